"""Run folders, and how files are written and read.

    config.json      what was decided before the run, and its id
    log.jsonl        a line for each update and each validation
    checkpoint.pt    all that a resumed run needs
    model.pt         the weights at the end, and beside them the tokenizer
    result.json      written last: a run that has it is finished

A run's id is a hash of what decides its result: its settings, the checksum of its corpus, and what
an hour is worth on its reference. Its folder's name ends in the id, so a run is found again by what
it is, wherever the repository, the corpus or the reference were moved.

Files are written whole (the old one stands until the new one is complete) and read with checks
(what is missing, damaged or of another kind is named with its file); one process at a time works in
a folder. Nothing else in the project does these things by itself.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

from errors import UserError

ROOT = Path(__file__).resolve().parent
# Flags that do not decide the result. (Of the corpus and of the reference the contents do.)
NOT_IN_ID = {"data", "reference", "device", "micro_batch", "threads"}
NOT_IN_ID |= {"checkpoint_minutes", "out", "yes"}
# `config`: the settings that it was started with; `corpus`: the checksum of its corpus.
CONFIG = {"id": str, "config": dict, "corpus": str, "reference": dict}


# -- Runs ------------------------------------------------------------------------------------------


def identify(*deciding):
    """The id of what these decide (anything that JSON can hold): eight hexadecimal digits."""
    text = json.dumps(deciding, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def find(name, run_id):
    """The folder of the run with this id in runs/; if there is none, where it will be."""
    for folder in sorted((ROOT / "runs").glob(f"*-{run_id}")):
        return folder
    return ROOT / "runs" / f"{name}-{run_id}"


def status(folder):
    """ "new", "interrupted" or "finished"."""
    result = folder / "result.json"
    if result.exists() and result.stat().st_size:  # an empty one was not written here
        return "finished"
    return "interrupted" if (folder / "config.json").exists() else "new"


def read_log(folder):
    """The lines of a run's log so far, as dictionaries."""
    path = folder / "log.jsonl"
    for number, line in enumerate(read_text(path).splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            raise UserError(f"{path} is damaged: its last line, {number}, is cut short")
        yield parsed(line, f"{path}, line {number}")


def relative_path(path):
    """A path as short as it can be said from here."""
    path = os.path.relpath(path)
    return path if not path.startswith("..") else os.path.abspath(path)


def git_commit():
    """The commit that this code is, or None."""
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):  # there is no git here
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() or None


# -- Writing ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_whole(path):
    """A binary file beside `path`, which replaces it when the block ends. Whatever happens in it
    leaves the old file, or the new one, never half of one."""
    temporary = f"{path}.tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)  # a killed process left it; or a link, which would be followed
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        kept = "; the file that was there is untouched" if os.path.isfile(path) else ""
        reason = getattr(error, "strerror", None) or f"{error}. Is the disk full?".splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


@contextlib.contextmanager
def folder_written_whole(folder):
    """The same for a folder, under a lock: what an earlier process left behind when it was killed
    is cleared away."""
    new, old = (folder.with_name(f"{folder.name}.{ending}") for ending in ("tmp", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def names_file(path):
    """For a file that grows line by line: what goes wrong in the block is said of this file. (The
    system names it when it is opened, but not when the disk is full.)"""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def write_json(path, record):
    with written_whole(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def write_tensors(path, stored):
    """torch.save, whole. (The zip file that it writes has a checksum for each member.)"""
    import torch  # here, because the processes that encode a corpus do without it

    with written_whole(path) as file:
        torch.save(stored, file)


# -- Reading ---------------------------------------------------------------------------------------


def read_record(path, expected=None):
    """The JSON object in a file. `expected`: its keys and their types, see `check_record`. Raises
    UserError with the file, the key, and what was found."""
    record = parsed(read_text(path), path)
    check_record(record, expected or {}, path)
    return record


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def parsed(text, path):
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged: a {type(record).__name__}, expected an object")
    return record


def check_record(record, expected, path):
    """Raises UserError unless an object has the keys of `expected`, {key: type}, {key: a tuple of
    types, None for null}, or {key: the same of an object in it}. A float may be written as a whole
    number, and is finite."""
    for key, kinds in expected.items():
        if key not in record:
            raise UserError(f"{path}: there is no {key} in it")
        within = kinds if isinstance(kinds, dict) else {}
        kinds = dict if isinstance(kinds, dict) else kinds
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not any(is_a(record[key], kind) for kind in kinds):
            names = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
            raise UserError(f"{path}: {key} is {record[key]!r}, expected {names}")
        check_record(record[key], within, f"{path}, {key}")


def is_a(value, kind):
    """Whether a value of JSON is of a type of Python's; None is the type of null."""
    if kind is None or value is None:
        return value is kind
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def read_tensors(path, expected, device="cpu"):
    """What `write_tensors` wrote: a dictionary that has the keys `expected`. All checksums are
    verified, and nothing but plain data is loaded (`weights_only`)."""
    import torch

    try:
        # Other programs' files may be torch's older kind, without them.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"the checksum of {damaged} differs")
        stored = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged, or holds more than plain data") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).partition(". ")[0]
        raise UserError(f"{path} cannot be read, it is cut short or damaged ({reason})") from None
    missing = [key for key in expected if not isinstance(stored, dict) or key not in stored]
    if missing:
        raise UserError(f"{path}: there is no {missing[0]} in it; is it of another program?")
    return stored


# -- Locks -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder, wait, shared=False):
    """Keeps other processes that lock the same folder out of this block: they wait, or are refused.
    Those that share the lock wait for, and keep out, only those that do not; they make no folder.
    A folder that is still empty at its end is removed. (Where the system or the file system has no
    such locks they are not kept out.)"""
    if not shared:
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # where it is not there, nobody is at work
            import fcntl

            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                place = relative_path(folder)
                if not wait:
                    raise UserError(f"{place}: another process is at work on this run") from None
                print(f"waiting for another process at work on {place}")
                fcntl.flock(handle, kind)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if not shared:
                    folder.rmdir()
