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
import re
import shutil
import signal
import sys
import sysconfig
import textwrap
import time
import unicodedata
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from errors import UserError, exits_on_user_error  # noqa: E402
from flags import Parser, boolean  # noqa: E402
from runs import locked  # noqa: E402

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # their ids are 0 to 4, always
SEPARATOR = SPECIAL_TOKENS.index("[SEP]")
SENTINELS = 100  # of T5
# Of a tiny model. BERT hides few tokens of a small batch: with 8192 most pieces are predicted once
# in a hundred updates, and a run of minutes hardly gets below the unigram entropy.
TINY_VOCABULARY = {"bert": 2048, "t5": 8192}
C4_URL = "https://huggingface.co/datasets/allenai/c4/resolve/main/en"
C4_SHARDS = 1024
SUFFIXES = tuple(kind + packed for kind in (".txt", ".json", ".jsonl") for packed in ("", ".gz"))

BLOCK_BYTES = 4 << 20  # text handed to a worker at a time
SAMPLE_FILES = 64  # files that the sample is taken from, evenly spaced
VALIDATION_SHARE = 0.02  # at most this share of the text ...
# ... and tokens: 10,000 rows, and a margin.
VALIDATION_TOKENS = {
    "bert": 10_000 * 128 * 1.1,
    "t5": 10_000 * 568 * 1.1,
}
CHECKSUM_BYTES = 16 << 20  # the .bin files are checked in blocks of this size


# -- Tokenizer -------------------------------------------------------------------------------------

# A word with the space before it, a run of punctuation with the space before it, or other white
# space. The lengths are bounded so that no text can make the merging slow. Python's and tiktoken's
# regular expressions read this pattern alike.
PATTERN = r" ?\w{1,32}| ?[^\w\s]{1,32}|\s{1,32}(?!\S)|\s"


def normalise(text, uncased):
    """The text that the tokenizer sees. Uncased, as the study: typewriter quotes (`` and '') become
    ", accents are stripped (NFD), letters are lower-cased, white space is one space. Unlike the
    study, characters outside ASCII stay: byte-level BPE can write them."""
    if not text.isascii():
        # JSON can hold half a surrogate pair.
        text = text.encode("utf-8", "replace").decode("utf-8")
    if uncased:
        text = text.replace("``", '"').replace("''", '"')
        if not text.isascii():
            text = "".join(
                c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c)
            )
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
            words.update(re.findall(PATTERN, normalise(text, uncased)))
        return words

    @classmethod
    def train(cls, samples, vocabulary_size, uncased):
        words = collections.Counter()
        for counted in samples:
            words.update(counted)
        # Words seen once tell the merges little and are most of the memory.
        frequent = {word: count for word, count in sorted(words.items()) if count > 1} or dict(
            sorted(words.items())
        )
        return (
            cls(train_bpe(frequent, vocabulary_size - len(SPECIAL_TOKENS)), uncased)
            if words
            else None
        )

    def encode(self, text):
        return self.encoding.encode_ordinary(normalise(text, self.uncased))

    def decode(self, tokens):
        return self.encoding.decode(tokens)

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
            raise UserError(
                f"--vocabulary={vocabulary_size}: SentencePiece cannot learn so many pieces "
                f"({str(error).splitlines()[-1]}); give it more text or ask for fewer"
            ) from None
        return cls(written.getvalue())

    def encode(self, text):
        return self.processor.encode(normalise(text, False))

    def decode(self, tokens):
        return self.processor.decode(
            [token for token in tokens if token < self.processor.get_piece_size()]
        )

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
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise UserError(
                    f"{path} is not a tokenizer of ours ({error}); prepare the corpus again"
                ) from None
    raise UserError(f"{folder}: no tokenizer here; prepare the corpus again")


tokenizer_of_worker = functools.cache(load_tokenizer)  # a worker process loads it once


# -- Sources: each yields blocks (name, number of the first line, lines as bytes) ------------------


def opened(path):
    return gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb")


def file_blocks(path):
    """The file in blocks of whole documents, about BLOCK_BYTES each."""
    block, size, first = [], 0, 1
    blank_ends = ".txt" in Path(path).suffixes
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                block.append(line)
                size += len(line)
                # Text without any blank line is cut too, or memory would grow with it.
                if size >= BLOCK_BYTES and (
                    not blank_ends or not line.strip() or size >= 4 * BLOCK_BYTES
                ):
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
    is_text = ".txt" in Path(name).suffixes
    paragraph = []
    for number, line in enumerate(lines, first):
        try:
            line = line.decode("utf-8-sig" if number == 1 else "utf-8")
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
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise UserError(
                    f'{name}, line {number}: expected a JSON object with a string "text", '
                    f"got {line.strip()[:60]!r}"
                )
            yield text
    if paragraph:
        yield "".join(paragraph)


def local_files(pattern):
    """The files that a path, a folder or a glob names, in the order of their names."""
    if os.path.isdir(pattern):
        found = [path for path in sorted(Path(pattern).rglob("*")) if path.name.endswith(SUFFIXES)]
    else:
        found = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
        for path in found:
            if not path.name.endswith(SUFFIXES):
                raise UserError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
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
        elif isinstance(node, ast.Call) and getattr(
            node.func, "id", getattr(node.func, "attr", "")
        ) in ("add_docstr", "add_newdoc"):
            for constant in ast.walk(node):
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    yield constant.value


def pydocs_of(path):
    return [" ".join(text.split()) for text in docstrings(path) if text and len(text) >= 64]


def write_pydocs(folder):
    """Writes pydocs.jsonl, the documentation strings without duplicates; the same for the same
    versions."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    roots += [Path(importlib.util.find_spec(name).origin).parent for name in PYDOCS_PACKAGES]
    paths = []
    for root in roots:
        inside = sorted(path for path in root.rglob("*.py"))
        paths += [
            path
            for path in inside
            if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)
        ]
    seen = set()
    path = folder / "pydocs.jsonl"
    with workers() as pool, open(path, "w", encoding="utf-8") as file:
        for texts in tqdm(
            pool.imap(pydocs_of, paths, chunksize=32),
            "extracting",
            len(paths),
            unit=" files",
            disable=None,
        ):
            for text in texts:
                key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
                if key not in seen:
                    seen.add(key)
                    file.write(json.dumps({"text": text}) + "\n")
    return [path]


def check_gzip(path):
    """Reads all of it: gzip has a checksum of its own over the text."""
    with gzip.open(path) as file:
        while file.read(1 << 22):
            pass


def download(url, path, check=check_gzip):
    """Fetches `url` into `path`; goes on where a broken download stopped; the whole is checked.

    The length must be the server's, where it says one, and `check(path)` must not raise OSError,
    EOFError, ValueError or zlib.error.
    """
    if path.exists():
        return
    part, problems = path.with_name(path.name + ".part"), []
    for attempt in range(5):
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                if response.status != 206:
                    have = 0  # the server sends the file from its start
                length = response.headers["Content-Length"]
                # 0: the server does not say; the check decides.
                total = have + int(length) if length else 0
                with (
                    open(part, "ab" if have else "wb") as file,
                    tqdm(
                        desc=path.name,
                        total=total or None,
                        initial=have,
                        unit="B",
                        unit_scale=True,
                        disable=None,
                    ) as bar,
                ):
                    while piece := response.read(1 << 20):
                        file.write(piece)
                        bar.update(len(piece))
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing is left beyond what we have: check it below
                total = have
            else:
                raise UserError(f"{url}: the server answers {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            if attempt == 4:
                raise UserError(
                    f"{url}: {error}; run the same command again to go on from {part}"
                ) from None
            time.sleep(2**attempt)
            continue
        if part.stat().st_size < total:
            continue  # the connection broke without an error
        try:
            check(part)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            part.unlink()  # spliced or damaged: from the start again, once
            problems.append(f"damaged ({error})")
            if len(problems) == 2:
                break
            continue
        part.rename(path)
        return
    raise UserError(
        f"{url}: {problems[-1] if problems else 'incomplete'} after {attempt + 1} tries; run the "
        "same command again"
    )


# -- Encoding --------------------------------------------------------------------------------------


def document_hash(text):
    """A number in [0, 1) that depends on the text alone: it decides sample and validation
    membership."""
    return (
        int.from_bytes(
            hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big"
        )
        / 2**64
    )


def take_sample(block, share, kind, uncased):
    """What the tokenizer's training needs of the sampled documents of a block."""
    return kind.sample((text for text in documents(block) if document_hash(text) < share), uncased)


def encode_block(block, folder, validation_share):
    """(training tokens, validation tokens, documents of each) of a block; empty documents are left
    out."""
    tokenizer = tokenizer_of_worker(folder)
    tokens, count = ([], []), [0, 0]
    for text in documents(block):
        encoded = tokenizer.encode(text)
        if encoded:
            # 1 - hash: in a large corpus the validation documents are not in the tokenizer's
            # sample.
            part = int(1 - document_hash(text) <= validation_share)
            tokens[part].extend(encoded)
            tokens[part].append(tokenizer.separator)
            count[part] += 1
    return np.array(tokens[0], np.uint16), np.array(tokens[1], np.uint16), count


def workers():
    """A process for every core. Ctrl-C is the main process's alone to answer."""
    return multiprocessing.Pool(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))


def in_parallel(pool, function, blocks, *arguments):
    """`function(block, ...)` for every block, in order, on all cores, with few blocks in memory."""
    pending = collections.deque()
    for block in blocks:
        pending.append(pool.apply_async(function, (block, *arguments)))
        if len(pending) > 2 * pool._processes:
            yield pending.popleft().get()
    while pending:
        yield pending.popleft().get()


def estimated_bytes(path):
    """Bytes of text in the file; of a packed one, estimated from its first megabytes."""
    size = os.path.getsize(path)
    if not str(path).endswith(".gz"):
        return size
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 20)
        return int(size * len(zlib.decompressobj(31).decompress(head)) / max(1, len(head)))
    except zlib.error as error:
        raise UserError(f"{path}: not gzip data ({error})") from None


def block_checksums(path):
    with open(path, "rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(CHECKSUM_BYTES), b"")]


def meta_checksum(meta):
    """The checksum of meta.json's own contents: it notices an edit."""
    content = {key: value for key, value in meta.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def encode(files, folder, model, vocabulary_size, uncased, source, tokenizer=None):
    """Trains the tokenizer on a sample of `files`, if none is given, encodes them all into
    `folder`, writes meta.json."""
    started = time.perf_counter()
    total_bytes = sum(map(estimated_bytes, files))
    kind = TOKENIZERS[model]
    with workers() as pool:
        if tokenizer is None:
            sampled = files[:: max(1, len(files) // SAMPLE_FILES)]
            share = min(1.0, kind.sample_bytes / max(1, sum(map(estimated_bytes, sampled))))
            blocks = (block for path in sampled for block in file_blocks(path))
            samples = tqdm(
                in_parallel(pool, take_sample, blocks, share, kind, uncased),
                "sampling",
                unit=" blocks",
                disable=None,
            )
            tokenizer = kind.train(samples, vocabulary_size, uncased)
            if tokenizer is None:
                raise UserError(f"{source['files']}: no text in it")
        tokenizer.save(folder)
        trained = time.perf_counter()
        validation_share = min(
            VALIDATION_SHARE, VALIDATION_TOKENS[model] / max(1, total_bytes / 4.5)
        )
        count, tokens = [0, 0], [0, 0]
        blocks = (block for path in files for block in file_blocks(path))
        with (
            open(folder / "train.bin", "wb") as train,
            open(folder / "val.bin", "wb") as validation,
        ):
            with tqdm(desc="encoding", unit=" tokens", unit_scale=True, disable=None) as bar:
                for *encoded, documents_here in in_parallel(
                    pool, encode_block, blocks, folder, validation_share
                ):
                    for part, file in enumerate((train, validation)):
                        file.write(encoded[part].tobytes())
                        tokens[part] += len(encoded[part])
                        count[part] += documents_here[part]
                    bar.update(len(encoded[0]) + len(encoded[1]))
    meta = {
        "model": model,
        "vocabulary_size": vocabulary_size,
        "separator": tokenizer.separator,
        "first_sentinel": getattr(tokenizer, "first_sentinel", None),
        "uncased": uncased,
        "source": source,
        "train": {
            "documents": count[0],
            "tokens": tokens[0],
            "checksums": block_checksums(folder / "train.bin"),
        },
        "val": {
            "documents": count[1],
            "tokens": tokens[1],
            "checksums": block_checksums(folder / "val.bin"),
        },
        "tokenizer": kind.file_name,
        "tokenizer_checksum": zlib.crc32((folder / kind.file_name).read_bytes()),
    }
    meta["checksum"] = meta_checksum(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    encoding_seconds = time.perf_counter() - trained
    print(
        f"{tokens[0]:,} training and {tokens[1]:,} validation tokens in {count[0]:,} and "
        f"{count[1]:,} documents; "
        f"tokenizer {trained - started:.0f} s, encoding {encoding_seconds:.0f} s "
        f"({sum(tokens) / encoding_seconds:,.0f} tokens/s)"
    )


def corpus_folder(name, model, vocabulary_size):
    return ROOT / "data" / name / f"{model}-{vocabulary_size}"


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
    if uncased and model == "t5":
        raise UserError("--uncased: T5's text stays as it is (the study); leave the flag out")
    uncased = model == "bert" if uncased is None else uncased
    if tokenizer is not None:
        if model != "t5":
            raise UserError(
                f"--tokenizer={tokenizer}: a SentencePiece model, which is T5's: --model=t5"
            )
        try:
            tokenizer = SentencePieceTokenizer.load(tokenizer)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--tokenizer={tokenizer}: not a SentencePiece model for T5 ({error})"
            ) from None
        if vocabulary_size not in (None, tokenizer.size):
            raise UserError(
                f"--vocabulary={vocabulary_size}: that tokenizer has {tokenizer.size}; leave the "
                "flag out"
            )
        vocabulary_size = tokenizer.size
    vocabulary_size = TINY_VOCABULARY[model] if vocabulary_size is None else vocabulary_size
    least = len(SPECIAL_TOKENS) + 256 if model == "bert" else 256
    if not least <= vocabulary_size <= 65536 or (model == "t5" and vocabulary_size % 128):
        raise UserError(
            f"--vocabulary={vocabulary_size}: expected {least} to 65536 (16 bits)"
            + (", a multiple of 128" if model == "t5" else "")
        )
    folder = Path(folder) if folder else corpus_folder(name, model, vocabulary_size)
    if files:
        source = {"files": str(files)}
        found = local_files(str(files))
    elif name == "pydocs":
        source = {"files": "pydocs", "versions": pydocs_versions()}
        found = None  # written below
    elif name == "c4":
        if not 1 <= shards <= C4_SHARDS:
            raise UserError(f"--shards={shards}: C4 has shards 1 to {C4_SHARDS}")
        downloads = folder.parent / "downloads"
        names = [f"c4-train.{index:05d}-of-{C4_SHARDS:05d}.json.gz" for index in range(shards)]
        with locked(downloads, wait=True):
            for file in names:
                download(f"{base_url}/{file}", downloads / file)
        source = {"files": base_url, "shards": shards}
        found = [downloads / file for file in names]
    else:
        raise UserError(
            f"{name}: not a source of its own (pydocs, c4); for your own text say --files=PATH"
        )
    # All is written beside the folder, which it then replaces: a failure leaves what was there.
    # Two first runs may prepare the same corpus at once, so each has a folder of its own.
    work, old = (
        folder.with_name(f"{folder.name}.{os.getpid()}.{ending}") for ending in ("tmp", "old")
    )
    new_parent = not folder.parent.exists()
    for left in folder.parent.glob(f"{folder.name}.*.tmp"):  # by a killed process
        if left == work or left.stat().st_mtime < time.time() - 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        encode(
            found or write_pydocs(work), work, model, vocabulary_size, uncased, source, tokenizer
        )
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        work.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        if new_parent and not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    print(f"prepared {folder}")
    return folder


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("name", help="pydocs, c4, or a name for your own files")
    parser.add_argument("--files", help="your own text: a file, a folder or a quoted glob")
    parser.add_argument(
        "--model", choices=list(TOKENIZERS), default="bert", help="which model's tokens (bert)"
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        help="tokens (tiny models: bert 2048, t5 8192; small: 8192; base: bert 32768, t5 32128)",
    )
    parser.add_argument("--uncased", type=boolean, help="lower-case and strip accents (bert: true)")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="t5: a SentencePiece model, as T5's spiece.model, instead of training one",
    )
    parser.add_argument("--shards", type=int, default=1, help="c4: how many of its 1024 shards (1)")
    parser.add_argument("--base_url", default=C4_URL, help="c4: where the shards are")
    options = parser.parse_args(arguments)
    prepare(
        options.name,
        options.files,
        options.vocabulary,
        options.uncased,
        options.shards,
        options.base_url,
        model=options.model,
        tokenizer=options.tokenizer,
    )


if __name__ == "__main__":
    main()
