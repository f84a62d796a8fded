"""Fine-tunes a finished run on the tasks of a suite, and scores it.

    python finetune.py runs/NAME --suite=glue                      BERT on GLUE, three seeds
    python finetune.py runs/NAME --suite=superglue --task=cb,rte   some tasks of SuperGLUE
    python finetune.py runs/NAME --suite=sni                       T5 on Super-NaturalInstructions
    python finetune.py runs/NAME --suite=glue --untrained          without pre-training, to compare

Every task and seed starts from the run's weights and ends in a file,
runs/NAME/finetuned/SUITE/TASK-seedS-ID.json: the scores after every epoch, the last ones, and the
best. Its id is a hash of weights, recipe and data. What is finished is kept: the same command goes
on where it was stopped. RUN may also be a folder of transformers with a T5 (config.json, weights,
spiece.model).
"""

import dataclasses
import datetime
import itertools
import math
import time
import zlib
from array import array
from pathlib import Path

import rst  # sets GOMP_SPINCOUNT, so it must precede torch

# isort: split

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import model as models
import runs
import tasks
from data.corpus import to_device
from data.prepare import SPECIAL_TOKENS, SentencePieceTokenizer, load_tokenizer
from errors import UserError, exits_on_user_error, explains_out_of_memory
from flags import Option, Parser
from parallel import print0
from transformers_folder import load_transformers, weight_files

SEEDS = 2**32  # torch and NumPy take no more
CLS, SEP = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
CLASSIFIER_WIDTH = 1024  # of the study's layer between the encoder and the classes, at every size
ROWS_AT_ONCE = 16  # in evaluation; changes speed and memory only
RECIPE_FLAGS = {
    "lr": Option(None, "peak learning rate (the study's)", kind=float, minimum=0),
    "epochs": Option(None, "passes over the training rows (the study's)", kind=int, minimum=1),
    "batch": Option(None, "rows per update (the study's)", kind=int, minimum=1),
    "max_length": Option(None, "tokens that a row reads (the study's)", kind=int, minimum=8),
    "dropout": Option(
        None, "share of activations dropped (the study's)", kind=float, minimum=0, maximum=0.9999999
    ),
    "dtype": Option(
        None, "precision (sni: fp32; else bf16 on a GPU that has it)", ("fp32", "bf16"), kind=str
    ),
}
DATA_DIR = "folder of the published files; what is missing is downloaded (data/SUITE)"
FLAGS = {
    "task": Option(
        None, "tasks of the suite, joined by commas (all; glue: all but wnli)", kind=str
    ),
    "data_dir": Option(None, DATA_DIR, kind=str),
    "base_url": Option(None, "where missing files are downloaded from (their publisher)", kind=str),
    "seeds": Option(None, "seeds, joined by commas (glue, superglue: 0,1,2; sni: 2137)", kind=str),
    "out": Option(None, "folder of the results (RUN/finetuned/SUITE)", kind=str),
    "untrained": Option(False, "start from new weights in place of the run's"),
    **RECIPE_FLAGS,
    "device": Option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda"),
    "threads": rst.THREADS,
}


# -- Two kinds of learners with one interface -----------------------------------------------------


def padded(rows, value=0):
    """Arrays of numbers -> (B, T) int64, T a multiple of 8."""
    length = -(-max(map(len, rows)) // 8) * 8
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def reading_batch(sources):
    """What both models read: `tokens` (B, T) int64, and `mask` (B, T) bool, True at the tokens that
    are no padding."""
    tokens = padded(sources)
    lengths = torch.tensor([len(source) for source in sources])
    return {"tokens": tokens, "mask": torch.arange(tokens.shape[1]) < lengths[:, None]}


class Classifier(nn.Module):
    """BERT with the study's classifier on the first position: linear, tanh, dropout, linear; one
    output and a squared error where the label is a score."""

    def __init__(self, bert, tokenizer, task, recipe):
        super().__init__()
        self.bert, self.tokenizer, self.recipe = bert, tokenizer, recipe
        self.is_score, outputs = not task.classes, max(1, len(task.classes))
        self.hidden = nn.Linear(bert.config.d_model, CLASSIFIER_WIDTH)
        self.output = nn.Linear(CLASSIFIER_WIDTH, outputs)
        for layer in (self.hidden, self.output):
            nn.init.normal_(layer.weight, std=bert.initial_std)
            nn.init.zeros_(layer.bias)

    def encode(self, row):
        """([CLS] and the row's texts, each ended by [SEP]; label). What is too long loses the ends
        of its longest texts."""
        parts = [self.tokenizer.encode(text) for text in row.texts]
        lengths, room = [len(part) for part in parts], self.recipe.max_length - 1 - len(parts)
        while sum(lengths) > room:
            lengths[lengths.index(max(lengths))] -= 1
        tokens = array("i", [CLS])
        for part, length in zip(parts, lengths):
            tokens.extend([*part[:length], SEP])
        return tokens, row.label

    def batch(self, encoded):
        """`tokens` and `mask` (B, T), `labels` (B,)."""
        sources, labels = zip(*encoded)
        return reading_batch(sources) | {
            "labels": torch.tensor(labels, dtype=torch.float32 if self.is_score else torch.long)
        }

    def scored(self, row):
        """The row that its prediction is compared with."""
        return row

    def forward(self, batch):  # (B, classes)
        with self.bert.autocast():
            h = self.bert.encode(batch["tokens"], mask=batch["mask"])[:, 0]
            h = F.dropout(torch.tanh(self.hidden(h)), self.recipe.dropout, self.training)
            return self.output(h).float()

    def loss(self, batch):
        outputs, labels = self(batch), batch["labels"]
        if self.is_score:
            return F.mse_loss(outputs[:, 0], labels)
        return F.cross_entropy(outputs, labels)

    def predictions(self, batch):
        """For every row the number of its class, or its score."""
        outputs = self(batch)
        return (outputs[:, 0] if self.is_score else outputs.argmax(dim=-1)).tolist()


class Writer(nn.Module):
    """T5 that reads a row's prompt and writes a text, greedily."""

    def __init__(self, t5, tokenizer, task, recipe):
        super().__init__()
        self.t5, self.tokenizer, self.task, self.recipe = t5, tokenizer, task, recipe

    def ended(self, text, limit):
        """The tokens of a text, cut to the limit, and </s>."""
        return array("i", [*self.tokenizer.encode(text)[: limit - 1], self.tokenizer.separator])

    def encode(self, row):
        """(tokens of the prompt, tokens of the label), both ended by </s>."""
        limit = self.recipe.max_length
        source = self.task.prompt(row, lambda text: len(self.tokenizer.encode(text)) + 1, limit)
        return self.ended(source, limit), self.ended(row.label, self.recipe.target_length)

    def scored(self, row):
        """With its references as long as an answer can be, as in the study."""

        def cut(text):
            tokens, most = self.tokenizer.encode(text), self.recipe.target_length - 1
            return text if len(tokens) <= most else self.tokenizer.decode(tokens[:most])

        references = tuple(map(cut, row.references))
        return dataclasses.replace(row, label=cut(row.label), references=references)

    def batch(self, encoded):
        """`tokens` and `mask` (B, T), `labels` (B, P), -100 at padding."""
        sources, targets = zip(*encoded)
        return reading_batch(sources) | {"labels": padded(targets, -100)}

    def loss(self, batch):
        return self.t5.loss(batch)

    def predictions(self, batch):
        """For every row the text that the model writes."""
        written = self.t5.generate(batch, self.recipe.target_length, end=self.tokenizer.separator)
        texts = (
            [token for token in row if token > 1] for row in written.tolist()
        )  # no <pad>, </s>
        return [self.tokenizer.decode(text) for text in texts]


KINDS = {"bert": Classifier, "t5": Writer}


# -- What a run gives: a model and its tokenizer ---------------------------------------------------


def kind_of(folder):
    """ "bert" or "t5": which model a finished run, or a folder of transformers, holds."""
    path = folder / "config.json"
    config = runs.read_record(path)
    if config.get("model_type") == "t5":
        return "t5"
    if "model_type" in config or "id" not in config:
        raise UserError(f"{path} belongs neither to a run nor to a T5 in transformers' format")
    runs.check_record(config, runs.CONFIG | {"config": {"model": str}}, path)
    if runs.status(folder) != "finished":
        raise UserError(f"{folder} is not finished; go on with: python train.py --resume={folder}")
    return config["config"]["model"]


def weights_checksum(folder):
    """CRC-32 of the weights' files."""
    whole = folder / "model.pt"
    found = 0
    for path in [whole] if whole.exists() else weight_files(folder):
        found = zlib.crc32(path.read_bytes(), found)
    return found


def load_run(folder, dropout, untrained, seed):
    """(model, tokenizer) of a finished run, or of a folder of transformers; `untrained`: with new
    weights from the seed."""
    if runs.status(folder) == "finished":
        model = models.load(folder / "model.pt", "cpu", dropout=dropout)
        tokenizer = load_tokenizer(folder)
        result = runs.read_record(folder / "result.json", {"tokenizer_checksum": int})
        path = folder / tokenizer.file_name
        if zlib.crc32(path.read_bytes()) != result["tokenizer_checksum"]:
            raise UserError(f"{path} is not the tokenizer of this run (its checksum differs)")
    else:
        model = load_transformers(folder, "cpu", dropout=dropout)
        path = folder / "spiece.model"
        try:
            tokenizer = SentencePieceTokenizer.load(path)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{path}: no SentencePiece model of T5 ({error})") from None
        if tokenizer.size > model.config.vocabulary_size:
            sizes = f"{tokenizer.size} tokens, its weights {model.config.vocabulary_size}"
            raise UserError(f"{folder}: its tokenizer has {sizes}")
    if untrained:
        torch.manual_seed(seed)
        model.initialise()
    return model, tokenizer


# -- One task, one seed ----------------------------------------------------------------------------


def scheduled_lr(recipe, update, updates):
    """The learning rate of an update, counted from 0: a linear warm-up over the task's own first
    updates, then a cosine to zero over the rest, or constant."""
    warm_up = int(recipe.warmup_share * updates)
    if update < warm_up:
        return recipe.lr * update / warm_up
    if recipe.schedule == "constant":
        return recipe.lr
    progress = (update - warm_up) / max(1, updates - warm_up)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))


def moved(batch, device):
    return {name: to_device(tensor, device) for name, tensor in batch.items()}


@torch.no_grad()
def predict(learner, encoded, device, label=""):
    """The predictions for all encoded rows, in their order. Rows of like length are read together,
    so that little is padding."""
    learner.eval()
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index][0]))
    predictions = [None] * len(encoded)
    starts = range(0, len(order), ROWS_AT_ONCE)
    for start in tqdm(starts, f"{label}, evaluating", leave=False, disable=None):
        part = order[start : start + ROWS_AT_ONCE]
        batch = moved(learner.batch([encoded[index] for index in part]), device)
        for index, prediction in zip(part, learner.predictions(batch)):
            predictions[index] = prediction
    learner.train()
    return predictions


def finetune(learner, task, training, evaluated, recipe, seed, device, label):
    """Trains on a task and evaluates; returns the scores after every epoch: [{metric: score}].

    Args:
        learner: a Classifier or a Writer, with the run's weights.
        training, evaluated: rows, and {suffix of the metrics' names: rows}.
        label: what the progress bar says.
    """

    def encode(rows):
        rows = tqdm(rows, f"{label}, encoding", leave=False, disable=None)
        return [learner.encode(row) for row in rows]

    encoded = encode(training)
    evaluated = {
        suffix: ([learner.scored(row) for row in rows], encode(rows))
        for suffix, rows in evaluated.items()
    }
    batch = min(recipe.batch, len(training))
    per_epoch = len(training) // batch  # the last, incomplete batch is dropped, as in the study
    updates, update, epochs = recipe.epochs * per_epoch, 0, []
    optimizer = torch.optim.AdamW(
        learner.parameters(),
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    learner.train()
    torch.manual_seed(seed)  # of the dropout
    losses = torch.zeros((), device=device)
    with tqdm(total=updates, desc=label, unit=" updates", leave=False, disable=None) as bar:
        for epoch in range(recipe.epochs):
            losses.zero_()
            order = np.random.default_rng((seed, epoch)).permutation(len(training))
            for start in range(0, per_epoch * batch, batch):
                part = order[start : start + batch]
                for group in optimizer.param_groups:
                    group["lr"] = scheduled_lr(recipe, update, updates)
                rows = learner.batch([encoded[index] for index in part])
                loss = learner.loss(moved(rows, device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses += loss.detach()
                update += 1
                bar.update()
            mean_loss = losses.item() / per_epoch
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"{label}: the training loss is {mean_loss} in epoch {epoch + 1}; lower --lr "
                    f"(it is {recipe.lr:g})"
                )
            if recipe.evaluate_every_epoch or epoch == recipe.epochs - 1:
                scores = {}
                for suffix, (rows, its_encoded) in evaluated.items():
                    predictions = predict(learner, its_encoded, device, label)
                    for name, metric in task.metrics.items():
                        scores[name + suffix] = metric(predictions, rows)
                epochs.append({"epoch": epoch + 1, "training_loss": mean_loss, "scores": scores})
                bar.set_postfix({name: f"{score:.4f}" for name, score in scores.items()})
    return epochs


# -- A suite ---------------------------------------------------------------------------------------


def recipe_of(suite, typed):
    """The suite's recipe with what was typed over it."""
    changes = {name: typed[name] for name in RECIPE_FLAGS if typed[name] is not None}
    recipe = dataclasses.replace(suite.RECIPE, **changes)
    low = rst.default_precision(typed["device"])
    dtype = recipe.dtype or (low if low != "fp16" else "fp32")  # fp16 would need a loss scale
    return dataclasses.replace(recipe, dtype=dtype)


def seeds_of(text):
    """The seeds of a list that is joined by commas."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        seeds = [-1]
    if not 0 <= min(seeds) <= max(seeds) < SEEDS:
        raise UserError(
            f"--seeds={text}: expected whole numbers from 0 to below {SEEDS}, joined by commas"
        )
    return seeds


@dataclasses.dataclass(frozen=True)
class Job:
    """What all tasks and seeds of a command have in common."""

    folder: Path  # of the run
    kind: str  # of its model
    suite_name: str
    recipe: tasks.Recipe
    untrained: bool
    data_dir: Path
    url: str
    device: str
    out: Path

    def load(self, task_name, seed):
        """The rows of a task, (training, {name suffix: evaluated}); downloads what is missing."""
        with runs.locked(self.data_dir, wait=True):
            return tasks.find(self.suite_name).load(task_name, self.data_dir, self.url, seed)

    def run(self, task_name, seed):
        """One task with one seed, unless its result is there; returns the result."""
        started = time.perf_counter()
        training, evaluated = self.load(task_name, seed)
        evaluated_rows = list(itertools.chain(*evaluated.values()))
        recipe = dataclasses.asdict(self.recipe)
        del recipe["seeds"]
        result = {
            "suite": self.suite_name,
            "task": task_name,
            "seed": seed,
            "untrained": self.untrained,
            "weights": weights_checksum(self.folder),
            "recipe": recipe,
            "data": {
                "training_rows": len(training),
                "data_checksum": tasks.checksum(evaluated_rows),
            },
        }
        result_id = runs.identify(result, tasks.checksum(training))
        path = self.out / f"{task_name}-seed{seed}-{result_id}.json"
        label = f"{task_name} seed {seed}"
        if path.exists():
            print0(f"  {label}: kept")
            return tasks.read_result(path)
        model, tokenizer = load_run(self.folder, self.recipe.dropout, self.untrained, seed)
        model.autocast_dtype = models.DTYPES[self.recipe.dtype]
        torch.manual_seed(seed)  # of the classifier
        task = tasks.find(self.suite_name).TASKS[task_name]
        learner = KINDS[self.kind](model, tokenizer, task, self.recipe).to(self.device)
        epochs = finetune(learner, task, training, evaluated, self.recipe, seed, self.device, label)
        last = epochs[-1]["scores"]
        best = {metric: max(epoch["scores"][metric] for epoch in epochs) for metric in last}
        result |= {
            "id": result_id,
            "last": last,
            "best": best,
            "epochs": epochs,
            "evaluated_rows": len(evaluated_rows),
            "seconds": time.perf_counter() - started,
            "run": runs.relative_path(self.folder),
            "finished": datetime.datetime.now().isoformat(timespec="seconds"),
            "commit": runs.git_commit(),
            "device": rst.device_name(self.device),
            "torch": torch.__version__,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        runs.write_json(path, result)
        scores = (
            f"{metric} {100 * score:.1f} (best epoch {100 * best[metric]:.1f})"
            for metric, score in last.items()
        )
        print0(f"  {label}: {', '.join(scores)} in {result['seconds']:.0f} s")
        return result


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="finetune.py")
    parser.add_argument("run", help="the folder of a finished run, or of transformers with a T5")
    parser.add_argument("--suite", required=True, help=", ".join(tasks.suites()))
    for name, option in FLAGS.items():
        parser.add(name, option)
    options = parser.parse_args(arguments)
    suite, folder = tasks.find(options.suite), Path(options.run)
    rst.check_device(options.device)
    recipe = recipe_of(suite, vars(options))
    seeds = seeds_of(options.seeds) if options.seeds else recipe.seeds
    chosen = options.task.split(",") if options.task else suite.DEFAULT
    if unknown := [name for name in chosen if name not in suite.TASKS]:
        raise UserError(f"--task={unknown[0]}: {options.suite} has {', '.join(suite.TASKS)}")
    kind = kind_of(folder)
    if kind != suite.MODEL:
        raise UserError(f"--suite={options.suite} is for {suite.MODEL}; {folder} is a {kind}")
    rst.prepare_machine(options.threads)
    # What is damaged or missing is named before anything is downloaded.
    model, _ = load_run(folder, recipe.dropout, options.untrained, seed=0)
    if kind == "bert" and recipe.max_length > model.config.max_length:
        raise UserError(
            f"--max_length={recipe.max_length}: this model reads at most {model.config.max_length} "
            "tokens"
        )
    del model
    job = Job(
        folder,
        kind,
        options.suite,
        recipe,
        options.untrained,
        data_dir=Path(options.data_dir or runs.ROOT / "data" / options.suite),
        url=options.base_url or suite.URL,
        device=options.device,
        out=Path(options.out or folder / "finetuned" / options.suite),
    )
    untrained = ", untrained," if options.untrained else ""
    print0(
        f"{runs.relative_path(folder)}{untrained} on {', '.join(chosen)} of {options.suite}; "
        f"results in {runs.relative_path(job.out)}"
    )
    settings = dataclasses.asdict(recipe) | {"seeds": ", ".join(map(str, seeds))}
    print0("  recipe   " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    too_small = (
        f"with --batch={recipe.batch} --max_length={recipe.max_length}: this device is too small "
        "for the recipe"
    )
    try:
        with explains_out_of_memory(too_small):
            for name in chosen:  # a damaged file is named before anything trains
                job.load(name, seeds[0])
            results = [job.run(name, seed) for name in chosen for seed in seeds]
    except KeyboardInterrupt:
        print0("stopped; what is finished is kept, and the same command goes on with the rest")
        raise
    print0("\n| task | metric | last epoch | best epoch |\n|---|---|---|---|")
    for (name, metric), kinds in tasks.summary(results, suite).items():
        cells = [tasks.percent(kinds[part].values(), "seed") for part in ("last", "best")]
        print0(f"| {name} | {metric} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
