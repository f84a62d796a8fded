"""Text to tokens on disk.

    python data/prepare.py pydocs                           what is installed here: its docstrings
    python data/prepare.py NAME --files='folder/*.json.gz'  your own: a file, a folder or a glob
    python data/prepare.py c4 --shards=8                    the first shards of C4, downloaded

(with --model=t5 for T5) writes data/NAME/MODEL-VOCABULARY/: `train.bin` and `val.bin` (uint16
tokens, every document ended by [SEP] or </s>), the tokenizer and `meta.json` (counts, source,
versions, checksums), together or not at all: a preparation that fails leaves the corpus that was
there.

Files: `.txt` (documents separated by blank lines), `.json` and `.jsonl` (a JSON object with a
string `text` a line), each also with `.gz`.

Two passes: one samples documents and trains the tokenizer, one encodes them all on all cores.
Memory does not grow with the corpus: a bounded number of blocks of lines is in flight.
"""

import ast
import base64
import collections
import concurrent.futures
import contextlib
import errno
import functools
import glob
import gzip
import hashlib
import heapq
import http.client
import importlib.metadata
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import platform
import signal
import sys
import sysconfig
import textwrap
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import regex  # which tiktoken brings; its classes of characters are tiktoken's, not those of re
import sentencepiece
import tiktoken
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from errors import UserError, exits_on_user_error  # noqa: E402
from flags import Option, Parser  # noqa: E402
from runs import folder_written_whole, locked, names_file, write_json  # noqa: E402

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # their ids are 0 to 4, always
SEPARATOR = SPECIAL_TOKENS.index("[SEP]")
SENTINELS = 100  # of T5
TINY_VOCABULARY = 1024
C4_URL = "https://huggingface.co/datasets/allenai/c4/resolve/main/en"
C4_SHARDS = 1024
KINDS = (".txt", ".json", ".jsonl")
SUFFIXES = tuple(kind + packed for kind in KINDS for packed in ("", ".gz"))

BLOCK_BYTES = 4 << 20  # text handed to a worker at a time
LINE_BYTES = 16 << 20  # of a line at most
SAMPLE_FILES = 64  # the tokenizer's sample comes from 64 files, or up to 127, in even steps
VALIDATION_SHARE = 0.02  # of the text, or less: 10,000 rows of the study, and a margin
VALIDATION_TOKENS = {"bert": 10_000 * 128 * 1.1, "t5": 10_000 * 568 * 1.1}
CHECKSUM_BYTES = 16 << 20  # the .bin files are checked in blocks of this size


# -- Tokenizer -------------------------------------------------------------------------------------

# A word with the space before it, a run of punctuation with the space before it, or other white
# space. The lengths are bounded so that no text can make the merging slow.
PATTERN = r" ?\w{1,32}| ?[^\w\s]{1,32}|\s{1,32}(?!\S)|\s"
WORDS = regex.compile(PATTERN)
MARKED_LATIN = regex.compile(r"(\p{Latin})\p{Mn}+")


def normalise(text, uncased):
    """The text that the tokenizer sees. Uncased, as in the study: TeX's quotes (`` and '') become
    ", Latin letters lose their accents, letters are lower-cased, white space is one space.
    Unlike the study, all other characters stay (byte-level BPE can write them), and their marks:
    in other scripts these make other letters (Japanese voicing, Indic vowels, Cyrillic i)."""
    if not text.isascii():
        # JSON can hold half a surrogate pair.
        text = text.encode("utf-8", "replace").decode("utf-8")
    if uncased:
        text = text.replace("``", '"').replace("''", '"')
        if not text.isascii():
            bare = MARKED_LATIN.sub(r"\1", unicodedata.normalize("NFD", text))
            text = unicodedata.normalize("NFC", bare)
        text = " ".join(text.lower().split())
    return text


def train_bpe(word_counts, size):
    """Byte-pair encoding (Sennrich et al. 2016): `size` byte strings in the order of their merging.

    The first 256 are the bytes; every further one joins the pair of neighbours that is most
    frequent over the words (ties: the smaller pair). Pair counts are kept up to date merge by
    merge, and a heap with lazy deletion finds the largest.
    """
    vocabulary = [bytes([byte]) for byte in range(256)]
    words = [list(word.encode()) for word in word_counts]
    counts = list(word_counts.values())
    pair_counts, pair_words = collections.Counter(), collections.defaultdict(set)
    for index, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += counts[index]
            pair_words[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while len(vocabulary) < size and heap:
        count, best = heapq.heappop(heap)
        if pair_counts[best] != -count or count == 0:
            continue  # an outdated entry; the pair's current count has one of its own
        token = len(vocabulary)
        joined = vocabulary[best[0]] + vocabulary[best[1]]
        vocabulary.append(joined)
        changed = set()
        for index in sorted(pair_words.pop(best)):
            word, merged, position = words[index], [], 0
            while position < len(word):
                if tuple(word[position : position + 2]) == best:
                    merged.append(token)
                    position += 2
                else:
                    merged.append(word[position])
                    position += 1
            for pair in itertools.pairwise(word):
                pair_counts[pair] -= counts[index]
                changed.add(pair)
            for pair in itertools.pairwise(merged):
                pair_counts[pair] += counts[index]
                pair_words[pair].add(index)
                changed.add(pair)
            words[index] = merged
        for pair in changed:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return vocabulary


class BPETokenizer:
    """BERT's: byte-level BPE, trained here, run by tiktoken. Ids 0 to 4 are the special tokens,
    which no text encodes to.

    `encode(text)` normalises first; `decode(encode(text)) == normalise(text, tokenizer.uncased)`.
    """

    file_name = "tokenizer.json"
    sample_bytes = 64 << 20  # text that it is trained on
    separator = SEPARATOR

    def __init__(self, vocabulary, uncased):
        self.vocabulary, self.uncased = vocabulary, uncased
        shift = len(SPECIAL_TOKENS)
        self.size = len(vocabulary) + shift
        self.encoding = tiktoken.Encoding(
            "trained-here",
            pat_str=PATTERN,
            mergeable_ranks={token: rank + shift for rank, token in enumerate(vocabulary)},
            special_tokens={token: index for index, token in enumerate(SPECIAL_TOKENS)},
        )

    @staticmethod
    def sample(texts, uncased):
        """What training needs of some texts: the counts of their words."""
        words = collections.Counter()
        for text in texts:
            words.update(WORDS.findall(normalise(text, uncased)))
        return words

    @classmethod
    def train(cls, samples, vocabulary_size, uncased):
        words = collections.Counter()
        for counted in samples:
            words.update(counted)
        if not words:
            return None
        # Words seen once tell the merges little and are most of the memory.
        words = dict(sorted(words.items()))
        frequent = {word: count for word, count in words.items() if count > 1} or words
        return cls(train_bpe(frequent, vocabulary_size - len(SPECIAL_TOKENS)), uncased)

    def encode(self, text):
        return self.encoding.encode_ordinary(normalise(text, self.uncased))

    def decode(self, tokens):
        return self.encoding.decode(tokens)

    def piece(self, token):
        """One token as text, with the space before it."""
        return self.decode([token])

    def save(self, folder):
        tokens = [base64.b64encode(token).decode() for token in self.vocabulary]
        (Path(folder) / self.file_name).write_text(
            json.dumps({"uncased": self.uncased, "vocabulary": tokens})
        )

    @classmethod
    def load(cls, path):
        stored = json.loads(Path(path).read_text())
        return cls([base64.b64decode(token) for token in stored["vocabulary"]], stored["uncased"])


class SentencePieceTokenizer:
    """T5's: a SentencePiece unigram model (Kudo 2018), trained here or given, and behind its pieces
    100 sentinels; the vocabulary is padded to a multiple of 128 (32,000 pieces: 32,128). Ids 0 to 2
    are <pad>, </s> and <unk>; the first sentinel of a row is the last of the 100.
    """

    file_name = "tokenizer.model"
    sample_bytes = 16 << 20  # SentencePiece holds it in memory many times over
    separator = 1

    def __init__(self, model):
        self.model, self.processor = model, sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = self.processor.get_piece_size()
        self.size = -(-(pieces + SENTINELS) // 128) * 128
        self.first_sentinel = pieces + SENTINELS - 1
        if self.processor.pad_id() != 0 or self.processor.eos_id() != self.separator:
            raise ValueError("its <pad> is not 0 or its </s> not 1, as T5's are")

    @staticmethod
    def sample(texts, uncased):
        """What training needs of some texts: their lines, cut to at most 1000 characters."""
        return [
            part
            for text in texts
            for line in normalise(text, uncased).splitlines()
            for part in textwrap.wrap(line, 1000, break_on_hyphens=False)
        ]

    @classmethod
    def train(cls, samples, vocabulary_size, uncased):
        texts = [text for part in samples for text in part]
        if not texts:
            return None
        written = io.BytesIO()
        # A fixed number of threads, so that its sums are split alike on every machine.
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=written,
                model_type="unigram",
                vocab_size=vocabulary_size - 128,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                character_coverage=0.9995,
                num_threads=2,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            few = "required_chars" in reason  # a writing system of thousands of characters
            cure = "ask for more" if few else "give it more text, or ask for fewer"
            raise UserError(
                f"--vocabulary={vocabulary_size}: SentencePiece cannot learn that many pieces "
                f"({reason}); {cure}"
            ) from None
        return cls(written.getvalue())

    def encode(self, text):
        return self.processor.encode(normalise(text, False))

    def decode(self, tokens):
        return self.processor.decode(
            [token for token in tokens if token < self.processor.get_piece_size()]
        )

    def piece(self, token):
        """One token as text, with the space before it; sentinels, too."""
        if token < self.processor.get_piece_size():
            return self.processor.id_to_piece(token).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        number = self.first_sentinel - token
        return f" <extra_id_{number}>" if number >= 0 else ""  # or the vocabulary's padding

    def save(self, folder):
        (Path(folder) / self.file_name).write_bytes(self.model)

    @classmethod
    def load(cls, path):
        return cls(Path(path).read_bytes())


TOKENIZERS = {"bert": BPETokenizer, "t5": SentencePieceTokenizer}


def load_tokenizer(folder):
    """The tokenizer of a prepared folder."""
    for kind in TOKENIZERS.values():
        path = Path(folder) / kind.file_name
        if path.exists():
            try:
                return kind.load(path)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                raise UserError(
                    f"{path} is not a tokenizer of ours ({error}); prepare the corpus again"
                ) from None
    raise UserError(f"{folder}: no tokenizer here; prepare the corpus again")


tokenizer_of_worker = functools.cache(load_tokenizer)  # a worker process loads it once


# -- Sources: each yields blocks (name, number of the first line, lines as bytes) ------------------


def kind_of(path):
    """The one of KINDS that the file's name ends in (in any case, before `.gz`), or ""."""
    name = Path(path).name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), "")


def opened(path):
    return gzip.open(path, "rb") if str(path).lower().endswith(".gz") else open(path, "rb")


@functools.cache
def say_once(text):
    """Prints it, in the first of the two passes."""
    print(text)


def file_lines(path):
    """The lines of a file, as bytes. One that is too long to hold is cut, and that is said."""
    with opened(path) as file:
        for number in itertools.count(1):
            line = file.readline(LINE_BYTES)
            if not line:
                return
            if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                rest = 0
                while (piece := file.readline(LINE_BYTES)) and not piece.endswith(b"\n"):
                    rest += len(piece)
                rest += len(piece)
                say_once(f"{path}, line {number}: cut at {LINE_BYTES:,} bytes, {rest:,} left out")
            yield line


def file_blocks(path):
    """The file in blocks of whole documents, about BLOCK_BYTES each."""
    block, size, first = [], 0, 1
    is_text = kind_of(path) == ".txt"
    try:
        for number, line in enumerate(file_lines(path), 1):
            block.append(line)
            size += len(line)
            # Text without any blank line is cut too, or memory would grow with it.
            between = not is_text or not line.strip() or size >= 4 * BLOCK_BYTES
            if size >= BLOCK_BYTES and between:
                yield str(path), first, block
                block, size, first = [], 0, number + 1
        if block:
            yield str(path), first, block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: the gzip data is cut short or damaged ({error}); get the file again"
        ) from None


def documents(block):
    """The documents of a block, as strings; a line that cannot be read is named by file and
    number."""
    name, first, lines = block
    is_text = kind_of(name) == ".txt"
    paragraph = []
    for number, line in enumerate(lines, first):
        was_cut = len(line) == LINE_BYTES
        try:
            # A cut may be in the middle of a character.
            errors = "ignore" if was_cut else "strict"
            line = line.decode("utf-8-sig" if number == 1 else "utf-8", errors)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); convert "
                "the file"
            ) from None
        if is_text:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph)
                paragraph = []
        elif line.strip():
            text = cut_text(line) if was_cut else text_of(line)
            if text is None:
                raise UserError(
                    f'{name}, line {number}: expected a JSON object with a string "text", '
                    f"got {line.strip()[:60]!r}"
                )
            yield text
    if paragraph:
        yield "".join(paragraph)


def text_of(line):
    """The text of a JSON object, None if it has none."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return text if isinstance(text, str) else None


def cut_text(line):
    """The same of an object that was cut within its text, perhaps within a character's escape."""
    endings = (f'{line[: len(line) - less]}"}}' for less in range(12))
    return next((text for ending in endings if (text := text_of(ending)) is not None), None)


def files_below(folder):
    """Every file below a folder and in the folders that it links to, each folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()  # a link to where it stands in
            continue
        seen.add(real)
        yield from (Path(place) / name for name in names)


def local_files(pattern):
    """The files that a path, a folder or a glob names, in the order of their names. What a folder
    has besides is left out, and that is said."""
    named = Path(pattern).expanduser()
    places = [named] if named.exists() else map(Path, glob.glob(str(named), recursive=True))
    found, left_out = [], []
    for place in sorted(places):
        if place.is_dir():
            for path in sorted(files_below(place)):
                (found if kind_of(path) and path.exists() else left_out).append(path)
        elif not kind_of(place):
            raise UserError(f"{place}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        else:
            found.append(place)
    if left_out:
        print(f"left out, of another kind or a broken link: {len(left_out)} (as {left_out[0]})")
    if not found:
        raise UserError(
            f"--files={pattern}: no file found (a file, a folder or a quoted glob of "
            f"{', '.join(SUFFIXES)})"
        )
    return found


PYDOCS_PACKAGES = ["torch", "sympy", "networkx", "numpy"]


def pydocs_versions():
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PYDOCS_PACKAGES
    }


def docstrings(path):
    """The documentation strings of one Python file: of its module, classes and functions, and those
    that C extensions get by a call (torch's add_docstr, numpy's add_newdoc)."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # a few files of the standard library's tests are broken on purpose
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("add_docstr", "add_newdoc"):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                        yield inner.value


def pydocs_of(path):
    return [" ".join(text.split()) for text in docstrings(path) if text and len(text) >= 64]


def write_pydocs(folder):
    """Writes pydocs.jsonl, the documentation strings without duplicates; the same for the same
    versions. Returns its path."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    roots += [Path(importlib.util.find_spec(name).origin).parent for name in PYDOCS_PACKAGES]
    others = {"site-packages", "dist-packages"}  # what lies within the standard library's folder
    files = [
        path
        for root in roots
        for path in sorted(root.rglob("*.py"))
        if not others & set(path.relative_to(root).parts)
    ]
    seen = set()
    with workers() as pool, open(folder / "pydocs.jsonl", "w", encoding="utf-8") as written:
        found = pool.map(pydocs_of, files, chunksize=32)
        for texts in tqdm(found, "extracting", len(files), unit=" files", disable=None):
            for text in texts:
                key = document_hash(text)
                if key not in seen:
                    seen.add(key)
                    written.write(json.dumps({"text": text}) + "\n")
    return Path(written.name)


def check_gzip(path):
    """Reads all of it: gzip has a checksum of its own over the text."""
    with gzip.open(path) as file:
        while file.read(1 << 22):
            pass


def fetch_rest(url, part):
    """Fetches what `part` does not have yet of a file. Returns the length of the whole, 0 where the
    server does not say it."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left beyond what we have
            return have
        raise UserError(f"{url}: the server answers {error.code} {error.reason}") from None
    with response:
        if response.status != 206:
            have = 0  # the server sends the file from its start
        length = response.headers["Content-Length"]
        total = have + int(length) if length else 0
        progress = dict(total=total or None, initial=have, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if have else "wb") as file, tqdm(desc=part.stem, **progress) as bar:
            while piece := response.read(1 << 20):
                with names_file(part):
                    file.write(piece)
                bar.update(len(piece))
    return total


def download(url, path, check=check_gzip):
    """Fetches `url` into `path`; goes on where a broken download stopped; the whole is checked.

    The length must be the server's, where it says one, and `check(path)` must not raise OSError,
    EOFError, ValueError or zlib.error.
    """
    if path.exists():
        return
    part, problem, damaged = path.with_name(path.name + ".part"), "incomplete", 0
    for attempt in range(5):
        try:
            total = fetch_rest(url, part)
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            problem = f"{error}"
            if attempt < 4:
                time.sleep(2**attempt)
            continue
        if part.stat().st_size < total:
            continue  # the connection broke without an error
        try:
            check(part)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            part.unlink()  # spliced or damaged: from the start again, once
            problem, damaged = f"damaged ({error})", damaged + 1
            if damaged == 2:
                break
            continue
        part.rename(path)
        return
    tries = f"after {attempt + 1} tries"
    raise UserError(f"{url}: {problem} {tries}; run the same command again to go on")


# -- All cores -------------------------------------------------------------------------------------


def cores():
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count()


def start_worker():
    """Leaves Ctrl-C to the main process, and ends when that one is killed (or an orphan would wait
    for work, and hold the corpus's lock, for ever)."""

    def end_with_main():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_main, daemon=True).start()


@contextlib.contextmanager
def workers():
    """A pool with a process for every core."""
    pool = concurrent.futures.ProcessPoolExecutor(cores(), initializer=start_worker)
    try:
        yield pool
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "a worker process was killed, as the system does when memory is short; free some "
            "memory and run the same command again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_parallel(pool, function, blocks, *arguments):
    """`function(block, ...)` for every block, in order, with few blocks in memory."""
    pending = collections.deque()
    for block in blocks:
        pending.append(pool.submit(function, block, *arguments))
        if len(pending) > 2 * cores():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# -- Encoding --------------------------------------------------------------------------------------


def document_hash(text):
    """A number in [0, 1) that depends on the text alone: it decides what is in the tokenizer's
    sample and what is validation."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def take_sample(block, share, kind, uncased):
    """What the tokenizer's training needs of the sampled documents of a block."""
    return kind.sample((text for text in documents(block) if document_hash(text) < share), uncased)


def encode_block(block, folder, validation_share):
    """The tokens of a block's documents as (training, validation) arrays, and how many documents
    are in each; a document without a token is left out."""
    tokenizer = tokenizer_of_worker(folder)
    tokens, count = ([], []), [0, 0]
    for text in documents(block):
        encoded = tokenizer.encode(text)
        if encoded:
            # 1 - hash, so that a large corpus validates on what its tokenizer has not seen.
            part = int(1 - document_hash(text) <= validation_share)
            tokens[part].extend(encoded)
            tokens[part].append(tokenizer.separator)
            count[part] += 1
    return [np.array(part, np.uint16) for part in tokens], count


def estimated_bytes(path):
    """Bytes of text in the file; of a packed one, estimated from its first megabyte."""
    size = os.path.getsize(path)
    if not str(path).lower().endswith(".gz"):
        return size
    with open(path, "rb") as file:
        packed, text_bytes = io.BytesIO(file.read(1 << 20)), 0
    try:
        with gzip.open(packed) as text:
            while text_bytes < 1 << 28 and (piece := text.read(1 << 14)):
                text_bytes += len(piece)
    except EOFError:
        pass  # the megabyte ends in the middle of the data
    except (zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not gzip data ({error})") from None
    return int(size * text_bytes / max(1, packed.tell()))


def train_tokenizer(pool, files, kind, vocabulary_size, uncased):
    """A tokenizer of this kind, trained on a sample of the documents in `files`."""
    sampled = files[:: max(1, len(files) // SAMPLE_FILES)]
    share = min(1.0, kind.sample_bytes / max(1, sum(map(estimated_bytes, sampled))))
    blocks = (block for path in sampled for block in file_blocks(path))
    samples = in_parallel(pool, take_sample, blocks, share, kind, uncased)
    samples = tqdm(samples, "sampling", unit=" blocks", disable=None)
    tokenizer = kind.train(samples, vocabulary_size, uncased)
    if tokenizer is None:
        raise UserError(f"{', '.join(map(str, files[:3]))}: no text in them")
    return tokenizer


def encode_files(pool, files, folder, model):
    """Writes train.bin and val.bin, with the tokenizer that is in `folder`; returns what meta.json
    says of each."""
    total_tokens = max(1, sum(map(estimated_bytes, files)) / 4.5)  # about, of English
    validation_share = min(VALIDATION_SHARE, VALIDATION_TOKENS[model] / total_tokens)
    blocks = (block for path in files for block in file_blocks(path))
    parts = {name: {"documents": 0, "tokens": 0} for name in ("train", "val")}
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in parts]
        bar = stack.enter_context(
            tqdm(desc="encoding", unit=" tokens", unit_scale=True, disable=None)
        )
        for encoded, count in in_parallel(pool, encode_block, blocks, folder, validation_share):
            for index, (name, part) in enumerate(parts.items()):
                with names_file(folder / f"{name}.bin"):
                    opened[index].write(encoded[index].tobytes())
                part["tokens"] += len(encoded[index])
                part["documents"] += count[index]
                bar.update(len(encoded[index]))
    if not parts["val"]["documents"]:  # of few documents the hash may choose none
        set_last_document_aside(folder, parts)
    for name, part in parts.items():
        part["checksums"] = block_checksums(folder / f"{name}.bin")
    return parts


def set_last_document_aside(folder, parts):
    """Moves the last training document to the validation part."""
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    ends = np.flatnonzero(tokens == tokens[-1:]) + 1  # a document ends with the separator
    if len(ends) < 2:
        raise UserError("a corpus needs two documents at least, one of them to validate on")
    for name, part in (("train", tokens[: ends[-2]]), ("val", tokens[ends[-2] :])):
        part.tofile(folder / f"{name}.bin")
        parts[name] = {"documents": 1, "tokens": len(part)}
    parts["train"]["documents"] = len(ends) - 1


def block_checksums(path):
    with open(path, "rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(CHECKSUM_BYTES), b"")]


def meta_checksum(meta):
    """The checksum of a corpus: of what meta.json says, which has the checksums of the other files,
    but not of where its text came from."""
    content = {key: value for key, value in meta.items() if key not in ("checksum", "source")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def encode(files, folder, model, vocabulary_size, uncased, source, tokenizer=None):
    """Trains the tokenizer, if none is given, encodes `files` into `folder`, writes meta.json."""
    started = time.perf_counter()
    with workers() as pool:
        if tokenizer is None:
            tokenizer = train_tokenizer(pool, files, TOKENIZERS[model], vocabulary_size, uncased)
        tokenizer.save(folder)
        trained = time.perf_counter()
        parts = encode_files(pool, files, folder, model)
    meta = {
        "model": model,
        "vocabulary_size": vocabulary_size,
        "tokenizer_size": tokenizer.size,  # smaller, where the text has fewer words to learn
        "separator": tokenizer.separator,
        "first_sentinel": getattr(tokenizer, "first_sentinel", None),
        "uncased": uncased,
        "source": source,
        **parts,
        "tokenizer": tokenizer.file_name,
        "tokenizer_checksum": zlib.crc32((folder / tokenizer.file_name).read_bytes()),
    }
    write_json(folder / "meta.json", meta | {"checksum": meta_checksum(meta)})
    train, validation, seconds = parts["train"], parts["val"], time.perf_counter() - trained
    print(
        f"{train['tokens']:,} training and {validation['tokens']:,} validation tokens in "
        f"{train['documents']:,} and {validation['documents']:,} documents; tokenizer "
        f"{trained - started:.0f} s, encoding {seconds:.0f} s "
        f"({(train['tokens'] + validation['tokens']) / seconds:,.0f} tokens/s)"
    )


# -- The command -----------------------------------------------------------------------------------


def corpus_folder(name, model, vocabulary_size):
    return ROOT / "data" / name / f"{model}-{vocabulary_size}"


def find_text(name, files, shards, base_url, folder):
    """The files of a source, and what meta.json says of it. pydocs is written into `folder`, C4 is
    downloaded beside it."""
    if files:
        return local_files(str(files)), {"files": str(files)}
    if name == "pydocs":
        return [write_pydocs(folder)], {"files": name, "versions": pydocs_versions()}
    if name == "c4":
        downloads = folder.parent / "downloads"
        names = [f"c4-train.{index:05d}-of-{C4_SHARDS:05d}.json.gz" for index in range(shards)]
        with locked(downloads, wait=True):
            for file in names:
                download(f"{base_url}/{file}", downloads / file)
        return [downloads / file for file in names], {"files": base_url, "shards": shards}
    raise UserError(f"{name} is neither pydocs nor c4; for your own text say --files=PATH")


def prepare(
    name,
    files=None,
    vocabulary_size=None,
    uncased=None,
    shards=1,
    base_url=C4_URL,
    folder=None,
    model="bert",
    tokenizer=None,
):
    """Prepares corpus `name` for a model; see the module's docstring. Returns its folder."""
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"{name!r}: expected a name for a folder in data/")
    if uncased and model == "t5":
        raise UserError("--uncased: T5's text stays as it is (the study); leave the flag out")
    if tokenizer is not None:
        tokenizer = given_tokenizer(tokenizer, model, vocabulary_size)
        vocabulary_size = tokenizer.size
    vocabulary_size = vocabulary_size or TINY_VOCABULARY
    least = len(SPECIAL_TOKENS) + 256 if model == "bert" else 256
    if not least <= vocabulary_size <= 65536 or (model == "t5" and vocabulary_size % 128):
        multiple = ", a multiple of 128" * (model == "t5")
        raise UserError(
            f"--vocabulary={vocabulary_size}: expected {least} to 65536 (16 bits){multiple}"
        )
    folder = Path(folder) if folder else corpus_folder(name, model, vocabulary_size)
    uncased = model == "bert" if uncased is None else uncased
    with locked(folder.parent, wait=True), folder_written_whole(folder) as work:
        paths, source = find_text(name, files, shards, base_url, work)
        encode(paths, work, model, vocabulary_size, uncased, source, tokenizer)
    print(f"prepared {folder}")
    return folder


def given_tokenizer(path, model, vocabulary_size):
    """The SentencePiece model in a file, as T5's tokenizer."""
    if model != "t5":
        raise UserError(f"--tokenizer={path}: a SentencePiece model, which is T5's: --model=t5")
    try:
        tokenizer = SentencePieceTokenizer.load(path)
    except (OSError, ValueError, RuntimeError) as error:
        message = f"--tokenizer={path}: not a SentencePiece model for T5 ({error})"
        raise UserError(message) from None
    if vocabulary_size not in (None, tokenizer.size):
        raise UserError(
            f"--vocabulary={vocabulary_size}: that tokenizer has {tokenizer.size}; leave it out"
        )
    return tokenizer


FLAGS = {
    "files": Option(None, "your own text: a file, a folder or a quoted glob", kind=str),
    "model": Option("bert", "which model's tokens", choices=tuple(TOKENIZERS)),
    "vocabulary": Option(
        None,
        "tokens (tiny models: 1024; small: 8192; base: bert 32768, t5 32128)",
        kind=int,
        minimum=1,
    ),
    "uncased": Option(None, "lower-case and strip accents (bert: true)", kind=bool),
    "tokenizer": Option(None, "t5: a SentencePiece model, as its spiece.model", kind=str),
    "shards": Option(1, f"c4: how many of its {C4_SHARDS} shards", minimum=1, maximum=C4_SHARDS),
    "base_url": Option(C4_URL, "c4: where the shards are"),
}


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("name", help="pydocs, c4, or a name for your own files")
    for name, option in FLAGS.items():
        parser.add(name, option)
    options = vars(parser.parse_args(arguments))
    prepare(vocabulary_size=options.pop("vocabulary"), **options)


if __name__ == "__main__":
    main()
