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

import contextlib
import math
from dataclasses import dataclass

from errors import UserError
from runs import written_whole
from tasks import Recipe, Row, class_of, fetch, fetch_zip, lines, of_rows, read_rows
from tasks.metrics import accuracy, f1, matthews, pearson, spearman

MODEL = "bert"
RECIPE = Recipe(
    lr=4e-5, epochs=5, batch=16, max_length=128, warmup_share=0.1, beta2=0.98, dropout=0.1
)
URL = "https://dl.fbaipublicfiles.com"


@dataclass(frozen=True)
class Task:
    """Where a task's examples stand in its files."""

    folder: str
    texts: tuple  # names of their columns
    label: str  # name of its column
    classes: tuple  # in the order of their numbers; empty: the label is a score
    metrics: dict
    archive: str  # below URL
    sha256: str
    evaluated: tuple = (("", "dev.tsv"),)  # suffix of the metrics' names, file
    header: tuple = ()  # names of the columns, where the files do not begin with them
    incomplete: int = 0  # lines of a file that may end early, at most


BINARY = ("0", "1")
TWO_WAY = ("entailment", "not_entailment")
THREE_WAY = ("entailment", "neutral", "contradiction")
ACCURACY = {"accuracy": of_rows(accuracy, "label")}
F1 = {"f1": of_rows(f1, "label")} | ACCURACY
MATTHEWS = {"matthews": of_rows(matthews, "label")}
CORRELATIONS = {"pearson": of_rows(pearson, "label"), "spearman": of_rows(spearman, "label")}

PAIR = ("sentence1", "sentence2")
STRINGS = ("#1 String", "#2 String")
QUESTIONS = ("question1", "question2")
MNLI_DEV = (("", "dev_matched.tsv"), ("_mismatched", "dev_mismatched.tsv"))
COLA_HEADER = ("source", "label", "mark", "sentence")

# fmt: off
TASKS = {  # folder, columns of the texts and of the label, classes, metrics, archive, SHA-256
    "cola": Task("CoLA", ("sentence",), "label", BINARY, MATTHEWS, "glue/data/CoLA.zip",
                 "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff",
                 header=COLA_HEADER),
    "mnli": Task("MNLI", PAIR, "gold_label", THREE_WAY, ACCURACY, "glue/data/MNLI.zip",
                 "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633",
                 evaluated=MNLI_DEV),
    "mrpc": Task("MRPC", STRINGS, "Quality", BINARY, F1,
                 "senteval/senteval_data/msr_paraphrase_train.txt",
                 "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
    "qnli": Task("QNLI", ("question", "sentence"), "label", TWO_WAY, ACCURACY,
                 "glue/data/QNLIv2.zip",
                 "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "qqp":  Task("QQP", QUESTIONS, "is_duplicate", BINARY, F1, "glue/data/QQP-clean.zip",
                 "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0",
                 incomplete=10),  # three and one are known
    "rte":  Task("RTE", PAIR, "label", TWO_WAY, ACCURACY, "glue/data/RTE.zip",
                 "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, ACCURACY, "glue/data/SST-2.zip",
                 "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "stsb": Task("STS-B", PAIR, "score", (), CORRELATIONS, "glue/data/STS-B.zip",
                 "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "wnli": Task("WNLI", PAIR, "label", BINARY, ACCURACY, "glue/data/WNLI.zip",
                 "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
}
MRPC_DEV_IDS = ("glue/data/mrpc_dev_ids.tsv",
                "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")
DEFAULT = tuple(name for name in TASKS if name != "wnli")
AVERAGED = (
    ("cola", "matthews"), ("mnli", "accuracy"), ("mnli", "accuracy_mismatched"), ("mrpc", "f1"),
    ("qnli", "accuracy"), ("qqp", "f1"), ("rte", "accuracy"), ("sst2", "accuracy"),
    ("stsb", "pearson"),
)
# fmt: on


def load(name, data_dir, url=URL, seed=0):
    """(training rows, {suffix: rows to evaluate on}) of a task; downloads what is missing. The seed
    changes nothing here."""
    task = TASKS[name]
    folder = data_dir / task.folder
    if name == "mrpc":
        fetch_mrpc(folder, url)
    else:
        fetch_zip(f"{url}/{task.archive}", folder, "train.tsv", task.sha256)
    training = read(folder / "train.tsv", task)
    return training, {suffix: read(folder / file, task) for suffix, file in task.evaluated}


def read(path, task):
    """The rows of one file."""
    header = task.header or next(lines(path), (1, ""))[1].split("\t")
    names = (*task.texts, task.label)
    if missing := [name for name in names if name not in header]:
        raise UserError(f"{path}, line 1: no column {missing[0]!r} among {header}")
    columns = [header.index(name) for name in names]
    incomplete = []

    def parse(line):
        cells = line.split("\t")
        if len(cells) <= max(columns):
            incomplete.append(line)
            if len(incomplete) <= task.incomplete:
                return []
            raise ValueError(f"{len(cells)} columns, expected {max(columns) + 1} or more")
        *texts, label = (cells[column].strip() for column in columns)
        return [Row(tuple(texts), class_of(label, task.classes) if task.classes else score(label))]

    rows = read_rows(path, parse, first=1 if task.header else 2)
    if incomplete:
        print(f"{path}: {len(incomplete)} lines end early and are left out")
    return rows


def score(text):
    """The score that a label says."""
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise ValueError(f"the label is {text!r}, expected a number")


def fetch_mrpc(folder, url):
    """Makes MRPC's files. GLUE does not publish them, only which lines of Microsoft's training file
    are the dev set; both of these are downloaded unless they are in the folder."""
    if (folder / "train.tsv").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)

    def published(address, sha256):
        path = folder / address.rpartition("/")[2]
        fetch(f"{url}/{address}", path, folder, sha256)
        return [line for _, line in lines(path)]

    header, *examples = published(TASKS["mrpc"].archive, TASKS["mrpc"].sha256)
    dev_ids = {tuple(line.split("\t")[:2]) for line in published(*MRPC_DEV_IDS)}
    parts = {"dev": [header], "train": [header]}
    for line in examples:
        is_dev = tuple(line.split("\t")[1:3]) in dev_ids
        parts["dev" if is_dev else "train"].append(line)
    for part, chosen in parts.items():  # train.tsv last: what is there then is complete
        with written_whole(folder / f"{part}.tsv") as file:
            file.write("".join(f"{line}\n" for line in chosen).encode())
