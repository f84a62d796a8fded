"""Super-NaturalInstructions (Wang et al. 2022), as the study evaluates T5 on it: train on 757
tasks, write answers to 119 others.

A row is a definition of its task, up to two worked examples, and an input; the score is Rouge-L's
F-measure of the answer. The study compares with one reference drawn at random where an instance has
several (`rouge_l`); Tk-Instruct's script takes the best of all, which stands beside it
(`rouge_l_best`). There is no dev set; the test tasks are read once, at the end.

As the study: 100 instances drawn from each training task, the first 100 of each test task, no
dropout, a constant rate, fp32 (on a GPU its products in TF32); a prompt above the limit loses its
end. The study's seed is 2137.

Where we differ from the release: the reference that an instance is compared with is the same for
every seed.

Files: DATA_DIR/tasks/*.json and DATA_DIR/splits/default/{train,test}_tasks.txt, as in the
natural-instructions repository; what is downloaded, its release 2.8, comes into
DATA_DIR/natural-instructions.
"""

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from errors import UserError
from tasks import Recipe, Row, fetch_zip, lines
from tasks.metrics import rouge_l

MODEL = "t5"
RECIPE = Recipe(
    lr=5e-5,
    epochs=2,
    batch=8,
    max_length=1024,
    seeds=(2137,),
    schedule="constant",
    target_length=128,
    evaluate_every_epoch=False,
    dtype="fp32",
)
URL = "https://github.com/allenai/natural-instructions/archive/refs/tags/v2.8.zip"
SAME_ROWS = False  # the seed draws them
INSTANCES = 100  # of a task, at most
EXAMPLES = 2  # in a prompt, at most


DEFAULT = ("sni",)
AVERAGED = (("sni", "rouge_l"),)


def load(name, data_dir, url=URL, seed=0):
    """(training rows, {"": rows to evaluate on}); downloads the repository if it is missing. The
    seed draws the training tasks' instances. The texts of a row are the parts of its prompt:
    `prompt` joins those that fit."""
    rouge_l(["a"], [["a"]])  # a missing package is named now, not after the training
    if not (data_dir / "tasks").exists():
        data_dir = data_dir / "natural-instructions"
        fetch_zip(url, data_dir, "tasks")
    training, test = (
        [row for task in split(data_dir, part) for row in read(data_dir, task, part, seed)]
        for part in ("train", "test")
    )
    for part, rows in (("train", training), ("test", test)):
        if not rows:
            raise UserError(
                f"{data_dir}: the tasks of splits/default/{part}_tasks.txt have no instance"
            )
    return training, {"": test}


def split(data_dir, part):
    """Names of the tasks of the default English split."""
    names = [
        line.strip() for _, line in lines(data_dir / "splits" / "default" / f"{part}_tasks.txt")
    ]
    if not any(names):
        raise UserError(f"{data_dir / 'splits' / 'default' / f'{part}_tasks.txt'}: no task in it")
    return [name for name in names if name]


def read(data_dir, task, part, seed):
    """The rows of one task's file."""
    path = data_dir / "tasks" / f"{task}.json"
    text = "\n".join(line for _, line in lines(path))
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}, line {getattr(error, 'lineno', 1)}: not JSON ({error})") from None
    place = "Definition"
    try:
        definition = content["Definition"]
        text = definition if isinstance(definition, str) else definition[0]
        start = f"Definition: {ended(text.strip())}\n\n"
        place = "Positive Examples"
        examples = tuple(
            example_text(number, one)
            for number, one in enumerate(content["Positive Examples"][:EXAMPLES], 1)
        )
        place, instances = "Instances", content["Instances"]
        draw = random.Random(f"{seed} {task}")
        if part == "train":
            chosen = draw.sample(range(len(instances)), min(INSTANCES, len(instances)))
        else:
            # The same test for every seed.
            chosen, draw = (
                range(min(INSTANCES, len(instances))),
                random.Random(task),
            )
        rows = []
        for index in chosen:
            place = f"instance {index + 1}"
            output = instances[index]["output"]
            references = (output,) if isinstance(output, str) else tuple(output)
            if not references or not all(isinstance(reference, str) for reference in references):
                raise TypeError("its output is neither a text nor texts")
            texts = (start, *examples, query_text(instances[index]["input"]))
            rows.append(Row(texts, draw.choice(references), references=references))
        return rows
    except KeyError as error:
        raise UserError(f"{path}, {place}: no {error} in it") from None
    except (TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path}, {place}: not in the format of natural-instructions ({error})"
        ) from None


def ended(text):
    """With a full stop, unless it ends with a punctuation mark."""
    return text if text and text[-1] in string.punctuation else text + "."


def example_text(number, example):
    """A worked example as the study writes it, with its spaces."""
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


TASKS = {
    "sni": Task(
        prompt,
        {
            "rouge_l": lambda predictions, rows: rouge_l(
                predictions, [[row.label] for row in rows]
            ),
            "rouge_l_best": lambda predictions, rows: rouge_l(
                predictions, [row.references for row in rows]
            ),
        },
    )
}
