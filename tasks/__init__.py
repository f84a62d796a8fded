"""What a downstream suite is, and how its published files come to this machine and are read.

A suite is a file `tasks/NAME.py` with

    MODEL       "bert" or "t5": whose suite it is
    RECIPE      the study's hyper-parameters, a `Recipe`
    TASKS       {name: task}; a task has `metrics`, {name: function(predictions, rows)}
    DEFAULT     the tasks of a run without --task
    AVERAGED    what the suite's score is the mean of: (task, metric) pairs
    URL         where the files are published
    SAME_ROWS   whether the training rows are the same for every seed
    load(task, data_dir, url, seed)  (training rows, {suffix of the metrics' names: rows to evaluate
    on})

For T5 a task also has `prompt(row, count_tokens, limit)`, the text that is read.
"""

import hashlib
import importlib
import json
import os
import shutil
import statistics
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from data.prepare import download
from errors import UserError


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of fine-tuning: AdamW without clipping."""

    lr: float
    epochs: int
    batch: int
    max_length: int  # tokens that a row reads, special ones included
    seeds: tuple
    schedule: str = "cosine"  # after the warm-up: cosine to zero, or constant
    warmup_share: float = 0.0  # of the task's own updates
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    dropout: float = 0.0
    target_length: int = 0  # T5: tokens that a row writes, at most
    evaluate_every_epoch: bool = True  # or only after the last
    dtype: str = None  # fp32 or bf16; None: bf16 on a GPU, as in pre-training, else fp32


@dataclass(frozen=True)
class Row:
    """One example: the texts that the model reads, in order, and what it should say: the number of
    a class, a score, or (T5) one text; then `references` are all the texts that count as right."""

    texts: tuple
    label: object
    group: object = None  # MultiRC: the question that the answer belongs to
    references: tuple = ()


def suites():
    """Names of the suites: the files beside this one that hold one."""
    return sorted(
        path.stem
        for path in Path(__file__).parent.glob("*.py")
        if path.stem not in ("__init__", "metrics")
    )


def find(name):
    """The module of a suite."""
    if name not in suites():
        raise UserError(f"--suite={name}: expected one of {', '.join(suites())}")
    return importlib.import_module(f"tasks.{name}")


def of_labels(metric):
    """A metric of (predictions, truths) as one of (predictions, rows)."""
    return lambda predictions, rows: metric(predictions, [row.label for row in rows])


def lines(path):
    """(number, text) of every line. Only a line feed ends one: texts hold other characters that
    Python would split at."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield (
                        number,
                        line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"),
                    )
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})"
                    ) from None
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; --data_dir names a folder with the suite's files as they are "
            "published"
        ) from None


def check_published(sha256=None):
    """A check for `download`: the file has this SHA-256; without one it is a zip file with whole
    members."""

    def check(path):
        if sha256 and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
            raise ValueError(f"its SHA-256 is {found}, that of the published file {sha256}")
        try:
            if not sha256 and zipfile.ZipFile(path).testzip():
                raise ValueError("a member of the zip file is damaged")
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
        ) as error:  # what damage in one makes
            raise ValueError(f"not a whole zip file: {error}") from None

    return check


def fetch_zip(url, folder, needed, sha256=None):
    """Makes `folder` from the top folder of a published zip file, unless it has the file `needed`
    already. One process at a time: `finetune.py` sees to it, where the system has locks."""
    if (folder / needed).exists():
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} has files in it, but no {needed}; it should have them as published, or not "
            "be there"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    archive, unpacked = (
        folder.with_name(f"{folder.name}.zip"),
        folder.with_name(f"{folder.name}.{os.getpid()}.tmp"),
    )
    fetch(url, archive, folder, sha256)
    try:
        with zipfile.ZipFile(archive) as file:
            members = [name for name in file.namelist() if not name.startswith("__MACOSX")]
            file.extractall(unpacked, members)
        tops = {name.partition("/")[0] for name in members}
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
        if not folder.exists():  # or another process was here first, on a system without locks
            (unpacked / tops.pop() if len(tops) == 1 else unpacked).rename(folder)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink(missing_ok=True)


def fetch(url, path, folder, sha256=None):
    """Downloads a published file, unless it is there, and checks it; without a network it says what
    to do."""
    check = check_published(sha256)
    if path.exists():
        try:
            return check(path)
        except ValueError as error:
            raise UserError(
                f"{path} is not as published: {error}; remove it, and it is downloaded"
            ) from None
    print(f"{path} is not there; downloading {url}")
    try:
        download(url, path, check)
    except UserError as error:
        raise UserError(
            f"{error}; or put the published files into {folder} yourself (see --data_dir)"
        ) from None


# -- Results: files TASK-seedS.json, written by finetune.py ----------------------------------------


def results(folder):
    """(the results of a folder, what is wrong with the files that cannot be read)."""
    found, problems = [], []
    for path in sorted(Path(folder).glob("*-seed*.json")):
        try:
            result = json.loads(path.read_text())
            scores = {
                metric: {kind: float(result[kind][metric]) for kind in ("last", "best")}
                for metric in result["last"]
            }
            identity = dict(result["identity"])
            if identity["suite"] not in suites() or not isinstance(identity["untrained"], bool):
                raise ValueError(
                    f"its suite is {identity['suite']!r}, its untrained {identity['untrained']!r}"
                )
            found.append(
                {
                    "task": result["task"],
                    "seed": int(result["seed"]),
                    "identity": identity,
                    "data_checksum": result.get("data_checksum"),
                    "training_rows": result.get("training_rows"),
                    "scores": scores,
                }
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(
                f"{path} is damaged ({type(error).__name__}: {error}); remove it and make it again"
            )
    return found, problems


def summary(results, suite):
    """What results say: {task: {metric: {"last": {seed: score}, "best": {seed: score}}}}, and under
    "all" the suite's own mean for the seeds that have all of it."""
    found = {}
    for result in results:
        for metric, kinds in result["scores"].items():
            for kind, score in kinds.items():
                found.setdefault(result["task"], {}).setdefault(metric, {"last": {}, "best": {}})[
                    kind
                ][result["seed"]] = score
    if len(suite.AVERAGED) > 1 and all(
        metric in found.get(task, {}) for task, metric in suite.AVERAGED
    ):
        columns = {
            kind: [found[task][metric][kind] for task, metric in suite.AVERAGED]
            for kind in ("last", "best")
        }
        seeds = sorted(set.intersection(*map(set, columns["last"])))
        if seeds:
            found["all"] = {
                "score": {
                    kind: {
                        seed: statistics.mean(column[seed] for column in columns[kind])
                        for seed in seeds
                    }
                    for kind in columns
                }
            }
    return found


def percent(scores, unit):
    """The mean in percent, the standard deviation, and how many there are of the unit: "61.2 ± 0.8
    (3 seeds)"."""
    scores = list(scores)
    deviation = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    count = f"{len(scores)} {unit}{'s' * (len(scores) != 1)}"
    return f"{100 * statistics.mean(scores):.1f}{deviation} ({count})"
