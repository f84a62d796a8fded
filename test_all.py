"""The tests: every part against an independent reference or an invariant. Fixed seeds, kills at
fixed points, nothing that depends on the machine's speed."""

import ast
import collections
import copy
import csv
import dataclasses
import difflib
import errno
import functools
import glob
import gzip
import hashlib
import http.server
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace

import rst  # sets GOMP_SPINCOUNT, so it must precede torch

# isort: split

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import finetune
import methods
import model as models
import optimizers
import parallel
import report
import runs
import sample
import study
import tasks
import train
import transformers_folder
from config import Config, open_corpus, parse, resolve, resumed
from data import corpus as corpora
from data import prepare
from data.corpus import MASK, SECOND_STREAM, Corpus, hash_of, permute
from errors import UserError
from fake_cuda import fake_cuda
from methods import (
    baseline,
    layer_drop,
    muon,
    rho,
    selective_backprop,
    sophia,
    token_dropping,
    token_rho,
    wsd,
)
from methods.baseline import Method, Option, one_cycle
from methods.schedule_free import new_state, schedule_free_update
from optimizers import hidden_matrices, parameter_groups
from runs import locked, read_record, read_tensors, write_tensors
from tasks import glue, metrics, sni, superglue

ROOT = Path(__file__).resolve().parent
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
torch.set_num_threads(1)


def words_text(seed, count):
    """`count` words of a small invented language: enough to learn something from."""
    generator = random.Random(seed)
    vocabulary = [
        "".join(generator.choices("abcdefghij", k=generator.randint(2, 6))) for _ in range(200)
    ]
    return " ".join(generator.choices(vocabulary, [1 / rank for rank in range(1, 201)], k=count))


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """400 documents of 60 to 300 words, prepared with a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("text")
    lines = [
        json.dumps({"text": words_text(seed, 60 + 240 * (seed % 7) // 6)}) for seed in range(400)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return prepare.prepare("invented", folder / "text.jsonl", 512, folder=folder / "bert-512")


def small_run(corpus_folder, out, *flags):
    """The flags of a run that takes a second; `flags` hold one or several each."""
    flags = " ".join(flags).split()
    tiny = "--size=tiny --row_length=32 --batch=6 --validation_rows=20 --device=cpu --threads=1"
    return [f"--data={corpus_folder}", "--vocabulary=512", f"--out={out}", *tiny.split(), *flags]


def trained(corpus_folder, out, *flags):
    """Trains such a run in this process; returns its result."""
    return train.main(small_run(corpus_folder, out, *flags))


def result_of(folder, name):
    """What finetune.py wrote for a task and a seed."""
    (path,) = Path(folder).glob(f"{name}-*.json")
    return json.loads(path.read_text())


def log_of(folder):
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r], [r for r in records if "validation_loss" in r]


def weights_of(folder):
    return torch.load(Path(folder) / "model.pt", weights_only=True)["weights"]


def assert_same_weights(one, other, message="not the same bits"):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys(), message
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, message


def command(*arguments, project=ROOT, env=None, **options):
    """Runs one of the project's commands in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= env or {}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def in_two_processes(*arguments):
    """A script of two processes that are one run."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = command(*launch, *arguments, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stdout + result.stderr


class Killed(BaseException):
    """A process that is gone."""


@pytest.fixture
def refuses(capsys):
    """refuses(main, flags, message): the command ends with status 2 and says why. Returns what it
    printed: (output, error)."""

    def check(main, flags, message):
        with pytest.raises(SystemExit) as stopped:
            main([str(flag) for flag in flags])
        output, error = capsys.readouterr()
        assert stopped.value.code == 2 and message in error, error
        return output, error

    return check


@pytest.fixture
def at_update(monkeypatch):
    """at_update({number: function}): calls each function once, at the end of that update."""
    due, report = {}, methods.Combination.report

    def report_and_call(self):
        (clock, *_) = (method.clock for method in self.methods.values())
        due.pop(clock.updates + 1, lambda: None)()
        return report(self)

    monkeypatch.setattr(methods.Combination, "report", report_and_call)
    return due.update


def kill():
    raise Killed


@pytest.fixture
def method_files(tmp_path, monkeypatch):
    """method_files(name=source): files of methods, as a forker writes them, while a test runs."""
    folder, made = tmp_path / "methods", []
    folder.mkdir()
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])

    def write(**sources):
        for name, source in sources.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(source))
            made.append(f"methods.{name}")

    yield write
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def project(tmp_path):
    """A copy of the project, for tests that add a method file to it."""
    copy = tmp_path / "project"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "bert-*")
    )
    return copy


# -- Data ------------------------------------------------------------------------------------------


def slow_bpe(word_counts, size):
    """BPE training by its definition: count all pairs anew before every merge."""
    vocabulary = [bytes([byte]) for byte in range(256)]
    words = {word: [bytes([byte]) for byte in word.encode()] for word in word_counts}
    rank = {token: index for index, token in enumerate(vocabulary)}
    while len(vocabulary) < size:
        pairs = collections.Counter()
        for word, pieces in words.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += word_counts[word]
        pairs = {pair: count for pair, count in pairs.items() if count}
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], rank[pair[0]], rank[pair[1]]))
        rank[best[0] + best[1]] = len(vocabulary)
        vocabulary.append(best[0] + best[1])
        for word, pieces in words.items():
            index, merged = 0, []
            while index < len(pieces):
                step = 2 if tuple(pieces[index : index + 2]) == best else 1
                merged.append(b"".join(pieces[index : index + step]))
                index += step
            words[word] = merged
    return vocabulary


def test_bpe_training_equals_its_definition():
    counts = dict(
        collections.Counter(words_text(1, 3000).split()) | {"aaaaaaa": 50, "ababab": 31, "é": 3}
    )
    assert prepare.train_bpe(counts, 400) == slow_bpe(counts, 400)


@pytest.mark.parametrize("uncased", [True, False])
def test_tokenizer_gives_the_normalised_text_back(corpus_folder, uncased):
    tokenizer = prepare.BPETokenizer(prepare.load_tokenizer(corpus_folder).vocabulary, uncased)
    texts = [
        "Plain text.",
        "  two  spaces \n\n and\tlines ",
        "Éléphant naïve Ångström",
        "[MASK] [SEP] <|x|>",
        "``quoted'' 'words'",
        "日本語 🙂 \u200d",
        "x" * 10_000,
        "\ud800 lone",
        "",
        "a_b 12345 ---- //",
        "İSTANBUL ß ﬁ",
    ]
    for text in texts:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == prepare.normalise(text, uncased)
        assert all(token >= len(prepare.SPECIAL_TOKENS) for token in tokens)
    assert tokenizer.size == 512
    assert prepare.normalise("  Ça  ``va'' ", True) == 'ca "va"'


def test_all_file_kinds_hold_the_same_documents(tmp_path):
    texts = [words_text(seed, 50) for seed in range(30)]
    contents = {
        "a.txt": "\n\n".join(texts) + "\n",
        "b.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
    }
    contents["c.json"] = contents["b.jsonl"]
    found = {}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
            file.write(content)
    for path in prepare.local_files(str(tmp_path)):
        found[path.name] = [
            text.strip() for block in prepare.file_blocks(path) for text in prepare.documents(block)
        ]
    assert len(found) == 6 and all(documents == texts for documents in found.values())
    assert prepare.local_files(str(tmp_path / "*.gz")) == sorted(tmp_path.glob("*.gz"))


def test_blocks_are_small_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 1000)
    texts = [words_text(seed, 40) for seed in range(100)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    blocks = list(prepare.file_blocks(tmp_path / "a.txt"))
    assert len(blocks) > 5 and max(sum(map(len, lines)) for *_, lines in blocks) < 4000
    assert [text.strip() for block in blocks for text in prepare.documents(block)] == texts


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_line_that_is_too_long_is_cut_and_said(tmp_path, monkeypatch, capsys, name):
    """In a character, in its escape, in the text of an object."""
    monkeypatch.setattr(prepare, "LINE_BYTES", 100)
    long = "é\n" * 300 if "json" in name else "é" * 300
    texts = ["before", long, "after"]
    for ascii_only in (True, False):
        lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=ascii_only) for text in texts]
        content = "\n".join(lines) if "json" in name else "\n\n".join(texts)
        for shift in range(3):
            spaces = " " * shift + "\n" if "json" in name else "x" * shift + "\n\n"
            with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
                file.write(spaces + content.replace("{", "{" + " " * shift))
            blocks = prepare.file_blocks(tmp_path / name)
            found = [text.strip() for block in blocks for text in prepare.documents(block)]
            cut = found[-2]
            assert found[-3] == "before" and found[-1] == "after"
            assert 3 < len(cut) < 100 and long.startswith(cut)
            prepare.say_once.cache_clear()
    line = {"a.txt": 5}.get(name, 3)
    assert f"{name}, line {line}: cut at 100 bytes, " in capsys.readouterr().out


def test_files_are_found_through_links_in_any_case_and_what_is_left_out_is_said(
    tmp_path, monkeypatch, capsys
):
    folder, other = tmp_path / "texts", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
    for path in (folder / "A.JSONL", folder / "a.txt.jsonl", folder / "b [2024].json"):
        path.write_text('{"text": "one"}\n')
    (folder / "readme.md").write_text("")
    (other / "c.TXT").write_text("two")
    (folder / "linked").symlink_to(other)
    (folder / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    found = prepare.local_files(str(folder))
    names = ["A.JSONL", "a.txt.jsonl", "b [2024].json", "c.TXT"]
    assert [path.name for path in found] == names
    assert "broken link: 2 (as " in capsys.readouterr().out
    kinds = [prepare.kind_of(path) for path in found]
    assert kinds == [".jsonl", ".jsonl", ".json", ".txt"]
    texts = [
        text
        for path in found
        for block in prepare.file_blocks(path)
        for text in prepare.documents(block)
    ]
    assert texts == ["one"] * 3 + ["two"]
    assert prepare.local_files(str(folder / "b [2024].json")) == [folder / "b [2024].json"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(prepare.local_files("~/texts/*.[jJ]*")) == 3


def test_packed_text_is_estimated_from_all_members(tmp_path):
    lines = [json.dumps({"text": words_text(seed, 100)}).encode() + b"\n" for seed in range(400)]
    for name, content in (
        ("members", b"".join(map(gzip.compress, lines))),
        ("one", gzip.compress(b"".join(lines))),
        ("long", gzip.compress(b"".join(lines) * 40)),
    ):
        (tmp_path / f"{name}.gz").write_bytes(content)
        size = sum(map(len, lines)) * (40 if name == "long" else 1)
        assert prepare.estimated_bytes(tmp_path / f"{name}.gz") == pytest.approx(size, rel=0.1)


def test_one_document_of_few_is_set_aside(tmp_path):
    for count in (2, 5):
        text = "\n\n".join(words_text(seed, 200) for seed in range(count))
        (tmp_path / "a.txt").write_text(text)
        folder = prepare.prepare("few", tmp_path / "a.txt", 300, folder=tmp_path / f"of{count}")
        meta = json.loads((folder / "meta.json").read_text())
        assert (meta["train"]["documents"], meta["val"]["documents"]) == (count - 1, 1)
        assert Corpus(folder, row_length=32, holdout=0.0).rows > 3
        last = np.fromfile(folder / "val.bin", np.uint16)[:-1]
        found = prepare.load_tokenizer(folder).decode(last.tolist())
        assert found == text.split("\n\n")[-1]
    (tmp_path / "a.txt").write_text("only one")
    with pytest.raises(UserError, match="needs two documents"):
        prepare.prepare("few", tmp_path / "a.txt", 300, folder=tmp_path / "of1")
    for name in ("..", "", "a/b", ".hidden"):
        with pytest.raises(UserError, match="expected a name for a folder"):
            prepare.prepare(name, tmp_path / "a.txt", 300)


def test_both_engines_read_the_pattern_alike():
    """Training cuts words with regex, encoding with tiktoken. (Of characters that this Python does
    not know yet they may know different ones.)"""
    bytes_alone = {bytes([byte]): byte for byte in range(256)}
    known = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    for pattern in (r"\w", r"\s", r"[^\w\s]"):
        encoding = tiktoken.Encoding(
            "x", pat_str=pattern, mergeable_ranks=bytes_alone, special_tokens={}
        )
        mine = prepare.regex.compile(pattern)
        different = [c for c in known if bool(mine.match(c)) != bool(encoding.encode_ordinary(c))]
        assert not different, pattern


def test_every_script_has_words(tmp_path):
    """A word that is seen often is one token, whatever its script and its marks."""
    words = [
        "hello",
        "नमस्ते",
        "வணக்கம்",
        "নমস্কার",
        "مُحَمَّد",
        "สวัสดี",
        "かぎ",
        "パンダ",
        "їжак",
        "한국어",
    ]
    (tmp_path / "a.txt").write_text("\n\n".join(f"{' '.join([word] * 20)} ." for word in words * 3))
    for uncased in (True, False):
        folder = tmp_path / str(uncased)
        prepare.prepare("words", tmp_path / "a.txt", 600, uncased, folder=folder)
        tokenizer = prepare.load_tokenizer(folder)
        for word in words:
            assert len(tokenizer.encode(f". {word} {word}")) == 3, word
            assert tokenizer.decode(tokenizer.encode(word)) == word


def test_random_tokens_are_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(["a few words, again and again " * 9] * 300))
    folder = prepare.prepare("few", tmp_path / "a.txt", 2048, folder=tmp_path / "few")
    corpus, size = Corpus(folder, row_length=32), prepare.load_tokenizer(folder).size
    batch = corpus.batch(np.arange(2000))
    assert size < 400 and corpus.vocabulary_size == 2048
    assert size * 0.9 < batch["tokens"].max() < size


def test_preparing_is_deterministic_and_complete(corpus_folder, tmp_path):
    text = corpus_folder.parent / "text.jsonl"
    again = prepare.prepare("invented", text, 512, folder=tmp_path / "again")
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        assert (again / name).read_bytes() == (corpus_folder / name).read_bytes()
    tokenizer, stored, lengths = prepare.load_tokenizer(corpus_folder), [], []
    for part in ("train", "val"):
        tokens = np.fromfile(corpus_folder / f"{part}.bin", np.uint16)
        lengths.append(len(tokens))
        ends = np.flatnonzero(tokens == prepare.SEPARATOR) + 1
        found = [document.tolist() for document in np.split(tokens, ends) if len(document)]
        stored += [tokenizer.decode(document[:-1]) for document in found]
    assert sorted(stored) == sorted(json.loads(line)["text"] for line in open(text))
    assert 0 < lengths[1] < 0.06 * lengths[0]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"fine\n\xff\xfe\n", "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"other": 1}\n', "line 2: expected a JSON object"),
        ("a.jsonl", b'{"text": "fine"}\n[1]\n', "line 2: expected a JSON object"),
        ("a.json", b'{"text": 3}\n', "line 1: expected"),
        ("a.json", b"[" * 200_000 + b"\n", "line 1: expected"),
        ("a.txt", b"", "no text"),
        (
            "a.txt.gz",
            gzip.compress(bytes(random.Random(0).choices(b"abc ", k=100_000)))[:9000],
            "cut short or damaged",
        ),
        ("a.txt.gz", b"not gzip at all", "not gzip"),
        ("a.pdf", b"x", "unknown kind"),
        ("a.txt", None, "no file found"),
    ],
)
def test_text_that_cannot_be_read_is_named(tmp_path, name, content, message, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare.prepare("bad", tmp_path / name, 300, folder=tmp_path / "data" / "out")
    assert not (tmp_path / "data").exists()


def test_a_preparation_that_fails_leaves_the_corpus_that_was_there(corpus_folder, tmp_path):
    copy = shutil.copytree(corpus_folder, tmp_path / "copy")
    (tmp_path / "bad.txt").write_bytes(b"fine fine\n\xff")
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        prepare.prepare("invented", tmp_path / "bad.txt", 512, folder=copy)
    assert Corpus(copy).rows == Corpus(corpus_folder).rows and sorted(tmp_path.iterdir()) == [
        tmp_path / "bad.txt",
        copy,
    ]


def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_noticed(corpus_folder, tmp_path, monkeypatch):
    text = corpus_folder.parent / "text.jsonl"
    monkeypatch.setattr(prepare, "encode_block", killed)
    with pytest.raises(UserError, match="a worker process was killed"):
        prepare.prepare("invented", text, 512, folder=tmp_path / "data" / "out")
    assert not (tmp_path / "data").exists()


class BrokenServer(http.server.SimpleHTTPRequestHandler):
    """Serves files with byte ranges, and breaks every first answer off in its middle."""

    broken = set()

    def do_GET(self):
        path = Path(self.directory) / self.path.lstrip("/")
        if not path.exists():
            return self.send_error(404)
        content = path.read_bytes()
        first = int(self.headers["Range"][6:-1]) if self.headers["Range"] else 0
        self.server.requests.append((self.path, first))
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        end = len(content)
        if self.path not in self.broken:
            self.broken.add(self.path)
            end = first + (end - first) // 2
        self.wfile.write(content[first:end])

    def log_message(self, *arguments):
        pass


def serve(folder):
    """A BrokenServer of a folder, on a free port of this machine."""
    handler = type("Handler", (BrokenServer,), {"broken": set()})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a: handler(*a, directory=folder)
    )
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_c4_download_goes_on_after_a_break(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    served = tmp_path / "served"
    served.mkdir()
    for shard in range(2):
        with gzip.open(served / f"c4-train.{shard:05d}-of-01024.json.gz", "wt") as file:
            for seed in range(200):
                file.write(
                    json.dumps({"text": words_text(1000 * shard + seed, 50), "url": "x"}) + "\n"
                )
    server = serve(served)
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        folder = prepare.prepare(
            "c4", None, 300, shards=2, base_url=url, folder=tmp_path / "c4" / "bert-300"
        )
        starts = [first for _, first in server.requests]
        assert len(starts) == 4 and starts[0] == starts[2] == 0 and starts[1] > 0 and starts[3] > 0
        for path in served.iterdir():
            assert (folder.parent / "downloads" / path.name).read_bytes() == path.read_bytes()
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["train"]["documents"] + meta["val"]["documents"] == 400
        with pytest.raises(UserError, match="404"):
            prepare.download(f"{url}/none.gz", tmp_path / "none.gz")
    finally:
        server.shutdown()


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 4096, 5000])
def test_permute_is_a_permutation(size):
    images = permute(np.arange(size), size, 7)
    assert sorted(images.tolist()) == list(range(size))
    if size >= 1000:
        assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.1
        assert (permute(np.arange(size), size, 8) != images).mean() > 0.9
        assert permute(np.array([size // 2]), size, 7)[0] == images[size // 2]


def test_hash_is_the_same_in_python_numpy_and_torch():
    numbers = [0, 1, 12345, 2**31, 2**32 - 1, 2**40 + 3]
    expected = [hash_of(9, number, 4) for number in numbers]
    assert hash_of(9, np.array(numbers), 4).tolist() == expected
    assert hash_of(9, torch.tensor(numbers), 4).tolist() == expected
    shares = np.histogram(hash_of(np.arange(100_000), 5), bins=16, range=(0, 2**32))[0] / 100_000
    assert abs(shares - 1 / 16).max() < 0.004


def test_the_three_parts_are_disjoint_and_fixed(corpus_folder):
    parts = {}
    for seed, train_on in itertools.product((0, 1), ("training", "holdout")):
        corpus = Corpus(corpus_folder, seed, train_on=train_on)
        for stream in (0, SECOND_STREAM):
            rows = corpus.row_indices(np.arange(corpus.rows), stream)
            assert len(set(rows.tolist())) == corpus.rows  # an epoch is every row once
            assert set(rows.tolist()) == parts.setdefault(train_on, set(rows.tolist()))
        assert (
            set(corpus.row_indices(np.arange(corpus.rows, 2 * corpus.rows)).tolist())
            == parts[train_on]
        )
    assert not parts["training"] & parts["holdout"]
    assert parts["training"] | parts["holdout"] == set(range(corpus.all_rows))
    assert len(parts["holdout"]) == int(0.2 * corpus.all_rows)
    assert Corpus(corpus_folder, holdout=0.0).rows == corpus.all_rows


def test_a_batch_is_a_pure_function_of_its_positions(corpus_folder):
    corpus, positions = Corpus(corpus_folder, seed=3), np.arange(50, 90)
    whole = corpus.batch(positions)
    corpus.draw(7)
    for first, last in ((50, 51), (51, 83), (83, 90)):
        part = corpus.batch(np.arange(first, last))
        for name in whole:
            assert torch.equal(whole[name][first - 50 : last - 50], part[name])
    for other in (Corpus(corpus_folder, seed=4).batch(positions), corpus.batch(positions, 1)):
        assert not torch.equal(other["tokens"], whole["tokens"])
    corpora_of_two_seeds = [Corpus(corpus_folder, seed, validation_rows=20) for seed in (1, 2)]
    one, other = (list(corpus.validation_batches(8)) for corpus in corpora_of_two_seeds)
    rows = sum(len(batch["labels"]) for batch in one)
    assert rows == corpora_of_two_seeds[0].validation_rows >= 10
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, other) for name in a)


def test_validation_rows_are_spread_over_the_corpus(corpus_folder):
    corpus = Corpus(corpus_folder, row_length=16, validation_rows=10)
    rows = len(corpus.val_tokens) // 16
    assert rows > 50
    (batch,) = corpus.validation_batches(10)
    for number, (tokens, columns, labels) in enumerate(
        zip(batch["tokens"], batch["positions"], batch["labels"])
    ):
        tokens[columns[labels >= 0]] = labels[labels >= 0]
        first = 16 * (number * rows // 10)
        assert tokens.tolist() == corpus.val_tokens[first : first + 16].tolist()


def test_corruption_counts_and_shares(corpus_folder):
    corpus = Corpus(corpus_folder)
    positions = np.arange(4 * corpus.rows)
    batch = corpus.batch(positions)
    rows = corpora.gather_rows(corpus.train_tokens, corpus.row_indices(positions), 128)
    raw, chosen = torch.from_numpy(rows), batch["positions"]
    assert chosen.shape == (len(positions), 19)
    assert (chosen.diff(dim=1) > 0).all()  # 19 different columns
    assert torch.equal(batch["labels"], raw.gather(1, chosen))
    assert not (batch["labels"] == prepare.SEPARATOR).any()
    unchosen = torch.ones_like(raw, dtype=torch.bool).scatter(1, chosen, False)
    assert torch.equal(batch["tokens"][unchosen], raw[unchosen])
    seen, count = batch["tokens"].gather(1, chosen), batch["labels"].numel()
    margin = 4 / math.sqrt(count)  # eight standard deviations of a share are below this
    assert abs((seen == MASK).float().mean().item() - 0.8) < margin
    assert abs((seen == batch["labels"]).float().mean().item() - 0.1) < margin
    size = corpus.meta["tokenizer_size"]
    random_ones = seen[(seen != MASK) & (seen != batch["labels"])].float()
    assert (torch.histc(random_ones, 8, 0, size) / len(random_ones) - 1 / 8).abs().max() < 0.03
    shares = torch.bincount(chosen.flatten(), minlength=128) / len(positions)
    assert abs(shares - 19 / 128).max() < 5 * math.sqrt(0.15 / len(positions)) + 0.01


@pytest.fixture(scope="session")
def t5_folder(corpus_folder, tmp_path_factory):
    """The same documents for T5: 384 pieces, 512 ids."""
    folder = tmp_path_factory.mktemp("t5") / "t5-512"
    return prepare.prepare(
        "invented", corpus_folder.parent / "text.jsonl", 512, folder=folder, model="t5"
    )


def test_t5_tokens(t5_folder, corpus_folder, tmp_path):
    tokenizer = prepare.load_tokenizer(t5_folder)
    meta = json.loads((t5_folder / "meta.json").read_text())
    assert tokenizer.size == 512 and meta["first_sentinel"] == 384 + 99 and meta["separator"] == 1
    tokens, text = np.fromfile(t5_folder / "train.bin", np.uint16), corpus_folder.parent
    found = [part for part in np.split(tokens, np.flatnonzero(tokens == 1) + 1) if len(part)]
    documents = [tokenizer.decode(document.tolist()) for document in found]
    assert set(documents) <= {json.loads(line)["text"] for line in open(text / "text.jsonl")}
    assert len(documents) == meta["train"]["documents"] > 300 and tokens.max() < 384

    def prepared(**options):
        return prepare.prepare("x", text / "text.jsonl", folder=tmp_path / "x", **options)

    again = prepared(model="t5", tokenizer=t5_folder / "tokenizer.model")
    assert (again / "train.bin").read_bytes() == (t5_folder / "train.bin").read_bytes()
    (tmp_path / "han.txt").write_text("\n\n".join(map(chr, range(0x4E00, 0x4E00 + 9000))))
    with pytest.raises(UserError, match="vs .* ask for more"):
        prepare.prepare("han", tmp_path / "han.txt", folder=tmp_path / "han", model="t5")
    for options, message in (
        (dict(model="t5", vocabulary_size=1000), "multiple of 128"),
        (dict(model="t5", vocabulary_size=8192), "too high .* give it more text, or ask for fewer"),
        (dict(model="t5", uncased=True), "stays as it is"),
        (dict(model="t5", tokenizer=corpus_folder / "meta.json"), "not a SentencePiece model"),
        (dict(tokenizer="x"), "--model=t5"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(**options)


def restored(read, labels, sentinels):
    """What T5 reads and predicts of a row, put together: (the raw row, {sentinel: its span})."""
    spans, current = {}, None
    for token in labels[:-1]:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [part for token in read[:-1] for part in spans.get(token, [token])], spans


@pytest.mark.parametrize(
    "row_length, expected",
    [(512, (568, 85, 28, 512, 114)), (128, (141, 21, 7, 128, 29)), (32, None), (100, None)],
)
def test_span_corruption(row_length, expected):
    corrupt = corpora.SpanCorruption(row_length, {"first_sentinel": 32_099, "separator": 1})
    read_length, predicted = corrupt.read_length, corrupt.predicted_per_row
    shape = corrupt.raw_length, corrupt.noise, corrupt.spans, read_length, predicted
    assert shape == expected or expected is None
    assert row_length - 1 <= corrupt.read_length <= row_length
    rows, generator = 10_000 if row_length == 128 else 200, torch.Generator().manual_seed(0)
    raw = torch.randint(2, 32_000, (rows, corrupt.raw_length), generator=generator)
    batch = corrupt(raw, torch.arange(rows), 5)
    assert batch["tokens"].shape == (rows, read_length)
    assert batch["labels"].shape == (rows, predicted)
    lengths, sentinels = collections.Counter(), list(range(32_099, 32_099 - corrupt.spans, -1))
    for row, read, labels in zip(raw.tolist(), batch["tokens"].tolist(), batch["labels"].tolist()):
        assert read[-1] == labels[-1] == 1 and labels[0] == 32_099
        assert read[0] < 32_000 <= read[-2]
        assert [token for token in read if token >= 32_000] == sentinels
        whole, spans = restored(read, labels, sentinels)
        assert whole == row and list(spans) == sentinels and all(spans.values())
        assert sum(map(len, spans.values())) == corrupt.noise
        lengths.update(map(len, spans.values()))
    if row_length == 128:
        # The literal random segmentation, a shuffled row of segment starts: one distribution.
        generator, literal = np.random.default_rng(0), collections.Counter()
        for _ in range(rows):
            starts = generator.permutation(np.arange(corrupt.noise - 1) < corrupt.spans - 1)
            literal.update(np.bincount(np.cumsum([0, *starts])).tolist())
        *seen, last = sorted(length for length in literal if literal[length] > 50)
        observed = [
            [counter[length] for length in seen]
            + [sum(counter[length] for length in counter if length >= last)]
            for counter in (lengths, literal)
        ]
        chi_square = sum((a - b) ** 2 / (a + b) for a, b in zip(*observed))
        assert chi_square < len(seen) + 4 * math.sqrt(2 * len(seen))
    part = corrupt(raw[7:9], torch.arange(7, 9), 5)
    assert all(torch.equal(part[name], batch[name][7:9]) for name in batch)
    assert not torch.equal(corrupt(raw[7:9], torch.arange(7, 9), 6)["tokens"], part["tokens"])


def test_t5_unigram_entropy(t5_folder):
    corpus = Corpus(t5_folder, row_length=32, validation_rows=40)
    indices = corpus.validation_indices
    rows = torch.from_numpy(corpora.gather_rows(corpus.val_tokens, indices, corpus.raw_length))
    positions = torch.arange(len(rows))
    labels = [corpus.objective(rows, positions, key)["labels"].flatten() for key in range(200)]
    shares = torch.bincount(torch.cat(labels)).double() / sum(map(len, labels))
    expected = -(shares * shares.log()).nansum().item()
    assert corpus.unigram_entropy() == pytest.approx(expected, abs=0.1)


def test_unigram_entropy(corpus_folder):
    corpus = Corpus(corpus_folder, validation_rows=5)
    rows = corpus.val_tokens[: len(corpus.val_tokens) // 128 * 128].reshape(-1, 128)
    tokens = np.concatenate([rows[number * len(rows) // 5] for number in range(5)]).tolist()
    counts = collections.Counter(token for token in tokens if token != prepare.SEPARATOR)
    shares = [count / counts.total() for count in counts.values()]
    expected = -sum(share * math.log(share) for share in shares)
    assert corpus.unigram_entropy() == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train.bin", lambda old: old[:1000], "train.bin is missing, or not as prepare.py wrote"),
        ("train.bin", lambda old: b"\1" * len(old), "train.bin is missing, or not as"),
        ("meta.json", lambda old: old.replace(b"bert", b"t5"), "meta.json is missing, or not as"),
        ("meta.json", lambda old: b"{", "meta.json is damaged"),
        ("meta.json", lambda old: b'{"checksum": ""}', "there is no model in it"),
        ("meta.json", None, "no corpus here"),
        ("tokenizer.json", lambda old: b"{}", "tokenizer.json is missing, or not as"),
    ],
)
def test_a_damaged_corpus_is_refused(corpus_folder, tmp_path, name, content, message):
    copy = shutil.copytree(corpus_folder, tmp_path / "copy")
    if content:
        (copy / name).write_bytes(content((copy / name).read_bytes()))
    else:
        (copy / name).unlink()
    with pytest.raises(UserError, match=message):
        Corpus(copy)


# -- Model -----------------------------------------------------------------------------------------


def test_base_has_the_studys_parameters_and_initial_values():
    torch.manual_seed(0)
    model = models.build("bert", "base", 32768)
    assert sum(parameter.numel() for parameter in model.parameters()) == 120_179_713
    assert sum(parameter.numel() for parameter in model.layers.parameters()) == 16 * 5_901_312
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.01), name
            assert abs(parameter.mean().item()) < 1e-4, name
        elif name == "position_scale":
            assert parameter.item() == pytest.approx(768**-0.5)
        else:
            assert parameter.unique().tolist() == [1.0 if name.endswith("weight") else 0.0], name
    # 1/6 of base's width.
    narrow = models.build("bert", "tiny", 2048)
    weight = narrow.layers[0].feed_forward.linear.weight
    assert weight.std().item() == pytest.approx(0.02 * 6**0.5, rel=0.01)
    # `finetune.py --untrained` keeps nothing of what was learnt.
    learned = models.BERT(dataclasses.replace(narrow.config, learned_position_scale=True))
    for parameter in learned.parameters():
        parameter.data.fill_(3.0)
    learned.initialise()
    assert learned.position_scale.item() == pytest.approx(128**-0.5)
    assert not any((parameter == 3.0).any() for parameter in learned.parameters())


class ReferenceLayer(nn.Module):
    """A crammed-BERT layer from torch.nn's own modules."""

    def __init__(self, width, heads, d_ff):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.attention = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.w_in = nn.Linear(width, d_ff, bias=False)
        self.w_out = nn.Linear(d_ff // 2, width, bias=False)

    def forward(self, h):
        x = self.norm1(h)
        # With weights: the plain softmax path.
        h = h + self.attention(x, x, x, need_weights=True)[0]
        linear, gate = self.w_in(self.norm2(h)).tensor_split(2, dim=-1)
        return h + self.w_out(linear * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))))


def test_model_equals_one_built_from_reference_modules():
    torch.manual_seed(0)
    shape = dict(vocabulary_size=100, n_layers=3, d_model=24, n_heads=3, d_ff=48, max_length=16)
    model = models.BERT(models.BERTConfig(**shape)).double()
    with torch.no_grad():  # far from the initial values, so that every path matters
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    embedding = nn.Embedding(100, 24, padding_idx=0).double()
    norm, final = nn.LayerNorm(24, eps=1e-12).double(), nn.LayerNorm(24, eps=1e-12).double()
    layers = nn.ModuleList(ReferenceLayer(24, 3, 96) for _ in range(3)).double()
    head = nn.Linear(24, 24, bias=False).double()
    scale = nn.Parameter(model.position_scale.detach().clone())
    # Ours, one matrix or several of them, and the reference's one.
    pairs = [([model.embedding], embedding.weight), ([model.head.weight], head.weight)]
    pairs += [([model.position_scale], scale)]
    norms = [(model.embedding_norm, norm), (model.final_norm, final)]
    for ours, theirs in zip(model.layers, layers):
        norms += [(ours.attention_norm, theirs.norm1), (ours.feed_forward_norm, theirs.norm2)]
        a, f = ours.attention, ours.feed_forward
        pairs += [
            ([a.query.weight, a.key.weight, a.value.weight], theirs.attention.in_proj_weight),
            ([a.output.weight], theirs.attention.out_proj.weight),
            ([f.linear.weight, f.gate.weight], theirs.w_in.weight),
            ([f.output.weight], theirs.w_out.weight),
        ]
    for ours, theirs in norms:
        pairs += [([ours.weight], theirs.weight), ([ours.bias], theirs.bias)]
    covered = {id(weight) for ours, _ in pairs for weight in ours}
    assert covered == {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(torch.cat(ours) if len(ours) > 1 else ours[0])
    tokens, labels = torch.randint(0, 100, (5, 16)), torch.randint(0, 100, (5, 4))
    tokens[0, 0] = 0
    positions = torch.rand(5, 16).argsort(1)[:, :4]

    table = torch.zeros(16, 24, dtype=torch.float64)
    for position, k in itertools.product(range(16), range(12)):
        angle = position * 10000 ** (-2 * k / 24)
        table[position, 2 * k], table[position, 2 * k + 1] = math.sin(angle), math.cos(angle)
    torch.testing.assert_close(model.position_table, table, rtol=0, atol=3e-6)
    h = norm(embedding(tokens) + scale * model.position_table)
    for layer in layers:
        h = layer(h)
    all_logits = head(final(h)) @ embedding.weight.T
    logits = torch.stack([all_logits[row, positions[row]] for row in range(5)])
    losses = -logits.log_softmax(-1).gather(2, labels[:, :, None])[:, :, 0]
    losses.mean().backward()

    batch = {"tokens": tokens, "positions": positions, "labels": labels}
    torch.testing.assert_close(model.logits(batch), logits)
    per_row = model.loss(batch, per_example=True).double()
    torch.testing.assert_close(per_row, losses.mean(1), rtol=1e-5, atol=1e-5)
    model.loss(batch).backward()
    for ours, theirs in pairs:
        gradients = [weight.grad for weight in ours]
        gradient = torch.cat(gradients) if len(ours) > 1 else gradients[0]
        torch.testing.assert_close(gradient, theirs.grad, rtol=1e-5, atol=1e-7)


def test_layers_are_those_asked_for():
    torch.manual_seed(0)
    model = models.build("bert", "tiny", 300)
    batch = {
        "tokens": torch.randint(0, 300, (2, 16)),
        "positions": torch.tensor([[1, 2]] * 2),
        "labels": torch.tensor([[5, 6]] * 2),
    }
    expected = model.final_norm(model.layers[2](model.layers[0](model.embed(batch["tokens"]))))
    assert torch.equal(model.encode(batch["tokens"], [0, 2]), expected)
    none = model.logits(batch, [])
    assert torch.equal(
        model.encode(batch["tokens"], []), model.final_norm(model.embed(batch["tokens"]))
    )
    assert not torch.equal(none, model.logits(batch))
    model.loss(batch, [0, 2]).backward()
    assert all(
        (parameter.grad is None) == (name.split(".")[1] in "13")
        for name, parameter in model.layers.named_parameters(prefix="layers")
    )
    model.present_layers = [0, 1]
    assert torch.equal(model.logits(batch), model.logits(batch, [0, 1]))


def test_one_product_is_several():
    """As a GPU makes them; here a tensor that says that it is there."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    x, layers = torch.randn(2, 3, 8), [nn.Linear(8, n, bias=False) for n in (8, 8, 16)]
    for product, layer in zip(models.project(x.as_subclass(Elsewhere), *layers), layers):
        torch.testing.assert_close(product.as_subclass(torch.Tensor), layer(x))


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_flops_are_those_that_torch_counts(name, corpus_folder, t5_folder):
    """With attention written out: of a CPU's fused kernel torch counts nothing."""
    model = models.build(name, "tiny", 512)
    corpus = Corpus(corpus_folder if name == "bert" else t5_folder, row_length=32)
    batch = corpus.batch(np.arange(4))
    read, predicted = batch["tokens"].shape[1], batch["labels"].shape[1]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(batch).backward()
    expected = 4 * model.training_flops_per_row(read, predicted)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_the_readmes_costs_are_what_the_flops_say():
    """At base: of muon, mask_schedule and token_dropping."""
    readme = (ROOT / "README.md").read_text()
    cells = dict(re.findall(r"methods/(\w+)\.py\) \|.*\| (.*)$", readme, re.MULTILINE))
    found = {"muon": [], "mask_schedule": []}
    for name in ("bert", "t5"):
        config = resolve({"model": name, "size": "base", "device": "cpu"})
        with torch.device("meta"):
            model = models.build(name, "base", config.vocabulary)
        meta = dict(tokenizer_size=config.vocabulary, first_sentinel=0, separator=1)
        plain = corpora.OBJECTIVES[name](config.row_length, meta, config.mask_share)

        def flops(objective, model=model):
            read = getattr(objective, "read_length", objective.raw_length)
            return model.training_flops_per_row(read, objective.predicted_per_row)

        products = 0
        for matrix in hidden_matrices(model).values():
            short, long = sorted(matrix.shape)
            products += muon.STEPS * (4 * short**2 * long + 2 * short**3)
        found["muon"].append(1 + products / (config.batch * flops(plain)))
        options = resolve({"model": name, "size": "base", "method": "mask_schedule"}).options
        shares = np.linspace(options["first_multiple"], 1, options["steps"]) * config.mask_share
        costs = [flops(plain.with_mask_share(share, meta)) / flops(plain) for share in shares]
        found["mask_schedule"].append(np.mean(costs))
    for method, (bert, t5) in found.items():
        assert cells[method] == f"{bert:.2f}, T5 {t5:.2f}", method
    # Layers of tokens: 8 full ones, 7 of half the tokens, and one in which only keys and values are
    # of all tokens.
    d, ff = (models.SIZES["bert"]["base"][name] for name in ("d_model", "d_ff"))
    mixed = (2 * d**2 + 0.5 * (2 * d**2 + 3 * d * ff)) / (4 * d**2 + 3 * d * ff)
    options = token_dropping.TokenDropping.options
    full, keep = options["full_phase"].default, options["keep"].default
    assert keep == 0.5 and models.SIZES["bert"]["base"]["n_layers"] == 16
    share = full + (1 - full) * (8 + 3.5 + mixed) / 16
    assert cells["token_dropping"] == f"{share:.2f} of BERT's layers"


def test_save_and_load(tmp_path):
    model = models.build("bert", "tiny", 300)
    model.present_layers = [0, 1]
    models.save(model, tmp_path / "model.pt")
    loaded = models.load(tmp_path / "model.pt")
    tokens = torch.randint(0, 300, (2, 16))
    assert torch.equal(loaded.encode(tokens), model.encode(tokens))
    (tmp_path / "short.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match="cut short"):
        models.load(tmp_path / "short.pt")


def test_dropout_only_when_fine_tuning(tmp_path):
    models.save(models.build("bert", "tiny", 300), tmp_path / "model.pt")
    model, tokens = models.load(tmp_path / "model.pt", dropout=0.1), torch.randint(0, 300, (2, 16))
    assert torch.equal(model.encode(tokens), model.encode(tokens))
    model.train()
    assert not torch.equal(model.encode(tokens), model.encode(tokens))
    model = models.load(tmp_path / "model.pt").train()
    assert torch.equal(model.encode(tokens), model.encode(tokens))


def transformers_t5(config):
    """transformers' T5 v1.1 of the same shape."""
    import transformers

    shape = dict(
        vocab_size=config.vocabulary_size, d_model=config.d_model, d_kv=config.d_head,
        d_ff=config.d_ff, num_layers=config.n_layers, num_heads=config.n_heads,
        relative_attention_num_buckets=config.relative_buckets,
        relative_attention_max_distance=config.relative_distance,
    )  # fmt: skip
    options = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0)
    options |= dict(decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, **options))
    # Transformers 5 ties what v1.1 does not.
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


T5_SHAPE = models.T5Config(
    vocabulary_size=200, n_layers=3, d_model=48, n_heads=3, d_head=16, d_ff=80
)


def t5_batch(rows, length, targets, padded=True):
    tokens, labels = torch.randint(2, 200, (rows, length)), torch.randint(2, 200, (rows, targets))
    lengths = torch.randint(3, length + 1, (rows, 1)) if padded else torch.full((rows, 1), length)
    mask = torch.arange(length) < lengths
    return {"tokens": tokens.where(mask, 0), "labels": labels, "mask": mask}


@pytest.mark.slow
def test_t5_base_has_the_published_parameters_and_initial_values():
    torch.manual_seed(0)
    model = models.build("t5", "base", 32128)
    assert sum(parameter.numel() for parameter in model.parameters()) == 247_577_856
    deviations = {"embedding": 1.0, "head.weight": 1.0, "query.weight": (768 * 64) ** -0.5}
    deviations |= {"feed_forward.output.weight": 2048**-0.5}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert parameter.unique().tolist() == [1.0], name
        else:
            found = [value for end, value in deviations.items() if name.endswith(end)]
            deviation, few = (found or [768**-0.5])[0], name.endswith("_positions")
            std, mean = parameter.std().item(), parameter.mean().item()
            assert std == pytest.approx(deviation, rel=0.15 if few else 0.01), name
            assert abs(mean) < (0.2 if few else 0.01) * deviation, name


def test_t5_tinys_position_tables_begin_wide_and_its_head_small():
    torch.manual_seed(0)
    tiny = models.build("t5", "tiny", 1024)
    assert tiny.head.weight.std().item() == pytest.approx(0.125, rel=0.01)
    for table in (tiny.encoder_positions, tiny.decoder_positions):  # 64 numbers
        assert table.std().item() == pytest.approx(4.0, rel=0.3)


@pytest.mark.slow
def test_t5_equals_transformers():
    torch.manual_seed(0)
    theirs, ours = transformers_t5(T5_SHAPE), models.T5(T5_SHAPE)
    names, parameters = (
        transformers_folder.transformers_names(range(3)),
        dict(ours.named_parameters()),
    )
    assert sorted(names) == sorted(parameters)
    assert sorted(names.values()) == sorted(name for name, _ in theirs.named_parameters())
    pairs = [(parameters[mine], theirs.get_parameter(its)) for mine, its in names.items()]
    with torch.no_grad():
        for mine, its in pairs:
            its.add_(torch.randn_like(its) * 0.05)
            mine.copy_(its)
    # Longer than the exact distances of both stacks, and than the farthest bucket.
    batch = t5_batch(6, 150, 70)
    batch["labels"][1, 50:] = -100
    expected = run_transformers(theirs, batch)
    torch.testing.assert_close(ours.logits(batch), expected.logits, rtol=1e-4, atol=1e-4)
    loss = ours.loss(batch)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    alone = ({name: value[[row]] for name, value in batch.items()} for row in range(6))
    rows = [run_transformers(theirs, one).loss.item() for one in alone]
    assert ours.loss(batch, per_example=True).tolist() == pytest.approx(rows, rel=1e-5)
    loss.backward()
    expected.loss.backward()
    for mine, its in pairs:
        scale = its.grad.abs().max()
        assert scale > 0 and (mine.grad - its.grad).abs().max() < 2e-5 * scale


def run_transformers(model, batch):
    """Its outputs for a batch of ours."""
    mask = batch["mask"].long()
    return model(input_ids=batch["tokens"], attention_mask=mask, labels=batch["labels"])


def test_t5_generates_what_transformers_does(tmp_path):
    torch.manual_seed(1)
    model = models.T5(T5_SHAPE).eval()
    with torch.no_grad():
        model.head.weight[1] *= 2  # so that rows end at different lengths
    transformers_folder.save_transformers(model, tmp_path / "folder")
    import transformers

    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "folder").eval()
    batch = t5_batch(50, 20, 1)
    mask, greedy = batch["mask"].long(), dict(do_sample=False, num_beams=1, max_new_tokens=40)
    expected = theirs.generate(input_ids=batch["tokens"], attention_mask=mask, **greedy)[:, 1:]
    for use_cache in (True, False):
        assert torch.equal(model.generate(batch, 40, use_cache=use_cache), expected)
    assert 5 < (expected == 1).any(dim=1).sum() < 50  # some rows end, some do not
    # What a row generates does not depend on its padding or its neighbours.
    alone = {"tokens": batch["tokens"][7:8, : batch["mask"][7].sum()]}
    generated = model.generate(alone, 40)[0]
    assert torch.equal(F.pad(generated, (0, expected.shape[1] - len(generated))), expected[7])


def test_t5_in_the_transformers_format(tmp_path, monkeypatch):
    torch.manual_seed(2)
    model = models.T5(T5_SHAPE)
    model.present_layers = [0, 2]
    transformers_folder.save_transformers(model, tmp_path / "ours")
    loaded = transformers_folder.load_transformers(tmp_path / "ours")
    batch = t5_batch(3, 20, 5)
    assert loaded.config.n_layers == 2 and torch.equal(loaded.logits(batch), model.logits(batch))
    theirs, folder = transformers_t5(T5_SHAPE), tmp_path / "theirs"
    expected = run_transformers(theirs, batch).logits
    theirs.save_pretrained(folder)
    for _ in range(2):
        logits = transformers_folder.load_transformers(folder).logits(batch)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")  # as t5-v1_1 is published
        (folder / "model.safetensors").unlink(missing_ok=True)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for change, message in (
        ({"model_type": "bart"}, "model_type is 'bart'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj"),
        ({"d_ff": 81}, "do not fit"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"num_decoder_layers": 7}, "num_decoder_layers is 7"),
        ({"num_layers": 5, "num_decoder_layers": 5}, "have no"),
    ):
        (tmp_path / "ours" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            transformers_folder.load_transformers(tmp_path / "ours")
    with pytest.raises(UserError, match="config.json: no such file"):
        transformers_folder.load_transformers(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        transformers_folder.save_transformers(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_t5_layers_come_in_pairs():
    torch.manual_seed(0)
    model, batch = models.T5(T5_SHAPE), t5_batch(2, 9, 4, padded=False)
    model.loss(batch, [0, 2]).backward()
    assert all(
        (parameter.grad is None) == (name.split(".")[1] == "1")
        for name, parameter in model.layers.named_parameters(prefix="layers")
    )
    assert model.encoder_positions.grad is not None
    # A bias whose last dimension is not contiguous keeps a GPU from its fused kernels.
    places = torch.arange(9)
    assert all(
        model.position_bias(table, places, places, both).stride(-1) == 1
        for table, both in ((model.encoder_positions, True), (model.decoder_positions, False))
    )
    model.present_layers = [0, 2]
    assert torch.equal(model.logits(batch), model.logits(batch, [0, 2])) and not torch.equal(
        model.logits(batch), model.logits(batch, [])
    )


# -- Reference system time -------------------------------------------------------------------------


def test_references_are_the_recorded_times_per_layer():
    for name, probe, table, share in (
        ("rtx3090", "bert", rst.RTX3090_BERT, 1),
        ("a100", "t5", rst.A100_T5, 2),
    ):
        slope = share * rst.REFERENCES[name].probe_seconds[probe]
        for layers, seconds in enumerate(table, 1):
            line = table[0] + slope * (layers - 1)
            if (name, layers) == ("rtx3090", 7):
                # The slip of the decimal point.
                assert 10 * seconds == pytest.approx(line, rel=0.015)
            else:
                assert seconds == pytest.approx(line, rel=0.015)
    assert rst.REFERENCES["rtx3090"].probe_seconds["bert"] == pytest.approx(0.01334, abs=5e-6)
    assert rst.REFERENCES["a100"].probe_seconds["t5"] == pytest.approx(0.082 / 2, rel=1e-3)


def test_reference_files(tmp_path):
    rst.main([f"--save={tmp_path}/mine.json", "--repeats=1", "--threads=1", "--device=cpu"])
    reference = rst.find_reference(str(tmp_path / "mine.json"))
    assert (
        set(reference.probe_seconds) == {"bert", "t5"} and min(reference.probe_seconds.values()) > 0
    )
    for content in (
        "{}",
        "nothing",
        '{"name": "x", "probe_seconds": {"bert": 0}, "provenance": ""}',
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match="bad.json"):
            rst.find_reference(str(tmp_path / "bad.json"))
    with pytest.raises(UserError, match="rtx4090"):
        rst.find_reference("rtx4090")


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_the_probe_is_a_layer_at_the_studys_shapes(name):
    probe = rst.Probe(name, "cpu")
    assert probe.seconds() > 0
    rows, lengths, weights = {
        "bert": (128, [128], 4 * 768**2 + 3 * 768 * 1536),
        "t5": (72, [512, 114], 12 * 768**2 + 2 * 3 * 768 * 2048),
    }[name]
    assert probe.full_rows == rows
    assert [tuple(x.shape) for x in probe.inputs] == [(1, length, 768) for length in lengths]
    assert sum(weight.numel() for weight in probe.weights if weight.requires_grad) == weights
    # In the precision of the runs that are charged by it.
    assert probe.dtype == rst.DTYPES[resolve(parse(["--device=cpu", f"--model={name}"])[0]).dtype]
    x = torch.randn(1, 16, 768)
    if name == "bert":  # the frozen copy is a layer of the model's kind
        layer = models.BERTLayer(models.BERTConfig())
        attention, feed_forward = layer.attention, layer.feed_forward
        weights = [
            torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]),
            attention.output.weight,
        ]
        weights += [
            torch.cat([feed_forward.linear.weight, feed_forward.gate.weight]),
            feed_forward.output.weight,
        ]
        torch.testing.assert_close(rst.bert_layer(x, weights), layer(x), rtol=1e-4, atol=1e-5)


def clock_of(**options):
    return rst.Clock(rst.REFERENCES["this"], "bert", "cpu", **options)


def test_clock_charges_everything_and_counts_stalls():
    clock = clock_of(budget_seconds=1000.0)
    clock.factor = 0.5
    for _ in range(20):
        clock.charge(1.0, 0.2)
        assert (
            clock.charged_seconds == 0.5 and clock.update_free_seconds == 0.2 and clock.stalls == 0
        )
    clock.charge(9.0, 0.0)  # a model that grew
    assert clock.stalls == 0
    clock.charge(50.0, 0.0)
    assert (clock.stalls, clock.stall_seconds, clock.charged_seconds) == (1, 25.0, 25.0)
    assert clock.spent_seconds == 10.0 + 4.5 + 25.0 and clock.free_seconds == pytest.approx(4.0)
    assert clock.updates == 22 and clock.progress == clock.spent_seconds / 1000
    again = clock_of(budget_seconds=1000.0)
    again.load_state_dict(clock.state_dict())
    for name in ("updates", "spent_seconds", "free_seconds", "stalls", "stall_seconds"):
        assert getattr(again, name) == getattr(clock, name), name


def test_an_update_is_charged_less_its_free_blocks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rst.time, "perf_counter", lambda: now[0])
    clock = clock_of(budget_seconds=10.0)
    with clock.free():
        now[0] += 7  # between updates: nobody's
    with clock.charged():
        now[0] += 1
        with clock.free():
            now[0] += 1.5
            with clock.free():  # of a method's tool
                now[0] += 0.5
        now[0] += 0.5
    assert (clock.charged_seconds, clock.free_seconds, clock.updates) == (1.5, 2.0, 1)
    with pytest.raises(KeyError), clock.charged():
        raise KeyError  # an update that failed is none
    assert (clock.spent_seconds, clock.updates) == (1.5, 1)


def test_the_factor_is_of_the_last_minutes_probes_without_their_extremes(monkeypatch):
    now = 0.0
    monkeypatch.setattr(rst.time, "perf_counter", lambda: now)
    clock = clock_of(budget_seconds=1.0)
    clock.reference = rst.Reference("mine", {"bert": 1.0}, "")
    paces = iter([2.0] * 8 + [4.0, 4.0, 90.0, 3.0, 5.0])
    clock.probe = SimpleNamespace(name="bert", seconds=paces.__next__, rows=1, full_rows=2)
    clock.measure(8)
    assert clock.factor == 0.5 and clock.probe_wall_seconds == 1.0
    # Seconds, and the probes that count then: after a minute the opening's are forgotten, but for
    # the last four probes.
    for now, counted in (
        (10.0, [2] * 7),  # of 2 x 8 and 4
        (50.0, [2] * 7 + [4]),  # of 2 x 8, 4, 4
        (65.0, [4, 4]),  # of 2, 4, 4, 90: the stalled probe is left out, and the opening
        (200.0, [4, 4]),  # of 4, 4, 90, 3
        (300.0, [4, 5]),  # of 4, 90, 3, 5
    ):
        clock.measure()
        assert clock.factor == pytest.approx(len(counted) / sum(counted)), now
    assert len(clock.factor_history) == 6


def test_a_stalled_probe_does_not_put_off_the_next(monkeypatch):
    clock = clock_of(budget_seconds=1000.0)
    clock.reference = rst.Reference("mine", {"bert": 1.0}, "")
    paces = iter([0.1] * 8 + [30.0, 0.1])
    clock.probe = SimpleNamespace(name="bert", seconds=paces.__next__, rows=1, full_rows=1)
    clock.measure(8)
    clock.measure()
    measured = len(clock.factor_history)
    for _ in range(11):  # the probe's usual 0.1 s are due after 10 s
        clock.charge(1.0, 0.0)
        clock.probe_when_due()
    assert len(clock.factor_history) == measured + 1


def test_the_worked_example_of_the_clock(monkeypatch):
    """The numbers in Clock's docstring, of one process and of two."""
    clock = clock_of(budget_seconds=1.0)
    clock.reference = rst.Reference("mine", {"bert": 0.20}, "")
    for processes, charged in ((1, 1.02), (2, 2.04)):
        paces = iter([0.24, 0.90, 0.25, 0.26])
        clock.probe = SimpleNamespace(name="bert", seconds=paces.__next__, rows=1, full_rows=1)
        clock.probes.clear()
        monkeypatch.setattr(rst, "gather", lambda values, device: [values] * processes)
        clock.measure(4)
        clock.charge(1.3, 0.2)
        assert (
            round(clock.factor / processes, 2) == 0.78
            and round(clock.charged_seconds, 2) == charged
        )


def test_free_work_is_not_charged_and_may_not_train():
    clock = clock_of(budget_seconds=1.0)
    weight = nn.Parameter(torch.ones(4))
    clock.weights = [weight]
    with clock.free():
        pass
    assert clock.free_block_seconds > 0 and clock.spent_seconds == 0
    for change in (lambda: weight.data.mul_(2), lambda: weight.data[:2].copy_(weight.data[:2] + 1)):
        with pytest.raises(RuntimeError, match="free"), clock.free():
            change()


# -- Methods ---------------------------------------------------------------------------------------


def test_schedule_and_parameter_groups():
    assert [one_cycle(f) for f in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    for name, others in (
        ("bert", {"embedding", "head.weight"}),
        ("t5", {"embedding", "head.weight", "encoder_positions", "decoder_positions"}),
    ):
        model = models.build(name, "tiny", 300)
        names = {parameter: key for key, parameter in model.named_parameters()}
        groups = [[names[p] for p in group["params"]] for group in parameter_groups(model, 0.1)]
        assert sorted(sum(groups, [])) == sorted(names.values())
        for group, own in zip(parameter_groups(model, 0.1), groups):
            places = {key.split(".")[1] if key.startswith("layers.") else "" for key in own}
            assert len(places) == 1  # a layer's, or what is outside of all
            decayed = {"norm" not in key and key != "position_scale" for key in own}
            assert decayed == {group["weight_decay"] > 0.0}
        matrices = hidden_matrices(model)
        assert {names[p] for p in names if p.dim() == 2} - set(matrices) == others
        rest = parameter_groups(model, 0.1, without=matrices.values())
        assert not set(matrices) & {names[p] for group in rest for p in group["params"]}


def test_the_cosine_schedule_is_the_studys():
    for q in (0, 1, 5000, 9999, 10_000, 30_000, 65_000, 65_535):
        expected = (
            0.5 + 0.5 * q / 10_000
            if q < 10_000
            else max(1e-5, 0.5 * (1 + math.cos(math.pi * (q - 10_000) / 55_536)))
        )
        assert baseline.cosine(q / 65_536) == pytest.approx(expected, rel=1e-9)
    assert baseline.cosine(1.0) == 1e-5


def literal_adamw_scale(weight, gradient, state, lr, scale, weight_decay):
    beta1, beta2, eps = 0.9, 0.999, 1e-6
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * gradient
    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * gradient**2
    weight = weight - lr * scale * math.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (v.sqrt() + eps)
    return weight - lr * weight_decay * weight


def literal_lion(weight, gradient, state, lr, scale, weight_decay):
    beta1, beta2 = 0.9, 0.99
    m = state.get("m", torch.zeros_like(weight))
    u = torch.sign(beta1 * m + (1 - beta1) * gradient)
    state["m"] = beta2 * m + (1 - beta2) * gradient
    return weight * (1 - lr * scale * weight_decay) - lr * scale * u


def literal_sophia(weight, gradient, state, lr, scale, weight_decay):
    beta1, rho, eps = 0.965, 0.05, 1e-15
    state["m"] = beta1 * state.get("m", torch.zeros_like(weight)) + (1 - beta1) * gradient
    ratio = state["m"] / (rho * state.get("h", torch.zeros_like(weight)) + eps)
    return weight * (1 - lr * weight_decay) - lr * scale * ratio.clamp(-1, 1)


LITERAL = {"baseline": literal_adamw_scale, "lion": literal_lion, "sophia": literal_sophia}
CONSTANTS = {
    "baseline": (0.9, 0.999, 1e-6),
    "lion": (0.9, 0.99, 0.0),
    "sophia": (0.965, 0.99, 1e-15),
}


def make_optimizer(name, parameters, rms_scaling, compile):
    """A method's optimizer of T5, with the constants of its literal formula; the second parameter
    is a layer."""
    options = dict(clip_threshold=0.05, hessian_batch=1)
    config = SimpleNamespace(model="t5", batch=1, lr=1.0, weight_decay=0.1, options=options)
    config.beta1, config.beta2, config.eps = CONSTANTS[name]
    config.rms_scaling, config.compile = rms_scaling, compile
    layers = [nn.ParameterList(parameters[1:2])]
    model = SimpleNamespace(layers=layers, parameters=lambda: parameters)
    (cls,) = methods.find(name).classes.values()
    return cls(model, None, None, config, {}).optimizer()


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "name, rms_scaling",
    [("baseline", True), ("lion", True), ("lion", False), ("sophia", True), ("sophia", False)],
)
def test_update_rules_equal_their_formulas(name, rms_scaling, compile):
    """On parameters that come late, saved and loaded on the way, in float64 beside."""
    if compile and not HAS_COMPILER:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    generator = torch.Generator().manual_seed(0)
    shapes = [((7, 5), 1.0), ((300, 40), 0.1), ((5,), 0.3), ((), 1.0), ((3, 4), 1e-5)]
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator) * scale) for shape, scale in shapes
    ]

    settings = name, parameters, rms_scaling, compile
    optimizer, graphs = make_optimizer(*settings), train.compilations()
    expected, clipped = [parameter.detach().double() for parameter in parameters], []
    states = [{} for _ in parameters]
    for update in range(20):
        if update == 10 and not compile:  # as after a resume
            stored, optimizer = optimizer.state_dict(), make_optimizer(*settings)
            optimizer.load_state_dict(stored)
        for group in optimizer.param_groups:
            group["lr"] = lr = 0.01 / (update + 1)
        for index, (parameter, state) in enumerate(zip(parameters, states)):
            parameter.grad = None
            if index == 1 and update < 5:
                continue  # a layer that is not there yet: no step, no decay
            # some gradients near eps, where it matters how eps enters
            size = 10.0 ** -(update % 8) if name == "baseline" else 1.0
            parameter.grad = torch.randn(parameter.shape, generator=generator) * size
            if name == "sophia" and update % 5 == 1 and parameter in optimizer.state:
                estimate = torch.rand(parameter.shape, generator=generator) * 20  # a Hessian pass
                optimizer.state[parameter]["hessian"].lerp_(estimate, 0.01)
                state["h"] = 0.99 * state.get("h", 0.0) + 0.01 * estimate.double()
            scale = max(1e-3, expected[index].square().mean().sqrt().item()) if rms_scaling else 1.0
            own, decay = (expected[index], parameter.grad.double()), 0.1 * (parameter.dim() == 2)
            expected[index] = LITERAL[name](*own, state, lr, scale, decay)
            if "h" in state:
                clipped.append((state["m"].abs() >= 0.05 * state["h"]).double().mean().item())
        optimizer.step()
        tolerance = (2e-5, 1e-9) if name == "baseline" else (1e-6, 1e-6)
        for parameter, value in zip(parameters, expected):
            torch.testing.assert_close(
                parameter.double(), value, rtol=tolerance[0], atol=tolerance[1]
            )
    assert train.compilations() == graphs  # all of them were made when the optimizer was
    # Both branches of the clipping matter.
    assert name != "sophia" or 0.1 < statistics.mean(clipped) < 0.9


METHOD_FILES = {
    "wide": """
        from methods.baseline import Method, Option
        class Wide(Method):
            options = {"factor": Option(2, "how much wider")}
            defaults = {"bert": {"base": dict(lr=0.5, weight_decay=0.3)}}
            def next_batch(self):
                return self.corpus.draw(self.config.batch * self.config.options["factor"])
        """,
    "plain_sgd": """
        import torch
        from methods.baseline import Method
        class PlainSGD(Method):
            defaults = {"bert": {"base": dict(lr=0.25)}}
            def optimizer(self):
                return torch.optim.SGD(self.model.parameters(), lr=self.config.lr)
        """,
    "narrow": """
        from methods.baseline import Method
        class Narrow(Method):
            def next_batch(self):
                return self.corpus.draw(1)
        """,
    "narrow_layers": """
        from methods.baseline import Method
        class NarrowLayers(Method):
            def groups(self, positions):
                return [(positions, [0])]
        """,
}


def test_methods_are_found_by_file_and_combined(method_files, refuses):
    method_files(**METHOD_FILES)
    assert {"baseline", *METHOD_FILES} <= set(methods.names())
    both = methods.find("plain_sgd+wide")
    owners = {hook: owner for hook, owner in both.owner.items() if owner}
    assert owners == dict(optimizer="plain_sgd", next_batch="wide")
    assert both.defaults("bert", "base")["lr"] == 0.25  # the optimizer's wins
    assert both.defaults("bert", "base")["weight_decay"] == 0.3
    # The other one declares none.
    assert methods.find("wide+narrow_layers").defaults("bert", "base")["lr"] == 0.5
    assert methods.find("rho+wsd").defaults("bert", "tiny", {"lr"})["weight_decay"] == 0.01
    # After the step, what belongs to the optimizer comes last.
    assert list(methods.find("sophia+layer_drop").classes) == ["layer_drop", "sophia"]
    typed, _ = parse(["--method=wide", "--factor=3", "--lr", "7", "--device=cpu"])
    config = resolve(typed)
    assert config.options == {"factor": 3} and config.lr == 7.0 and config.weight_decay == 0.3
    for flags, message in (
        ("--method=wide+narrow", "wide and narrow both choose the rows"),
        ("--method=wide+wide", "wide is listed twice"),
        ("--method=wsd --schedule=cosine", "--schedule=cosine: wsd sets the learning rate itself"),
        ("--method=rho+wsd", "rho has 0.008 and wsd 0.002 as --lr; type --lr"),
        ("--method=none", "no method 'none'; there are baseline, lawa"),
        ("--method=wide --factor=x", "--factor"),
        ("--factor=3", "unknown flag --factor"),
    ):
        refuses(train.main, flags.split(), message)


# -- Training --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_budget_in_hours(corpus_folder, tmp_path):
    trained(corpus_folder, tmp_path / "run", "--budget_hours=0.0005 --validations=2")
    updates, validations = log_of(tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert updates[-1]["spent_seconds"] >= 1.8
    assert len(updates) < 2 or updates[-2]["spent_seconds"] < 1.8
    spent = 0.0
    for number, record in enumerate(updates, 1):
        spent += record["charged_seconds"]
        assert record["update"] == number and record["spent_seconds"] == spent
        assert record["lr"] == result["config"]["lr"] * one_cycle(record["progress"])
        assert record["factor"] == 1.0
    assert result["charged_seconds"] == spent and result["updates"] == len(updates)
    assert validations[-1]["lr"] == 0.0 and validations[-1]["progress"] == 1.0
    assert validations[-1]["validation_loss"] == result["validation_loss"]
    assert result["charged_seconds"] < result["wall_seconds"]


@pytest.mark.slow
def test_it_learns(corpus_folder, tmp_path):
    flags = "--budget_steps=60 --validations=1 --batch=16 --holdout=0"
    result = trained(corpus_folder, tmp_path / "run", flags)
    assert result["validation_loss"] < math.log(512) - 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "t5"])
def test_the_loop_equals_a_plain_one(corpus_folder, t5_folder, tmp_path, monkeypatch, model):
    """Rows in their order, gradients clipped, the scheduled rate, torch's AdamW."""
    monkeypatch.setitem(models.SIZES[model], "tiny", NARROW)
    flags = "--budget_steps=8 --validations=1 --lr=0.02 --clip=0.1 --weight_decay=0.1"
    flags += f" --model={model} --rms_scaling=false --schedule=one_cycle"
    trained(corpus_folder if model == "bert" else t5_folder, tmp_path / "run", flags)
    config, _ = resumed(tmp_path / "run", {})
    corpus = open_corpus(config)
    torch.manual_seed(0)
    network = models.build(model, "tiny", 512)
    start = copy.deepcopy(network.state_dict())
    matrices = [parameter for parameter in network.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in network.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
    for update in range(8):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - abs(2 * update / 8 - 1))
        optimizer.zero_grad()
        network.loss(corpus.batch(np.arange(6 * update, 6 * update + 6))).backward()
        assert torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1) > 0.1
        optimizer.step()
    saved = weights_of(tmp_path / "run")
    for name, weight in network.state_dict().items():
        assert (saved[name] - weight).norm() <= 0.01 * (weight - start[name]).norm(), name


def test_tokens_of_the_other_model_are_refused(t5_folder, tmp_path, refuses):
    refuses(train.main, small_run(t5_folder, tmp_path / "run"), "is of --model=t5, not bert")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nothing_keeps_the_process_group_alive(corpus_folder, tmp_path):
    """A group that outlives the run has threads that can abort the interpreter at its end."""
    script = textwrap.dedent("""
        import os, sys, weakref
        import torch.distributed as dist
        import train
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        destroy = dist.destroy_process_group
        def destroy_and_look():
            group = weakref.ref(dist.group.WORLD)
            destroy()
            assert group() is None
        dist.destroy_process_group = destroy_and_look
        train.main(sys.argv[1:])
        assert not dist.is_initialized()
        """)
    flags = small_run(corpus_folder, tmp_path / "run", "--budget_steps=2 --validations=1")
    result = command("-c", script, *flags)
    assert result.returncode == 0, result.stderr


def test_rows_are_shared_out_over_groups_and_processes(monkeypatch):
    groups = [
        (group, number) for number, group in enumerate(np.array_split(np.arange(100, 123), 4))
    ]

    def shares(processes, groups):
        monkeypatch.setattr(parallel, "processes", lambda: processes)
        for rank in range(processes):
            monkeypatch.setattr(parallel, "process", lambda: rank)
            parts = parallel.micro_batches(groups, 2)
            assert all(0 < len(rows) <= 2 for rows, _ in parts)
            yield [(number, row) for rows, number in parts for row in rows.tolist()]

    expected = [(number, row) for group, number in groups for row in group.tolist()]
    for processes in (1, 2, 3, 5, 23):
        found = list(shares(processes, groups))
        assert sum(found, []) == expected and max(map(len, found)) - min(map(len, found)) <= 1
    # As many groups as processes: each has one.
    even = [(np.arange(8 * number, 8 * number + 8), number) for number in range(4)]
    assert [{number for number, _ in share} for share in shares(4, even)] == [{0}, {1}, {2}, {3}]
    with pytest.raises(UserError, match="2 rows cannot be shared out over 3 processes"):
        list(shares(3, [(np.arange(2), 0)]))


def test_gradients_travel_while_the_backward_pass_runs(monkeypatch):
    """Of two processes, here this one and its equal: sums are twice its own, those of the last
    layers begin before the first ones have a gradient, and what none used has none."""
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    events, layers = [], nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def all_reduce(tensor, async_op):
        events.append("sum")
        return SimpleNamespace(wait=lambda: tensor.mul_(2))

    monkeypatch.setattr(parallel.dist, "all_reduce", all_reduce)
    layers[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("first layer"))
    gradients = parallel.Gradients(layers.parameters(), bucket_elements=72)  # a layer
    x = torch.randn(3, 8)

    def loss(used):
        return functools.reduce(lambda h, layer: layer(h).tanh(), used, x).square().mean()

    for used in (layers, [layers[0], *layers[2:]]):
        layers.zero_grad(set_to_none=True)
        expected = dict.fromkeys(layers.parameters())
        for layer in used:
            expected |= dict.fromkeys(layer.parameters(), 0)
        for _ in range(2):
            loss(used).backward()
        expected = {p: p.grad for p in expected}
        layers.zero_grad(set_to_none=True)
        events.clear()
        gradients.start()
        for is_last in (False, True):
            gradients.backward(loss(used), is_last)
        total = gradients.finish(loss(used).detach())
        assert gradients.read(total) == [pytest.approx(2 * loss(used).item())]
        for parameter, gradient in expected.items():
            if gradient is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, 2 * gradient)
        # Buckets are summed in their order, which is the same everywhere: behind the layer that
        # none used they have to wait for the end.
        before_the_first = 3 if used is layers else 2
        sums = ["sum"] * before_the_first
        rest = ["sum"] * (5 - before_the_first)
        assert events == ["first layer", *sums, "first layer", *rest]
    # A parameter of several buckets leaves none empty.
    large = parallel.Gradients([nn.Parameter(torch.zeros(n)) for n in (3, 40, 3)], 10)
    assert large.bucket_sizes == [43, 3]
    # A pass between updates is none of theirs.
    layers.zero_grad(set_to_none=True)
    events.clear()
    loss(layers).backward()
    assert events == ["first layer"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_is_near_fp32(corpus_folder, tmp_path, dtype):
    losses, norms = {}, {}
    for name in ("fp32", dtype):
        flags = f"--budget_steps=4 --dtype={name} --validations=1"
        trained(corpus_folder, tmp_path / name, flags)
        losses[name], norms[name] = losses_of(tmp_path / name), norms_of(tmp_path / name)
        assert not any(record["skipped"] for record in log_of(tmp_path / name)[0])
    assert losses[dtype] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses[dtype] != losses["fp32"]
    assert norms[dtype] == pytest.approx(norms["fp32"], rel=0.05)  # not of the scaled loss


def test_t5_in_bf16_is_near_fp32():
    torch.manual_seed(0)
    model, batch = models.T5(T5_SHAPE), t5_batch(4, 20, 8)
    expected = model.loss(batch).item()
    model.autocast_dtype = torch.bfloat16
    assert (
        model.loss(batch).item() == pytest.approx(expected, rel=0.02)
        and model.loss(batch).item() != expected
    )
    model.loss(batch).backward()
    assert all(
        parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        for parameter in model.parameters()
    )


def test_an_overflow_in_fp16_skips_the_update(corpus_folder, tmp_path, monkeypatch):
    large = functools.partial(torch.amp.GradScaler, init_scale=2.0**30)
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    flags = "--budget_steps=3 --dtype=fp16 --validations=1"
    result = trained(corpus_folder, tmp_path / "run", flags)
    updates, _ = log_of(tmp_path / "run")
    assert [record["skipped"] for record in updates] == [True] * 3 and result[
        "skipped_updates"
    ] == 3
    assert [record["gradient_norm"] for record in updates] == [None] * 3
    torch.manual_seed(0)
    fresh, saved = models.build("bert", "tiny", 512).state_dict(), weights_of(tmp_path / "run")
    assert all(torch.equal(value, fresh[name]) for name, value in saved.items())


def test_a_gradient_that_is_not_finite_stops_before_it_does_harm(
    corpus_folder, tmp_path, monkeypatch, refuses
):
    loss = Method.loss

    def poisoned(self, batch, layers):  # the loss is finite, its gradient is not
        if self.clock.updates == 2:
            self.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
        return loss(self, batch, layers)

    monkeypatch.setattr(Method, "loss", poisoned)
    flags = small_run(corpus_folder, tmp_path / "run", "--budget_steps=9", SAVING)
    refuses(train.main, flags, "gradient's norm is inf in update 3")
    checkpoint = read_tensors(tmp_path / "run" / "checkpoint.pt", ["clock", "model"])
    assert checkpoint["clock"]["updates"] == 2
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_new_layers_have_step_counts_of_their_own(contract):
    folder = contract("stacking", "bert")
    layers = [record["stacking"]["layers"] for record in log_of(folder)[0]]
    stored = read_tensors(folder / "checkpoint.pt", ["optimizer"])["optimizer"]["state"]
    steps = {sum(count >= wanted for count in layers) for wanted in (1, 2, 4)}
    assert len(steps) == 3 and {int(entry["step"]) for entry in stored.values()} == steps
    assert models.load(folder / "model.pt").present_layers == [0, 1, 2, 3]


@pytest.mark.slow
def test_every_hooks_work_is_charged(corpus_folder, tmp_path, monkeypatch):
    """By a clock on which only hooks take time, each another power of two."""
    hooks = "begin_update layers schedule next_batch groups inputs loss before_step after_step"
    hooks, seconds = [*hooks.split(), "report"], [0.0]
    monkeypatch.setattr(rst, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def taking(number, original):
        def wrapper(self, *arguments):
            seconds[0] += 2**number
            return original(self, *arguments)

        return wrapper

    for number, hook in enumerate(hooks):
        monkeypatch.setattr(Method, hook, taking(number, getattr(Method, hook)))
    trained(corpus_folder, tmp_path / "run", "--budget_steps=3 --validations=1")
    charged = {record["charged_seconds"] for record in log_of(tmp_path / "run")[0]}
    assert charged == {2 ** len(hooks) - 1}


@pytest.mark.slow
def test_the_slowest_process_is_charged_and_saving_is_not(corpus_folder, tmp_path):
    """Two processes, of which one saves for a second after every update, and is ready a second
    later, and the other takes 0.3 s longer for each update."""
    script = textwrap.dedent("""
        import sys, time
        import model, runs, train
        from parallel import is_main
        def slowly(function):
            def wrapper(*arguments):
                time.sleep(1 if is_main() else 0)
                return function(*arguments)
            return wrapper
        runs.write_tensors = slowly(runs.write_tensors)
        train.Training.warm_up = slowly(train.Training.warm_up)
        train.methods.Method.after_step = lambda self: time.sleep(0 if is_main() else 0.3)
        train.main(sys.argv[1:])
        """)
    (tmp_path / "slow.py").write_text(script)
    flags = "--budget_steps=4 --checkpoint_minutes=0.00001"
    in_two_processes(tmp_path / "slow.py", *small_run(corpus_folder, tmp_path / "run", flags))
    charged = [record["charged_seconds"] for record in log_of(tmp_path / "run")[0]]
    assert 0.3 <= min(charged) and max(charged) < 1


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(corpus_folder, tmp_path, capsys):
    """By SIGKILL, in the middle of an update; `bench.py kills` does it to every method."""
    script = textwrap.dedent("""
        import os, signal, sys
        import rst, train
        before_step = train.methods.Method.before_step
        def die_or_clip(self, *arguments):
            if self.clock.updates == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return before_step(self, *arguments)
        train.methods.Method.before_step = die_or_clip
        train.main(sys.argv[1:])
        """)
    flags = "--budget_steps=12 --validations=3 --checkpoint_minutes=0.00001"
    trained(corpus_folder, tmp_path / "plain", flags)
    killed = command("-c", script, *small_run(corpus_folder, tmp_path / "killed", flags))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    train.main([f"--resume={tmp_path / 'killed'}", "--checkpoint_minutes=10"])
    assert "resumed after update 5" in capsys.readouterr().out
    assert_same_weights(tmp_path / "plain", tmp_path / "killed")
    one, other = log_of(tmp_path / "plain"), log_of(tmp_path / "killed")
    assert [r["update"] for r in other[0]] == list(range(1, 13))
    for kind, key in ((0, "loss"), (1, "validation_loss")):
        assert [r[key] for r in one[kind]] == [r[key] for r in other[kind]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(corpus_folder, tmp_path, at_update, capsys, number):
    def stops(status, message, *flags):
        with pytest.raises(SystemExit) as stopped:
            train.main([*flags])
        assert stopped.value.code == status and message in "".join(capsys.readouterr())

    flags = small_run(corpus_folder, tmp_path / "run", "--budget_steps=6")
    at_update({4: lambda: os.kill(os.getpid(), number)})
    stops(128 + number, "stopped after update 4; go on with: python train.py --resume=", *flags)
    assert len(log_of(tmp_path / "run")[0]) == 4  # the interrupted update is whole
    stops(2, "holds the run", *flags, "--lr=3")
    resume = f"--resume={tmp_path / 'run'}"
    stops(2, "decides its result", resume, "--lr=3")
    stops(2, "at least 1", resume, "--micro_batch=0")
    stops(2, "expected cpu", resume, "--device=tpu")
    stops(2, "from 0 to 4096", resume, "--threads=-3")
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    other_dtype = "--dtype=fp16" if number == signal.SIGTERM else "--dtype=fp32"
    train.main([f"--resume={moved}", "--micro_batch=2", other_dtype])
    assert "resumed after update 4" in capsys.readouterr().out
    assert [r["update"] for r in log_of(moved)[0]] == [1, 2, 3, 4, 5, 6]


def test_a_run_killed_early_resumes_in_another_precision(corpus_folder, tmp_path, at_update):
    """And again afterwards: its id is that of the precision that it was started in."""
    flags = small_run(corpus_folder, tmp_path / "run", "--budget_steps=6")
    at_update({2: kill})  # its only checkpoint is that of update 0
    with pytest.raises(Killed):
        train.main(flags)
    at_update({4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(SystemExit):
        train.main([f"--resume={tmp_path / 'run'}", "--dtype=bf16"])
    assert train.main([f"--resume={tmp_path / 'run'}"])["updates"] == 6


@pytest.mark.parametrize("reference", ["this", "mine.json"])
def test_a_run_resumes_wherever_everything_was_moved(
    corpus_folder, tmp_path, monkeypatch, refuses, reference
):
    """Its folder, its corpus and its reference's file; on another number of threads."""
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(corpus_folder, before / "corpus")
    monkeypatch.chdir(before)
    mine = rst.Reference("mine", {"bert": 1.0}, "a test")
    Path("mine.json").write_text(json.dumps(dataclasses.asdict(mine)))
    flags = [f"--reference={reference}", "--budget_hours=1e-4", "--method=rho", "--validations=1"]
    monkeypatch.setattr("runs.ROOT", before)
    result = train.main(small_run("corpus", "run", *flags))
    Path("run/result.json").unlink()
    Path("mine.json").unlink()
    monkeypatch.chdir(tmp_path)
    before.rename(after)
    monkeypatch.setattr("runs.ROOT", after)
    refuses(train.main, ["--resume=after/run"], "data")  # data/ does not have it
    again = train.main(["--resume=after/run", "--data=after/corpus", "--threads=1"])
    assert again["updates"] == result["updates"]


def test_a_signal_in_the_last_update_finishes_the_run_and_stops_what_needed_it(
    corpus_folder, tmp_path, at_update, capsys
):
    at_update({3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(SystemExit) as stopped:
        trained(corpus_folder, tmp_path / "run", "--budget_steps=3")
    assert stopped.value.code == 128 + signal.SIGTERM and "charged" in capsys.readouterr().out
    assert (tmp_path / "run" / "result.json").exists()


# -- The methods of the study ----------------------------------------------------------------------


@pytest.fixture
def started(corpus_folder, t5_folder, tmp_path, monkeypatch):
    """started(method, model, *flags): a method of a small run as the loop starts it, with its
    optimizer."""
    monkeypatch.setattr("runs.ROOT", tmp_path)

    def start(name, model, *flags, prerequisites=None):
        folder = corpus_folder if model == "bert" else t5_folder
        own = f"--model={model} --method={name}"
        config = resolve(parse(small_run(folder, tmp_path / "run", own, *flags))[0])
        torch.manual_seed(config.seed)
        network, this = models.build(model, "tiny", 512), rst.find_reference("this")
        clock = rst.Clock(this, model, "cpu", budget_updates=config.budget_steps or 100)
        corpus = open_corpus(config)
        method = methods.find(name).start(network, corpus, clock, config, prerequisites or {})
        network.present_layers = method.layers()
        return method, method.methods[name], method.optimizer_in_use

    return start


@pytest.mark.slow
def test_sophias_estimate_is_the_gauss_newton_diagonal():
    """Of a softmax of W x with the mean cross-entropy: mean over the tokens of x_j^2 p_k (1 -
    p_k)."""
    torch.manual_seed(0)
    inputs, layer = torch.randn(12, 5), nn.Linear(5, 6, bias=False)
    logits = layer(inputs)
    p = logits.softmax(dim=-1).detach()
    exact = (torch.einsum("tk,tj->kj", p * (1 - p), inputs.square()) / 12).double()
    total, errors = torch.zeros(6, 5, dtype=torch.float64), {}
    for count in range(1, 4097):
        uniform = hash_of(0, count, torch.arange(12))[None].double() / 2**32
        (labels,) = sophia.sample_labels(logits.detach()[None], uniform)
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, layer.weight, retain_graph=True)
        total += sophia.hessian_estimate(gradients, 12, 0.0)[0]
        if count in (64, 4096):
            errors[count] = ((total / count - exact).norm() / exact.norm()).item()
    assert errors[4096] < 0.03 and errors[64] > 3 * errors[4096]  # as 1 / sqrt(samples)


def test_a_hessian_pass_moves_the_average_and_counts_the_wins(started):
    flags = "--hessian_clip=0.01 --micro_batch=2"
    method, part, optimizer = started("sophia", "bert", flags)
    part.model.loss(part.corpus.batch(method.next_batch())).backward()
    optimizer.step()
    optimizer.zero_grad()
    gradients = part.mean_gradients(np.arange(3), SECOND_STREAM, part.sampled_loss)
    norm, expected, wins = torch.nn.utils.get_total_norm(gradients.values()), [], []
    assert norm > 0.01
    tokens = 3 * part.corpus.predicted_per_row
    for parameter, gradient in gradients.items():
        clipped = gradient * 0.01 / (norm + 1e-6)
        expected.append(0.01 * tokens * clipped**2)
        momentum = 0.05 * expected[-1] * 2 * torch.rand_like(gradient)  # half of it is larger
        optimizer.state[parameter]["momentum"] = momentum
        wins.append((momentum < 0.05 * expected[-1]).flatten())
    part.refresh_hessian()
    for parameter, hessian in zip(gradients, expected):
        torch.testing.assert_close(optimizer.state[parameter]["hessian"], hessian)
    share = torch.cat(wins).float().mean().item()
    assert part.win_rate == pytest.approx(share, rel=1e-3) and 0.2 < share < 0.6


def test_labels_are_drawn_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, -math.inf]).expand(1, 200_000, 5)
    uniform = hash_of(3, torch.arange(200_000))[None].double() / 2**32
    labels = sophia.sample_labels(logits, uniform)
    shares = torch.bincount(labels.flatten(), minlength=5) / 200_000
    torch.testing.assert_close(shares, logits[0, 0].softmax(dim=-1), rtol=0, atol=0.004)
    assert shares[4] == 0 and sophia.sample_labels(
        logits[:, :2], torch.tensor([[0.0, 1 - 2**-32]])
    ).tolist() == [[3, 0]]
    # The loss says that it is none.
    assert sophia.sample_labels(torch.full((1, 1, 5), math.nan), torch.tensor([[0.5]])).item() < 5


def test_a_hessian_pass_that_is_not_finite_is_an_error(started):
    method, part, optimizer = started("sophia", "bert")
    part.model.loss(part.corpus.batch(method.next_batch())).backward()
    optimizer.step()
    with torch.no_grad():
        part.model.embedding[7] = math.nan
    with pytest.raises(UserError, match="the Hessian pass after update 1 is not finite"):
        part.refresh_hessian()


def test_sophias_pass_touches_nothing_but_the_hessian(started):
    for model, rows in (("bert", 3), ("t5", 6)):
        method, part, optimizer = started("sophia", model)
        network, corpus = part.model, part.corpus
        network.loss(corpus.batch(method.next_batch())).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        before = copy.deepcopy([network.state_dict(), optimizer.state_dict()["state"]])
        next_position = corpus.position[0]
        part.refresh_hessian()
        assert corpus.position == [next_position, rows] and part.rows == rows
        assert all(parameter.grad is None for parameter in network.parameters())
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[0][name])
        for index, state in optimizer.state_dict()["state"].items():
            assert torch.equal(state["momentum"], before[1][index]["momentum"])
            assert (state["hessian"] > 0).any()


def bare_layer_drop(model, gamma, **options):
    """layer_drop on a stub of everything but the model."""
    options = dict(theta_bar=0.5, gamma=gamma, rescale=False) | options
    config = SimpleNamespace(options=options, device="cpu", model="bert")
    clock = SimpleNamespace(progress=0.0, updates=0)
    corpus = SimpleNamespace(uniform=lambda *numbers: hash_of(0, *numbers) / 2**32)
    return layer_drop.LayerDrop(model, corpus, clock, config, {})


@pytest.mark.slow
@pytest.mark.parametrize("present", [[0, 1, 2, 3], [0, 1]])  # all, and what stacking begins with
@pytest.mark.parametrize("theta_bar", [0.5, 0.0])
def test_layer_drop_keeps_as_its_formula_says(theta_bar, present):
    gamma, draws = 20.0, 30_000
    model = SimpleNamespace(layers=[None] * 4, present_layers=present)
    method = bare_layer_drop(model, gamma, theta_bar=theta_bar)
    # All of them at the start.
    assert all(method.draw(number, method.keep_probs()) == present for number in range(100))
    for method.clock.updates, method.clock.progress in ((1, 0.02), (2, 1.0)):
        theta = theta_bar + (1 - theta_bar) * math.exp(-gamma * method.clock.progress)
        keep = np.array([1 - (i + 1) / len(present) * (1 - theta) for i in present])
        keep /= 1 - np.prod(1 - keep)  # an empty draw is drawn again
        groups = method.groups(np.arange(128 * draws, dtype=np.int32))
        drawn = [layers for _, layers in groups]
        counts = np.bincount(np.concatenate(drawn), minlength=len(present))
        assert len(groups) == draws and all(len(rows) == 128 for rows, _ in groups)
        assert min(map(len, drawn)) >= 1
        assert drawn[:9] == [layers for _, layers in method.groups(np.arange(128 * 9))]
        margin = 4.5 * np.sqrt(keep * (1 - keep) / draws) + 1e-12
        assert (np.abs(counts / draws - keep) < margin).all(), (counts / draws, keep)


@pytest.mark.slow
def test_each_group_of_rows_has_layers_of_its_own(started, corpus_folder, tmp_path, monkeypatch):
    """Three draws an update, as base has twelve; a rate of 0 keeps the weights where they can be
    known."""
    monkeypatch.setattr(layer_drop, "ROWS_PER_DRAW", {"bert": 2})
    flags = "--gamma=1000 --lr=0 --budget_steps=6 --micro_batch=1"
    method, part, _ = started("layer_drop", "bert", flags)
    trained(corpus_folder, tmp_path / "looped", "--method=layer_drop --validations=1", flags)
    for record in log_of(tmp_path / "looped")[0]:
        part.clock.updates = record["update"] - 1
        groups = method.groups(np.arange(6 * part.clock.updates, 6 * record["update"]))
        assert [len(rows) for rows, _ in groups] == [2, 2, 2]
        alone = [(rows[i : i + 1], layers) for rows, layers in groups for i in range(2)]
        loss = sum(part.model.loss(part.corpus.batch(row), layers) for row, layers in alone) / 6
        loss.backward()
        gradients = [weight.grad for weight in part.model.parameters() if weight.grad is not None]
        expected = loss.item(), torch.nn.utils.get_total_norm(gradients).item()
        part.model.zero_grad(set_to_none=True)
        assert (record["loss"], record["gradient_norm"]) == pytest.approx(expected, rel=1e-5)
        assert record["layer_drop"]["layers"] == sum(len(layers) for _, layers in groups) / 3
    assert len({tuple(layers) for _, layers in groups}) > 1


def test_one_graph_serves_all_layers_that_are_rescaled():
    """More layers than torch.compile makes versions of one function."""
    model = models.BERT(
        models.BERTConfig(vocabulary_size=64, n_layers=12, d_model=8, n_heads=2, d_ff=8)
    )
    method = bare_layer_drop(model, gamma=10.0, rescale=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.layers:
        layer.compile(backend="eager")
    tokens = torch.arange(12).view(2, 6)
    for method.clock.updates in range(3):
        method.clock.progress = method.clock.updates / 3
        ((_, layers),) = method.groups(np.arange(2))
        h = model.encode(tokens, layers)
        assert train.compilations() == 1, method.clock.updates
    with torch.no_grad():
        assert not torch.equal(model.encode(tokens, layers), h)
    assert train.compilations() == 2


def test_layer_drop_rescales_what_a_kept_layer_adds(started):
    for model in ("bert", "t5"):
        flags = "--rescale --gamma=1000 --theta_bar=0.5"
        method, part, _ = started("layer_drop", model, flags)
        part.clock.updates = 50
        method.groups(np.arange(2))
        batch = part.corpus.batch(np.arange(2))
        with torch.no_grad():
            plain = part.model.loss(batch, [2])
        scaled = part.model.loss(batch, [2]).detach()
        keep = 1 - 3 / 4 * 0.5
        with torch.no_grad():  # every branch ends in a matrix without bias
            for name, parameter in part.model.layers[2].named_parameters():
                if name.endswith("output.weight"):
                    parameter /= keep
            by_hand = part.model.loss(batch, [2])
        torch.testing.assert_close(by_hand, scaled, rtol=1e-6, atol=1e-6)
        assert abs(scaled.item() - plain.item()) > 1e-5
        # A pass with gradients between updates, as Sophia's, is of the model that is evaluated.
        method.after_step()
        assert part.model.loss(batch, [2]).item() == pytest.approx(scaled.item(), rel=1e-6)


def test_selection_percentiles_equal_counts():
    """The mean rank among equal losses, as scipy.stats.percentileofscore(kind="rank") defines
    it."""
    from scipy import stats

    generator = np.random.default_rng(0)
    for history in (np.array([0.5]), generator.integers(0, 5, 17) / 7, generator.normal(size=1000)):
        losses = history[-5:]
        expected = [stats.percentileofscore(history, loss, "rank") / 100 for loss in losses]
        found = selective_backprop.percentiles(losses, history)
        assert np.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_selective_backprop_equals_the_literal_loop(started, beta):
    flags = f"--beta={beta} --loss_history=500 --batch=50 --selection_batch=20"
    method, part, _ = started("selective_backprop", "bert", flags)
    losses = np.random.default_rng(1).gamma(2.0, size=60_000)
    part.row_losses = lambda positions: losses[positions]
    history, waiting, position = collections.deque(maxlen=500), [], 0
    candidates = accepted = 0
    for _ in range(100):
        while len(waiting) < 50:
            group = range(position, position + 20)
            position += 20
            history.extend(losses[i] for i in group)
            for i in group:
                below = sum(old < losses[i] for old in history)
                equal = sum(old == losses[i] for old in history)
                probability = ((below + (equal + 1) / 2) / len(history)) ** beta
                draw = hash_of(part.corpus.seed, selective_backprop.ACCEPTANCE, i) / 2**32
                if draw < probability:
                    waiting.append(i)
        assert method.next_batch().tolist() == waiting[:50]
        waiting = waiting[50:]
        report = method.report()["selective_backprop"]
        candidates, accepted = candidates + report["candidates"], accepted + report["accepted"]
        assert report["waiting"] == len(waiting) and part.corpus.position[0] == position
    share = 1 / (1 + beta)
    margin = 4 * math.sqrt(share * (1 - share) / candidates) + 0.5 / 500
    assert accepted / candidates == pytest.approx(share, abs=margin)


def test_rho_trains_on_the_largest_differences(started):
    theirs = SimpleNamespace()
    flags, needed = "--mega_batch_factor=5 --batch=40", {rho.MODEL: theirs}
    method, part, _ = started("rho", "bert", flags, prerequisites=needed)
    # With ties.
    training, irreducible = np.random.default_rng(2).normal(size=(2, 2000)).round(1)

    def row_losses(positions, model=None):
        return (irreducible if model is theirs else training)[positions]

    part.row_losses = row_losses
    for update in range(10):
        candidates = list(range(200 * update, 200 * (update + 1)))
        # Stable: the earlier of equals.
        by_score = sorted(candidates, key=lambda i: irreducible[i] - training[i])
        assert method.next_batch().tolist() == sorted(by_score[:40])
    expected = np.mean([training[i] - irreducible[i] for i in by_score[:40]])
    assert part.report()["chosen_score"] == pytest.approx(expected)


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_row_losses_are_those_of_the_rows(started, model):
    method, part, _ = started("rho", model, "--micro_batch=3", prerequisites={})
    expected = [
        part.model.loss(part.corpus.batch(np.array([position]))).item() for position in range(5, 12)
    ]
    assert part.row_losses(np.arange(5, 12)).tolist() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        next(part.model.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match="a row's loss is not finite before update 1"):
        part.row_losses(np.arange(5, 12))


@pytest.mark.parametrize("optimizer_state", ["keep", "reset", "copy"])
@pytest.mark.parametrize("model", ["bert", "t5"])
def test_stacking_doubles_the_model(started, model, optimizer_state):
    flags = f"--growth_times=0.2,0.5 --optimizer_state={optimizer_state} --budget_steps=10"
    method, part, optimizer = started("stacking", model, flags)
    network, batch = part.model, part.corpus.batch(np.arange(3))
    method.begin_update()
    assert method.layers() == [0]
    part.clock.updates = 2
    network.loss(batch, [0]).backward()
    optimizer.step()
    before = network.loss(batch, [0]).item()
    by_hand = network.loss(batch, [0, 0]).item()  # the one layer twice
    moment = optimizer.state[next(network.layers[0].parameters())]["exp_avg"].clone()
    assert method.layers() == [0]  # a query changes nothing
    method.begin_update()
    assert method.layers() == [0, 1]
    assert network.loss(batch, [0, 1]).item() == by_hand != before
    old_has, new_has = optimizer_state != "reset", optimizer_state == "copy"
    for old, new in zip(network.layers[0].parameters(), network.layers[1].parameters()):
        assert torch.equal(old, new) and old is not new
        assert (old in optimizer.state, new in optimizer.state) == (old_has, new_has)
        if optimizer_state == "copy":
            one, other = (optimizer.state[weight]["exp_avg"] for weight in (old, new))
            assert torch.equal(one, other) and one is not other
    if optimizer_state != "reset":
        assert torch.equal(optimizer.state[next(network.layers[0].parameters())]["exp_avg"], moment)
    optimizer.zero_grad()
    network.loss(batch, [0, 1]).backward()
    optimizer.step()
    by_hand = network.loss(batch, [0, 1, 0, 1]).item()
    part.clock.updates = 5
    method.begin_update()
    assert method.layers() == [0, 1, 2, 3] and network.loss(batch, [0, 1, 2, 3]).item() == by_hand
    again = type(part)(part.model, part.corpus, part.clock, part.config, part.finished_models)
    again.load_state_dict(part.state_dict())
    assert again.layers() == [0, 1, 2, 3]


# -- The contract: what every file in methods/ keeps to, a forker's own included -------------------

# Tiny's layers, of a width at which saving takes no time.
NARROW = dict(n_layers=4, d_model=64, n_heads=2, d_ff=96)
SAVING = "--checkpoint_minutes=0.00001"  # after every update
EVERY_METHOD = [
    (name, model) for name in methods.names() for model in methods.find(name).classes[name].models
]


@pytest.fixture(scope="session")
def contract(corpus_folder, t5_folder, tmp_path_factory):
    """contract(name, model, variant, *flags): the folder of a run of 12 updates of 8 rows, made
    once. Runs share what they need first."""
    root = tmp_path_factory.mktemp("contract")

    def flags_of(name, model, variant, *flags):
        data = corpus_folder if model == "bert" else t5_folder
        recipe = f"--model={model} --method={name} --batch=8 --lr=0.0005 --budget_steps=12"
        out = root / f"{name}-{model}-{variant}"
        return small_run(data, out, recipe, "--validations=2", *flags)

    def run(name, model, variant="plain", *flags):
        folder = root / f"{name}-{model}-{variant}"
        if not (folder / "result.json").exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("runs.ROOT", root)
                patch.setitem(models.SIZES[model], "tiny", NARROW)
                flags = flags_of(name, model, variant, *flags)
                new = not (folder / "config.json").exists()
                train.main(flags if new else [f"--resume={folder}"])
        return folder

    run.root, run.flags_of = root, flags_of
    return run


def losses_of(folder):
    return [record["loss"] for record in log_of(folder)[0]]


def norms_of(folder):
    return [record["gradient_norm"] for record in log_of(folder)[0]]


def reports_of(folder, combination):
    """{method, name and update: number} of all that methods reported."""
    return {
        (method, name, record["update"]): number
        for record in log_of(folder)[0]
        for method in combination.split("+")
        for name, number in record.get(method, {}).items()
    }


def assert_alike(one, other, combination, message):
    """Two runs' losses, gradients and reports within rounding."""
    assert losses_of(one) == pytest.approx(losses_of(other), rel=1e-4), f"{message}: loss"
    assert norms_of(one) == pytest.approx(norms_of(other), rel=1e-3), f"{message}: gradient"
    validated = [[record["validation_loss"] for record in log_of(run)[1]] for run in (one, other)]
    assert validated[0] == pytest.approx(validated[1], rel=1e-4), f"{message}: validation loss"
    reports = reports_of(other, combination)
    near = pytest.approx(reports, rel=1e-3, abs=1e-3)
    assert reports_of(one, combination) == near, f"{message}: report"


def assert_two_processes_are_one(two, one, combination):
    assert_alike(two, one, combination, "two processes together do not what one does")
    of_each = [(two / f"weights-of-process-{rank}.json").read_text() for rank in range(2)]
    assert of_each[0] == of_each[1], "each process ended with weights of its own"


@pytest.mark.parametrize("name", methods.names())
def test_contract_declarations(name):
    """Options and defaults are real flags, and no hook is misspelt."""
    (cls,) = methods.find(name).classes.values()
    message = "a method file opens with paper, idea, cost, finding, deviation"
    assert sys.modules[cls.__module__].__doc__, message
    hooks = [hook for hook in dir(Method) if hook[0] != "_"]
    for attribute in set(vars(cls)) - set(dir(Method)):
        meant = difflib.get_close_matches(attribute, hooks, 1, cutoff=0.85)
        assert not meant, f"{attribute} is no hook; is {meant} meant? If not, choose another name"
    saves = cls.state_dict is not Method.state_dict
    assert saves == (cls.load_state_dict is not Method.load_state_dict), "a resumed run needs both"
    common = {field.name: field for field in dataclasses.fields(Config)}
    for flag, option in cls.options.items():
        assert flag.isidentifier() and isinstance(option, Option) and flag not in common, flag
        assert isinstance(option.default, (bool, int, float, str)), flag
        assert not option.choices or option.default in option.choices, flag
    known = {flag for flag, field in common.items() if field.default is None} | set(cls.options)
    turned_off = ((model, {"base": off}) for model, off in cls.turned_off.items())
    for model, sizes in (*cls.defaults.items(), *turned_off):
        shape = f"expected {{model: {{size: {{flag: value}}}}}}: {model}"
        assert model in cls.models and set(sizes) <= {"base", "small", "tiny"}, shape
        for values in sizes.values():
            assert set(values) <= known, f"{set(values) - known} are no flags"


@pytest.mark.parametrize("name, model", EVERY_METHOD)
def test_contract_trains_and_resumes_bit_for_bit(
    contract, monkeypatch, at_update, capsys, name, model
):
    plain = contract(name, model)
    losses = losses_of(plain)
    assert len(losses) == 12 and np.isfinite(losses).all()
    monkeypatch.setitem(models.SIZES[model], "tiny", NARROW)
    torch.manual_seed(0)
    fresh, saved = models.build(model, "tiny", 512).state_dict(), weights_of(plain)
    assert not any(torch.equal(fresh[key], saved[key]) for key in saved if saved[key].dim() == 2)
    at_update({1: kill, 5: kill, 8: kill, 12: kill})  # before and after stacking has grown
    for _ in range(4):
        with pytest.raises(Killed):
            contract(name, model, "killed", SAVING)
    killed = contract(name, model, "killed")
    said = re.findall("resumed after update ([0-9]+)", capsys.readouterr().out)
    assert said == ["0", "4", "7", "11"]
    message = "a resumed run ends with other weights: is something missing from state_dict?"
    assert_same_weights(plain, killed, message)
    timing = {"charged_seconds", "free_seconds", "spent_seconds", "factor"}
    one, other = (
        [
            {key: value for key, value in record.items() if key not in timing}
            for record in itertools.chain(*log_of(folder))
        ]
        for folder in (plain, killed)
    )
    message = "logs something else: is something missing from state_dict, or not reset?"
    assert one == other, f"a resumed run {message}"


@pytest.mark.parametrize("name, model", EVERY_METHOD)
def test_contract_validation_is_the_models_own(contract, name, model):
    """What result.json says, computed from what was saved."""
    folder = contract(name, model)
    result = json.loads((folder / "result.json").read_text())
    corpus, network = open_corpus(resumed(folder, {})[0]), models.load(folder / "model.pt")
    with torch.no_grad():
        losses = [network.loss(row).item() for row in corpus.validation_batches(1)]
    assert statistics.mean(losses) == pytest.approx(result["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("name, model", EVERY_METHOD)
def test_contract_micro_batch_and_free_passes_change_nothing(contract, name, model):
    plain, other = contract(name, model), contract(name, model, "micro_batch", "--micro_batch=3")
    assert_alike(other, plain, name, "another micro-batch does something else")
    # No weights may change in a free block: the clock looks.
    if "free_extra_passes" in methods.find(name).options:
        free = contract(name, model, "free", "--free_extra_passes")
        assert_same_weights(plain, free)
        charged, uncharged = (
            json.loads((folder / "result.json").read_text())["free_seconds"]
            for folder in (plain, free)
        )
        assert uncharged > 0 and (charged > 0) == (name == "rho")  # its second model's losses


@pytest.mark.parametrize("name", methods.names())
def test_contract_goes_on_after_overflows_in_fp16(contract, monkeypatch, name):
    cls = methods.find(name).classes[name]
    if "fp16" not in cls.dtypes or "bert" not in cls.models:  # T5 takes too long on a CPU
        pytest.skip(f"{name} is not for a BERT in fp16")
    large = functools.partial(torch.amp.GradScaler, init_scale=2.0**26)
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    folder = contract(name, "bert", "fp16", "--dtype=fp16")
    skipped = [record["skipped"] for record in log_of(folder)[0]]
    assert skipped == sorted(skipped, reverse=True) and 0 < sum(skipped) < 12, skipped
    assert all(weight.isfinite().all() for weight in weights_of(folder).values())


@pytest.mark.parametrize("name", methods.names())
def test_contract_combines_with_stacking(contract, at_update, name):
    """Layers that come, and a resume in between."""
    try:
        methods.find(f"stacking+{name}")
    except UserError:
        pytest.skip(f"{name} is stacking, or claims one of its hooks")
    model = methods.find(name).classes[name].models[0]
    plain = contract(f"stacking+{name}", model)
    assert [record["stacking"]["layers"] for record in log_of(plain)[0]][::11] == [1, 4]
    at_update({3: kill})
    with pytest.raises(Killed):
        contract(f"stacking+{name}", model, "killed", SAVING)
    assert_same_weights(plain, contract(f"stacking+{name}", model, "killed"))


@pytest.mark.parametrize(
    "name, model",
    [
        (name, model)
        for name, model in EVERY_METHOD
        if methods.find(name).classes[name].turned_off.get(model)
    ],
)
def test_contract_turned_off_is_the_baseline(contract, name, model):
    recipe = methods.find("baseline").defaults(model, "tiny").items()
    values = {flag: value for flag, value in recipe if flag not in ("lr", "batch", "schedule")}
    values |= methods.find(name).classes[name].turned_off[model]
    off = contract(name, model, "off", *(f"--{flag}={value}" for flag, value in values.items()))
    assert_same_weights(contract("baseline", model), off, f"turned off, {name} is not the baseline")


def run_all_in_two_processes(tmp_path, root, runs):
    """Runs all of them with two processes, one after the other; resumes those that were begun."""
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    (tmp_path / "runs.json").write_text(json.dumps([runs, NARROW]))
    in_two_processes(tmp_path / "script.py", root, tmp_path / "runs.json")


TWO_PROCESSES = """
import json, sys
from pathlib import Path
import rst, model, parallel, runs, train
from config import parse, plan, resolve
runs.ROOT = Path(sys.argv[1])
clocks = []
init = rst.Clock.__init__
rst.Clock.__init__ = lambda self, *a, **b: (init(self, *a, **b), clocks.append(self))[0]
flags_of_all, size = json.loads(Path(sys.argv[2]).read_text())
for sizes in model.SIZES.values():
    sizes["tiny"] = size
for number, flags in enumerate(flags_of_all):
    config = resolve(parse(flags)[0])
    if not number:
        train.start_processes(config)
    train.train(plan(config))
    sums = rst.fingerprint(clocks[-1].weights)[1]
    name = f"weights-of-process-{parallel.process()}.json"
    (Path(config.out) / name).write_text(json.dumps(sums))
    parallel.wait_for_all()
"""


@pytest.fixture(scope="session")
def runs_in_two_processes(contract, request, tmp_path_factory):
    """Those of all selected tests, by the same two processes: starting them takes longer than a
    run."""
    tests = (item for item in request.session.items if "two_processes_are_one" in item.name)
    selected = [(test.callspec.params["name"], test.callspec.params["model"]) for test in tests]
    for name, model in selected:
        contract(name, model)  # with what it needs first
    flags = [contract.flags_of(name, model, "two") for name, model in selected]
    run_all_in_two_processes(tmp_path_factory.mktemp("two"), contract.root, flags)


@pytest.mark.parametrize("name, model", EVERY_METHOD)
def test_contract_two_processes_are_one(contract, runs_in_two_processes, name, model):
    two, plain = (contract.root / f"{name}-{model}-{variant}" for variant in ("two", "plain"))
    assert_two_processes_are_one(two, plain, name)


COMBINATIONS = {
    "stacking+length_warmup+muon+wsd": "",
    "token_rho+lawa": "",
    "rho+muon": "",
    "layer_drop+mask_schedule+schedule_free": "--gamma=30",
    "stacking+selective_backprop+sophia": "--hessian_interval=4 --selection_batch=4",
    "stacking+layer_drop+token_dropping+lion": "--growth_times=0.5 --gamma=30",
}


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_methods_combine_and_resume(contract, at_update, tmp_path, model):
    """Killed and resumed the same bits; with two processes, saved on the way, the same within
    rounding."""
    for name, flags in COMBINATIONS.items():
        plain = contract(name, model, "plain", flags)
        at_update({8: kill})
        with pytest.raises(Killed):
            contract(name, model, "killed", flags, SAVING)
        assert_same_weights(plain, contract(name, model, "killed"))
    all_flags = [
        contract.flags_of(name, model, "two", flags, SAVING) for name, flags in COMBINATIONS.items()
    ]
    run_all_in_two_processes(tmp_path, contract.root, all_flags)
    for name in COMBINATIONS:
        two, plain = (contract.root / f"{name}-{model}-{variant}" for variant in ("two", "plain"))
        assert_two_processes_are_one(two, plain, name)


def test_methods_that_claim_one_hook_do_not_combine():
    refused = 0
    for one, other in itertools.combinations(sorted({*methods.names()} - {"baseline"}), 2):
        owners = [methods.find(name).owner for name in (one, other)]
        both = [hook for hook in methods.HOOKS if all(own[hook] for own in owners)]
        if both:
            with pytest.raises(UserError, match=rf"{one} and {other} both .*\({both[0]}\)"):
                methods.find(f"{one}+{other}")
        else:
            methods.find(f"{one}+{other}")
        refused += bool(both)
    assert refused > 9


@pytest.mark.slow
def test_extra_passes_are_charged_unless_free(corpus_folder, tmp_path, monkeypatch):
    """By a clock on which only such a pass takes time: a second, exactly."""
    monkeypatch.setattr("runs.ROOT", tmp_path)
    seconds, passes = [0.0], collections.Counter()
    monkeypatch.setattr(rst, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def taking_a_second(place):
        original = getattr(Method, place)

        def wrapper(self, *arguments):
            if self.clock.rehearsed_progress is None:  # not to warm up
                seconds[0] += 1
                of_rhos_model = place == "row_losses" and len(arguments) == 2
                passes["always free" if of_rhos_model else "extra"] += 1
            return original(self, *arguments)

        return wrapper

    for place in ("row_losses", "mean_gradients"):
        monkeypatch.setattr(Method, place, taking_a_second(place))
    for name, flags in (
        ("selective_backprop", ""),
        ("sophia", "--hessian_interval=2"),
        ("rho", ""),
    ):
        losses = []
        for free in ("", "--free_extra_passes"):
            passes.clear()
            out = tmp_path / f"{name}{free}"
            own = f"--method={name} --budget_steps=6 --validations=1"
            result = trained(corpus_folder, out, own, flags, free)
            losses.append(losses_of(out))
            extra, always_free = passes["extra"], passes["always free"]
            assert extra == {"sophia": 3, "rho": 6}.get(name, extra) and extra >= 3
            assert always_free == (6 if name == "rho" else 0)
            assert result["charged_seconds"] == (0 if free else extra)
            assert result["free_seconds"] == always_free + (extra if free else 0)
        assert losses[0] == losses[1]


@pytest.mark.slow
def test_rho_trains_its_other_model_once(corpus_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("runs.ROOT", tmp_path)
    places = (tmp_path / str(number) for number in itertools.count())

    def other_model(*flags):
        """What is said of it, its cost."""
        result = trained(corpus_folder, next(places), "--method=rho --validations=1", *flags)
        (said,) = re.findall(r"irreducible_loss_model: (\w+) .*", capsys.readouterr().out)
        return said, result["prerequisites"][rho.MODEL]

    said, cost = other_model("--budget_steps=3")
    assert said == "training" and cost["updates"] == 3 and cost["charged_seconds"] > 0
    assert other_model("--budget_steps=3 --seed=1")[0] == "reusing"
    # Its recipe is the baseline's, whatever the run's.
    assert other_model("--budget_steps=3 --lr=0.0001 --clip=2")[0] == "reusing"
    assert other_model("--budget_steps=4 --lr=0.0001 --clip=2 --seed=3")[0] == "training"
    folder, _ = (tmp_path / "runs").iterdir()
    stored = json.loads((folder / "config.json").read_text())["config"]
    assert (stored["method"], stored["train_on"], stored["seed"]) == ("baseline", "holdout", 0)
    # The same text elsewhere is the same run; other text in its place is another.
    moved, flags = tmp_path / "moved", "--budget_steps=3 --validation_rows=9"
    data = f"--data={shutil.copytree(corpus_folder, tmp_path / 'again')}"
    assert other_model(flags, data)[0] == "training"
    (tmp_path / "again").rename(moved)
    assert other_model(flags, f"--data={moved}", "--seed=9")[0] == "reusing"
    (tmp_path / "other.txt").write_text(words_text(1, 20_000).replace("aa", "\n\n"))
    prepare.prepare("moved", str(tmp_path / "other.txt"), 512, folder=moved)
    assert other_model(flags, f"--data={moved}")[0] == "training"


def program_of(page, text):
    """The one Python program on a page that has this text in it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (found,) = (block for block in blocks if text in block)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, title, flags, said",
    [
        ("README.md", "Largest loss", "--method=page+lion --candidates=4", "candidates 4"),
        ("docs/methods.md", "Largest loss", "--method=page+lion --candidates=4", "clip 1,"),
        ("docs/course.md", "Constant", "--method=page", "method page"),
        ("docs/course.md", "Short rows with", "--method=page --shortest=0.5", "shortest 0.5"),
    ],
)
def test_the_pages_methods_are_complete(
    corpus_folder, tmp_path, method_files, at_update, capsys, page, title, flags, said
):
    """As they stand there: killed and resumed, next to one of the six, with another option."""
    method_files(page=program_of(page, f'"""{title}'))
    flags += " --budget_steps=6 --validations=1"
    trained(corpus_folder, tmp_path / "plain", flags)
    assert said in capsys.readouterr().out
    at_update({4: kill})
    with pytest.raises(Killed):
        trained(corpus_folder, tmp_path / "killed", flags, SAVING)
    train.main([f"--resume={tmp_path / 'killed'}"])
    assert_same_weights(tmp_path / "plain", tmp_path / "killed")
    one, two = (log_of(tmp_path / folder)[0] for folder in ("plain", "killed"))
    for name in ("loss", "page"):
        assert [record.get(name) for record in one] == [record.get(name) for record in two]


def test_the_courses_programs_find_where_the_model_grows_and_what_the_factor_was(contract, capsys):
    program = program_of("docs/course.md", "FOLDER/log.jsonl")
    exec(program.replace("FOLDER", str(contract("stacking", "bert"))), {})
    assert re.findall(r"^(\d) layers: \d.* -> \d", capsys.readouterr().out, re.M) == ["2", "4"]
    program = program_of("docs/course.md", "FOLDER/result.json")
    exec(program.replace("FOLDER", str(ROOT / "results" / "reference_time" / "3-others")), {})
    factors = kept("reference_time/3-others")["factor_history"]
    printed = re.findall(r"^ *\d+ s: (\d\.\d\d)$", capsys.readouterr().out, re.MULTILINE)
    assert len(factors) > 10 and printed == [f"{factor:.2f}" for _, factor in factors]


def test_a_schedule_of_the_course_equals_the_flags_that_it_names(corpus_folder, method_files):
    method_files(constant=program_of("docs/course.md", '"""Constant'))
    (cls,) = methods.find("constant").classes.values()
    options = dict(warm_up=0.2, cool_down=0.0, shape="sqrt")
    config = SimpleNamespace(options=options)
    for progress in np.linspace(0, 1, 101):
        expected = wsd.WSD.schedule(SimpleNamespace(config=config), progress)
        assert cls.schedule(None, progress) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, model, options",
    [
        ("layer_drop+lion", "bert", "--rescale --gamma=30"),
        ("stacking", "t5", "--growth_times=0.3,0.6"),
        ("stacking+selective_backprop+sophia", "bert", "--hessian_interval=4 --selection_batch=6"),
        ("stacking+rho", "bert", "--growth_times=0.3,0.6"),
        ("length_warmup", "t5", "--shortest=0.5"),
    ],
)
def test_nothing_is_compiled_after_the_warm_up(
    corpus_folder, t5_folder, tmp_path, monkeypatch, name, model, options
):
    """Growing and dropping layers, scoring, a validation whose last batch is short. Without
    generating code, which takes the time; `bench.py step` and the update rules do."""
    monkeypatch.setattr("runs.ROOT", tmp_path)
    torch._dynamo.reset()
    for owner in (torch, nn.Module):
        traced = functools.partialmethod(owner.compile, backend="aot_eager")
        if owner is torch:
            traced = functools.partial(owner.compile, backend="aot_eager")
        monkeypatch.setattr(owner, "compile", traced)
    counts, loop = [], train.Training.loop

    def counted(self, stop):
        before = train.compilations()
        stopped = loop(self, stop)
        counts.append((before, train.compilations()))
        return stopped

    monkeypatch.setattr(train.Training, "loop", counted)
    flags = f"--model={model} --method={name} {options} --compile --budget_steps=10 --validations=2"
    trained(corpus_folder if model == "bert" else t5_folder, tmp_path / "run", flags)
    updates, _ = log_of(tmp_path / "run")
    reported = (record[name.split("+")[0]] for record in updates)
    assert len({tuple(report.values()) for report in reported}) >= 2
    assert all(0 < before == after for before, after in counts)
    assert [record["compilations"] for record in updates] == [0] * 10


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_is_near_eager(corpus_folder, tmp_path):
    for name, compiled in (("eager", ""), ("compiled", "--compile")):
        flags = small_run(corpus_folder, tmp_path / name, "--budget_steps=4", compiled)
        result = command("train.py", *flags)
        assert result.returncode == 0, result.stderr
    eager, compiled = (losses_of(tmp_path / name) for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-5) and "compiled" in result.stdout


@pytest.mark.slow
def test_evaluation_weights_are_validated_and_saved_and_do_not_disturb(
    corpus_folder, tmp_path, monkeypatch
):
    flags = "--budget_steps=5 --validations=5"
    trained(corpus_folder, tmp_path / "baseline", flags)

    def halved(self):
        return {weight: weight.detach() / 2 for weight in self.model.parameters()}

    monkeypatch.setattr(Method, "evaluation_weights", halved)
    trained(corpus_folder, tmp_path / "halved", flags)
    one, other = log_of(tmp_path / "baseline"), log_of(tmp_path / "halved")
    assert [record["loss"] for record in one[0]] == [record["loss"] for record in other[0]]
    whole, model = weights_of(tmp_path / "baseline"), models.load(tmp_path / "halved" / "model.pt")
    assert all(torch.equal(own, whole[name] / 2) for name, own in model.named_parameters())
    corpus = Corpus(corpus_folder, row_length=32, validation_rows=20, mask_share=0.3)
    loss = other[1][-1]["validation_loss"]
    assert train.validate(model, corpus, 6) == pytest.approx(loss, rel=1e-6)
    assert one[1][-1]["validation_loss"] != loss


# -- A GPU, or one that is not there ---------------------------------------------------------------

# Where the loop waits for the device: the clock, its numbers, and what some methods read.
MAY_WAIT = {
    ("synchronize", "rst.py, synchronise"),
    ("tolist", "parallel.py, read"),
    ("tolist", "baseline.py, row_losses"),
    ("tolist", "rst.py, fingerprint"),
    ("tolist", "sophia.py, refresh_hessian"),
    ("item", "train.py, validate"),
    ("item", "train.py, save_checkpoint"),
    ("tolist", "finetune.py, predictions"),
    ("item", "finetune.py, finetune"),
    ("item", "model.py, generate"),
}


@pytest.fixture
def on_gpu():
    """on_gpu(function): calls it where "cuda" is a GPU, or one that is not there, of which every
    operation is checked."""

    def call(function, may_wait=(), **of_gpu):
        if torch.version.cuda:
            if not torch.cuda.is_available():
                pytest.skip("a CUDA build of torch, and no GPU")
            return function()
        with fake_cuda(**of_gpu) as gpu:
            function()
        assert set(gpu.waits) <= {*MAY_WAIT, *may_wait}, "waits for the device"
        assert not gpu.attention["math"], "attention falls back to its slow path"
        return gpu

    return call


@pytest.fixture
def gpu_run(corpus_folder, t5_folder, tmp_path, monkeypatch):
    """gpu_run(model, method, *flags): two updates of a base model with fewer layers. Where nothing
    has values, a model that is needed first is a new one."""

    def run(model, method, *flags):
        layers = 4 if "dropping" in method else 2
        monkeypatch.setitem(models.SIZES[model]["base"], "n_layers", layers)
        if not torch.version.cuda:
            numbers = ("updates", "charged_seconds", "wall_seconds", "validation_loss")
            (tmp_path / "result.json").write_text(json.dumps(dict.fromkeys(numbers, 1)))
            monkeypatch.setattr(train, "ensure_run", lambda *_: tmp_path)

            def fresh(path, device="cpu"):
                return models.build(model, "base", 512).to(device)

            monkeypatch.setattr(models, "load", fresh)
            for place in (models, runs):
                monkeypatch.setattr(place, "write_tensors", lambda *_: None)
        folder = corpus_folder if model == "bert" else t5_folder
        common = "--size=base --vocabulary=512 --device=cuda --budget_steps=2 --validation_rows=8"
        common += f" --method={method} --model={model} --batch=16 --micro_batch=8 --validations=1"
        common += " --reference=this" + " --compile=false" * (not torch.version.cuda)
        out = tmp_path / f"{model}-{method}"
        train.main([f"--data={folder}", f"--out={out}", *" ".join([common, *flags]).split()])

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name, model", EVERY_METHOD)
def test_every_method_on_a_gpu(on_gpu, gpu_run, name, model):
    options = {
        "sophia": "--hessian_interval=1",
        "token_dropping": "--full_phase=0",
        "layer_drop": "--rescale --gamma=1000",
        "length_warmup": "--shortest=0.5",
        "mask_schedule": "--steps=2",
        "stacking": "--growth_times=0.5",
    }
    on_gpu(lambda: gpu_run(model, name, options.get(name, "")))


@pytest.mark.slow
def test_before_ampere_training_is_in_fp16(on_gpu, gpu_run, tmp_path):
    old = dict(capability=(7, 5))
    overflow = [("item", "train.py, loop")]  # the scaler looks for one
    on_gpu(lambda: gpu_run("bert", "lion"), overflow, **old)
    on_gpu(lambda: gpu_run("bert", "sophia"), **old)
    if not torch.version.cuda:
        for name, dtype in (("lion", "fp16"), ("sophia", "fp32")):
            stored = json.loads((tmp_path / f"bert-{name}" / "config.json").read_text())["config"]
            assert stored["dtype"] == dtype


@pytest.mark.slow
def test_fine_tuning_on_a_gpu(on_gpu, corpus_folder, t5_folder, monkeypatch):
    rows = [tasks.Row((words_text(1, 9), words_text(2, 12)), 1, references=("a",))] * 20

    def tune(kind, folder, suite, task, rows):
        recipe = dataclasses.replace(suite.RECIPE, epochs=1, batch=8, max_length=32, dtype="bf16")
        monkeypatch.setitem(models.SIZES[kind]["base"], "n_layers", 2)
        model = models.build(kind, "base", 512)
        model.autocast_dtype = torch.bfloat16
        tokenizer = prepare.load_tokenizer(folder)
        learner = finetune.KINDS[kind](model, tokenizer, suite.TASKS[task], recipe).to("cuda")
        finetune.finetune(learner, suite.TASKS[task], rows, {"": rows}, recipe, 0, "cuda", task)

    on_gpu(lambda: tune("bert", corpus_folder, glue, "rte", rows))
    texts = [dataclasses.replace(row, label="a b") for row in rows]
    task = next(iter(sni.TASKS))
    on_gpu(lambda: tune("t5", t5_folder, sni, task, texts))


@pytest.mark.skipif(bool(torch.version.cuda), reason="needs a torch without CUDA")
@pytest.mark.parametrize("model", ["bert", "t5"])
def test_the_default_micro_batch_fits_a_gpu(on_gpu, monkeypatch, model):
    """Measured: the memory that rows take more, next to the estimate; and equal parts of an update
    that fit."""
    monkeypatch.setitem(models.SIZES[model], "base", models.SIZES[model]["base"] | {"n_layers": 4})
    for dtype in ("bf16", "fp32"):
        flags = {"model": model, "size": "base", "device": "cuda", "dtype": dtype}

        def step(rows):
            config = resolve(flags | {"micro_batch": rows, "compile": False})
            language_model = models.build(model, "base", config.vocabulary).to("cuda")
            language_model.autocast_dtype = models.DTYPES[dtype]
            batch = bench.random_batch(config, rows)
            batch = {name: tensor.to("cuda", non_blocking=True) for name, tensor in batch.items()}
            language_model.loss(batch).backward()
            step.estimate = language_model.training_bytes_per_row(config.row_length)

        small, large = (on_gpu(lambda: step(rows)).peak_bytes for rows in (16, 32))
        assert 1 < step.estimate / ((large - small) / 16) < 1.4
    monkeypatch.undo()
    for memory, processes, expected in (
        (80 << 30, 1, {"bert": 768, "t5": 72}),
        (80 << 30, 8, {"bert": 192, "t5": 18}),
        (24 << 30, 1, {"bert": 192, "t5": 24}),
        (1 << 30, 1, {"bert": 1, "t5": 1}),
    ):
        with fake_cuda(memory_bytes=memory), pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", str(processes))
            config = resolve({"model": model, "device": "cuda"})
            assert (config.size, config.compile) == ("base", True)
            assert config.micro_batch == expected[model], (memory, processes)


@pytest.mark.skipif(bool(torch.version.cuda), reason="needs a torch without CUDA")
def test_more_processes_than_gpus(monkeypatch):
    with fake_cuda():
        config = resolve({"device": "cuda"})
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(UserError, match=r"--device=cuda:1: torch sees 1 GPU\(s\) here"):
            train.start_processes(config)


OF_UNKNOWN_SHAPE = torch._subclasses.fake_tensor.DynamicOutputShapeException
MISTAKES_ON_A_GPU = {  # an expression for the loss, and what it raises
    "a tensor of the CPU": ("(loss[None] * torch.ones(1)).sum()", RuntimeError, "device"),
    "item": ("loss * loss.item()", AssertionError, "wait"),
    "tolist": ("loss * sum(loss[None].tolist())", AssertionError, "wait"),
    "a boolean index": ("loss[None][loss[None] > 0].mean()", OF_UNKNOWN_SHAPE, None),
    "a copy": ("(loss[None] * torch.ones(1).to(loss.device)).sum()", AssertionError, "wait"),
    "no kernel": ("loss * batch['tokens'].to(torch.uint16).sum()", NotImplementedError, None),
}


@pytest.mark.skipif(bool(torch.version.cuda), reason="needs a torch without CUDA")
@pytest.mark.parametrize("mistake", MISTAKES_ON_A_GPU)
def test_a_mistake_on_a_gpu_is_noticed(on_gpu, gpu_run, method_files, mistake):
    expression, raised, message = MISTAKES_ON_A_GPU[mistake]
    method_files(
        mistaken=f'''
        """Paper, idea, cost."""
        import torch
        from methods.baseline import Method

        class Mistaken(Method):
            def loss(self, batch, layers):
                loss = super().loss(batch, layers)
                return {expression}
        '''
    )
    with pytest.raises(raised, match=message):
        on_gpu(lambda: gpu_run("bert", "mistaken"))


@pytest.mark.skipif(bool(torch.version.cuda), reason="needs a torch without CUDA")
def test_slow_attention_is_noticed(on_gpu, gpu_run, monkeypatch):
    contiguous = models.T5.position_bias

    def transposed(self, *arguments, **keywords):
        return contiguous(self, *arguments, **keywords).mT.contiguous().mT

    monkeypatch.setattr(models.T5, "position_bias", transposed)
    with pytest.raises(AssertionError, match="slow path"):
        on_gpu(lambda: gpu_run("t5", "baseline"))


# -- The newer methods, each next to an independent one --------------------------------------------


@pytest.mark.parametrize("name", ["baseline", "lion", "muon", "schedule_free", "sophia"])
def test_t5s_step_is_in_proportion_to_each_tensors_rms(started, name):
    moves = []
    for scaled in ("false", "true"):
        _, part, optimizer = started(name, "t5", f"--rms_scaling={scaled} --weight_decay=0 --eps=0")
        weights, generator = dict(part.model.named_parameters()), torch.Generator().manual_seed(1)
        before = {key: weight.detach().clone() for key, weight in weights.items()}
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        moves.append({key: before[key] - weight.detach() for key, weight in weights.items()})
    for key, plain in moves[0].items():
        rms = before[key].square().mean().sqrt()
        torch.testing.assert_close(moves[1][key], plain * rms, rtol=1e-3, atol=1e-6)


def test_orthogonalised_is_nearly_the_polar_factor():
    torch.manual_seed(0)
    for shape in ((5, 48, 32), (3, 32, 48), (2, 40, 40)):
        u, values, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        matrices = (
            u @ torch.diag_embed(torch.linspace(0.2, 1.0, values.shape[1]).expand_as(values)) @ v
        )
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
            # Diagonal, where the singular vectors stay.
            values = u.mT @ muon.orthogonalise(matrices, dtype).float() @ v.mT
            diagonal = values.diagonal(dim1=1, dim2=2)
            assert (values - torch.diag_embed(diagonal)).abs().max() < tolerance
            assert 0.4 < diagonal.min() and diagonal.max() < 1.3 and 0.8 < diagonal.mean() < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "t5"])
def test_muon_equals_torchs(started, monkeypatch, model):
    """torch.optim.Muon on the hidden matrices and AdamW on the rest, with layers that miss updates;
    T5's without RMS scaling."""
    monkeypatch.setattr(muon, "fast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setitem(models.SIZES[model], "tiny", NARROW)
    flags = "--weight_decay=0.1 --rms_scaling=false --lr=0.01"
    method, part, optimizer = started("muon", model, flags)
    ours, c = dict(part.model.named_parameters()), part.config
    theirs = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    hidden = {name for name in ours if name.startswith("layers.") and ours[name].dim() == 2}
    matrices = [theirs[name] for name in hidden]
    scaled = dict(weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    peers = [torch.optim.Muon(matrices, lr=1.0, **scaled)]
    for decay, dims in ((0.1, (2,)), (0.0, (0, 1))):
        rest = [theirs[name] for name in theirs.keys() - hidden if theirs[name].dim() in dims]
        constants = dict(betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=decay)
        peers.append(torch.optim.AdamW(rest, lr=1.0, **constants, fused=True))
    generator = torch.Generator().manual_seed(0)
    for update in range(6):
        if update == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # the two stay joined
        for name, parameter in ours.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            missing = name.startswith("layers.3.") and update < 2
            parameter.grad = None if missing else gradient
            theirs[name].grad = None if missing else gradient.clone()
        for one in (optimizer, *peers):
            for group in one.param_groups:
                group["lr"] = 0.01 * (1 - update / 6)
            one.step()
    for name in ours:
        moved = (theirs[name] - before[name]).norm()
        share = 0.01 if name in hidden else 1e-6
        assert (ours[name] - theirs[name]).norm() <= share * moved, name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("cls", ["AdamWScheduleFreeReference", "AdamWScheduleFree"])
def test_schedule_free_equals_the_package(cls, weight_decay):
    import schedulefree

    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((7, 5), (6,))]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    rule = functools.partial(schedule_free_update, beta1=0.9, beta2=0.98, eps=1e-8)
    groups = [{"params": ours, "weight_decay": weight_decay}]
    optimizer = optimizers.RuleOptimizer(groups, 1.0, rule, new_state)
    constants = dict(lr=1.0, betas=(0.9, 0.98), eps=1e-8, weight_decay=weight_decay)
    package = getattr(schedulefree, cls)(theirs, **constants)
    package.train()
    config = SimpleNamespace(beta1=0.9, options=dict(warm_up=0.05))
    part = methods.find("schedule_free").classes["schedule_free"](None, None, None, config, {})
    for update in range(30):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for group in (*optimizer.param_groups, *package.param_groups):
            group["lr"] = 0.01 * part.schedule(update / 200)
        if update == 15:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        package.step()
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert [part.schedule(share) for share in (0, 0.0125, 0.05, 1)] == [0, 0.25, 1, 1]
    part.combination = SimpleNamespace(optimizer_in_use=optimizer)
    package.eval()
    evaluated = part.evaluation_weights()
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(evaluated[one], other.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["sqrt", "linear"])
def test_wsd_equals_its_formula(shape):
    def literal(update, updates=400, w=0.05, d=0.2):
        p = update / updates
        if p < w:
            return p / w
        if p <= 1 - d:
            return 1.0
        return 1 - (math.sqrt((p - 1 + d) / d) if shape == "sqrt" else (p - 1 + d) / d)

    config = SimpleNamespace(options=dict(warm_up=0.05, cool_down=0.2, shape=shape))
    part = wsd.WSD(None, None, None, config, {})
    for update in range(401):
        assert part.schedule(update / 400) == pytest.approx(literal(update), abs=1e-12)
    config.options |= dict(warm_up=0.5, cool_down=0.5, shape="linear")
    assert all(part.schedule(n / 997) == one_cycle(n / 997) for n in range(998))
    config.options |= dict(cool_down=0.6)
    with pytest.raises(UserError, match="at most 1 in all"):
        wsd.WSD(None, None, None, config, {})


@pytest.mark.slow
def test_lawa_averages_the_latest_weights(started):
    """What is evaluated is torch's AveragedModel of the copies. (That training is the baseline's,
    bit for bit, is in the contract.)"""
    flags = "--copies=3 --interval=0.1 --budget_steps=40"
    method, part, optimizer = started("lawa", "bert", flags)
    copies = []
    for update in range(41):
        part.clock.updates = update
        if update < 40:  # the last copy is due after the last update
            method.begin_update()
        if update % 4 == 0 and update:  # another tenth of the budget is spent
            copies.append(copy.deepcopy(part.model))
        assert bool(method.evaluation_weights()) == (len(copies) >= 3)
        if update < 40:
            with torch.no_grad():
                for parameter in part.model.parameters():
                    parameter.add_(0.01 * torch.randn(parameter.shape))
    averaged = torch.optim.swa_utils.AveragedModel(copies[-3])
    for each in copies[-3:]:
        averaged.update_parameters(each)
    weights = method.evaluation_weights()
    for parameter, expected in zip(part.model.parameters(), averaged.module.parameters()):
        torch.testing.assert_close(weights[parameter], expected.detach(), rtol=1e-6, atol=1e-7)
    part.model.present_layers = [0, 1]
    assert not method.evaluation_weights()  # another depth


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_token_rho_equals_the_literal_loop(started, model):
    torch.manual_seed(1)
    reference = models.build(model, "tiny", 512)
    method, part, _ = started(
        "token_rho", model, "--share=0.6", prerequisites={token_rho.MODEL: reference}
    )
    batch = method.inputs(np.arange(5))
    losses, theirs = (network.token_losses(batch).tolist() for network in (part.model, reference))
    chosen = []
    for ours, other in zip(losses, theirs):
        order = sorted(range(len(ours)), key=lambda i: -(ours[i] - other[i]))
        chosen += [ours[i] for i in order[: math.ceil(0.6 * len(ours))]]
    loss = method.loss(batch, part.model.present_layers)
    assert loss.item() == pytest.approx(statistics.mean(chosen), rel=1e-6)
    loss.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert part.model.loss(batch).item() == pytest.approx(
        statistics.mean(sum(losses, [])), rel=1e-6
    )


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_length_warmup_cuts_rows_by_its_schedule(started, model):
    flags = "--row_length=64 --mask_share=0.15 --shortest=0.25 --length_warm_up=0.4"
    flags += " --budget_steps=1000"
    method, part, _ = started("length_warmup", model, flags)
    corpus, positions, lengths = part.corpus, np.arange(4), []
    indices = corpus.row_indices(positions)
    raw = torch.from_numpy(corpora.gather_rows(corpus.train_tokens, indices, corpus.raw_length))
    for part.clock.updates in range(0, 1001, 5):
        q = math.floor(part.clock.progress / 0.4 * (64 - 16) + 16)  # DeepSpeed's fixed_linear
        assert part.row_length() == min(64, q - q % 16)
        lengths.append(part.row_length())
    assert sorted(set(lengths)) == [16, 32, 48, 64] and lengths == sorted(lengths)
    for part.clock.updates, length in ((0, 16), (150, 32), (1000, 64)):
        batch = method.inputs(positions)
        if model == "bert":
            cut = batch["tokens"].scatter(1, batch["positions"], batch["labels"])
            assert torch.equal(cut, raw[:, :length])
            assert batch["labels"].shape[1] == round(0.15 * length)
        else:
            alone, key = corpora.SpanCorruption(length, corpus.meta), hash_of(part.config.seed, 0)
            expected = alone(raw[:, : alone.raw_length], torch.arange(4), key)
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
            assert batch["tokens"].shape[1] <= length
    full = corpus.batch(positions)
    assert all(torch.equal(batch[name], full[name]) for name in full)


def test_mask_schedule_predicts_less_and_less(started):
    flags = "--row_length=120 --mask_share=0.15 --first_multiple=2 --budget_steps=60"
    method, part, _ = started("mask_schedule", "bert", flags)
    shares, positions = [], np.arange(4)
    for part.clock.updates in range(61):
        shares.append(part.mask_share())
        assert method.inputs(positions)["labels"].shape[1] == round(shares[-1] * 120)
    assert sorted(set(shares)) == pytest.approx([0.15, 0.18, 0.21, 0.24, 0.27, 0.30])
    assert shares == sorted(shares, reverse=True)
    part.clock.updates = 0
    many, few = method.inputs(positions), part.corpus.batch(positions)
    key, separator = hash_of(part.config.seed, 0), 3
    raw = few["tokens"].scatter(1, few["positions"], few["labels"]).tolist()
    # The literal choice: the columns with the smallest hashes, separators last.
    for row in range(4):
        draws = [
            (raw[row][column] == separator, hash_of(key, row, column)) for column in range(120)
        ]
        order = sorted(range(120), key=draws.__getitem__)
        assert many["positions"][row].tolist() == sorted(order[:36])
        assert few["positions"][row].tolist() == sorted(order[:18])
        common = few["positions"][row]
        # The same replacement.
        assert torch.equal(many["tokens"][row][common], few["tokens"][row][common])


def test_mask_schedule_of_t5_keeps_the_raw_row(started):
    flags = "--row_length=128 --mask_share=0.15 --first_multiple=2 --steps=3"
    method, part, _ = started("mask_schedule", "t5", flags)
    corpus, positions = part.corpus, np.arange(3)
    indices = corpus.row_indices(positions)
    raw = corpora.gather_rows(corpus.train_tokens, indices, corpus.raw_length)
    for part.clock.updates, share in ((0, 0.3), (99, 0.15)):
        batch, first = method.inputs(positions), corpus.meta["first_sentinel"]
        noise = round(share * corpus.raw_length)
        assert batch["labels"].shape[1] == noise + round(noise / 3) + 1
        sentinels = range(first - corpora.SENTINELS + 1, first + 1)
        for row, read, labels in zip(raw, batch["tokens"].tolist(), batch["labels"].tolist()):
            assert restored(read, labels, sentinels)[0] == row.tolist()


def literal_token_dropping(network, importance, batch, layers, count):
    """BERT with dropped tokens, one row at a time; a layer that moves only some reads all and
    forgets the rest."""
    losses, half = [], len(layers) // 2
    for row, tokens in enumerate(batch["tokens"].tolist()):
        order = sorted(range(len(tokens)), key=lambda column: -importance[tokens[column]])
        kept, h = sorted(order[:count]), network.embed(batch["tokens"][row : row + 1])
        for index in layers[: half - 1]:
            h = network.layers[index](h)
        part = network.layers[layers[half - 1]](h)[:, kept]
        for index in layers[half:-1]:
            part = network.layers[index](part)
        whole = h.clone()
        whole[:, kept] = part
        h = network.final_norm(network.layers[layers[-1]](whole))
        logits = F.linear(network.head(h[0, batch["positions"][row]]), network.embedding)
        losses.append(F.cross_entropy(logits, batch["labels"][row], reduction="none"))
    return torch.stack(losses)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [0, 2, 3], [1, 3]])
def test_token_dropping_equals_the_literal_loop(started, layers):
    method, part, _ = started("token_dropping", "bert", "--keep=0.5")
    importance = collections.defaultdict(lambda: 10.0, {special: 1e4 for special in (1, 2, 3, 4)})
    for update in range(3):
        method.begin_update()
        by_id = collections.defaultdict(list)
        for rows in (np.arange(4), np.arange(4, 6)):
            batch = method.inputs(rows + 6 * update)
            expected = literal_token_dropping(part.model, importance, batch, layers, 16)
            assert method.loss(batch, layers).item() == pytest.approx(
                expected.mean().item(), rel=1e-5
            )
            for label, loss in zip(batch["labels"].flatten().tolist(), expected.flatten().tolist()):
                by_id[label].append(loss)
        method.after_step()
        for label, values in by_id.items():
            importance[label] = 0.995 * importance[label] + 0.005 * statistics.mean(values)
        assert part.importance.tolist() == pytest.approx(
            [importance[number] for number in range(512)], rel=1e-5
        )
    part.clock.updates = 95  # of 100: nothing is dropped any more
    assert method.loss(batch, layers).item() == part.model.loss(batch, layers).item()


def test_token_dropping_of_t5_is_random_ltd(started):
    """Every encoder layer but the first and last moves columns of its own, with the distances that
    they have in the row."""
    method, part, _ = started("token_dropping", "t5", "--keep=0.5")
    network, batch = part.model, method.inputs(np.arange(3))
    width = batch["tokens"].shape[1]
    h, previous = network.embed_both(batch)
    subsets = []
    for index in range(4):
        kept = torch.arange(width)
        if index in (1, 2):
            key = part.config.seed, token_dropping.COLUMNS, 0, index
            draws = [hash_of(*key, column) for column in range(width)]
            order = sorted(range(width), key=draws.__getitem__)
            kept = torch.tensor(sorted(order[: round(0.5 * width)]))
            subsets.append(kept.tolist())
        bias = network.position_bias(network.encoder_positions, kept, kept, bidirectional=True)
        moved = network.layers[index].encoder(h[:, kept], bias)
        h = h.clone()
        h[:, kept] = moved
    logits = network.decode(previous, network.encoder_norm(h))
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert method.loss(batch, [0, 1, 2, 3]).item() == pytest.approx(expected.item(), rel=1e-5)
    assert subsets[0] != subsets[1]


# -- What a model has learnt -----------------------------------------------------------------------


def prediction(text):
    """What stands in a row's brackets."""
    return re.findall(r"\[([^]]*)\]", text)


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_rows_before_and_after(
    model, corpus_folder, t5_folder, tmp_path, capsys, monkeypatch, refuses
):
    folder = {"bert": corpus_folder, "t5": t5_folder}[model]
    run = tmp_path / "run"
    flags = f"--model={model} --budget_steps=2 --mask_share=0.3 --validation_rows=9"
    trained(folder, run, flags)
    read_at_end = re.findall(r"^  read     (.*)$", capsys.readouterr().out, re.MULTILINE)
    sample.main([str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:11].strip() for line in lines] == ["read", "written", "original", ""] * 3
    lines = [line[11:] for line in lines]
    assert read_at_end == lines[:1]
    corpus = Corpus(folder, row_length=32, validation_rows=9, mask_share=0.3)
    tokenizer, network = corpus.tokenizer, models.load(run / "model.pt")
    for number, (read, written, original, _) in zip((0, 3, 6), zip(*[iter(lines)] * 4)):
        raw = corpora.gather_rows(
            corpus.val_tokens, corpus.validation_indices[[number]], corpus.raw_length
        )
        text = re.sub(r"\s|\[(?!SEP)|(?<!SEP)\]", "", original)
        assert text == re.sub(r"\s|</s>", "", "".join(map(tokenizer.piece, raw[0].tolist())))
        (batch,) = list(corpus.validation_batches(1))[number : number + 1]
        if model == "bert":
            masked = (batch["tokens"] == corpora.MASK).sum().item()
            assert read.count("[MASK]") == masked and len(prediction(original)) >= 10
            best = network.logits(batch)[0].argmax(dim=-1).tolist()
            told = [tokenizer.piece(token).strip() for token in best]
            assert prediction(written.replace("[SEP]", "")) == told
        else:
            assert prediction(written) != prediction(original)
            spans = [f"<extra_id_{n}>" for n in range(corpus.objective.spans)]
            assert re.findall(r"<extra_id_\d+>", read) == spans
            assert len(prediction(original)) == len(spans) and all(prediction(original))
    # Where the corpus was moved, and another one is damaged.
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["data"] = "moved"
    (run / "config.json").write_text(json.dumps(stored))
    (tmp_path / "data" / "text" / "bad").mkdir(parents=True)
    (tmp_path / "data" / "text" / "bad" / "meta.json").write_text("{")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    _, error = refuses(sample.main, [run], "--data=FOLDER")
    assert "bad/meta.json is damaged" in error
    sample.main([str(run), f"--data={folder}"])
    assert [line[11:] for line in capsys.readouterr().out.splitlines()] == lines


def test_a_text_is_filled_in(corpus_folder, t5_folder, monkeypatch):
    torch.manual_seed(0)
    bert, tokenizer = models.build("bert", "tiny", 512), prepare.load_tokenizer(corpus_folder)
    first, second, third = words_text(5, 3).split()
    lines = sample.fill(bert, tokenizer, f"{first} [MASK] {second} [MASK]{third}")
    before = tokenizer.encode(first)
    with_second = tokenizer.encode(f"{first} {second}")
    assert with_second[: len(before)] == before and len(lines) == 2
    tokens = [*before, corpora.MASK, *with_second[len(before) :], corpora.MASK]
    tokens += tokenizer.encode(third)
    scores = F.linear(bert.head(bert.encode(torch.tensor([tokens]))), bert.embedding)[0]
    columns = [column for column, token in enumerate(tokens) if token == corpora.MASK]
    for line, shares in zip(lines, scores[columns].softmax(dim=-1)):
        told = [(f"{share:.2f}", repr(tokenizer.piece(token))) for token, share in
                sorted(enumerate(shares.tolist()), key=lambda pair: -pair[1])[:5]]  # fmt: skip
        assert re.split(r"\s{3}|(?<=\d) ", line) == [part for pair in told for part in pair]
    with pytest.raises(UserError, match="has no gap"):
        sample.fill(bert, tokenizer, "nothing")

    t5, tokenizer = models.build("t5", "tiny", 512), prepare.load_tokenizer(t5_folder)
    sentinels = [tokenizer.first_sentinel - number for number in range(2)]
    one, two = (tokenizer.encode(word) for word in (second, third))

    def generate(batch, most, end):  # the gaps in another order, and an id of no piece
        parts = [tokenizer.encode(first), [sentinels[0]], tokenizer.encode("a")]
        assert batch["tokens"].tolist() == [[*parts[0], *parts[1], *parts[2], sentinels[1], end]]
        return torch.tensor([[sentinels[1], *two, 511, sentinels[0], *one, end, *two]])

    monkeypatch.setattr(t5, "generate", generate)
    filled = sample.fill(t5, tokenizer, f"{first} [MASK] a <extra_id_7>")
    assert [" ".join(filled[0].split())] == [f"{first} [{second}] a [{third}]"]


def test_sample_explains_what_is_missing(tmp_path, refuses):
    (tmp_path / "model.pt").write_bytes(b"")
    for folder, message in ((tmp_path / "none", "none"), (tmp_path, "model.pt")):
        _, error = refuses(sample.main, [folder, "a [MASK]"], message)
        assert error.count("\n") == 1


# -- Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--budgt_hours=1", "unknown flag --budgt_hours; did you mean --budget_hours"),
        ("--method=nothing", "no method 'nothing'; there are baseline"),
        ("--size=huge", "invalid choice: 'huge'"),
        ("--lr=fast", "--lr=fast: expected a number"),
        ("--budget_hours=0", "--budget_hours=0.0: expected a number, at least 1e-09"),
        (f"--seed={2**32}", f"--seed={2**32}: expected a number, from 0 to {2**32 - 1}"),
        ("--budget_steps=-3", "--budget_steps=-3: expected a number, at least 1"),
        ("--budget_hours=nan", "--budget_hours=nan"),
        ("--budget_hours=1 --budget_steps=2", "two budgets"),
        ("more", "'more' is not a flag"),
        ("--device=tpu", "expected cpu, cuda or cuda:NUMBER"),
        ("--device=cuda:99", "--device=cuda:99: torch sees"),
        (
            "--row_length=600 --validation_rows=1",
            "rows of 600 tokens: this model reads at most 512",
        ),
        ("--out=/dev/null/run", "error: /dev/null/run: Not a directory"),
        ("--data=nowhere", "python data/prepare.py nowhere"),
        ("--reference=rtx9", "--reference=rtx9"),
        ("--holdout=1", "--holdout=1.0"),
        ("--resume=nowhere", "nowhere"),
        ("--resume=", "--resume=: it is empty"),
        ("--out=", "--out=: it is empty"),
        (f"--out={'x' * 300}", "File name too long"),
        ("--data=~/nowhere", f"--data={Path.home()}/nowhere: not prepared"),
        (f"--seed={'9' * 400}", "expected a number between -2^63 and 2^63"),
        (f"--batch={10**11}", f"--batch={10**11}: expected a number, from 1 to {2**24}"),
        ("--threads=3000000000", "expected a number, from 0 to 4096"),
        ("--row_length=3", "--row_length=3: expected a number, at least 8"),
        ("--budget_hours=200 --reference=this", "add --yes"),
        ("--lr=1e30 --budget_steps=9", "the loss is"),
        ("--lr=1e308 --budget_steps=9", "is nan in update"),
        ("--weight_decay=1e30 --budget_steps=2", "is nan in update"),
        ("--method=lion --eps=1e-8", "--eps=1e-08: lion divides by nothing"),
        ("--method=rho --holdout=0", "--holdout=0"),
        ("--method=rho --train_on=holdout", "--train_on=holdout: rho compares"),
        ("--method=sophia --dtype=fp16", "--dtype=fp16: sophia trains in fp32 or bf16 only"),
        ("--method=layer_drop --gamma=inf", "--gamma=inf: expected"),
        ("--method=stacking --growth_times=0.5,0.2", "rising numbers"),
        ("--method=stacking --growth_times=soon", "--growth_times=soon: expected shares"),
        ("--method=stacking --growth_times=0.1,0.2,0.3", "4 layers cannot be halved 3 time(s)"),
        ("--method=selective_backprop --beta=-1", "--beta=-1.0: expected a number, at least 0"),
        ("--method=layer_drop --theta_bar=1.5", "1.5: expected a number, from 0.01 to 1.0"),
        ("--method=stacking --optimizer_state=drop", "invalid choice: 'drop'"),
    ],
)
def test_a_mistake_is_a_message(corpus_folder, tmp_path, flags, message, refuses):
    refuses(train.main, small_run(corpus_folder, tmp_path / "run", flags), message)
    assert not (tmp_path / "run" / "result.json").exists()


def test_without_a_compiler(corpus_folder, tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    flags = small_run(corpus_folder, tmp_path / "run", "--compile")
    refuses(train.main, flags, "--compile: none of c++, g++, clang++ is here")


def test_finished_and_damaged_runs(corpus_folder, tmp_path, refuses):
    def fails(flags, message):
        _, error = refuses(train.main, flags, message)
        assert error.count("\n") <= 2, error

    run = tmp_path / "run"
    flags = small_run(corpus_folder, run, "--budget_steps=2 --validations=1")
    train.main(flags)
    fails(flags, "this run is finished")
    fails(flags[:-2] + ["--budget_steps=3"], "holds the run")
    fails([f"--resume={run}"], "is finished")
    fails([f"--resume={run}", "--out=elsewhere"], "--out=elsewhere: the run's folder is that of")
    fails([f"--resume={run}", "--seed=2"], "--seed=2: this run was started with 0,")
    (run / "result.json").unlink()
    checkpoint = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    fails([f"--resume={run}"], "cut short")
    (run / "checkpoint.pt").unlink()
    fails([f"--resume={run}"], "checkpoint.pt is missing")
    (run / "checkpoint.pt").write_bytes(checkpoint)
    config = (run / "config.json").read_text()
    lr = f'"lr": {json.loads(config)["config"]["lr"]}'
    (run / "config.json").write_text(config.replace(lr, '"lr": 0.5'))
    fails([f"--resume={run}"], "its config.json was changed")
    (run / "config.json").write_text(config.replace(lr, '"lr": "high"'))
    fails([f"--resume={run}"], "config.json, config: lr is 'high', expected float or null")
    (run / "config.json").write_text(config)
    log = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(log[:10])
    fails([f"--resume={run}"], "is shorter")
    (run / "log.jsonl").write_bytes(log + b'{"update": 99}\n')
    train.main([f"--resume={run}"])
    assert (run / "log.jsonl").read_bytes() == log


def test_an_output_that_nobody_reads_is_a_message(finished_runs):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "report.py", str(finished_runs["bert"])]
    pipes = dict(stdout=writing, stderr=subprocess.PIPE, text=True)
    done = subprocess.run(command, cwd=ROOT, **pipes)
    os.close(writing)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("ended: nobody reads")


def finetuned(run, suite, *flags):
    """Fine-tunes a run with these flags, one or several each."""
    finetune.main([str(run), f"--suite={suite}", "--threads=1", *" ".join(flags).split()])


def test_one_process_at_a_time_works_on_a_run(corpus_folder, tmp_path, refuses):
    run = tmp_path / "run"
    flags = small_run(corpus_folder, run, "--budget_steps=2 --validations=1")
    with locked(run, wait=False):
        refuses(train.main, flags, "another process is at work on this run")
    assert not run.exists()  # a plan that is refused leaves nothing
    assert train.main(flags)["updates"] == 2
    with locked(run, wait=False, shared=True), locked(run, wait=False, shared=True):
        with pytest.raises(UserError, match="at work"), locked(run, wait=False):
            pass
    with locked(tmp_path / "none", wait=True, shared=True):
        assert not (tmp_path / "none").exists()


def test_training_in_a_thread(corpus_folder, tmp_path):
    """Where there are no signals, as in a notebook's or a server's; a read-only corpus."""
    corpus, done = shutil.copytree(corpus_folder, tmp_path / "corpus"), []
    for path in corpus.iterdir():
        path.chmod(0o444)
    flags = corpus, tmp_path / "run", "--budget_steps=2 --validations=1"
    thread = threading.Thread(target=lambda: done.append(trained(*flags)))
    thread.start()
    thread.join(60)
    assert done and done[0]["updates"] == 2
    assert (tmp_path / "run" / "tokenizer.json").stat().st_mode & 0o200


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("whole")
    (tmp_path / "model.pt.tmp").symlink_to(tmp_path / "precious")
    write_tensors(tmp_path / "model.pt", {"x": torch.zeros(3)})
    assert (tmp_path / "precious").read_text() == "whole"
    assert read_tensors(tmp_path / "model.pt", ["x"])["x"].tolist() == [0, 0, 0]


def test_an_ascii_terminal_and_a_dollar_in_a_name(tmp_path):
    write_run(tmp_path / "run", [4.0, 3.0], config={"data": "a$b$c"})
    flags = "report.py", tmp_path / "run", f"--figures={tmp_path / 'figures'}"
    result = command(*flags, env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and r"3.0000 \xb1" in result.stdout, result.stderr
    (figure,) = (tmp_path / "figures").iterdir()
    assert figure.read_text().count("a$b$c") == 1


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_tensors(path, {"x": torch.zeros(1000)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a full disk: writing fails half-way.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="the file that was there is untouched"):
            write_tensors(path, {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_of_the_file(tmp_path):
    with pytest.raises(OSError) as raised, runs.names_file("log.jsonl"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == "log.jsonl"


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "model.pt"
    stored = {"weights": torch.randn(1000)}
    write_tensors(path, stored)
    assert torch.equal(read_tensors(path, ["weights"])["weights"], stored["weights"])
    whole = path.read_bytes()
    place = whole.index(stored["weights"].numpy().tobytes()) + 1234
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    with pytest.raises(UserError, match=r"model.pt cannot be read.*checksum"):
        read_tensors(path, ["weights"])
    path.write_bytes(whole)
    with pytest.raises(UserError, match="there is no optimizer in it"):
        read_tensors(path, ["optimizer"])
    torch.save({"weights": functools.partial(print, "code")}, path)
    with pytest.raises(UserError, match="damaged, or holds more than plain data$"):
        read_tensors(path, ["weights"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[1]", "a list, expected an object"),
        ("[" * 100_000, "is damaged"),
        ('{"n": 1}', "there is no loss in it"),
        ('{"n": 1, "loss": "1"}', "loss is '1', expected float or null"),
        ('{"n": 1, "loss": NaN}', "loss is nan, expected float or null"),
        ('{"n": true, "loss": 1}', "n is True, expected int"),
        ('{"n": 1.5, "loss": 1}', "n is 1.5, expected int"),
        ("\xff", "is damaged"),
    ],
)
def test_one_reader_names_file_key_and_value(tmp_path, content, message):
    path, expected = tmp_path / "record.json", {"n": int, "loss": (float, None)}
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"record.json.*{message}"):
        read_record(path, expected)
    for good in ('{"n": 1, "loss": 1, "other": []}', '{"n": -1, "loss": null}'):
        path.write_text(good)
        assert read_record(path, expected)["n"] in (1, -1)


# -- Downstream ------------------------------------------------------------------------------------


def random_answers(generator, kind):
    """Predictions and truths of 2 to 40 rows; in every fifth case one side is constant."""
    count = generator.integers(2, 40)
    if kind == "scores":
        # Rounded: with ties.
        pair = [generator.normal(size=count).round(generator.integers(0, 3)) for _ in range(2)]
    else:
        pair = [generator.integers(0, kind, count) for _ in range(2)]
    if generator.random() < 0.2:
        pair[generator.integers(2)][:] = generator.integers(0, 2)
    return pair


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_metrics_are_those_of_scikit_learn_and_scipy():
    from scipy import stats
    from sklearn import metrics as oracle

    generator = np.random.default_rng(0)
    constant = 0
    for _ in range(300):
        guessed, true = random_answers(generator, 2)
        f1 = oracle.f1_score(true, guessed, zero_division=0)
        matthews = oracle.matthews_corrcoef(true, guessed)
        assert metrics.accuracy(guessed, true) == pytest.approx(np.mean(guessed == true))
        assert metrics.f1(guessed, true) == pytest.approx(f1)
        assert metrics.matthews(guessed, true) == pytest.approx(matthews, abs=1e-12)
        groups = generator.integers(0, 5, len(true)).tolist()
        wrong = {group for group, right in zip(groups, guessed == true) if not right}
        share = 1 - len(wrong) / len(set(groups))
        assert metrics.exact_match(guessed.tolist(), true.tolist(), groups) == pytest.approx(share)
        guessed, true = random_answers(generator, 3)
        f1 = oracle.f1_score(true, guessed, average="macro", zero_division=0)
        assert metrics.macro_f1(guessed, true) == pytest.approx(f1)
        guessed, true = random_answers(generator, "scores")
        if len(set(guessed)) == 1 or len(set(true)) == 1:  # scipy: nan
            constant += 1
            pearson = spearman = 0.0
        else:
            pearson, spearman = stats.pearsonr(guessed, true)[0], stats.spearmanr(guessed, true)[0]
        assert metrics.pearson(guessed, true) == pytest.approx(pearson, abs=1e-12)
        assert metrics.spearman(guessed, true) == pytest.approx(spearman, abs=1e-12)
    assert constant > 30
    published = {"cola": "matthews", "stsb": "pearson spearman", "cb": "macro_f1 accuracy"}
    published |= dict.fromkeys(("mrpc", "qqp"), "f1 accuracy") | {"multirc": "f1a exact_match"}
    guessed, true, groups = [1, 1, 3, 0], [1, 0, 1, 2], [0, 0, 1, 2]
    rows = [tasks.Row((), label, group) for label, group in zip(true, groups)]
    exact_match = functools.partial(metrics.exact_match, groups=groups)
    by_name = vars(metrics) | {"f1a": metrics.f1, "exact_match": exact_match}
    for name, task in (glue.TASKS | superglue.TASKS).items():
        assert " ".join(task.metrics) == published.get(name, "accuracy"), name
        for metric, function in task.metrics.items():
            assert function(guessed, rows) == by_name[metric](guessed, true), (name, metric)


def test_rouge_is_the_longest_common_subsequence_of_stems():
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem

    def stems(text):
        return [stem(word) if len(word) > 3 else word for word in text.lower().split()]

    def literal(text, reference):  # Lin 2004, over stems
        a, b = stems(text), stems(reference)
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, j in itertools.product(range(len(a)), range(len(b))):
            longer = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else longer
        return 2 * table[-1, -1] / (len(a) + len(b)) if table[-1, -1] else 0.0

    generator = random.Random(0)
    words = "cat Cats dogs dog running runs happily happy".split()
    texts = [" ".join(generator.choices(words, k=generator.randint(0, 8))) for _ in range(1000)]
    for text, reference in zip(texts[::2], texts[1::2]):
        assert metrics.rouge_l([text], [reference]) == pytest.approx(literal(text, reference))
    # Stems; the best reference; the mean.
    assert metrics.rouge_l(["running dogs", "x"], [["cat", "runs dog"], ["y"]]) == 0.5


# Quotes that do not end; a separator inside a line.
SENTENCES = [
    "The cat isn't \"here",
    "a dog said 'so'",
    "it rained\u2028all day",
    "nobody came .",
]
MNLI_HEADER = (
    "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|"
    "sentence2_parse|sentence1|sentence2|label1|"
)
STSB_HEADER = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score"
# fmt: off
GLUE_FILES = [  # folder, header, an example, labels
    ("CoLA", "", "gj04|{y}||{a}", "0 1"),
    ("MNLI", MNLI_HEADER + "gold_label", "{n}|1|2|g|()|()|()|()|{a}|{b}|x|{y}",
     "entailment neutral contradiction"),
    ("MNLI", MNLI_HEADER + "label2|label3|label4|label5|gold_label",
     "{n}|1|2|g|()|()|()|()|{a}|{b}|x|x|x|x|x|{y}", "entailment neutral contradiction"),
    ("MRPC", "Quality|#1 ID|#2 ID|#1 String|#2 String", "{y}|{n}|9|{a}|{b}", "0 1"),
    ("QNLI", "index|question|sentence|label", "{n}|{a}|{b}|{y}", "entailment not_entailment"),
    ("QQP", "id|qid1|qid2|question1|question2|is_duplicate", "{n}|1|2|{a}|{b}|{y}", "0 1"),
    ("RTE", "index|sentence1|sentence2|label", "{n}|{a}|{b}|{y}", "entailment not_entailment"),
    ("SST-2", "sentence|label", "{a} |{y}", "0 1"),
    ("STS-B", STSB_HEADER, "{n}|g|f|2012|1|none|none|{a}|{b}|{y}", "0.000 2.5 5.000"),
    ("WNLI", "index|sentence1|sentence2|label", "{n}|{a}|{b}|{y}", "0 1"),
]
# fmt: on


def glue_files(folder):
    """All GLUE tasks in their published layout, eight examples each; returns their folder."""
    for task, header, example, labels in GLUE_FILES:
        parts, labels = ["train", "dev"], labels.split()
        if task == "MNLI":
            parts = ["dev_matched", "dev_mismatched"] if "label5" in header else ["train"]
        for part in parts:
            lines = [header] * bool(header)
            for n in range(8):
                a, b = f"{part} {SENTENCES[n % 4]}", SENTENCES[(n + 1) % 4]
                lines.append(example.format(a=a, b=b, y=labels[n % len(labels)], n=n))
            text = "".join(line.replace("|", "\t") + "\n" for line in lines)
            if task == "MRPC":
                text = "\ufeff" + text.replace("\n", "\r\n")
            (folder / task).mkdir(parents=True, exist_ok=True)
            (folder / task / f"{part}.tsv").write_bytes(text.encode())
    return folder


def superglue_files(folder):
    """All tasks of SuperGLUE in their published layout, eight examples each."""
    a, b, c, _ = SENTENCES

    def answers(n):
        return [{"idx": i, "text": c, "label": (n + i) % 2} for i in range(2)]

    def questions(n):
        return [{"idx": 2 * n + q, "question": b, "answers": answers(n)} for q in range(2)]

    def examples(n, part):
        entailed = ["entailment", "contradiction", "neutral"][n % 3]
        other = ["entailment", "not_entailment"][n % 2]
        spans = {"span1_text": "cat", "span1_index": 1, "span2_text": "here", "span2_index": 3}
        choices = {"choice1": b, "choice2": c, "question": "cause"}
        return {
            "BoolQ": {"question": part, "passage": b * 40, "label": n % 2 == 0},
            "CB": {"premise": part, "hypothesis": b, "label": entailed},
            "COPA": {"premise": part, **choices, "label": n % 2},
            "MultiRC": {"passage": {"text": part + a * 30, "questions": questions(n)}},
            "RTE": {"premise": part, "hypothesis": b, "label": other},
            "WiC": {"word": part, "sentence1": a, "sentence2": b, "start1": 0, "label": n % 2 == 0},
            "WSC": {"text": part, "target": spans, "label": n % 2 == 1},
        }

    for part, n in itertools.product(("train", "val"), range(8)):
        for task, example in examples(n, part).items():
            (folder / task).mkdir(parents=True, exist_ok=True)
            with open(folder / task / f"{part}.jsonl", "a") as file:
                file.write(json.dumps({"idx": n} | example) + "\n")
    return folder


def sni_files(folder):
    """Two training tasks of 120 and 3 instances, and a test task of 130, as published."""

    def task(name, definition, outputs):
        examples = [{"input": f"in {k}", "output": f"out {k}!"} for k in range(3)]
        instances = [
            {"id": f"{name}-{n}", "input": f"{SENTENCES[n % 4]} {n}", "output": output}
            for n, output in enumerate(outputs)
        ]
        record = {
            "Definition": definition,
            "Positive Examples": examples,
            "Negative Examples": [],
            "Instances": instances,
        }
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(record, indent=1))

    (folder / "tasks").mkdir(parents=True)
    task("task1_a", ["Say it again ", "not this"], [["yes", "no"], ["no"]] * 60)
    task("task2_b", "Say so!", ["maybe"] * 3)
    task("task3_c", ["Tell."], [["one", "two", "three"]] * 130)
    (folder / "splits" / "default").mkdir(parents=True)
    (folder / "splits" / "default" / "train_tasks.txt").write_text("task1_a\ntask2_b\n")
    (folder / "splits" / "default" / "test_tasks.txt").write_text("task3_c\n")
    return folder


FILES = {"glue": glue_files, "superglue": superglue_files, "sni": sni_files}


@pytest.fixture(scope="session")
def finished_runs(corpus_folder, t5_folder, tmp_path_factory):
    """{model: the folder of a finished run of two updates}, of a model that is quick."""
    root, flags = tmp_path_factory.mktemp("runs"), "--budget_steps=2 --validations=1"
    with pytest.MonkeyPatch.context() as patch:
        for model, folder in (("bert", corpus_folder), ("t5", t5_folder)):
            patch.setitem(models.SIZES[model], "tiny", NARROW)
            trained(folder, root / model, f"--model={model}", flags)
    return {model: root / model for model in ("bert", "t5")}


def study_flags(corpus_folder, *flags):
    """The flags of a study of runs that take seconds."""
    return [flag for flag in small_run(corpus_folder, None, *flags) if flag != "--out=None"]


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["glue", "superglue", "sni"])
def test_every_task_runs_end_to_end(finished_runs, tmp_path, monkeypatch, capsys, suite):
    """Stopped in its third task (sni has only one), it goes on there; its results are the tasks'
    metrics after every epoch."""
    module, out, seeds = tasks.find(suite), tmp_path / "out", (0, 1)
    data = FILES[suite](tmp_path / "data")
    run = functools.partial(finetuned, finished_runs[module.MODEL], suite)
    flags = f"--data_dir={data} --out={out} --seeds=0,1 --epochs=2 --batch=4"
    if suite == "sni":
        monkeypatch.setattr(module, "INSTANCES", 6)
        flags += " --max_length=64"
    everything = f"--task={','.join(module.TASKS)}"  # glue's with wnli
    original, begun = finetune.finetune, []

    def recorded(*arguments):
        begun.append(arguments[-1])
        if stop_in_the_third and len(begun) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(finetune, "finetune", recorded)
    stop_in_the_third = suite != "sni"
    if stop_in_the_third:
        with pytest.raises(SystemExit) as stopped:
            run(flags, everything)
        assert stopped.value.code == 130 and "goes on with the rest" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.glob("*.json")}
    assert len(before) == (2 if stop_in_the_third else 0)
    stop_in_the_third = False
    begun.clear()
    run(flags, everything)
    labels = [f"{name} seed {seed}" for name in module.TASKS for seed in seeds]
    assert begun == labels[len(before) :]
    assert all(path.read_bytes() == content for path, content in before.items())
    output, results = capsys.readouterr().out, {}
    for (name, task), seed in itertools.product(module.TASKS.items(), seeds):
        results[name, seed] = result = result_of(out, f"{name}-seed{seed}")
        suffixes = ("", "_mismatched") if name == "mnli" else ("",)
        names = [metric + suffix for suffix in suffixes for metric in task.metrics]
        epochs = [epoch["scores"] for epoch in result["epochs"]]
        assert list(result["last"]) == names and len(epochs) == (1 if suite == "sni" else 2)
        assert result["last"] == epochs[-1] and f"| {name} | " in output
        assert result["best"] == {each: max(scores[each] for scores in epochs) for each in names}
    if suite != "sni":
        expected = [
            np.mean([results[name, seed]["last"][metric] for name, metric in module.AVERAGED])
            for seed in seeds
        ]
        mean = tasks.summary(results.values(), module)["all", "score"]["last"]
        assert list(mean.values()) == pytest.approx(expected)
        # Trained alone it scores the same: nothing is left over from the tasks before it.
        third = list(module.TASKS)[2]
        run(flags, f"--task={third} --out={tmp_path / 'alone'} --seeds=1")
        alone = result_of(tmp_path / "alone", f"{third}-seed1")
        assert alone["epochs"] == results[third, 1]["epochs"]
    # Another recipe, other weights or other data: another result.
    first, load = list(module.TASKS)[0], module.load
    one = f"{flags} --seeds=0 --task={first}"
    run(one, "--lr=1e-3")
    run(one, "--untrained")
    monkeypatch.setattr(module, "load", lambda *place: (load(*place)[0][1:], load(*place)[1]))
    run(one)
    assert "kept" not in capsys.readouterr().out
    assert len(list(out.glob(f"{first}-seed0-*.json"))) == 4


def test_glue_reads_what_is_published(tmp_path, capsys):
    data = glue_files(tmp_path)
    for name in glue.TASKS:
        training, evaluated = glue.load(name, data)
        files = ["train", "dev_matched", "dev_mismatched"] if name == "mnli" else ["train", "dev"]
        assert list(evaluated) == ["", "_mismatched"][: len(files) - 1]
        for file, rows in zip(files, [training, *evaluated.values()], strict=True):
            # Quotation marks as they are.
            texts = f"{file} {SENTENCES[0]}", SENTENCES[1]
            assert len(rows) == 8
            assert rows[0].texts == (texts[:1] if name in ("cola", "sst2") else texts)
        labels = {"mnli": [0, 1, 2], "stsb": [0.0, 2.5, 5.0]}.get(name, [0, 1, 0])
        assert [row.label for row in training[:3]] == labels
    path = data / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "9\t1\t2\thow\n")
    assert len(glue.load("qqp", data)[0]) == 8
    assert "1 lines end early and are left out" in capsys.readouterr().out


def test_superglue_reads_what_is_published(tmp_path):
    data = superglue_files(tmp_path)
    loaded = {name: superglue.load(name, data) for name in superglue.TASKS}
    for training, evaluated in loaded.values():
        assert all(row.texts[0].startswith("train") for row in training)
        assert all(row.texts[0].startswith("val") for row in evaluated[""])
    labels = {name: [row.label for row in rows[:3]] for name, (rows, _) in loaded.items()}
    assert labels["cb"] == [0, 1, 2] and labels["boolq"] == [1, 0, 1] and labels["rte"] == [0, 1, 0]
    a, b, c, _ = SENTENCES
    for name, rest in (("boolq", (b * 40,)), ("cb", (b,)), ("rte", (b,)), ("wic", (a, b))):
        assert loaded[name][0][0].texts == ("train", *rest), name
    assert loaded["copa"][0][1].texts == ("train", b, c, "cause")
    assert loaded["wsc"][0][1].texts == ("train", "cat", "here")
    answers = loaded["multirc"][0]
    assert len(answers) == 32 and len({row.group for row in answers}) == 16
    assert answers[0].texts[1:] == (b, c)


def test_sni_draws_training_instances_and_keeps_its_test(tmp_path):
    data = sni_files(tmp_path)
    training, evaluated = sni.load("sni", data)
    test = evaluated[""]
    assert len(training) == 103 and len(test) == 100  # at most 100 of a task; the test's first 100
    assert all(row.texts[-1].count(f" {n}.\n") == 1 for n, row in enumerate(test))
    assert {row.label for row in test} == {"one", "two", "three"}
    assert test[0].references == ("one", "two", "three")
    again, others = sni.load("sni", data), sni.load("sni", data, seed=1)
    assert again == (training, evaluated) and others[0] != training and others[1] == evaluated


def test_rows_have_a_checksum():
    rows = [tasks.Row(("a", "b"), 1), tasks.Row(("c",), "d", (1, 2), ("d", "e"))]
    changes = [{"texts": ("c", "")}, {"label": 0}, {"group": (1, 3)}, {"references": ("d",)}]
    others = [[rows[0], dataclasses.replace(rows[1], **change)] for change in changes]
    sums = {tasks.checksum(one) for one in (rows, rows[::-1], rows[:1], *others)}
    assert len(sums) == 7 and tasks.checksum(list(rows)) == tasks.checksum(rows)


# fmt: off
@pytest.mark.parametrize("suite, task, file, old, new, message", [
    ("glue", "cola", "CoLA/dev.tsv", "gj04\t1\t", "gj04\t7\t",
     "CoLA/dev.tsv, line 2: the label is '7', expected one of 0, 1"),
    ("glue", "cola", "CoLA/dev.tsv", None, "", "dev.tsv: no example in it"),
    ("glue", "rte", "RTE/train.tsv", "1\ttrain a dog", "a dog", "line 3: 3 columns, expected 4"),
    ("glue", "qqp", "QQP/dev.tsv", "is_duplicate\n", "is_duplicate\n" + "9\t1\t2\thow\n" * 11,
     "line 12: 4 columns, expected 6"),
    ("glue", "stsb", "STS-B/dev.tsv", "\t2.5\n", "\tmuch\n",
     "line 3: the label is 'much', expected a number"),
    ("glue", "stsb", "STS-B/dev.tsv", "\t2.5\n", "\tnan\n", "line 3: the label is 'nan'"),
    ("glue", "stsb", "STS-B/train.tsv", "\t5.000\n", "\t-inf\n", "line 4: the label is '-inf'"),
    ("glue", "mnli", "MNLI/dev_mismatched.tsv", "gold_label", "label",
     "line 1: no column 'gold_label'"),
    ("glue", "sst2", "SST-2/dev.tsv", "a dog", "\udcff dog", "line 3: 'utf-8' codec can't decode"),
    ("superglue", "cb", "CB/val.jsonl", '"hypothesis"', '"h"', "line 1: no 'hypothesis' in it"),
    ("superglue", "boolq", "BoolQ/val.jsonl", '"passage":', '"passage"', "line 1: Expecting ':'"),
    ("superglue", "wic", "WiC/val.jsonl", '"word": "val"', '"word": 1',
     "line 1: a text is not a string"),
    ("superglue", "rte", "RTE/train.jsonl", '"label": "not_', '"label": "un_',
     "line 2: the label is 'un_entailment', expected one of entailment, not_entailment"),
    ("superglue", "wsc", "WSC/val.jsonl", '"span1_text"', '"s"', "line 1: no 'span1_text' in it"),
    ("superglue", "multirc", "MultiRC/val.jsonl", '"questions": [', '"questions": 5, "q": [',
     "line 1: not as published .*int"),
    ("sni", "sni", "tasks/task3_c.json", '"output": [', '"outptu": [',
     "task3_c.json, instance 1: no 'output' in it"),
    ("sni", "sni", "tasks/task3_c.json", '"one"', "1", "instance 1: a text is not a string"),
    ("sni", "sni", "tasks/task3_c.json", '"output": [', '"output": [], "o": [',
     "instance 1: not as published"),
    ("sni", "sni", "tasks/task3_c.json", '"input"', '"input', "task3_c.json is damaged: .* line "),
    ("sni", "sni", "tasks/task3_c.json", '"Definition"', '"D"', "there is no Definition in it"),
    ("sni", "sni", "tasks/task3_c.json", '"Tell."', "3", "Definition: not as published"),
    ("sni", "sni", "tasks/task3_c.json", '"Instances": [', '"Instances": [], "I": [',
     "test_tasks.txt: no example in it"),
    ("sni", "sni", "splits/default/test_tasks.txt", "c", "d", "task3_d.json: no such file"),
])
# fmt: on
def test_a_malformed_file_is_named_with_its_line(tmp_path, suite, task, file, old, new, message):
    path = FILES[suite](tmp_path) / file
    whole = path.read_bytes()
    old = whole if old is None else old.encode()
    assert old in whole
    path.write_bytes(whole.replace(old, new.encode(errors="surrogateescape"), 1))
    with pytest.raises(UserError, match=message):
        tasks.find(suite).load(task, tmp_path)


def test_snis_prompt_is_the_studys(tmp_path):
    row = sni.load("sni", sni_files(tmp_path))[1][""][1]
    start = "Definition: Tell.\n\n"
    examples = [
        f" Positive Example {k + 1} -\nInput: in {k}.\n Output: out {k}!\n\n" for k in range(2)
    ]
    query = "Now complete the following example -\nInput: a dog said 'so' 1.\nOutput: "
    room_for_one = len(start + examples[0] + query)
    for limit, fitting in ((1000, examples), (room_for_one, examples[:1]), (10, [])):
        assert sni.prompt(row, len, limit) == start + "".join(fitting) + query


def test_a_row_reads_all_its_texts_and_is_cut_at_the_longest(finished_runs):
    bert, tokenizer = finetune.load_run(finished_runs["bert"], 0.1, False, 0)
    assert bert.config.dropout == 0.1
    recipe = dataclasses.replace(glue.RECIPE, max_length=16)
    learner = finetune.Classifier(bert, tokenizer, glue.TASKS["rte"], recipe)
    short, long = tokenizer.encode("abc de"), tokenizer.encode(words_text(0, 40))
    tokens, label = learner.encode(tasks.Row(("abc de", words_text(0, 40), "abc de"), 1))
    room = 16 - 4 - 2 * len(short)
    assert tokens.tolist() == [2, *short, 3, *long[:room], 3, *short, 3]
    assert len(tokens) == 16 and label == 1
    assert learner.encode(tasks.Row(("abc de",), 1))[0].tolist() == [2, *short, 3]


def test_fine_tunings_rate_is_that_of_transformers():
    from transformers import get_cosine_schedule_with_warmup

    recipe = dataclasses.replace(glue.RECIPE, lr=0.5)
    for updates in (7, 40, 333):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        schedule = get_cosine_schedule_with_warmup(optimizer, int(0.1 * updates), updates)
        for update in range(updates):
            expected = optimizer.param_groups[0]["lr"]
            assert finetune.scheduled_lr(recipe, update, updates) == pytest.approx(expected)
            optimizer.step()
            schedule.step()
    assert {finetune.scheduled_lr(sni.RECIPE, update, 10) for update in range(10)} == {5e-5}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "t5"])
def test_neighbours_and_batch_size_change_no_prediction(finished_runs, monkeypatch, model):
    loaded, tokenizer = finetune.load_run(finished_runs[model], 0.1, False, 0)
    nn.init.normal_(loaded.embedding, std=1.0)  # so that predictions differ
    rows = [tasks.Row((words_text(seed, 3 + 9 * (seed % 4)),), seed % 2) for seed in range(12)]
    if model == "bert":
        learner = finetune.Classifier(loaded, tokenizer, glue.TASKS["stsb"], glue.RECIPE).eval()
        encoded = [learner.encode(row) for row in rows]
        batch = learner.batch(encoded)
        alone, together = [learner(learner.batch([one]))[0] for one in encoded], learner(batch)
        torch.testing.assert_close(torch.stack(alone), together, rtol=0, atol=1e-5)
        unmasked = batch | {"mask": torch.ones_like(batch["mask"])}
        assert (learner(unmasked) - together).abs().max() > 1e-3  # the mask is what makes it so
        loaded.autocast_dtype = torch.bfloat16  # as on a GPU
        torch.testing.assert_close(learner(batch), together, rtol=0, atol=0.1)
        loaded.autocast_dtype = None
    else:
        recipe = dataclasses.replace(sni.RECIPE, target_length=6)
        learner = finetune.Writer(loaded, tokenizer, sni.TASKS["sni"], recipe).eval()
        encoded = [(learner.ended(row.texts[0], 1024), [1]) for row in rows]
    predictions = []
    for size in (1, 5, 32):
        monkeypatch.setattr(finetune, "ROWS_AT_ONCE", size)
        predictions.append(finetune.predict(learner, encoded, "cpu"))
    first = predictions[0]
    for others in predictions[1:]:
        assert others == (pytest.approx(first, abs=1e-5) if model == "bert" else first)
    assert len(set(first)) > 6


@pytest.mark.slow
def test_fine_tuning_learns_and_starts_anew_for_every_task(finished_runs, monkeypatch):
    """It tells rows with one word from rows with another; the same seed gives the same scores."""
    task, recipe = glue.TASKS["sst2"], dataclasses.replace(glue.RECIPE, lr=3e-3, epochs=4, batch=8)
    texts = [f"{words_text(n, 4)} {'aaa' if n % 2 else 'jjj'}" for n in range(96)]
    rows = [tasks.Row((text,), n % 2) for n, text in enumerate(texts)]
    found, steps = [], []

    class AdamW(torch.optim.AdamW):
        def step(self):
            (group,) = self.param_groups
            steps.append([group[name] for name in ("lr", "betas", "eps", "weight_decay")])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    for _ in range(2):
        bert, tokenizer = finetune.load_run(finished_runs["bert"], 0.1, False, 0)
        torch.manual_seed(0)
        learner = finetune.Classifier(bert, tokenizer, task, recipe)
        parts = rows[:64], {"": rows[64:]}
        found.append(finetune.finetune(learner, task, *parts, recipe, 0, "cpu", "words"))
    assert found[0] == found[1] and found[0][-1]["scores"]["accuracy"] > 0.9
    assert found[0][0]["training_loss"] > found[0][-1]["training_loss"]
    rates = [finetune.scheduled_lr(recipe, update, 32) for update in range(32)]
    assert steps == [[rate, (0.9, 0.98), 1e-6, 0.0] for rate in rates] * 2


def test_a_run_carries_its_tokenizer(finished_runs, corpus_folder, tmp_path):
    run = shutil.copytree(finished_runs["bert"], tmp_path / "run")
    _, tokenizer = finetune.load_run(run, 0.0, False, 0)
    assert tokenizer.vocabulary == prepare.load_tokenizer(corpus_folder).vocabulary
    (run / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer here"):
        finetune.load_run(run, 0.0, False, 0)
    pretrained, _ = finetune.load_run(finished_runs["bert"], 0.0, False, 0)
    untrained, _ = finetune.load_run(finished_runs["bert"], 0.0, True, 0)
    assert not torch.equal(pretrained.embedding, untrained.embedding)
    assert untrained.embedding.std().item() == pytest.approx(0.02 * 12**0.5, rel=0.02)
    for seed, same in ((0, True), (1, False)):
        again, _ = finetune.load_run(finished_runs["bert"], 0.0, True, seed)
        assert torch.equal(again.embedding, untrained.embedding) is same


def test_untrained_results_stand_apart(finished_runs, tmp_path, capsys):
    run = shutil.copytree(finished_runs["bert"], tmp_path / "run")
    flags = f"--task=sst2 --data_dir={glue_files(tmp_path / 'data')} --seeds=3 --epochs=1"
    finetuned(run, "glue", flags)
    finetuned(run, "glue", flags, "--untrained")
    paths = (run / "finetuned" / "glue").glob("sst2-seed3-*.json")
    one, other = (json.loads(path.read_text()) for path in paths)
    assert one["untrained"] != other["untrained"] and one["epochs"] != other["epochs"]
    report.main([str(run)])
    header = "| method | glue sst2 accuracy | glue untrained sst2 accuracy |"
    assert header in capsys.readouterr().out


def test_fine_tuning_reads_folders_of_transformers(finished_runs, tmp_path, monkeypatch, refuses):
    convert = transformers_folder.main
    convert([str(finished_runs["t5"]), str(tmp_path / "theirs")])
    refuses(convert, [finished_runs["bert"], tmp_path / "bert"], "a BERT")
    before = (finished_runs["t5"] / "config.json").read_text()
    refuses(convert, [finished_runs["t5"]] * 2, "is the run itself")  # its config would be lost
    assert (finished_runs["t5"] / "config.json").read_text() == before
    monkeypatch.setattr(sni, "INSTANCES", 4)
    flags = f"--data_dir={sni_files(tmp_path / 'data')} --epochs=1 --max_length=64"
    for folder, out in ((finished_runs["t5"], "ours"), (tmp_path / "theirs", "same")):
        finetuned(folder, "sni", flags, f"--out={tmp_path / out}")
    ours, theirs = (result_of(tmp_path / out, "sni-seed2137") for out in ("ours", "same"))
    assert ours["epochs"] == theirs["epochs"]


def test_suites_are_downloaded_and_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    files, served, data = tmp_path / "files", tmp_path / "served", tmp_path / "data"
    ours = glue_files(files), sni_files(files / "natural-instructions-2.8")
    for archive, folder in (("glue/data/SST-2", "SST-2"), ("v2.8", "natural-instructions-2.8")):
        shutil.make_archive(served / archive, "zip", files, folder)
    (served / "senteval/senteval_data").mkdir(parents=True)
    shutil.copy(files / "MRPC" / "train.tsv", served / glue.TASKS["mrpc"].archive)
    (served / glue.MRPC_DEV_IDS[0]).write_text("0\t9\n5\t9\n")
    server = serve(served)
    url = f"http://127.0.0.1:{server.server_port}"

    def digest(path):
        return hashlib.sha256((served / path).read_bytes()).hexdigest()

    try:
        with pytest.raises(
            UserError, match=r"SST-2.zip: damaged \(its SHA-256 is .* after 3 tries.*--data_dir"
        ):
            glue.load("sst2", data, url)
        for name in ("sst2", "mrpc"):
            task = glue.TASKS[name]
            task = dataclasses.replace(task, sha256=digest(task.archive))
            monkeypatch.setitem(glue.TASKS, name, task)
        ids = glue.MRPC_DEV_IDS[0]
        monkeypatch.setattr(glue, "MRPC_DEV_IDS", (ids, digest(ids)))
        assert glue.load("sst2", data, url) == glue.load("sst2", files)
        everything = glue.load("mrpc", files)[0]
        training, evaluated = glue.load("mrpc", data, url)
        assert evaluated[""] == [everything.pop(5), everything.pop(0)][::-1]
        assert training == everything
        for address in (f"{url}/v2.8.zip", "no address"):  # the second time it is there
            assert sni.load("sni", tmp_path / "sni", address) == sni.load("sni", ours[1])
        (data / "CB").mkdir()
        with pytest.raises(UserError, match="404"):
            superglue.load("cb", data, url)
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(path.name for path in data.iterdir()) == ["CB", "MRPC", "SST-2"]
    assert [path.name for path in (tmp_path / "sni").iterdir()] == ["natural-instructions"]
    made = ["dev.tsv", "mrpc_dev_ids.tsv", "msr_paraphrase_train.txt", "train.tsv"]
    assert sorted(path.name for path in (data / "MRPC").iterdir()) == made
    for address, message in (
        (url, "CB.zip: .*run the same command again.*or put the published files into"),
        ("no address", "unknown url type: .*or put the published files into"),
    ):
        with pytest.raises(UserError, match=message):
            superglue.load("cb", data, address)
    for name in ("../../evil", f"{tmp_path}/evil", "CB/other", "CB/deep/train.jsonl", "CB"):
        with zipfile.ZipFile(data / "CB.zip", "w") as file:
            file.writestr(name, b"x")
        with pytest.raises(UserError, match="there is no train.jsonl in it"):
            tasks.fetch_zip("no address", data / "CB", "train.jsonl")
    assert not list(tmp_path.rglob("evil")) and not list((data / "CB").iterdir())
    with zipfile.ZipFile(data / "CB.zip", "w") as file:  # a folder in one of its own name
        file.writestr("CB/CB/more", b"x")
        file.writestr("CB/train.jsonl", b"x")
    tasks.fetch_zip("no address", data / "CB", "train.jsonl")
    assert (data / "CB" / "CB" / "more").read_bytes() == b"x"
    shutil.rmtree(data / "CB")
    (data / "CB").mkdir()
    (data / "CB" / "readme").write_text("")
    with pytest.raises(UserError, match="has files in it, but no train.jsonl"):
        superglue.load("cb", data, url)


@pytest.mark.parametrize(
    "suite, task, file, message",
    [
        (glue, "cola", "CoLA.zip", "its SHA-256 is .*; remove it"),
        (glue, "mrpc", "MRPC/msr_paraphrase_train.txt", "its SHA-256 is"),
        (sni, "sni", "natural-instructions.zip", "not a whole zip file"),
    ],
)
def test_a_download_that_is_there_is_verified_too(tmp_path, suite, task, file, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("half of it")
    with pytest.raises(UserError, match=f"{file} is not as published: {message}"):
        suite.load(task, tmp_path, "no address")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / file]


def test_fine_tuning_waits_for_who_is_at_its_files(finished_runs, tmp_path, capsys):
    data, out = glue_files(tmp_path / "data"), tmp_path / "out"
    flags = f"--task=rte --data_dir={data} --out={out} --seeds=0 --epochs=1"
    other = threading.Thread(target=finetuned, args=(finished_runs["bert"], "glue", flags))
    with locked(data, wait=True):
        other.start()
        for _ in range(600):
            if "waiting for another process" in capsys.readouterr().out:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("it did not wait")
        assert not out.exists()
    other.join(60)
    assert result_of(out, "rte-seed0")


def test_who_misses_the_same_files_waits(tmp_path, capsys):
    """Two at once, as two processes: the second one gets to work when the first one is done."""
    order, inside = [], threading.Event()

    def second():
        inside.wait(10)
        with locked(tmp_path / "data", wait=True):
            order.append("second")

    waiting = threading.Thread(target=second)
    waiting.start()
    with locked(tmp_path / "data", wait=True):
        inside.set()
        waiting.join(0.5)
        assert waiting.is_alive()
        order.append("first")
    waiting.join(10)
    assert (
        order == ["first", "second"]
        and f"waiting for another process at work on {tmp_path / 'data'}" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--suite=squad", "expected one of glue, sni, superglue"),
        ("--suite=glue --task=rte,boolq", "--task=boolq: glue has cola, mnli"),
        ("--suite=sni", "--suite=sni is for t5;"),
        ("--suite=glue --seeds=a", "expected whole numbers"),
        (f"--suite=glue --seeds={2**32}", f"expected whole numbers from 0 to below {2**32}"),
        ("--suite=glue --dropout=1", "--dropout=1.0: expected a number, from 0 to"),
        ("--suite=glue --device=gpu", "expected cpu, cuda or cuda:NUMBER"),
        ("--suite=glue --threads=-1", "--threads=-1: expected a number, from 0 to 4096"),
        ("--suite=glue --max_length=600", "600: this model reads at most 512 tokens"),
    ],
)
def test_a_mistake_in_fine_tuning_is_a_message(finished_runs, tmp_path, refuses, flags, message):
    out = tmp_path / "out"
    refuses(finetune.main, [finished_runs["bert"], f"--out={out}", *flags.split()], message)
    assert not out.exists()


def test_a_damaged_task_is_named_before_another_trains(finished_runs, tmp_path, refuses):
    glue_files(tmp_path)
    (tmp_path / "MRPC" / "dev.tsv").write_text("Quality\n7\n")
    out, flags = tmp_path / "out", ("--suite=glue", "--task=sst2,mrpc", f"--data_dir={tmp_path}")
    refuses(finetune.main, [finished_runs["bert"], *flags, f"--out={out}"], "dev.tsv")
    assert not out.exists()


def test_only_a_finished_run_is_fine_tuned(finished_runs, tmp_path, refuses):
    def refused(run, message):
        refuses(finetune.main, [run, "--suite=glue"], message)

    def copied(name):
        return shutil.copytree(finished_runs["bert"], tmp_path / name)

    run = copied("no weights")
    (run / "model.pt").unlink()
    refused(run, "model.pt: no such file")
    run = copied("unfinished")
    (run / "result.json").unlink()
    refused(run, "is not finished; go on with")
    run = copied("empty")
    (run / "result.json").write_text("")
    refused(run, "is not finished; go on with")
    run = copied("swapped")
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    swapped = tokenizer | {"vocabulary": tokenizer["vocabulary"][::-1]}
    (run / "tokenizer.json").write_text(json.dumps(swapped))
    refused(run, "is not the tokenizer of this run (its checksum differs)")


def test_references_are_as_long_as_an_answer_can_be(finished_runs):
    t5, tokenizer = finetune.load_run(finished_runs["t5"], 0.0, False, 0)
    recipe = dataclasses.replace(sni.RECIPE, target_length=8)
    learner = finetune.Writer(t5, tokenizer, sni.TASKS["sni"], recipe)
    long, short = words_text(0, 50), "ab"
    row = learner.scored(tasks.Row(("x",), long, references=(long, short)))
    cut = tokenizer.decode(tokenizer.encode(long)[:7])
    assert row.label == cut != long and row.references == (cut, short)


def test_t5_folders_are_read_whole_or_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(3)
    model, batch, folder = models.T5(T5_SHAPE), t5_batch(3, 20, 5), tmp_path / "t5"
    transformers_folder.save_transformers(model, folder)
    path = folder / "model.safetensors"
    # Copies: what is loaded is mapped to the file, which is about to be damaged.
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    whole = path.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
        ({"decoder_start_token_id": 3}, "decoder_start_token_id is 3"),
        ({"num_layers": 2, "num_decoder_layers": 2}, "has no such layer"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            transformers_folder.load_transformers(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for damaged in (whole[:1000], whole[:8] + b"x" + whole[9:], b""):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="model.safetensors is damaged"):
            transformers_folder.load_transformers(folder)
    (folder / "model.safetensors").unlink()
    parts, places = ({}, {}), {}
    for number, (name, weight) in enumerate(weights.items()):
        parts[number % 2][name] = weight
        places[name] = f"part-{number % 2}.safetensors"
    for number, part in enumerate(parts):
        save_file(part, folder / f"part-{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    loaded = transformers_folder.load_transformers(folder)
    assert torch.equal(loaded.logits(batch), model.eval().logits(batch))
    before = finetune.weights_checksum(folder)
    changed = {name: weight + 1 for name, weight in parts[1].items()}
    save_file(changed, folder / "part-1.safetensors")
    assert finetune.weights_checksum(folder) != before
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match="part-1.safetensors: no such file"):
        transformers_folder.load_transformers(folder)
    index.unlink()
    with pytest.raises(UserError, match="no weights here"):
        finetune.weights_checksum(folder)


# -- The report and the study ----------------------------------------------------------------------


def write_run(folder, losses, method="baseline", seed=0, hours=1.0, **changes):
    """A finished run's folder, with the losses of its validations."""
    flags = {"method": method, "seed": seed, "budget_hours": hours, "data": "text", "device": "cpu"}
    config = dataclasses.asdict(resolve(flags)) | {"reference": "mine.json"}
    config |= changes.pop("config", {})
    stored = {"id": "0", "config": config, "corpus": "c"}
    stored["reference"] = {"probe_seconds": {"bert": 1.0}, "provenance": "a CPU"}
    stored |= {name: changes.pop(name) for name in ("corpus", "reference") if name in changes}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(stored))
    with open(folder / "log.jsonl", "w") as log:
        for n, loss in enumerate(losses):
            spent = 3600 * hours * (n + 1) / len(losses)
            record = {"update": 10 * n, "validation_loss": loss, "spent_seconds": spent}
            log.write(json.dumps(record) + "\n")
    seconds = dict(charged_seconds=3600.0 * hours, free_seconds=36.0, wall_seconds=7200.0)
    result = dict(validation_loss=losses[-1], updates=100, rows=800, config=config)
    result |= seconds | dict(stall_seconds=2.5, commit="abc", device="CPU", threads=2) | changes
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_score(folder, seed, score, data=1, weights=5, untrained=False, task="rte", **recipe):
    """A result of finetune.py."""
    folder.mkdir(parents=True, exist_ok=True)
    suffixes = ("", "_mismatched") if task == "mnli" else ("",)
    names = [name + suffix for suffix in suffixes for name in glue.TASKS[task].metrics]
    last, best = dict.fromkeys(names, score), dict.fromkeys(names, score + 0.1)
    result = dict(suite="glue", task=task, seed=seed, untrained=untrained, weights=weights)
    result |= dict(recipe={"lr": 0.001} | recipe, last=last, best=best)
    result["data"] = {"training_rows": 9, "data_checksum": data}
    (folder / f"{task}-seed{seed}.json").write_text(json.dumps(result))


def test_differences_and_intervals_are_scipys():
    from scipy import stats

    def middle_and_half(interval):
        middle, half = (interval.low + interval.high) / 2, (interval.high - interval.low) / 2
        return pytest.approx((middle, half), rel=1e-4)

    generator = np.random.default_rng(0)
    for count in (2, 3, 5, 12):
        ours, theirs = generator.normal(size=(2, count))
        paired = report.difference(dict(enumerate(ours)), dict(enumerate(theirs)))
        test = stats.ttest_rel(ours, theirs)
        assert paired[:2] == middle_and_half(test.confidence_interval())
        wider = report.difference(dict(enumerate(ours)), dict(enumerate(theirs)), 0.99)
        assert wider[:2] == middle_and_half(test.confidence_interval(0.99))
        if count > 2:
            others = dict(enumerate(theirs[:-1], 100))
            unpaired = report.difference(dict(enumerate(ours)), others)
            welch = stats.ttest_ind(ours, theirs[:-1], equal_var=False)
            assert unpaired[:2] == middle_and_half(welch.confidence_interval())
            assert unpaired[2] == "unpaired"
    assert report.difference({0: 2.0}, {0: 1.0}) == (1.0, None, "paired, 1")
    assert report.averaged([(0, 2.0), (0, 4.0), (1, 9.0)]) == {0: 3.0, 1: 9.0}  # a seed twice
    # One common seed is too few for an interval.
    assert report.difference({0: 2.0, 1: 4.0}, {1: 1.0, 2: 3.0})[2] == "unpaired"
    for degrees in (1, 1.7, 2, 5.3, 30, 1000):
        for confidence in (0.95, 1 - 0.05 / 14):
            expected = stats.t.ppf(0.5 + confidence / 2, degrees)
            found = report.student_t(degrees, confidence)
            assert found == pytest.approx(expected, rel=1e-4), degrees


def test_speed_up_is_read_off_the_baselines_final_losses():
    points = [(1.0, 3.0), (2.0, 2.0), (4.0, 1.5)]
    assert report.speed_up(points, 2.0, 1.0) == pytest.approx(2.0)
    assert report.speed_up(points, 2.5, 1.0) == pytest.approx(2**0.5)
    assert report.speed_up(points, 1.75, 4.0) == pytest.approx(8**0.5 / 4)
    assert report.speed_up(points, 3.5, 2.0) == "<0.5" and report.speed_up(points, 1.0, 2.0) == ">2"
    assert report.speed_up(points[:1], 3.0, 1.0) is None
    assert report.speed_up([*points, (8.0, 1.5)], 2.0, 1.0) is None  # it falls no more


def test_report_counts_its_comparisons(tmp_path, capsys):
    """One of two differences exceeds its own interval and not the wider one for both together."""
    for seed, (one, other) in enumerate([(0.1, 0.1), (0.15, 0.1), (0.08, 0.11)]):
        for method, gap in (("baseline", 0.0), ("lion", one), ("muon", other)):
            write_run(tmp_path / f"{method}{seed}", [3 + 0.1 * seed - gap], method, seed)
    report.main([str(tmp_path)])
    expected = "comparisons: 2; 95% intervals that exclude zero: lion, muon; after Bonferroni "
    output = capsys.readouterr().out
    assert f"{expected}correction: muon\n" in output
    assert "\nspeed-ups: none; they need baseline losses that fall" in output


def test_report_says_whether_a_gain_shrinks(tmp_path, capsys):
    """The change of a method's difference, from its first budget to its last, by seed; of another
    baseline it is none."""
    from scipy import stats

    gaps = {1.0: [-0.3, -0.2, -0.4], 2.0: [9.0, 9.0, 9.0], 4.0: [0.0, 0.15, -0.1]}
    for hours, of_seeds in gaps.items():
        for seed, gap in enumerate(of_seeds):
            loss = 3 / hours + 0.1 * seed
            write_run(tmp_path / f"b{hours}-{seed}", [loss], seed=seed, hours=hours)
            write_run(tmp_path / f"l{hours}-{seed}", [loss + gap], "lion", seed, hours)
    write_run(tmp_path / "muon", [1.0], "muon")  # at one budget only
    for method, lr in (("baseline", 0.1), ("lion", None)):
        changed = {"config": {"lr": lr}} if lr else {}
        write_run(tmp_path / f"{method}0.5", [9.0], method, hours=0.5, **changed)
    report.main([str(tmp_path)])
    interval = stats.ttest_rel(gaps[4.0], gaps[1.0]).confidence_interval()
    mean, half = (interval.high + interval.low) / 2, (interval.high - interval.low) / 2
    row = f"| lion | 1 h of mine | 4 h of mine | {mean:+.4f} ± {half:.4f} (paired, 3) |"
    found = re.findall(r"^\|.* h of mine \|.*", capsys.readouterr().out, re.MULTILINE)
    assert found == [row]


def test_the_noise_floor_is_fishers_least_significant_difference(tmp_path, capsys):
    """Against a regression on rows and seeds."""
    from scipy import stats

    losses = {"baseline": [3.0, 3.1, 2.9], "lion": [3.2, 3.4, 3.1], "muon": [2.8, 2.9, 2.9]}
    for method, of_seeds in (losses | {"rho": [9.0, 1.0]}).items():  # one that lacks a seed
        for seed, loss in enumerate(of_seeds):
            write_run(tmp_path / f"{method}{seed}", [loss], method, seed)
    report.main([str(tmp_path)])
    rows, seeds = np.repeat(np.eye(3), 3, axis=0), np.tile(np.eye(3), (3, 1))
    (squares,) = np.linalg.lstsq(np.hstack([rows, seeds[:, 1:]]), np.ravel([*losses.values()]))[1]
    deviation = (squares / 4) ** 0.5
    least = stats.t.ppf(0.975, 4) * deviation * (2 / 3) ** 0.5
    words = re.search("noise floor: .*", capsys.readouterr().out)[0]
    assert f"standard deviation of {deviation:.4f} after" in words
    assert "(3 rows, 4 degrees of freedom" in words and f"differ by up to {least:.4f} by" in words


def test_report_compares_only_what_can_be_compared(tmp_path, capsys, refuses):
    runs, table, drawn = tmp_path / "runs", tmp_path / "table.csv", tmp_path / "figures"
    for seed, (base, stacked) in enumerate([(3.0, 2.9), (3.1, 2.8), (3.2, 3.0)]):
        write_run(runs / f"b{seed}", [4.0, base], seed=seed)
        write_run(runs / f"s{seed}", [4.1, stacked], "stacking", seed)
        write_run(runs / f"b2-{seed}", [3.9, base - 0.5], seed=seed, hours=2.0)
    write_run(runs / "lr", [9.0], config={"lr": 0.5})  # another recipe: a row of its own
    # Another preparation, another reference, updates in place of hours: other tables.
    write_run(runs / "corpus", [8.0], "stacking", corpus="another")
    machine, plain = ({"probe_seconds": x, "provenance": "plain time"} for x in ({"bert": 2.0}, {}))
    write_run(runs / "machine", [7.0], "stacking", reference=machine)
    write_run(runs / "short", [4.5], "stacking", hours=0.5)
    write_run(runs / "other", [7.0], config={"data": "text2"}, corpus="d")
    write_run(runs / "moved", [9.0], "stacking", hours=0.5, config={"data": "/moved/text"})
    # Another measure.
    fewer = {"data": "text2", "validation_rows": 7}
    write_run(runs / "rows", [7.0], "stacking", config=fewer, corpus="d")
    # An hour buys more updates.
    write_run(runs / "compiled", [2.5], "stacking", config={"compile": True})
    # The same reference by another path.
    write_run(runs / "path", [2.7], seed=7, config={"reference": "elsewhere/mine.json"})
    write_run(runs / "plain", [7.0], config={"reference": "this"}, reference=plain)
    write_run(runs / "8", [6.5], config={"reference": "this"}, reference=plain, processes=8)
    write_run(runs / "steps", [6.0], config={"budget_hours": None, "budget_steps": 5})
    (write_run(runs / "unfinished", [5.0], "lion") / "result.json").unlink()
    (write_run(runs / "damaged", [5.0], "lion") / "result.json").write_text('{"validation_loss"')
    (write_run(runs / "no-loss", [5.0], "rho") / "result.json").write_text('{"updates": 1}')
    (write_run(runs / "config", [5.0]) / "config.json").write_text("{")
    cut = '{"update": 1, "validation_loss": 4.0, "spent_seconds": 1.0}\n{"upd'
    (write_run(runs / "cut-log", [5.0], "sophia") / "log.jsonl").write_text(cut)
    for run, score in (("b0", 0.5), ("b1", 0.7), ("s0", 0.8)):
        for seed in range(2):
            write_score(runs / run / "finetuned" / "glue", seed, score + 0.02 * seed)
    bad = runs / "b2-0" / "finetuned" / "glue" / "rte-seed0.json"
    bad.parent.mkdir(parents=True)
    bad.write_text("{")
    report.main([str(runs), f"--csv={table}", f"--figures={drawn}"])
    output = capsys.readouterr().out
    start, one = "bert-tiny on text, ", "corpus c, reference mine, probe_seconds bert 1, "
    assert re.findall("^## (.*)", output, re.MULTILINE) == [
        start + "corpus another, reference mine, probe_seconds bert 1, 1 h of mine",
        start + "corpus c, 5 updates",
        start + one + "0.5 h of mine",
        start + one + "1 h of mine",
        start + one + "2 h of mine",
        start + "corpus c, reference mine, probe_seconds bert 2, 1 h of mine",
        start + "corpus c, reference this, hour plain time, 1 process(es), 1 h of this",
        start + "corpus c, reference this, hour plain time, 8 process(es), 1 h of this",
        "bert-tiny on text2, validation_rows 1000, 1 h of mine",
        "bert-tiny on text2, validation_rows 7, 1 h of mine",
    ]
    of_one_hour = output.split("## ")[4]
    for expected in (
        "| baseline | 4 | 3.0000 ± 0.2160 | – |",
        "| stacking compile=True | 1 | 2.5000 ± – | -0.5000 ± – (paired, 1) |",
        "| stacking | 3 | 2.9000 ± 0.1000 | -0.2000 ± 0.2484 (paired, 3) | 1.41 (<1 to >2) |",
        "| baseline lr=0.5 | 1 | 9.0000 ± – | +6.0000 ± – (paired, 1) |",
        "| lion | 0 | – | – | – |",
        "| 100 | 800 | 1 | 0.01 | 2 | 2.5 |",
        "\ncomparisons: 1; 95% intervals that exclude zero: none; after Bonferroni",
        "\nspeed-ups are read off the baseline's mean losses, taken as exact: 3.0000 after 1 h",
        "\nstacking compile=True: compile True, growth_times 0.125,0.3, optimizer_state keep\n",
        "commits: abc",
        "\nCPU threads: 2\n",
        "\nbaseline: batch 32, beta1 ",
        "| method | glue rte accuracy |",
        "| baseline | 61.0 ± 14.1 (2 pre-trainings), best 71.0 ± 14.1 (2 pre-trainings) |",
        "| stacking | 81.0 ± 1.4 (2 fine-tunings), best 91.0 ± 1.4 (2 fine-tunings) |",
        "| lion | – |",
        "\nglue (rte): lr 0.001\n",
    ):
        assert expected in of_one_hour, expected
    for name, problem in (
        ("unfinished", "unfinished"),
        ("damaged", f"{runs / 'damaged'}/result.json is damaged"),
        ("no-loss", f"{runs / 'no-loss'}/result.json: there is no validation_loss in it"),
        ("config", f"{runs / 'config'}/config.json is damaged"),
        ("cut-log", f"{runs / 'cut-log'}/log.jsonl is damaged: its last line, 2, is cut short"),
        ("b2-0", f"{bad} is damaged"),
    ):
        assert f"{runs / name}: {problem}" in output
    records = list(csv.DictReader(open(table)))
    (lion,) = [r for r in records if r["method"] == "lion"]
    assert len(records) == 16 and (lion["n"], lion["difference"]) == ("0", "")
    assert (lion["model"], lion["data"]) == ("bert", "text")  # though none has finished
    of_an_hour = ("stacking", "1.0", "3")
    (r,) = [r for r in records if (r["method"], r["budget_hours"], r["n"]) == of_an_hour]
    numbers = float(r["difference"]), float(r["glue rte accuracy last"])
    assert numbers == pytest.approx((-0.2, 0.81))
    figures = sorted(path.name for path in drawn.iterdir())
    # And final losses and speed-up by budget.
    assert len([name for name in figures if name.startswith("loss-")]) == 10 and len(figures) == 12
    refuses(report.main, [drawn], "neither the folder of a run nor a folder with runs")


def test_pairs_of_two_devices_are_named(tmp_path, capsys):
    for seed, method, device in itertools.product(range(3), ("baseline", "lion", "muon"), "ab"):
        if device == ("b" if method == "lion" and seed else "a"):
            write_run(tmp_path / f"{method}{seed}", [3.0], method, seed, device=device)
    write_run(tmp_path / "muon3", [3.0], "muon", 3, device="b")  # no pair
    report.main([str(tmp_path)])
    apart = re.findall(r"(\w+): on another device than the baseline: (.*)", capsys.readouterr().out)
    assert apart == [("lion", "seed 1, 2")]


def test_two_versions_of_a_method_file_are_named(tmp_path, corpus_folder, capsys):
    for seed, version in enumerate("aab"):
        files = {"baseline": "c", "lion": version}
        write_run(tmp_path / f"run{seed}", [3.0], "lion", seed, method_files=files)
    report.main([str(tmp_path)])
    versions = f"a: {tmp_path / 'run0'}, {tmp_path / 'run1'}; b: {tmp_path / 'run2'}"
    output = capsys.readouterr().out
    assert f"methods/lion.py differs between these runs: {versions}\n" in output
    assert "methods/baseline.py" not in output
    flags = "--method=lawa+wsd --budget_steps=1 --validations=1"
    files = trained(corpus_folder, tmp_path / "real", flags)["method_files"]
    assert list(files) == ["baseline", "lawa", "wsd"]
    for name, found in files.items():
        source = (ROOT / "methods" / f"{name}.py").read_bytes()
        assert found == hashlib.sha256(source).hexdigest()[:12]


def test_an_edited_method_is_said(
    corpus_folder, tmp_path, method_files, at_update, monkeypatch, refuses, capsys
):
    """Of a run that goes on, of a finished one, and of one whose method inherits from it."""
    monkeypatch.setattr("runs.ROOT", tmp_path)
    parent = "from methods.baseline import Method\nclass Parent(Method):\n    pass\n"
    child = "from methods.parent import Parent\nclass Child(Parent):\n    pass\n"
    method_files(parent=parent, child=child)
    flags = small_run(corpus_folder, tmp_path / "run", "--method=child --budget_steps=4", SAVING)
    at_update({3: kill})
    with pytest.raises(Killed):
        train.main(flags)
    method_files(parent=parent + "# edited\n")
    resume = [f"--resume={tmp_path / 'run'}"]
    train.main(resume)
    edited = ", before methods/parent.py was edited"
    assert f"resumed after update 2{edited}" in capsys.readouterr().out
    refuses(train.main, flags, f"this run is finished{edited}")
    report.main([str(tmp_path / "run")])
    problem = "methods/parent.py was edited between its beginning and its end"
    assert f"{tmp_path / 'run'}: {problem}" in capsys.readouterr().out
    flags = study_flags(corpus_folder, "--methods=child --seeds=0 --budgets= --budget_steps=1")
    monkeypatch.setattr(study.Launcher, "run", lambda launcher, flags: train.main(flags))
    study.main(flags)
    study.main(flags)
    assert capsys.readouterr().out.endswith(": finished\n")
    method_files(child=child + "# edited\n")
    study.main(flags)
    assert ": finished, before methods/child.py was edited" in capsys.readouterr().out


def test_difference_and_speed_up_are_to_the_same_baseline(tmp_path, capsys):
    runs, other = tmp_path / "runs", {"lr": 0.5}
    for seed, (hours, loss) in enumerate([(1.0, 4.0), (2.0, 3.0), (8.0, 2.0)]):
        write_run(runs / f"plain{hours}", [loss], hours=hours, seed=seed)
    for hours, loss in ((4.0, 4.0), (16.0, 3.0)):  # at these budgets there is no other baseline
        write_run(runs / f"other{hours}", [loss], hours=hours, config=other)
    write_run(runs / "stacking", [3.5], "stacking", hours=4.0)
    report.main([str(runs), f"--figures={tmp_path / 'figures'}"])
    one = next(part for part in capsys.readouterr().out.split("## ") if ", 4 h of" in part)
    assert (
        "| stacking | 1 | 3.5000 ± – | -0.5000 ± – (paired, 1) | 2.00 |" in one
        and "| baseline lr=0.5 | 1 | 4.0000 ± – | – | 1.00 |" in one
    )


def test_scores_are_averaged_only_with_their_like(tmp_path, capsys):
    """Other data, another recipe or another start is a column of its own, whatever its folder is
    called."""
    runs = tmp_path / "runs"
    places = {
        run: write_run(runs / run, [3.0], seed=seed) / "finetuned" for seed, run in enumerate("abc")
    }

    def cells():
        report.main([str(runs), f"--csv={tmp_path / 'table.csv'}"])
        output = capsys.readouterr().out
        titles, scores = (
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in output.split("Fine-tuned")[1].splitlines()
            if re.match(r"\| (method|baseline)", line)
        )
        return {
            title: cell.partition(",")[0] for title, cell in zip(titles[1:], scores[1:])
        }, output

    for seed, (score, before) in enumerate([(0.80, 0.77), (0.82, 0.80), (0.84, 0.80)]):
        write_score(places["a"] / "glue", seed, score)
        write_score(places["a"] / "anything", seed, before, untrained=True)
    found, output = cells()
    assert found == {
        "glue rte accuracy": "82.0 ± 2.0 (3 fine-tunings)",
        "glue untrained rte accuracy": "79.0 ± 1.7 (3 fine-tunings)",
    }
    # 4.303 / 3**0.5.
    gain = (
        "baseline, glue rte accuracy, last epoch: pre-trained minus untrained +3.0 ± 2.5 points, "
        "95% over fine-tuning seeds (paired, 3)"
    )
    assert gain in output and "\nglue (rte): lr 0.001\n" in output
    with open(tmp_path / "table.csv") as file:
        record = next(csv.DictReader(file))
    assert [
        float(record[f"glue rte accuracy {name}"]) for name in ("last", "last deviation", "n")
    ] == pytest.approx([0.82, 0.02, 3])
    # The same from any run: no more evidence than before.
    for seed, before in enumerate((0.77, 0.80, 0.80)):
        write_score(places["b"] / "glue-untrained", seed, before, untrained=True)
    assert cells()[0] == found and gain in cells()[1]
    write_score(places["a"] / "glue-more", 3, 0.94)  # another seed of the same
    write_score(places["b"] / "glue", 0, 0.95, data=2)
    write_score(places["b"] / "rate", 0, 0.91, lr=0.5)
    write_score(places["c"] / "glue", 0, 0.65)
    found, output = cells()
    assert found == {
        "glue rte accuracy lr=0.001 data_checksum=1": "75.0 ± 14.1 (2 pre-trainings)",
        "glue rte accuracy lr=0.001 data_checksum=2": "95.0 (1 fine-tuning)",
        "glue rte accuracy lr=0.5 data_checksum=1": "91.0 (1 fine-tuning)",
        "glue untrained rte accuracy lr=0.001 data_checksum=1": "79.0 ± 1.7 (3 fine-tunings)",
    }
    assert "\nglue (rte): lr 0.001\nglue (rte): lr 0.5\n" in output
    # 0.85 and 0.65 against 0.77, 0.80 and 0.80 are two samples, so that the spread of the
    # pre-trainings counts: 12.12, of 1.02 degrees of freedom, times (0.01 + 0.0001)**0.5
    assert (
        "pre-trained minus untrained -4.0 ± 121.9 points, 95% over pre-training seeds (unpaired)"
        in output
    )
    write_score(places["c"] / "other", 0, 0.1, weights=6)
    found, output = cells()
    assert (
        f"{runs / 'c' / 'finetuned'}: its results are of 2 different weights" in output
        and found["glue rte accuracy lr=0.001 data_checksum=1"] == "85.0 ± 6.2 (4 fine-tunings)"
    )


def test_the_mean_of_a_suite_is_of_its_own_tasks(tmp_path, capsys):
    for seed in range(2):
        place = write_run(tmp_path / f"run{seed}", [3.0], seed=seed) / "finetuned" / "glue"
        for task in glue.TASKS if seed else glue.DEFAULT:  # one has wnli besides
            write_score(place, 0, 0.6 + 0.1 * seed, task=task)
    report.main([str(tmp_path)])
    output = capsys.readouterr().out
    assert (
        "| glue all score |" in output
        and "| 65.0 ± 7.1 (2 pre-trainings), best 75.0 ± 7.1 (2 pre-trainings) |" in output
    )
    write_score(place, 1, 0.5, task="sst2", data=2)  # of which data is the mean now?
    report.main([str(tmp_path / "run1")])
    assert " all score" not in capsys.readouterr().out


@pytest.mark.slow
def test_running_out_of_memory_is_a_message(
    finished_runs, tmp_path, corpus_folder, monkeypatch, refuses
):
    """Wherever it happens: in the warm-up before the first update, in the middle, or in
    fine-tuning."""

    def too_much(*arguments):
        return torch.empty(10**15)

    training = small_run(corpus_folder, tmp_path / "run", "--budget_steps=4")
    tuning = [str(finished_runs["bert"]), "--suite=glue", "--task=rte", f"--out={tmp_path / 'out'}"]
    tuning += [f"--data_dir={glue_files(tmp_path / 'data')}"]
    smaller = "--micro_batch=6; a smaller one"
    for main, flags, owner, place, message in (
        (train.main, training, train.Training, "warm_up", smaller),
        (train.main, training, train, "validate", smaller),
        (finetune.main, tuning, finetune.Classifier, "loss", "--batch=16 --max_length=128"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, place, too_much)
            refuses(main, flags, f"error: out of memory with {message}")
    with pytest.raises(RuntimeError, match="differ"), train.explains_out_of_memory("with this"):
        raise RuntimeError("shapes differ")


def test_a_run_that_changed_its_precision_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "run", [3.0])
    result = json.loads((run / "result.json").read_text())
    config = result["config"]
    for changes, problem in (
        ({"dtype": "bf16"}, f"{run}: resumed with another dtype, fp32 and then bf16"),
        ({"threads": 7}, ""),
        (None, f"{run}: {run}/result.json: config is None, expected dict"),
    ):
        (run / "result.json").write_text(
            json.dumps(result | {"config": changes and config | changes})
        )
        report.main([str(run)])
        output = capsys.readouterr().out
        assert problem in output and (problem or "resumed" not in output)


def test_a_folder_that_is_a_file_is_a_message(finished_runs, tmp_path, refuses):
    (tmp_path / "file").write_text("")
    for main, flags in (
        (report.main, [f"--figures={tmp_path / 'file'}"]),
        (finetune.main, ["--suite=glue", "--task=rte", f"--data_dir={tmp_path / 'file'}"]),
    ):
        refuses(main, [finished_runs["bert"], *flags], str(tmp_path / "file"))


def csv_records(path):
    with open(path, newline="") as file:
        return [*csv.DictReader(file)]


def study_records():
    """Those of results/study.csv on `pydocs`, but for the second models that methods need."""
    records = csv_records(ROOT / "results" / "study.csv")
    return [r for r in records if (r["data"], r["train_on"]) == ("pydocs", "training")]


def test_the_readmes_differences_are_those_of_the_study():
    """A row a method, a column a budget: in bold where it is larger than its interval."""
    columns = [("bert", "0.033"), ("bert", "0.1"), ("bert", "0.3"), ("t5", "0.1"), ("t5", "0.3")]
    cells = {}
    for record in study_records():
        if record["n"] != "3":
            continue
        if record["method"] == "baseline":
            text = f"{float(record['validation_loss']):.3f}"
        else:
            mean, half = float(record["difference"]), float(record["interval_95"])
            text = f"{mean:+.3f}".replace("-", "−")
            text = (f"**{text}**" if abs(mean) > half else text) + f"±{half:.3f}"
        cells[record["method"], record["model"], record["budget_hours"]] = text
    rows = [
        "|".join([method, *(cells.get((method, *column), "") for column in columns)])
        for method in dict.fromkeys(record["method"] for record in study_records())
        if method not in ("baseline lr=0.04", "wsd cool_down=0.0", "lawa+wsd")  # other questions
    ]
    table = re.findall(r"^(?!method)[a-z_+]+\|.*", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 17 and sorted(table) == sorted(rows)


def test_the_answers_numbers_are_those_of_the_study(tmp_path):
    """Of results/README.md, the text before its tables: differences and speed-ups."""
    page = (ROOT / "results" / "README.md").read_text()
    text = page.split("\n## ")[0].replace("\n  ", " ")
    report.main([str(ROOT / "results" / "runs-epyc"), f"--csv={tmp_path / 'epyc.csv'}"])
    # Beside T5's other baseline: the report without the usual one.
    (usual,) = re.findall(r"grep -v -e (\w+) -e (\w+) -e (\w+)", page)
    folders = (ROOT / "results" / "runs").glob("t5-*-0.1h-*")
    folders = [str(folder) for folder in folders if not folder.name.endswith(usual)]
    report.main([*folders, f"--csv={tmp_path / 'other.csv'}"])
    known = [
        f"{float(record['difference']):+.3f} ± {float(record['interval_95']):.3f}"
        for path in (ROOT / "results" / "study.csv", tmp_path / "epyc.csv", tmp_path / "other.csv")
        for record in csv_records(path)
        if record["interval_95"]
    ]
    scores = re.findall(r"\d\d\.\d ± \d\.\d(?!\d)", text)
    assert len(scores) == 4 and all(f"{score} (5 fine-tunings)" in page for score in scores)
    for rise, half in re.findall(r"one-thread \| ([+-]\d\.\d+) ± (\d\.\d+)", page):
        known.append(f"{float(rise):+.3f} ± {float(half):.3f}")
    found = re.findall(r"[+−]\d\.\d+(?: ± \d\.\d+)?", text)
    assert len(found) > 10 and {number.replace("−", "-") for number in found} <= {*known}
    speed_ups = [record["speed_up"] for record in study_records()]
    known = [f"{float(one):.2f}" for one in speed_ups if one and one[0] not in "<>"]
    found = re.findall(r"(?<![\d.])\d\.\d\d(?!\d| h)", text)
    assert len(found) > 4 and {*found} <= {*known}


def kept(folder):
    """The result of a run that is kept in results/."""
    (path,) = (ROOT / "results").glob(f"{folder}/result.json")
    return json.loads(path.read_text())


def test_the_pages_of_reference_time_show_the_runs_that_are_kept():
    """A row a run: its factor's mean, its minutes, updates and loss."""
    page = (ROOT / "results" / "README.md").read_text()
    first = "runs/{}-tiny-baseline-pydocs-{}h-one-thread-seed{}-*"
    rows = {
        "BERT, 0.1 h, an EPYC": kept(first.format("bert", "0.1", 0)),
        "BERT, 0.1 h, a Xeon": kept("reference_time/bert-0.1h-xeon"),
    }
    epyc = first.format("bert", "0.033", 0).replace("runs/", "runs-epyc/")
    rows["BERT, 0.033 h, the EPYC"] = kept(epyc)
    for others, name in ((0, "alone"), (1, "beside one process"), (3, "beside three")):
        rows[f"BERT, 0.033 h, the Xeon, {name}"] = kept(f"reference_time/{others}-others")
    for seed in range(3):
        rows[f"BERT, 0.3 h, the Xeon, seed {seed}"] = kept(first.format("bert", "0.3", seed))
    dropped = first.format("bert", "0.17", 0).replace("baseline", "layer_drop")
    for seed, folder in ((0, dropped), (2, "reference_time/slowed")):
        rows[f"BERT, `layer_drop`, 0.17 h, the Xeon, seed {seed}"] = kept(folder)
    for name, result in rows.items():
        factor = statistics.mean(factor for _, factor in result["factor_history"])
        row = f"| {name} | {factor:.2f} | {result['wall_seconds'] / 60:.1f} | "
        row += f"{result['updates']:,} | {result['validation_loss']:.4f} |"
        assert row in page, row


def test_the_courses_figures_are_those_of_the_runs_that_are_kept(capsys):
    """Its table has a row a run, and of step 8 the report's; what one should see is in it."""
    page = (ROOT / "docs" / "course.md").read_text()
    folder, known = ROOT / "results" / "course", set()
    rows = re.findall(r"^\| (\d-[a-z-]+) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    expected = []
    for path in sorted(folder.glob("[1-7]-*")):
        result = kept(f"course/{path.name}")
        log = [json.loads(line) for line in open(path / "log.jsonl")]
        losses = [f"{record['validation_loss']:.2f}" for record in log]
        expected.append((path.name, f"{result['updates']:,}", " ".join(losses)))
        factors = [f"{factor:.2f}" for _, factor in result["factor_history"]]
        known |= {expected[-1][1], *losses, *factors}
    assert len(rows) > 12 and rows == expected
    report.main([str(folder / "8-study")])
    reported = re.findall(r"^\| [a-z].* \| \d \| .*", capsys.readouterr().out, re.MULTILINE)
    reported = [row.split(" | ")[:6] for row in reported]
    assert len(reported) == 6 and all(f"\n{' | '.join(row)} |" in page for row in reported)
    known.update(*(re.findall(r"\d\.\d+", " ".join(row)) for row in reported))
    steps = re.sub(r"```.*?```|`.*?`", "", page.split("## Our runs")[0], flags=re.DOTALL)
    numbers = {*re.findall(r"\d\.\d\d+(?!\d| h| nats)|\d,\d{3}", steps)}
    assert steps.count("*You should see*") == 8 and numbers and numbers <= known, numbers - known


def test_the_readmes_sample_is_of_a_run_that_is_kept():
    readme, result = (ROOT / "README.md").read_text(), kept("quickstart/bert")
    entropy, loss = result["unigram_entropy"], result["validation_loss"]
    last = (
        f"validation loss {loss:.4f} after {result['updates']} updates, {result['rows']:,} rows; "
        f"unigram entropy {entropy:.4f} (difference {entropy - loss:.4f})"
    )
    printed = (ROOT / "results" / "quickstart" / "bert" / "printed.txt").read_text()
    assert last in readme and last in printed
    lines = re.findall(r"^  (?:read|written|original) +(.*) \.\.\.$", readme, re.MULTILINE)
    assert len(lines) == 3 and all(line in printed for line in lines)


def test_the_tables_of_results_are_the_reports(tmp_path, capsys):
    """Every row of the report of the runs that are kept in results/ is on its page."""
    report.main([str(ROOT / "results" / "runs"), f"--csv={tmp_path / 'study.csv'}"])
    rows = re.findall(r"^\|.*", capsys.readouterr().out, re.MULTILINE)
    page = (ROOT / "results" / "README.md").read_text().splitlines()
    assert len(rows) > 50 and set(rows) <= set(page)
    assert (tmp_path / "study.csv").read_text() == (ROOT / "results" / "study.csv").read_text()


def test_tinys_rates_are_the_best_of_their_trials():
    """Of its five trials each method's best has a worse one on both sides; T5's best rates and
    halves of them had longer trials, and two of BERT's. The best is the default, and the page has
    them all."""
    page = (ROOT / "results" / "README.md").read_text()
    longer_updates = {"bert": 10_000, "t5": 5_000}
    trials, longer_trials = collections.defaultdict(dict), collections.defaultdict(dict)
    for record in csv_records(ROOT / "results" / "tuning.csv"):
        settings = json.loads(record["settings"])
        if record["train_on"] == "training":
            model, updates = record["model"], int(record["budget_steps"])
            stage = {2500: trials, longer_updates[model]: longer_trials}[updates]
            own = stage[model, settings["method"]]
            assert settings["lr"] not in own  # or two tables have it
            own[settings["lr"]] = float(record["validation_loss"] or "inf")
    table = re.findall(r"\(methods/(\w+)\.py\) \|", (ROOT / "README.md").read_text())
    assert len(table) == 15 and {*table} <= {*methods.names()}
    assert trials.keys() == set(itertools.product(("bert", "t5"), table))
    of_bert = {("bert", "baseline"), ("bert", "stacking")}
    assert longer_trials.keys() == of_bert | set(itertools.product(["t5"], table))
    losses_of = {(*key, lr): losses[lr] for key, losses in trials.items() for lr in losses}
    assert [key for key, loss in losses_of.items() if loss == math.inf] == [("t5", "lion", 0.012)]

    def cells(losses):
        bold = {lr: "**" * (lr == min(losses, key=losses.get)) for lr in losses}
        cells = (f"{lr:g}: {bold[lr]}{losses[lr]:.4f}{bold[lr]}" for lr in sorted(losses))
        return " | ".join(cells).replace("inf", "diverged")

    for (model, method), losses in trials.items():
        best = min(losses, key=losses.get)
        assert len(losses) >= 5 and min(losses) < best < max(losses), (model, method)
        assert f"| {model} | {method} | {cells(losses)} |" in page
        if longer := longer_trials.get((model, method)):
            assert longer.keys() == {best, best / 2}, (model, method)
            updates = longer_updates[model]
            assert f"| {model} | {method} | {updates:,} | {cells(longer)} |" in page
            best = min(longer, key=longer.get)
        assert methods.find(method).defaults(model, "tiny")["lr"] == best, (model, method)


@pytest.mark.slow
def test_the_plateau_is_watched(corpus_folder, tmp_path):
    flags = study_flags(corpus_folder, "--budget_steps=8 --validations=2")
    done = command("results/plateau.py", "learned", tmp_path / "some.csv", *flags)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "some.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 4  # validations, layers, heads
    assert len({row["position_scale"] for row in rows}) == 2  # it is learned
    for row in rows:  # before the attention has learnt anything a share is one in 32 or so
        assert 0.01 < float(row["before"]) < 0.1 and 0.01 < float(row["behind"]) < 0.1
    drawn = command("results/plateau.py", "draw", tmp_path / "a.svg", tmp_path / "some.csv")
    assert drawn.returncode == 0 and (tmp_path / "a.svg").read_text().count("<!-- some -->") == 3


def test_t5s_plateau_is_watched(t5_folder, tmp_path):
    flags = study_flags(t5_folder, "--budget_steps=2 --validations=1")
    done = command("results/plateau.py", "published", tmp_path / "some.csv", *flags)
    assert done.returncode == 0, done.stderr
    rows = csv_records(tmp_path / "some.csv")
    assert len(rows) == 4 * 2  # layers, heads
    for row in rows:  # before the attention has learnt anything a share is one in 64 or so
        assert 0.005 < float(row["sentinel"]) < 0.05
        assert float(row["position_std"]) == pytest.approx(64**-0.5, rel=0.3)
    drawn = command("results/plateau.py", "draw", tmp_path / "a.svg", tmp_path / "some.csv")
    assert drawn.returncode == 0 and (tmp_path / "a.svg").read_text().count("<!-- some -->") == 3


def test_attention_to_the_sentinel_is_that_of_the_weights(t5_folder):
    """A decoder whose queries and keys are the embeddings themselves attends to the token that it
    has just read, which is the sentinel when it writes the first token of a span, and only then."""
    specification = importlib.util.spec_from_file_location("plateau", ROOT / "results/plateau.py")
    plateau = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(plateau)
    model = models.build("t5", "tiny", 512)
    corpus = Corpus(t5_folder, row_length=64, mask_share=0.3)
    batch = next(corpus.validation_batches(8))
    first = corpus.meta["first_sentinel"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search("cross_attention.(query|key)", name):
                parameter.copy_(torch.eye(64))
            elif name.endswith("output.weight"):  # no layer adds anything
                parameter.zero_()
        # In each head the first 31 sentinels have a direction each, and all other tokens share one.
        directions = torch.eye(32).repeat(1, 2)
        model.embedding.copy_(directions[-1].expand(512, -1))
        model.embedding[first - 30 : first + 1] = directions[:31]
    spans = (batch["labels"][0] > first - prepare.SENTINELS).sum().item()
    first_tokens = spans / (batch["labels"].shape[1] - spans - 1)
    shares = plateau.sentinel_shares(model, batch, first)
    assert len(shares) == 4 * 2
    assert [share for _, _, share in shares] == pytest.approx([first_tokens] * 8, abs=1e-6)


def test_report_reads_real_runs(finished_runs, capsys):
    report.main([str(finished_runs["bert"]), str(finished_runs["t5"])])
    output = capsys.readouterr().out
    for model, run in finished_runs.items():
        loss = json.loads((run / "result.json").read_text())["validation_loss"]
        assert (
            re.search(rf"## {model}-tiny on .*, 2 updates\n", output)
            and f"| baseline | 1 | {loss:.4f} ± – |" in output
        )


@pytest.mark.slow
def test_a_study_keeps_resumes_and_makes_runs(
    corpus_folder, tmp_path, monkeypatch, capsys, refuses
):
    class InThisProcess:
        stopped = 0

        def __init__(self, launch):
            pass

        def run(self, flags):
            train.main(flags)

    def states(*flags):
        study.main([*flags])
        return re.findall(r": (finished|interrupted|new)\n", capsys.readouterr().out)

    monkeypatch.setattr(study, "Launcher", InThisProcess)
    monkeypatch.setattr("runs.ROOT", tmp_path)
    flags = study_flags(
        corpus_folder, "--methods=baseline,stacking --seeds=0,1 --budgets=0.0001 --validations=1"
    )
    assert states(*flags) == ["new"] * 4
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 4 and all((folder / "result.json").exists() for folder in folders)
    results = {folder: (folder / "result.json").read_bytes() for folder in folders}
    (folders[0] / "result.json").unlink()  # as if it had been stopped just before its end
    assert states(*flags) == ["interrupted"] + ["finished"] * 3
    assert sorted((tmp_path / "runs").iterdir()) == folders
    assert all((folder / "result.json").read_bytes() == results[folder] for folder in folders[1:])
    for flag, message in (
        ("--size=huge", "--size"),
        ("--method=lion", "a study has --methods"),
        ("--seed=3", "a study has --seeds"),
        ("--lr=0.1", "a study has --lrs"),
        ("--budget_steps=3", "--budget_hours and --budget_steps are two budgets; give one"),
        ("--lrs=-1", "--lr=-1.0: expected"),
        ("--lrs=1e-3,", "--lrs=1e-3,: nothing stands at one of its commas"),
        ("--out=here", "a study has folders named after their settings"),
        ("--data=none", "--data=none: not prepared"),
        ("--data seed", "--data=seed: not prepared"),  # a flag's value is no flag
    ):
        output, _ = refuses(study.main, [*flags, *flag.split()], message)
        assert "[1 of 4]" not in output
    # A rate of its own, and updates for a budget.
    tuned = ["--methods=baseline", "--seeds=0", "--budgets=", "--budget_steps=1"]
    assert states(*flags, *tuned, "--lrs=0.1,0.2,1e-1", "--at_once=2") == ["new"] * 2
    # Another precision, or where hours are plain time other threads, is another run.
    for flag in ("--dtype=bf16", "--threads=2"):
        assert states(*flags, "--methods=baseline", "--seeds=0", flag) == ["new"]
    # Wherever the project and the corpus are moved, the same command finds its runs.
    shutil.copytree(tmp_path / "runs", tmp_path / "moved" / "runs")
    shutil.copytree(corpus_folder, tmp_path / "moved" / "corpus")
    monkeypatch.setattr("runs.ROOT", tmp_path / "moved")
    assert states(*flags, f"--data={tmp_path}/moved/corpus") == ["finished"] * 4


@pytest.mark.slow
def test_a_study_stops_on_ctrl_c_and_goes_past_a_failure(project, corpus_folder):
    own = "--methods=fails,baseline --seeds=0 --budgets=0.001"
    flags = ["study.py", *study_flags(corpus_folder, own)]
    (project / "methods" / "fails.py").write_text(
        "from errors import UserError\nfrom methods.baseline import Method\n\n\nclass "
        "Fails(Method):\n    def next_batch(self):\n        raise UserError('it fails')\n"
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begin = functools.partial(subprocess.Popen, cwd=project, start_new_session=True, **pipes)
    study = begin([sys.executable, *flags])
    for _ in range(1000):
        logs = list((project / "runs").glob("bert-tiny-baseline-bert-512-0.001h-this-*/log.jsonl"))
        if logs and logs[0].stat().st_size:
            break
        time.sleep(0.05)
    (log,) = logs
    assert log.stat().st_size
    os.killpg(study.pid, signal.SIGINT)  # as a terminal does
    output, error = study.communicate(timeout=60)
    assert study.returncode == 130 and "stopped after update" in output and "it fails" in error
    assert not (log.parent / "result.json").exists()
    again = command(*flags, project=project)
    assert again.returncode == 2 and (log.parent / "result.json").exists()
    assert "1 of 2 runs failed: runs/bert-tiny-fails" in again.stderr
    nothing = command(*flags, "--launch=true", "--seeds=7", project=project)
    assert nothing.returncode == 2 and "2 of 2 runs failed" in nothing.stderr


# -- The house -------------------------------------------------------------------------------------


def test_the_loop_names_no_method_and_the_readme_names_the_files():
    readme = (ROOT / "README.md").read_text()
    source = (ROOT / "train.py").read_text() + (ROOT / "config.py").read_text()
    for path in ROOT.glob("*.py"):
        assert path.name in readme, path
    assert len(readme.split()) <= 1300
    flags = {field.name for field in dataclasses.fields(Config)} | {"resume", "help"}
    assert set(re.findall(r"train\.py[^\n`]* --(\w+)", readme)) <= flags
    for name in set(methods.names()) - {"baseline"}:
        assert not re.search(rf"(?<![a-z]){name}(?![a-z])", source), name


def test_the_pages_flags_and_tests_are_there():
    known = {field.name for field in dataclasses.fields(Config)}
    known = known.union(*(methods.find(name).options for name in methods.names()))
    known |= {"resume", "help", "nproc_per_node"}
    for path in {*ROOT.glob("*.py"), *ROOT.glob("data/*.py")} - {ROOT / "test_all.py"}:
        source = path.read_text()
        known |= set(re.findall(r'"(\w+)"[:,]\s*(?:\("\w+", )?Option\(', source))
        known |= set(re.findall(r'add_argument\("--(\w+)"', source))
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")):
        flags = set(re.findall(r"(?<![\w-])--(\w+)", page.read_text()))
        assert flags <= known, (page, flags - known)
    assert sum(name.startswith("test_contract_") for name in globals()) >= 8


def test_the_pages_links_lead_somewhere():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")):
        links = re.findall(r"\]\(([^)#]+)|src=\"([^\"]+)", page.read_text())
        for link in filter(None, itertools.chain(*links)):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


def test_the_sources_are_python_3_10():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")):
        ast.parse(path.read_text(), feature_version=(3, 10))


QUICK = "--vocabulary=512 --size=tiny --batch=6 --validation_rows=20 --device=cpu --threads=1"
QUICK += " --budget_steps=3 --validations=1"
# What the pages' programs are here, and flags that make them quick.
PROGRAMS = {
    "bench.py": (bench.main, ""),
    "data/prepare.py": (prepare.main, "--vocabulary=300"),
    "finetune.py": (finetune.main, "--seeds=0 --epochs=1 --batch=4 --max_length=64 --threads=1"),
    "report.py": (report.main, ""),
    "rst.py": (rst.main, "--repeats=1 --threads=1 --device=cpu"),
    "sample.py": (sample.main, ""),
    "study.py": (study.main, f"{QUICK} --seeds=0"),
    "train.py": (train.main, QUICK),
    "transformers_folder.py": (transformers_folder.main, ""),
}


def commands_of(page):
    """Of its blocks, and of its text in `backquotes`. (Those that install or test: `.ci/run`.)"""
    text = (ROOT / page).read_text()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    quoted = re.findall(r"`((?:\S+/)?(?:python|torchrun) [^`]+)`", text)
    lines = [*blocks.splitlines(), *quoted]
    return [line for line in lines if not re.search(r"pip install|-m pytest", line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    dict.fromkeys(
        line
        for page in ("README.md", "docs/course.md", "docs/reference_time.md")
        for line in commands_of(page)
    ),
)
def test_the_pages_commands_run(
    corpus_folder, t5_folder, finished_runs, tmp_path, monkeypatch, line
):
    """In this process and in seconds: little text, narrow models, a few updates. (Of bench.py the
    flags only.)"""
    for owner in (runs, prepare):
        monkeypatch.setattr(owner, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study.Launcher, "run", lambda launcher, flags: train.main(flags))
    monkeypatch.setattr(sni, "INSTANCES", 4)
    nothing = (lambda repeats, **options: None), 1
    monkeypatch.setattr(bench, "BENCHES", dict.fromkeys(bench.BENCHES, nothing))
    for model, folder in (("bert", corpus_folder), ("t5", t5_folder)):
        monkeypatch.setitem(models.SIZES[model], "tiny", NARROW)
        for name in ("pydocs", "english"):
            shutil.copytree(folder, tmp_path / "data" / name / f"{model}-512")
    for shard in range(70):
        place = tmp_path / "texts" / f"c4-train.{shard:05d}-of-01024.json.gz"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(gzip.compress((corpus_folder.parent / "text.jsonl").read_bytes()))
    mine = {"name": "mine", "probe_seconds": {"bert": 1.0, "t5": 1.0}, "provenance": "a test"}
    (tmp_path / "mine.json").write_text(json.dumps(mine))

    words = shlex.split(re.sub(r"^timeout \d+ | --nproc_per_node=\d+", "", line), comments=True)
    program, words = words[1], words[2:]
    main, quick = PROGRAMS[program]
    model = "t5" if program == "transformers_folder.py" else "bert"
    shutil.copytree(finished_runs[model], tmp_path / "runs" / "NAME")
    words = [
        file
        for word in words
        for file in glob.glob(word) or ["runs/NAME" if "*" in word and word[0] != "-" else word]
    ]
    if {"--help", "--resume=runs/NAME"} & {*words}:
        quick = ""
        (tmp_path / "runs" / "NAME" / "result.json").unlink()
    server = serve(tmp_path / "texts")
    if "c4" in words:
        monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
        quick += f" --base_url=http://127.0.0.1:{server.server_port}"
    if program == "finetune.py":
        quick += f" --data_dir={glue_files(tmp_path / 'glue')}"
    if "--budget_steps" in quick:
        words = [word for word in words if not word.startswith("--budget")]
    try:
        main([*words, *quick.split()])
    except SystemExit as stopped:
        assert not stopped.code
    finally:
        server.shutdown()


def test_every_class_and_hook_has_a_docstring():
    study_rooms = (models, rst, train, prepare, corpora, methods, baseline, optimizers, report)
    for module in (*study_rooms, finetune, tasks, glue, superglue, sni):
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == module.__name__:
                # Which dataclass writes itself.
                assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name
    common = ("begin_update", "after_step", "report", "state_dict", "load_state_dict")
    for hook in (*methods.HOOKS, *common):
        assert getattr(Method, hook).__doc__, hook
