"""Tokens on disk to batches.

A training run is a stream of rows. Position n of the stream is row `permutation(seed, epoch)(n)` of
the training part, and its corruption is an integer hash of (seed, n, column), computed on the
training device. So `corpus.batch(positions)` is a pure function: the same masks on any device, for
any micro-batch size and number of processes, and a checkpoint needs of the corpus no more than n.

Three disjoint parts: validation (documents that `prepare.py` set aside; its corruption never
changes), holdout (a share of the other rows, by a hash that no seed touches, kept from every method
alike), and training (the rest). Rows are cut without regard to documents, so a document may lie
partly in the holdout.
"""

import math
import mmap
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from errors import UserError
from runs import read_record

from .prepare import (
    CHECKSUM_BYTES,
    SENTINELS,
    SEPARATOR,
    SPECIAL_TOKENS,
    load_tokenizer,
    meta_checksum,
)

MASK = SPECIAL_TOKENS.index("[MASK]")
MASK_SHARE = 0.15  # of a row's tokens are predicted in the study, in both models: BERT's 19 of 128
MOST_MASKS = 0.5  # of a row: at most every other token is a separator, which is not masked
MEAN_SPAN = 3.0  # tokens, of T5's span corruption

# Two streams over the same rows, each in its own order: one to train on, and one for forward passes
# that a method makes beside training, which must not take rows away from it.
TRAINING_STREAM = 0
SECOND_STREAM = 1
VALIDATION = 2  # not a stream: a key of its own for the corruption of validation rows
CHECKED_BLOCKS = 64  # at most this many blocks of a .bin file are read to verify it
PART = {"documents": int, "tokens": int, "checksums": list}
META = {"checksum": str, "model": str, "separator": int}
META |= {"vocabulary_size": int, "tokenizer_size": int}
META |= {"first_sentinel": (int, None), "tokenizer": str, "tokenizer_checksum": int}
META |= {"train": PART, "val": PART}


# -- Integer hashing: the same bits from NumPy and from torch, on any device -----------------------

LOW_32 = 0xFFFFFFFF


def hash32(x):
    """Scrambles integers in [0, 2^32), held in 64 bits: Wellons' "lowbias32" mixing function
    (https://nullprogram.com/blog/2018/07/31). `x` is a Python int, a NumPy or a torch int64
    array."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & LOW_32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & LOW_32
    return x ^ (x >> 16)


def hash_of(*numbers):
    """One hash in [0, 2^32) of several numbers; each of up to 62 bits, arrays broadcast."""
    state = 0x9E3779B9
    for number in numbers:
        state = hash32(state ^ hash32(number & LOW_32))
        state = hash32(state ^ hash32((number >> 32) + 0x85EBCA6B & LOW_32))
    return state


def permute(numbers, size, key):
    """A keyed permutation of range(size), applied to an int64 array: random access in constant
    memory.

    A Feistel network of four rounds over the smallest even number of bits that holds `size`;
    results outside the range are permuted again until they fall inside (cycle walking).
    """
    half = max(1, math.ceil(math.log2(max(2, size)) / 2))
    low = (1 << half) - 1

    def network(x):
        left, right = x >> half, x & low
        for turn in range(4):
            left, right = right, left ^ (hash_of(key, turn, right) & low)
        return (left << half) | right

    numbers = network(np.asarray(numbers, dtype=np.int64))
    while (outside := numbers >= size).any():
        numbers[outside] = network(numbers[outside])
    return numbers


# -- What a row becomes: deterministic in the row's stream position, static in shape ---------------


def smallest(draws, count):
    """Columns of the `count` smallest draws of every row, in order: (B, N) int64 below 2^33 ->
    (B, count). The column breaks ties, or devices would choose differently."""
    order = draws * draws.shape[1] + torch.arange(draws.shape[1], device=draws.device)
    return order.topk(count, dim=1, largest=False).indices.sort(dim=1).values


class Masking:
    """BERT's masking (Devlin et al. 2019), with a fixed count: in every row the same number of
    tokens, none of them a separator, is predicted. Of these 80% become [MASK], 10% a random token,
    10% stay. (A fixed count keeps shapes static; a random one would cost padding.)

    A larger `mask_share` predicts what the smaller one does, and more.
    """

    def __init__(self, row_length, meta, mask_share=MASK_SHARE):
        self.raw_length, self.tokenizer_size = row_length, meta["tokenizer_size"]
        self.predicted_per_row = max(1, min(round(mask_share * row_length), row_length // 2))

    def with_mask_share(self, mask_share, meta):
        """The same rows, another share of their tokens predicted."""
        return Masking(self.raw_length, meta, mask_share)

    def __call__(self, tokens, positions, key):
        """tokens (B, T) and positions (B,) int64 -> dict of `tokens` (B, T), `positions` (B, P) and
        `labels` (B, P), with P = `predicted_per_row`."""
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        draws = hash_of(key, positions[:, None], columns)  # (B, T)
        # Separators come last, and at most half a row is chosen, so none is.
        chosen = smallest(draws + (tokens == SEPARATOR) * (1 << 32), self.predicted_per_row)
        labels = tokens.gather(1, chosen)
        # A hash of its own for each decision: what is masked says nothing of what becomes of it.
        fate = hash_of(key, 1, positions[:, None], chosen)
        random_token = (hash_of(key, 2, positions[:, None], chosen) * self.tokenizer_size) >> 32
        replacement = torch.where(
            fate < int(0.8 * 2**32),
            MASK,
            torch.where(fate < int(0.9 * 2**32), random_token, labels),
        )
        return {
            "tokens": tokens.scatter(1, chosen, replacement),
            "positions": chosen,
            "labels": labels,
        }

    def label_counts(self, token_counts, rows):
        """How often each token is a label, up to a factor, given how often it occurs in `rows`."""
        return np.where(np.arange(len(token_counts)) == SEPARATOR, 0, token_counts)


class SpanCorruption:
    """T5's span corruption (Raffel et al. 2020, section 3.1.4): a share of the raw tokens, in
    spans of three on average, is replaced by sentinels in what is read, and is what is predicted.

        read:       clean_0 S_0 clean_1 S_1 ... </s>
        predicted:  S_0 noise_0 S_1 noise_1 ... </s>

    The numbers of noise tokens and of spans are fixed, so a row reads `row_length` tokens (or just
    below, where no raw length gives it exactly) and predicts `predicted_per_row`, without padding.
    """

    def __init__(self, row_length, meta, mask_share=MASK_SHARE, raw_length=None):
        def lengths(raw):
            noise = max(1, round(raw * mask_share))
            spans = max(1, round(noise / MEAN_SPAN))
            return noise, spans, raw - noise + spans + 1

        self.row_length, self.raw_length = row_length, raw_length or 2
        while not raw_length and lengths(self.raw_length + 1)[2] <= row_length:
            self.raw_length += 1
        self.noise, self.spans, self.read_length = lengths(self.raw_length)
        self.predicted_per_row = self.noise + self.spans + 1
        self.first_sentinel, self.end = meta["first_sentinel"], meta["separator"]
        if self.spans > SENTINELS:
            raise UserError(
                f"--row_length={row_length} with --mask_share={mask_share:g} needs {self.spans} "
                f"sentinels; there are {SENTINELS}"
            )

    def with_mask_share(self, mask_share, meta):
        """The same raw tokens, another share of them predicted (a larger one leaves less to
        read)."""
        return SpanCorruption(self.row_length, meta, mask_share, self.raw_length)

    def segment(self, items, key, positions):
        """Cuts `items` into `spans` segments of at least one, uniformly at random: (B, spans) ends
        of the segments."""
        gaps = torch.arange(items - 1, device=positions.device)
        ends = smallest(hash_of(key, positions[:, None], gaps), self.spans - 1) + 1
        return F.pad(ends, (0, 1), value=items)

    def interleave(self, tokens, sentinel_columns, skipped, length):
        """`length` columns: sentinels at `sentinel_columns` (B, spans), and between them the raw
        tokens in order, leaving out `skipped[:, n]` of them in all by the time that n sentinels
        have passed."""
        columns = torch.arange(length, device=tokens.device)
        is_sentinel = tokens.new_zeros(len(tokens), length).scatter_(1, sentinel_columns, 1)
        passed = is_sentinel.cumsum(dim=1)
        raw = columns - passed + skipped.gather(1, passed)
        raw = raw.clamp(max=self.raw_length - 1)  # only a sentinel's, not used, can be beyond
        sentinels = self.first_sentinel + 1 - passed
        row = torch.where(is_sentinel.bool(), sentinels, tokens.gather(1, raw))
        return F.pad(row, (0, 1), value=self.end)

    def __call__(self, tokens, positions, key):
        """tokens (B, raw_length) and positions (B,) int64 -> dict of `tokens` (B, read_length) and
        `labels` (B, predicted_per_row)."""
        # Ends of the noise spans in noise tokens alone, and of the clean ones in clean tokens.
        noise = self.segment(self.noise, hash_of(key, 1), positions)
        clean = self.segment(self.raw_length - self.noise, hash_of(key, 2), positions)
        number = torch.arange(self.spans, device=tokens.device)
        from_zero = F.pad(noise, (1, 0))
        read = self.interleave(tokens, clean + number, from_zero, self.read_length - 1)
        before = from_zero[:, :-1] + number  # a span's sentinel stands before it
        skipped = F.pad(clean, (1, 0))
        labels = self.interleave(tokens, before, skipped, self.predicted_per_row - 1)
        return {"tokens": read, "labels": labels}

    def label_counts(self, token_counts, rows):
        """As Masking's: the noise tokens' share, and each sentinel and the end once a row. (About:
        a row's first token is never noise, its last always.)"""
        counts = token_counts * (self.noise / self.raw_length)
        counts[self.first_sentinel - self.spans + 1 : self.first_sentinel + 1] += rows
        counts[self.end] += rows
        return counts


OBJECTIVES = {"bert": Masking, "t5": SpanCorruption}


# -- The corpus ------------------------------------------------------------------------------------


class Corpus:
    """A prepared folder as rows of `raw_length` tokens, of which the model reads `row_length`: the
    same number for BERT, fewer for T5.

    Args:
        folder: what `data/prepare.py` wrote, verified; a UserError names what cannot be trusted.
        seed: of the row order and the corruption.
        device: where batches are made.
        holdout: share of the rows that is kept from training.
        train_on: "training" or "holdout", the part that the streams run over.
        validation_rows: rows of the fixed validation set (at most all that there are).
        mask_share: share of a row's tokens that is predicted.
    """

    def __init__(
        self,
        folder,
        seed=0,
        device="cpu",
        row_length=128,
        holdout=0.2,
        train_on="training",
        validation_rows=10_000,
        mask_share=MASK_SHARE,
    ):
        self.folder, self.device = Path(folder), torch.device(device)
        self.seed, self.row_length, self.mask_share = seed, row_length, mask_share
        self.meta = load_meta(self.folder)
        self.vocabulary_size = self.meta["vocabulary_size"]
        self.objective = OBJECTIVES[self.meta["model"]](row_length, self.meta, mask_share)
        self.raw_length = self.objective.raw_length
        self.predicted_per_row = self.objective.predicted_per_row
        self.train_tokens = load_tokens(self.folder, "train", self.meta)
        self.val_tokens = load_tokens(self.folder, "val", self.meta)
        # Holdout and training are two ends of one permutation that no seed changes: a model that
        # was trained on the holdout has not seen a training row of any run with the same rows.
        self.all_rows = len(self.train_tokens) // self.raw_length
        holdout_rows = int(self.all_rows * holdout)
        self.first_row = holdout_rows if train_on == "training" else 0
        self.rows = self.all_rows - holdout_rows if train_on == "training" else holdout_rows
        all_validation_rows = len(self.val_tokens) // self.raw_length
        self.validation_rows = min(validation_rows, all_validation_rows)
        if self.rows < 1 or self.validation_rows < 1:
            raise UserError(
                f"{folder}: {self.rows} rows of {self.raw_length} tokens to train on and "
                f"{self.validation_rows} to validate on; "
                "both need at least one: prepare more text"
            )
        # Evenly spaced: val.bin keeps the order of the sources, so its first rows are of few.
        self.validation_indices = (
            np.arange(self.validation_rows) * all_validation_rows // self.validation_rows
        )
        self.special_ids = slice(1, len(SPECIAL_TOKENS))  # of BERT's rows: all but [PAD]
        self.position = [0, 0]  # of each stream: the first position that was not drawn yet

    @property
    def tokenizer(self):
        return load_tokenizer(self.folder)

    def uniform(self, *numbers):
        """A pseudo-random number in [0, 1) of this run's seed and these integers or arrays of
        integers, in float64: the same whenever it is asked for."""
        bits = hash_of(self.seed, *numbers)
        return (bits.double() if isinstance(bits, torch.Tensor) else bits) / 2**32

    # The streams

    def draw(self, count, stream=TRAINING_STREAM):
        """The next `count` positions of a stream, as an int64 array; the stream moves on."""
        first = self.position[stream]
        self.position[stream] = first + count
        self.read_ahead(np.arange(first + count, first + 2 * count), stream)
        return np.arange(first, first + count)

    def row_indices(self, positions, stream=TRAINING_STREAM):
        """Rows of train.bin at these positions: every epoch is a permutation of its own."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = positions // self.rows, positions % self.rows
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(within[here], self.rows, hash_of(self.seed, stream, int(epoch)))
        return permute(self.first_row + rows, self.all_rows, hash_of(0))

    def read_ahead(self, positions, stream):
        """Tells the system which rows come next: those of a corpus larger than memory are then read
        from disk while the model trains."""
        if hasattr(mmap, "MADV_WILLNEED") and isinstance(self.train_tokens, np.memmap):
            bytes_per_row = 2 * self.raw_length
            for row in self.row_indices(positions, stream).tolist():
                start = row * bytes_per_row // mmap.PAGESIZE * mmap.PAGESIZE
                self.train_tokens._mmap.madvise(
                    mmap.MADV_WILLNEED, start, (row + 1) * bytes_per_row - start
                )

    def batch(self, positions, stream=TRAINING_STREAM, row_length=None, mask_share=None):
        """The corrupted rows at stream positions (a pure function): a batch for the model.

        Args:
            positions: integers, an array or a list.
            stream: whose positions these are.
            row_length: tokens to read of each row, its first ones (the run's row length).
            mask_share: share of the row's tokens to predict (the run's).
        """
        row_length, mask_share = row_length or self.row_length, mask_share or self.mask_share
        objective = self.objective_for(row_length, mask_share)
        # A shorter row is the beginning of the same one, so a method that changes the length sees
        # the rows that all others see.
        rows = gather_rows(self.train_tokens, self.row_indices(positions, stream), self.raw_length)
        rows = self.to_device(np.ascontiguousarray(rows[:, : objective.raw_length]))
        positions = self.to_device(np.asarray(positions, dtype=np.int64))
        return objective(rows, positions, hash_of(self.seed, stream))

    def objective_for(self, row_length, mask_share):
        """The objective for rows of this length with this share of their tokens predicted."""
        if (row_length, mask_share) == (self.row_length, self.mask_share):
            return self.objective
        objective = OBJECTIVES[self.meta["model"]](row_length, self.meta, self.mask_share)
        return objective.with_mask_share(mask_share, self.meta)

    def validation_batches(self, rows_per_batch, process=0, processes=1):
        """This process's validation rows in batches. They are spread over val.bin and corrupted by
        a key that no seed changes: all runs on a corpus are measured on the same."""
        # Every process has each n-th row: together they have all of them, whatever their number.
        numbers = np.arange(process, self.validation_rows, processes)
        for first in range(0, len(numbers), rows_per_batch):
            yield self.validation_batch(numbers[first : first + rows_per_batch])

    def validation_batch(self, numbers, device=None):
        """These of the validation rows, corrupted, on this device (the run's)."""
        indices = self.validation_indices[numbers]
        arrays = gather_rows(self.val_tokens, indices, self.raw_length), indices
        rows, positions = (
            to_device(torch.from_numpy(array), device or self.device) for array in arrays
        )
        return self.objective(rows, positions, hash_of(0, VALIDATION))

    def to_device(self, array):
        return to_device(torch.from_numpy(array), self.device)

    def unigram_entropy(self):
        """Entropy in nats of the labels' frequencies on the validation rows: the loss of a model
        that knows the frequencies and reads no context."""
        rows = gather_rows(self.val_tokens, self.validation_indices, self.raw_length)
        counts = self.objective.label_counts(
            np.bincount(rows.ravel(), minlength=self.vocabulary_size).astype(float), len(rows)
        )
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def state_dict(self):
        return {"position": list(self.position)}

    def load_state_dict(self, state):
        self.position = list(state["position"])


def to_device(tensor, device):
    """A tensor of the CPU on another device, without waiting for the copy."""
    if torch.device(device).type == "cuda":  # only from pinned memory is it not waited for
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def gather_rows(tokens, indices, row_length):
    """Rows of a token stream as an int64 array: (len(indices), row_length)."""
    whole = tokens[: len(tokens) // row_length * row_length]
    return whole.reshape(-1, row_length)[indices].astype(np.int64)


def load_meta(folder):
    """meta.json, verified against its own checksum, and the tokenizer against meta.json's."""
    path = folder / "meta.json"
    if not path.exists():
        raise UserError(
            f"{folder}: no corpus here (no meta.json); make it with python data/prepare.py"
        )
    meta = read_record(path, META)
    verify(path, meta["checksum"] == meta_checksum(meta))
    tokenizer = folder / meta["tokenizer"]
    stored = tokenizer.read_bytes() if tokenizer.exists() else b""
    verify(tokenizer, zlib.crc32(stored) == meta["tokenizer_checksum"])
    return meta


def load_tokens(folder, part, meta):
    """A .bin file, memory-mapped. Its length is verified, and the checksums of evenly spaced blocks
    of it: all of a small file, 1 GiB of a large one."""
    path, checksums = folder / f"{part}.bin", meta[part]["checksums"]
    size = path.stat().st_size if path.exists() else 0
    verify(path, size == 2 * meta[part]["tokens"])
    checked = np.linspace(0, len(checksums) - 1, min(len(checksums), CHECKED_BLOCKS)).astype(int)
    for block in np.unique(checked):
        with open(path, "rb") as file:
            file.seek(int(block) * CHECKSUM_BYTES)
            verify(path, zlib.crc32(file.read(CHECKSUM_BYTES)) == checksums[block])
    return np.memmap(path, dtype=np.uint16, mode="r") if size else np.empty(0, np.uint16)


def verify(path, is_as_written):
    if not is_as_written:
        raise UserError(
            f"{path} is missing, or not as prepare.py wrote it (its size or its checksum differs); "
            "prepare the corpus again"
        )
