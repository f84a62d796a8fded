"""Text to tokens (`prepare.py`), tokens to batches (`corpus.py`)."""
