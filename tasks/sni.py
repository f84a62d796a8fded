"""Super-NaturalInstructions (Wang et al. 2022), as the study evaluates T5 on it: train on 757
tasks, write answers to 119 others.

A row is a definition of its task, up to two worked examples, and an input; the score is Rouge-L's
F-measure of the answer. The study compares with one reference drawn at random where an instance has
several (`rouge_l`); Tk-Instruct's script takes the best of all, which stands beside it
(`rouge_l_best`). There is no dev set; the test tasks are read once, at the end.

As in the study: 100 instances drawn from each training task, the first 100 of each test task, no
dropout, a constant rate, fp32 (on a GPU its products in TF32); a prompt above the limit loses its
end. The study's seed is 2137.

Where we differ from the release: the reference that an instance is compared with is the same for
every seed.

Files: DATA_DIR/tasks/*.json and DATA_DIR/splits/default/{train,test}_tasks.txt, as in the
natural-instructions repository; what is downloaded, its release 2.8, comes into
DATA_DIR/natural-instructions.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from runs import read_record
from tasks import Recipe, Row, fetch_zip, naming, of_rows, read_rows
from tasks.metrics import rouge_l

MODEL = "t5"
RECIPE = Recipe(
    lr=5e-5, epochs=2, batch=8, max_length=1024, target_length=128, seeds=(2137,),
    schedule="constant", evaluate_every_epoch=False, dtype="fp32",
)  # fmt: skip
URL = "https://github.com/allenai/natural-instructions/archive/refs/tags/v2.8.zip"
DEFAULT = ("sni",)
AVERAGED = (("sni", "rouge_l"),)
INSTANCES = 100  # of a task, at most
EXAMPLES = 2  # in a prompt, at most
PARTS = {"Definition": (str, list), "Positive Examples": list, "Instances": list}


def load(name, data_dir, url=URL, seed=0):
    """(training rows, {"": rows to evaluate on}); downloads the repository if it is missing. The
    seed draws the training tasks' instances. The texts of a row are the parts of its prompt:
    `prompt` joins those that fit."""
    rouge_l(["a"], [["a"]])  # a missing package is named now, not after the training
    if not (data_dir / "tasks").exists():
        data_dir = data_dir / "natural-instructions"
        fetch_zip(url, data_dir, "tasks")
    return read(data_dir, "train", seed), {"": read(data_dir, "test")}


def read(data_dir, part, seed=None):
    """The rows of all tasks of one part, train or test, of the default English split."""

    def parse(line):
        task = line.strip()
        return task_rows(data_dir / "tasks" / f"{task}.json", seed) if task else []

    return read_rows(data_dir / "splits" / "default" / f"{part}_tasks.txt", parse)


def task_rows(path, seed):
    """The rows of one task's file, `INSTANCES` at most: drawn with the seed or, without one, the
    first ones. The reference that is the label is drawn too, without a seed always the same."""
    content = read_record(path, PARTS)
    with naming(f"{path}, Definition"):
        definition = content["Definition"]
        text = definition if isinstance(definition, str) else definition[0]
        start = f"Definition: {ended(text.strip())}\n\n"
    with naming(f"{path}, Positive Examples"):
        chosen = enumerate(content["Positive Examples"][:EXAMPLES], 1)
        examples = [example_text(number, example) for number, example in chosen]
    instances = list(enumerate(content["Instances"], 1))
    draw = random.Random(path.stem if seed is None else f"{seed} {path.stem}")
    if seed is not None:
        instances = draw.sample(instances, min(INSTANCES, len(instances)))
    rows = []
    for number, instance in instances[:INSTANCES]:
        with naming(f"{path}, instance {number}"):
            texts = (start, *examples, query_text(instance["input"]))
            output = instance["output"]
            references = (output,) if isinstance(output, str) else tuple(output)
            rows.append(Row(texts, draw.choice(references), references=references))
    return rows


def ended(text):
    """With a full stop, unless it ends with a punctuation mark."""
    return text if text and text[-1] in string.punctuation else text + "."


def example_text(number, example):
    """A worked example as the study writes it, spaces included."""
    source, target = ended(example["input"].strip()), ended(example["output"].strip())
    return f" Positive Example {number} -\nInput: {source}\n Output: {target}\n\n"


def query_text(text):
    return f"Now complete the following example -\nInput: {ended(text.strip())}\nOutput: "


def prompt(row, count_tokens, limit):
    """What the model reads: the definition, as many examples as fit into `limit` tokens with all
    else, and the query."""
    definition, *examples, query = row.texts
    fitting = ""
    for example in examples:
        if count_tokens(definition + fitting + example + query) > limit:
            break
        fitting += example
    return definition + fitting + query


@dataclass(frozen=True)
class Task:
    """The suite's only task: how a row is read, and how an answer is scored."""

    prompt: Callable
    metrics: dict


METRICS = {"rouge_l": of_rows(rouge_l, "label"), "rouge_l_best": of_rows(rouge_l, "references")}
TASKS = {"sni": Task(prompt, METRICS)}
