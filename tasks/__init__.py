"""What a downstream suite is, and how its published files come to this machine and are read.

A suite is a file `tasks/NAME.py` with

    MODEL       "bert" or "t5": which model the suite is for
    RECIPE      the study's hyper-parameters, a `Recipe`
    TASKS       {name: task}; a task has `metrics`, {name: function(predictions, rows)}
    DEFAULT     the tasks of a run without --task
    AVERAGED    what the suite's score is the mean of: (task, metric) pairs
    URL         where the files are published
    load(task, data_dir, url, seed)
                (training rows, {suffix of the metrics' names: rows to evaluate on}); downloads
                what is missing

For T5 a task also has `prompt(row, count_tokens, limit)`, the text that is read.
"""

import contextlib
import functools
import hashlib
import importlib
import shutil
import statistics
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from data.prepare import download
from errors import UserError
from runs import check_record, read_record


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of fine-tuning: AdamW without clipping."""

    lr: float
    epochs: int
    batch: int
    max_length: int  # tokens that a row reads, special ones included
    seeds: tuple = (0, 1, 2)
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

    def __post_init__(self):
        if not all(isinstance(text, str) for text in (*self.texts, *self.references)):
            raise ValueError("a text is not a string")


def suites():
    """Names of the suites: the files beside this one that hold one."""
    files = Path(__file__).parent.glob("*.py")
    return sorted({path.stem for path in files} - {"__init__", "metrics"})


def find(name):
    """The module of a suite."""
    if name not in suites():
        raise UserError(f"--suite={name}: expected one of {', '.join(suites())}")
    return importlib.import_module(f"tasks.{name}")


def of_rows(metric, *fields):
    """A metric of predictions and these fields of the rows, as a function of both."""

    def score(predictions, rows):
        columns = [[getattr(row, field) for row in rows] for field in fields]
        return metric(predictions, *columns)

    return score


# -- Reading ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(place):
    """Turns what is raised about a malformed file into a UserError that names the place."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{place}: no {error} in it") from None
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    except (TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{place}: not as published ({error})") from None


def lines(path, first=1):
    """(number, text) of every line from number `first` on. Only a line feed ends a line: texts hold
    other characters that Python would split at."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; --data_dir names a folder with the suite's files as published"
        ) from None
    with file:
        for number, line in enumerate(file, 1):
            if number >= first:
                with naming(f"{path}, line {number}"):
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n")


def read_rows(path, parse, first=1):
    """The rows of a file: `parse(line)` gives those of one line. What it raises about a line
    becomes a UserError that names file and line."""
    rows = []
    for number, line in lines(path, first):
        with naming(f"{path}, line {number}"):
            rows += parse(line)
    if not rows:
        raise UserError(f"{path}: no example in it")
    return rows


def class_of(label, classes):
    """The number of the class that a label names."""
    if label not in classes:
        expected = ", ".join(map(str, classes))
        raise ValueError(f"the label is {label!r}, expected one of {expected}")
    return classes.index(label)


def checksum(rows):
    """A CRC-32 of all that is in rows, to tell them from other rows."""
    found = 0
    for row in rows:
        found = zlib.crc32(repr((row.texts, row.label, row.group, row.references)).encode(), found)
    return found


# -- Downloading -----------------------------------------------------------------------------------


def check_published(path, sha256=None):
    """Raises ValueError unless a file has this SHA-256; without one, unless it is a whole zip."""
    if sha256:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(f"its SHA-256 is {found}, that of the published file {sha256}")
        return
    try:
        with zipfile.ZipFile(path) as file:
            damage = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        damage = error
    if damage:
        raise ValueError(f"not a whole zip file: {damage}")


def fetch(url, path, folder, sha256=None):
    """Downloads a published file unless it is there, and checks it. Without a network it says what
    to put into `folder`."""
    check = functools.partial(check_published, sha256=sha256)
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
    except (UserError, ValueError) as error:  # ValueError: not a URL
        raise UserError(
            f"{error}; or put the published files into {folder} yourself (see --data_dir)"
        ) from None


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
    archive = folder.with_name(f"{folder.name}.zip")
    unpacked = folder.with_name(f"{folder.name}.tmp")
    fetch(url, archive, folder, sha256)
    shutil.rmtree(unpacked, ignore_errors=True)  # left by a process that was stopped here
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(unpacked)  # nothing outside it, whatever the members' names are
        tops = [path for path in unpacked.iterdir() if path.name != "__MACOSX"]
        top = tops[0] if len(tops) == 1 else unpacked
        if not (top / needed).exists():
            raise UserError(f"{archive}: there is no {needed} in it; remove it, and try again")
        if folder.exists():
            folder.rmdir()
        top.rename(folder)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink()


# -- Results of finetune.py ------------------------------------------------------------------------

RESULT = {"suite": str, "task": str, "seed": int, "untrained": bool, "weights": int}
RESULT |= dict.fromkeys(("recipe", "data", "last", "best"), dict)


def read_result(path):
    """The result of one task with one seed."""
    result = read_record(path, RESULT)
    scores = dict.fromkeys(result["last"], float)
    check_record(result, {"last": scores, "best": scores}, path)
    if result["suite"] not in suites():
        raise UserError(f"{path}: its suite is {result['suite']!r}, not {' or '.join(suites())}")
    return result


def summary(results, suite):
    """What results say: {(task, metric): {"last": {seed: score}, "best": {seed: score}}}, and under
    ("all", "score") the suite's own mean, for the seeds that have all of it."""
    found, kinds = {}, ("last", "best")
    for result in results:
        for metric in result["last"]:
            scores = found.setdefault((result["task"], metric), {kind: {} for kind in kinds})
            for kind in kinds:
                scores[kind][result["seed"]] = result[kind][metric]
    averaged = [found[key] for key in suite.AVERAGED if key in found]
    if len(averaged) == len(suite.AVERAGED) > 1:
        seeds = sorted(set.intersection(*(set(scores["last"]) for scores in averaged)))
        means = {
            kind: {seed: statistics.mean(one[kind][seed] for one in averaged) for seed in seeds}
            for kind in kinds
        }
        if seeds:
            found["all", "score"] = means
    return found


def percent(scores, unit):
    """The mean in percent, the standard deviation, and how many there are of the unit: "61.2 ± 0.8
    (3 seeds)"."""
    scores = list(scores)
    deviation = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    count = f"{len(scores)} {unit}{'s' * (len(scores) != 1)}"
    return f"{100 * statistics.mean(scores):.1f}{deviation} ({count})"
