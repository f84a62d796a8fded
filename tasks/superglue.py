"""SuperGLUE (Wang et al. 2019), as the study evaluates BERT on it: seven tasks, without ReCoRD.

The score is the mean of six numbers, as in the paper; MultiRC is reported beside it. The recipe is
GLUE's with another rate and ten epochs; the best epoch is the study's number, the last one ours.

Where we differ from the release: a row holds all texts of the task, each ended by [SEP] (there,
only the first two reached the model, so that COPA had no second choice, MultiRC no answer, WiC no
second sentence and WSC no second span); the warm-up is 10% of each task's own updates; rows are
shuffled; padding is not attended to; WSC's spans are as published.

Files: DATA_DIR/BoolQ/train.jsonl, val.jsonl and so on, as published.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

from tasks import Row, class_of, fetch_zip, glue, of_rows, read_rows
from tasks.metrics import exact_match, f1, macro_f1

MODEL = "bert"
RECIPE = dataclasses.replace(glue.RECIPE, lr=5e-5, epochs=10)
URL = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2"


@dataclass(frozen=True)
class Task:
    """Where a task's examples are, and how to find them: `examples(object)` gives (texts, label,
    group) of each example in one JSON object of its files."""

    folder: str
    classes: tuple  # in the order of their numbers
    examples: Callable
    metrics: dict
    sha256: str


def fields(*names):
    """`examples` for objects that are one example each, with texts of these names."""
    return lambda object: [([object[name] for name in names], object["label"], None)]


def wsc(object):
    """One example: a text, and two spans of it that may mean the same."""
    target = object["target"]
    yield [object["text"], target["span1_text"], target["span2_text"]], object["label"], None


def multirc(object):
    """One example for each answer to each question about a passage."""
    passage = object["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            texts = [passage["text"], question["question"], answer["text"]]
            yield texts, answer["label"], (object["idx"], question["idx"])


BOOLEAN = (False, True)  # equal to 0 and 1, which some files have
CB = ("entailment", "contradiction", "neutral")
ACCURACY = glue.ACCURACY
MACRO_F1 = {"macro_f1": of_rows(macro_f1, "label")} | ACCURACY
OF_ANSWERS = {"f1a": of_rows(f1, "label"), "exact_match": of_rows(exact_match, "label", "group")}

# fmt: off
TASKS = {
    "boolq":   Task("BoolQ", BOOLEAN, fields("question", "passage"), ACCURACY,
                    "853fbe7922f70c59629f06a39e8d9ca440c3d740e760fd3b87a5ddf3dcba2436"),
    "cb":      Task("CB", CB, fields("premise", "hypothesis"), MACRO_F1,
                    "8d641383298d54554066ba1c93f56ae7410af75df621b90c63028806bbbbb535"),
    "copa":    Task("COPA", BOOLEAN, fields("premise", "choice1", "choice2", "question"), ACCURACY,
                    "405906cddac74bc1e1ce8220f1107d1025b66a25ef10149d91b10bb30651125f"),
    "multirc": Task("MultiRC", BOOLEAN, multirc, OF_ANSWERS,
                    "b3cd440856e72eb166b2edcd37b798455f1ebd51f2c3de64c0c2a4e1971d2737"),
    "rte":     Task("RTE", glue.TWO_WAY, fields("premise", "hypothesis"), ACCURACY,
                    "6310aab3f000424c9d0318a1ff20692e07c7f4aa15e8f17a5972ea0a35c398b9"),
    "wic":     Task("WiC", BOOLEAN, fields("word", "sentence1", "sentence2"), ACCURACY,
                    "ee7e67f4ae9eafbf533780faa198e62167f3cda54256cdf261877be3c0e90900"),
    "wsc":     Task("WSC", BOOLEAN, wsc, ACCURACY,
                    "2ed6dfa94556b4a128ff0441efe365b2e883124e7e6aa00fb8d3a6cb1fd520a9"),
}
DEFAULT = tuple(TASKS)
AVERAGED = (
    ("boolq", "accuracy"), ("cb", "macro_f1"), ("copa", "accuracy"),
    ("rte", "accuracy"), ("wic", "accuracy"), ("wsc", "accuracy"),
)
# fmt: on


def load(name, data_dir, url=URL, seed=0):
    """(training rows, {"": rows to evaluate on}) of a task; downloads what is missing. The seed
    changes nothing here."""
    task = TASKS[name]
    folder = data_dir / task.folder
    fetch_zip(f"{url}/{task.folder}.zip", folder, "train.jsonl", task.sha256)

    def parse(line):
        return [
            Row(tuple(texts), class_of(label, task.classes), group)
            for texts, label, group in task.examples(json.loads(line))
        ]

    training = read_rows(folder / "train.jsonl", parse)
    return training, {"": read_rows(folder / "val.jsonl", parse)}
