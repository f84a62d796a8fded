"""Shows what a model has learnt: it fills in what is hidden.

    python sample.py runs/NAME "returns a new [MASK] of the given shape"
    python sample.py runs/NAME          three rows of the validation set

Into a [MASK] BERT writes one token (the five likeliest are shown, with their probabilities) and
T5 a span of any length. Of a validation row you see what the model reads, what it writes and what
was there; what it had to predict is [in brackets]. BERT reads some of that as it was, or another
token in its place. train.py ends with such a row.
"""

import itertools
import re
from pathlib import Path

import numpy as np
import torch

import model as models
from config import find_corpus, open_corpus, resumed
from data.corpus import MASK
from data.prepare import load_tokenizer
from errors import UserError, exits_on_user_error
from flags import Option, Parser

GAP = re.compile(r"\s*(\[MASK\]|<extra_id_\d+>)")  # a token begins with the space before it
CANDIDATES = 5
LONGEST_SPAN = 16  # tokens that T5 may write into a gap of a text


@torch.no_grad()
def fill(model, tokenizer, text):
    """A text with gaps: its likeliest tokens for each (BERT), or the text with them filled (T5)."""
    first, *rest = GAP.split(text)[::2]
    if not rest:
        raise UserError(f"{text!r} has no gap; write [MASK] where one is to be")
    tokens, columns = tokenizer.encode(first), []
    if isinstance(model, models.T5):
        for number, part in enumerate(rest):
            tokens += [tokenizer.first_sentinel - number, *tokenizer.encode(part)]
        return [t5_filled(model, tokenizer, tokens, LONGEST_SPAN * len(rest))]
    for part in rest:
        columns.append(len(tokens))
        # The tokenizer drops a text's first space: here it stands behind a letter.
        after = tokenizer.encode("a" + part)[1:] if part[:1].isspace() else tokenizer.encode(part)
        tokens += [MASK, *after]
    scores = model.logits({"tokens": torch.tensor([tokens]), "positions": torch.tensor([columns])})
    lines = []
    for probabilities, best in zip(*scores[0].softmax(dim=-1).topk(CANDIDATES)):
        found = zip(best.tolist(), probabilities.tolist())
        lines.append("   ".join(f"{p:.2f} {tokenizer.piece(token)!r}" for token, p in found))
    return lines


def t5_filled(t5, tokenizer, tokens, most):
    """The text of these tokens and sentinels, with what the model writes for them."""
    read = torch.tensor([[*tokens, tokenizer.separator]])
    written = t5.generate({"tokens": read}, most, tokenizer.separator)[0].tolist()
    return with_spans(tokenizer, tokens, written)


def with_spans(tokenizer, tokens, spans):
    """The text of tokens, and in its gaps [the spans] of other tokens: sentinel, span, sentinel,
    span, ..., end."""
    spans = itertools.takewhile(lambda token: token != tokenizer.separator, spans)
    parts = GAP.split("".join(map(tokenizer.piece, spans)))
    found = dict(zip(parts[1::2], parts[2::2]))
    text = "".join(map(tokenizer.piece, tokens))
    return GAP.sub(lambda gap: f" [{found.get(gap[1], '').strip()}]", text)


def with_tokens(tokenizer, tokens, columns, predicted):
    """The text of a row, with [other tokens] in some columns."""
    pieces = [tokenizer.piece(token) for token in tokens]
    for column, token in zip(columns, predicted):
        piece = tokenizer.piece(token)
        bare = piece.lstrip()
        pieces[column] = piece if token == MASK else piece[: -len(bare) or None] + f"[{bare}]"
    return "".join(pieces)


@torch.no_grad()
def print_rows(model, corpus, count):
    """Prints rows of the validation set: before, after, and as they were. (On the CPU.)"""
    tokenizer = corpus.tokenizer
    for row in np.linspace(0, corpus.validation_rows, count, endpoint=False, dtype=int):
        batch = corpus.validation_batch(row[None], "cpu")
        tokens, labels = (batch[name][0].tolist() for name in ("tokens", "labels"))
        if isinstance(model, models.T5):
            tokens = tokens[:-1]  # the end
            read = "".join(map(tokenizer.piece, tokens))
            written = t5_filled(model, tokenizer, tokens, 2 * len(labels))
            original = with_spans(tokenizer, tokens, labels)
        else:
            columns = batch["positions"][0].tolist()
            best = model.logits(batch)[0].argmax(dim=-1).tolist()
            texts = ([tokens[column] for column in columns], best, labels)
            read, written, original = (
                with_tokens(tokenizer, tokens, columns, part) for part in texts
            )
        for name, text in (("read", read), ("written", written), ("original", original)):
            print(f"  {name:<9}{' '.join(text.split())}")
        print()


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="sample.py")
    parser.add_argument("run", help="its folder")
    parser.add_argument("text", nargs="?", help="with a [MASK] for each gap")
    parser.add("data", Option(None, "folder of the run's corpus (found by its checksum)", kind=str))
    options = parser.parse_args(arguments)
    folder = Path(options.run)
    model = models.load(folder / "model.pt")
    if options.text is not None:
        print(*fill(model, load_tokenizer(folder), options.text), sep="\n")
        return
    typed = {"device": "cpu"} | ({"data": options.data} if options.data else {})
    config, stored = resumed(folder, typed)
    print_rows(model, open_corpus(config, find_corpus(config, stored["corpus"])[0]), 3)


if __name__ == "__main__":
    main()
