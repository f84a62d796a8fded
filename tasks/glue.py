"""GLUE (Wang et al. 2019), as the study evaluates BERT on it: eight tasks, and WNLI when asked for.

The score is the mean of nine numbers, in `AVERAGED`. The recipe is crammed BERT's, one setting for
all tasks; the study takes the best epoch on the very set that is reported, so we report the last
epoch beside it.

Where we differ from the release: the warm-up is 10% of each task's own updates (there, of the first
task's, for all), `[CLS]` comes first in every row, padding is not attended to, and MNLI's
mismatched set is evaluated after every epoch.

Files: DATA_DIR/CoLA/train.tsv and so on, as published. Quotation marks in them are text. QQP has a
few lines that end early, which are left out and counted.
"""

from dataclasses import dataclass

from errors import UserError
from tasks import Recipe, Row, fetch, fetch_zip, lines, of_labels
from tasks.metrics import accuracy, f1, matthews, pearson, spearman

MODEL = "bert"
RECIPE = Recipe(
    lr=4e-5,
    epochs=5,
    batch=16,
    max_length=128,
    seeds=(0, 1, 2),
    warmup_share=0.1,
    beta2=0.98,
    dropout=0.1,
)
URL = "https://dl.fbaipublicfiles.com"
SAME_ROWS = True
INCOMPLETE_LINES = 10  # of QQP, at most (three and one are known)

TWO_WAY, THREE_WAY = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
BINARY = ("0", "1")


@dataclass(frozen=True)
class Task:
    """Where a task's examples stand in its files. Columns are names of the header, or numbers where
    there is none."""

    folder: str
    texts: tuple  # columns
    label: object  # column
    classes: tuple  # in the order of their numbers; empty: the label is a score
    metrics: dict
    archive: str  # below URL
    sha256: str
    evaluated: tuple = (("", "dev.tsv"),)  # suffix of the metrics' names, file
    may_end_early: bool = False


ACCURACY = {"accuracy": of_labels(accuracy)}
F1 = {"f1": of_labels(f1)} | ACCURACY
PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Task(
        "CoLA",
        (3,),
        1,
        BINARY,
        {"matthews": of_labels(matthews)},
        "glue/data/CoLA.zip",
        "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff",
    ),
    "mnli": Task(
        "MNLI",
        PAIR,
        "gold_label",
        THREE_WAY,
        ACCURACY,
        "glue/data/MNLI.zip",
        "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633",
        evaluated=(("", "dev_matched.tsv"), ("_mismatched", "dev_mismatched.tsv")),
    ),
    "mrpc": Task(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        BINARY,
        F1,
        "senteval/senteval_data/msr_paraphrase_train.txt",
        "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
    ),
    "qnli": Task(
        "QNLI",
        ("question", "sentence"),
        "label",
        TWO_WAY,
        ACCURACY,
        "glue/data/QNLIv2.zip",
        "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5",
    ),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        BINARY,
        F1,
        "glue/data/QQP-clean.zip",
        "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0",
        may_end_early=True,
    ),
    "rte": Task(
        "RTE",
        PAIR,
        "label",
        TWO_WAY,
        ACCURACY,
        "glue/data/RTE.zip",
        "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee",
    ),
    "sst2": Task(
        "SST-2",
        ("sentence",),
        "label",
        BINARY,
        ACCURACY,
        "glue/data/SST-2.zip",
        "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa",
    ),
    "stsb": Task(
        "STS-B",
        PAIR,
        "score",
        (),
        {"pearson": of_labels(pearson), "spearman": of_labels(spearman)},
        "glue/data/STS-B.zip",
        "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85",
    ),
    "wnli": Task(
        "WNLI",
        PAIR,
        "label",
        BINARY,
        ACCURACY,
        "glue/data/WNLI.zip",
        "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46",
    ),
}
DEFAULT = tuple(name for name in TASKS if name != "wnli")
AVERAGED = (
    ("cola", "matthews"),
    ("mnli", "accuracy"),
    ("mnli", "accuracy_mismatched"),
    ("mrpc", "f1"),
    ("qnli", "accuracy"),
    ("qqp", "f1"),
    ("rte", "accuracy"),
    ("sst2", "accuracy"),
    ("stsb", "pearson"),
)
MRPC_DEV_IDS = (
    "glue/data/mrpc_dev_ids.tsv",
    "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
)


def load(name, data_dir, url=URL, seed=0):
    """(training rows, {suffix: rows to evaluate on}) of a task; downloads what is missing. The seed
    changes nothing here."""
    task = TASKS[name]
    folder = data_dir / task.folder
    if name == "mrpc":
        fetch_mrpc(folder, url)
    else:
        fetch_zip(f"{url}/{task.archive}", folder, "train.tsv", task.sha256)
    return read(folder / "train.tsv", task), {
        suffix: read(folder / file, task) for suffix, file in task.evaluated
    }


def read(path, task):
    """The rows of one file. A line that does not hold what the task needs is a UserError, by its
    number."""
    rows, columns, early = [], None, 0
    has_header = isinstance(task.label, str)  # CoLA's files have none
    for number, line in lines(path):
        cells = line.split("\t")
        if has_header and number == 1:
            columns = {cell: index for index, cell in enumerate(cells)}
            if missing := [column for column in (*task.texts, task.label) if column not in columns]:
                raise UserError(f"{path}, line 1: no column {missing[0]!r} in {', '.join(cells)}")
            continue
        needed = [columns[column] if has_header else column for column in (*task.texts, task.label)]
        if len(cells) <= max(needed):
            early += 1
            if task.may_end_early and early <= INCOMPLETE_LINES:
                continue
            raise UserError(
                f"{path}, line {number}: {len(cells)} columns, expected {max(needed) + 1} or more"
            )
        *texts, label = (cells[index].strip() for index in needed)
        rows.append(Row(tuple(texts), label_of(label, task, path, number)))
    if early:
        print(f"{path}: {early} lines end early and are left out")
    if not rows:
        raise UserError(f"{path}: no example in it")
    return rows


def label_of(text, task, path, number):
    """The number of a class, or the score."""
    try:
        return task.classes.index(text) if task.classes else float(text)
    except ValueError:
        expected = f"one of {', '.join(task.classes)}" if task.classes else "a number"
        raise UserError(
            f"{path}, line {number}: the label is {text!r}, expected {expected}"
        ) from None


def fetch_mrpc(folder, url):
    """GLUE does not publish MRPC's files but which lines of Microsoft's training file are the dev
    set: makes them of these two, which are downloaded unless they are in the folder."""
    if (folder / "train.tsv").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for address, sha256 in ((TASKS["mrpc"].archive, TASKS["mrpc"].sha256), MRPC_DEV_IDS):
        path = folder / address.rpartition("/")[2]
        fetch(f"{url}/{address}", path, folder, sha256)
    dev_ids = {
        tuple(line.split("\t")[:2])
        for _, line in lines(folder / MRPC_DEV_IDS[0].rpartition("/")[2])
    }
    (_, header), *rest = lines(folder / TASKS["mrpc"].archive.rpartition("/")[2])
    for part in ("dev", "train"):
        chosen = [
            line for _, line in rest if (tuple(line.split("\t")[1:3]) in dev_ids) == (part == "dev")
        ]
        (folder / "part.tmp").write_text("\n".join([header, *chosen]) + "\n", encoding="utf-8")
        (folder / "part.tmp").rename(folder / f"{part}.tsv")
