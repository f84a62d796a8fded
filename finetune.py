"""Fine-tunes a finished run on the tasks of a suite, and scores it.

    python finetune.py runs/NAME --suite=glue                      BERT on GLUE, three seeds
    python finetune.py runs/NAME --suite=superglue --task=cb,rte   some tasks of SuperGLUE
    python finetune.py runs/NAME --suite=sni                       T5 on Super-NaturalInstructions
    python finetune.py runs/NAME --suite=glue --untrained          without pre-training, to compare

Every task and seed starts from the run's weights and ends in a file,
runs/NAME/finetuned/SUITE/TASK-seedS.json: the scores after every epoch, the last ones, and the
best. What is finished is kept: the same command goes on where it was stopped. RUN may also be a
folder of transformers with a T5 (config.json, weights, spiece.model).
"""

import dataclasses
import datetime
import itertools
import json
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
import tasks
from data.prepare import (
    SPECIAL_TOKENS,
    TOKENIZERS,
    SentencePieceTokenizer,
    corpus_folder,
    load_tokenizer,
)
from errors import UserError, exits_on_user_error, explains_out_of_memory
from flags import Parser
from parallel import print0
from runs import CONFIG, ROOT, git_commit, is_a, locked, read_record, relative_path, write_json

SEEDS = 2**32  # torch and NumPy take no more
CLS, SEP = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
CLASSIFIER_WIDTH = 1024  # of the study's layer between the encoder and the classes, at every size
ROWS_AT_ONCE = 16  # in evaluation; changes speed and memory only
RECIPE_FLAGS = ("lr", "epochs", "batch", "max_length", "dropout", "dtype")


# -- Two kinds of learners, one interface: `encode` a row; `batch`, `loss`, `predictions` ----------


def padded(rows, value=0):
    """Arrays of numbers -> (B, T) int64, T a multiple of 8."""
    length = -(-max(map(len, rows)) // 8) * 8
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def reading_batch(sources):
    """What both models read: `tokens` (B, T) int64, and `mask` (B, T) bool, True at the tokens that
    are no padding."""
    tokens = padded(sources)
    return {
        "tokens": tokens,
        "mask": torch.arange(tokens.shape[1])
        < torch.tensor([len(source) for source in sources])[:, None],
    }


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
        return array(
            "i",
            [
                CLS,
                *(token for part, length in zip(parts, lengths) for token in (*part[:length], SEP)),
            ],
        ), row.label

    def batch(self, encoded):
        """`tokens` and `mask` (B, T), `labels` (B,)."""
        sources, labels = zip(*encoded)
        return reading_batch(sources) | {
            "labels": torch.tensor(labels, dtype=torch.float32 if self.is_score else torch.long)
        }

    def forward(self, batch):  # (B, classes)
        with self.bert.autocast():
            h = self.bert.encode(batch["tokens"], mask=batch["mask"])[:, 0]
            h = F.dropout(torch.tanh(self.hidden(h)), self.recipe.dropout, self.training)
            return self.output(h).float()

    def loss(self, batch):
        outputs = self(batch)
        return (
            F.mse_loss(outputs[:, 0], batch["labels"])
            if self.is_score
            else F.cross_entropy(outputs, batch["labels"])
        )

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
        source = self.task.prompt(
            row, lambda text: len(self.tokenizer.encode(text)) + 1, self.recipe.max_length
        )
        return self.ended(source, self.recipe.max_length), self.ended(
            row.label, self.recipe.target_length
        )

    def batch(self, encoded):
        """`tokens` and `mask` (B, T), `labels` (B, P), -100 at padding."""
        sources, targets = zip(*encoded)
        return reading_batch(sources) | {"labels": padded(targets, -100)}

    def loss(self, batch):
        return self.t5.loss(batch)

    def predictions(self, batch):
        """For every row the text that the model writes."""
        written = self.t5.generate(batch, self.recipe.target_length, end=self.tokenizer.separator)
        return [
            self.tokenizer.decode([token for token in row if token > self.tokenizer.separator])
            for row in written.tolist()
        ]


KINDS = {"bert": Classifier, "t5": Writer}


# -- What a run gives: a model and its tokenizer ---------------------------------------------------


def is_transformers(folder):
    """Whether a folder's config.json is one of transformers, not one of ours."""
    return "model_type" in read_record(folder / "config.json")


def load_run(folder, device, dropout, untrained, seed):
    """(model, tokenizer) of a finished run, or of a folder of transformers; `untrained`: with new
    weights from the seed."""
    if is_transformers(folder):
        model = models.load_transformers(folder, device, dropout=dropout)
        try:
            tokenizer = SentencePieceTokenizer.load(folder / "spiece.model")
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{folder}/spiece.model: no SentencePiece model of T5 ({error})"
            ) from None
        if tokenizer.size != model.config.vocabulary_size:
            raise UserError(
                f"{folder}: its tokenizer has {tokenizer.size} tokens, its weights "
                f"{model.config.vocabulary_size}"
            )
    else:
        model, tokenizer = (
            models.load(folder / "model.pt", device, dropout=dropout),
            tokenizer_of(folder),
        )
    if untrained:
        torch.manual_seed(seed)
        model.initialise()
    return model, tokenizer


def tokenizer_of(folder):
    """The tokenizer that a run was trained with: from its folder, or from its corpus if that is
    still the same one."""
    if any((folder / kind.file_name).exists() for kind in TOKENIZERS.values()):
        return load_tokenizer(folder)
    stored = read_record(folder / "config.json", CONFIG)
    config = stored["config"]
    corpus = Path(config["data"])
    if not (corpus / "meta.json").exists():
        corpus = corpus_folder(config["data"], config["model"], config["vocabulary"])
    if (
        not (corpus / "meta.json").exists()
        or read_record(corpus / "meta.json")["checksum"] != stored["corpus"]
    ):
        raise UserError(
            f"{folder} has no tokenizer in it, and {relative_path(corpus)} is not (or no longer) "
            "the corpus that it was trained on; prepare that one again"
        )
    return load_tokenizer(corpus)


# -- One task, one seed ----------------------------------------------------------------------------


def rate(recipe, update, updates):
    """The learning rate of an update, counted from 0: a linear warm-up over the task's own first
    updates, then a cosine to zero over the rest, or constant."""
    warm_up = int(recipe.warmup_share * updates)
    if update < warm_up:
        return recipe.lr * update / warm_up
    if recipe.schedule == "constant":
        return recipe.lr
    return (
        recipe.lr * 0.5 * (1 + math.cos(math.pi * (update - warm_up) / max(1, updates - warm_up)))
    )


def moved(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def predict(learner, encoded, device, label=""):
    """The predictions for all encoded rows, in their order. Rows of like length are read together,
    so that little is padding."""
    learner.eval()
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index][0]))
    predictions = [None] * len(encoded)
    for start in tqdm(
        range(0, len(order), ROWS_AT_ONCE), f"{label}, evaluating", leave=False, disable=None
    ):
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
    encoded, *others = (
        [learner.encode(row) for row in tqdm(rows, f"{label}, encoding", leave=False, disable=None)]
        for rows in (training, *evaluated.values())
    )
    evaluated = {
        suffix: (rows, its_encoded)
        for (suffix, rows), its_encoded in zip(evaluated.items(), others)
    }
    batch = min(recipe.batch, len(training))
    per_epoch = len(training) // batch  # the last, incomplete batch is dropped, as the study
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
                    group["lr"] = rate(recipe, update, updates)
                loss = learner.loss(
                    moved(learner.batch([encoded[index] for index in part]), device)
                )
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
                    scores |= {
                        name + suffix: metric(predictions, rows)
                        for name, metric in task.metrics.items()
                    }
                epochs.append({"epoch": epoch + 1, "training_loss": mean_loss, "scores": scores})
                bar.set_postfix({name: f"{score:.4f}" for name, score in scores.items()})
    return epochs


# -- A suite ---------------------------------------------------------------------------------------


def recipe_of(suite, typed):
    """The suite's recipe with what was typed over it."""
    recipe = dataclasses.replace(
        suite.RECIPE, **{name: typed[name] for name in RECIPE_FLAGS if typed.get(name) is not None}
    )
    if recipe.dtype is None:
        recipe = dataclasses.replace(
            recipe, dtype="bf16" if typed["device"].startswith("cuda") else "fp32"
        )
    if (
        not recipe.lr >= 0
        or min(recipe.epochs, recipe.batch) < 1
        or recipe.max_length < 8
        or not 0 <= recipe.dropout < 1
    ):
        raise UserError(
            f"--lr={recipe.lr:g} --epochs={recipe.epochs} --batch={recipe.batch} "
            f"--max_length={recipe.max_length} --dropout={recipe.dropout:g}: "
            "expected a rate of at least 0, epochs and batch from 1, a length from 8, a dropout "
            "from 0 to below 1"
        )
    return recipe


def identity_of(folder, options, recipe):
    """What all results of one folder have in common: which weights, and how they are fine-tuned."""
    files = [
        path
        for path in (
            folder / name for name in ("model.pt", "model.safetensors", "pytorch_model.bin")
        )
        if path.exists()
    ]
    if not files:
        raise UserError(
            f"{folder}: no weights here (model.safetensors or pytorch_model.bin, in one file)"
        )
    recipe = {name: value for name, value in dataclasses.asdict(recipe).items() if name != "seeds"}
    return {
        "suite": options.suite,
        "weights": zlib.crc32(files[0].read_bytes()),
        "untrained": options.untrained,
    } | recipe


def check_results(out, identity):
    """Refuses a folder that holds results of other weights, or of another recipe."""
    for path in sorted(out.glob("*-seed*.json")):
        theirs = read_record(path).get("identity", {})
        for name, ours in identity.items():
            if theirs.get(name) != ours:
                raise UserError(
                    f"{relative_path(path)} is of another recipe or model: its {name} is "
                    f"{theirs.get(name)}, now it is {ours}; choose another folder with --out"
                )


def data_checksum(training, evaluated, suite, out, name, data_dir):
    """What tells a task's data from other data; refuses those that other seeds' results of the task
    in `out` are not of. Where every seed draws its own training rows, only their number counts."""
    found = zlib.crc32(repr(len(training)).encode())
    for row in itertools.chain(training if suite.MODEL == "bert" else [], *evaluated.values()):
        found = zlib.crc32(repr((row.texts, row.label, row.group, row.references)).encode(), found)
    for path in sorted(out.glob(f"{name}-seed*.json")):
        if read_record(path).get("data_checksum") != found:
            raise UserError(
                f"{relative_path(path)} is of other data than {data_dir} has now, or from before "
                "results recorded it; choose another folder with --out"
            )
    return found


def results_of(folder):
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
            if identity["suite"] not in tasks.suites() or not isinstance(
                identity["untrained"], bool
            ):
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


def kind_of(folder):
    """ "bert" or "t5": which model a finished run, or a folder of transformers, holds."""
    config = read_record(folder / "config.json")
    if config.get("model_type") == "t5":
        return "t5"
    kind = config["config"].get("model") if is_a(config.get("config"), dict) else None
    if kind not in KINDS:
        raise UserError(
            f"{folder}/config.json is neither one of a run nor one of transformers with a T5"
        )
    if not (folder / "model.pt").exists():
        raise UserError(
            f"{folder}: its model.pt is missing"
            if (folder / "result.json").exists()
            else f"{folder} is not finished; go on with: python train.py --resume={folder}"
        )
    return kind


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="finetune.py")
    parser.add_argument(
        "run", help="the folder of a finished run, or one of transformers with a T5"
    )
    parser.add_argument("--suite", required=True, help=", ".join(tasks.suites()))
    parser.add_argument(
        "--task", help="some of its tasks, joined by commas (all; of glue without wnli)"
    )
    parser.add_argument(
        "--data_dir",
        help="folder of the suite's files as published; what is missing is downloaded (data/SUITE)",
    )
    parser.add_argument("--base_url", help="where they are downloaded from (their publisher)")
    parser.add_argument(
        "--seeds", help="joined by commas (the suite's: glue and superglue 0,1,2; sni 2137)"
    )
    parser.add_argument(
        "--untrained", action="store_true", help="start from new weights in place of the run's"
    )
    for name, kind, help in (
        ("lr", float, "peak learning rate"),
        ("epochs", int, "passes over the training rows"),
        ("batch", int, "rows an update"),
        ("max_length", int, "tokens that a row reads"),
        ("dropout", float, "share of activations dropped in training"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"{help} (the study's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="precision (sni: fp32; else bf16 on a GPU)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument(
        "--out", help="folder of the results (RUN/finetuned/SUITE, with -untrained)"
    )
    options = parser.parse_args(arguments)
    suite, folder, device = tasks.find(options.suite), Path(options.run), options.device
    rst.check_device(device)
    if options.threads < 0:
        raise UserError(f"--threads={options.threads}: expected at least 0")
    recipe = recipe_of(suite, vars(options))
    chosen = options.task.split(",") if options.task else suite.DEFAULT
    if unknown := [name for name in chosen if name not in suite.TASKS]:
        raise UserError(f"--task={unknown[0]}: {options.suite} has {', '.join(suite.TASKS)}")
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else recipe.seeds
        if not 0 <= min(seeds) <= max(seeds) < SEEDS:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--seeds={options.seeds}: expected whole numbers from 0 to below {SEEDS}, joined by "
            "commas"
        ) from None
    kind = kind_of(folder)
    if kind != suite.MODEL:
        raise UserError(f"--suite={options.suite} is for {suite.MODEL}; {folder} is a {kind}")
    rst.prepare_machine(options.threads)
    data_dir = Path(options.data_dir) if options.data_dir else ROOT / "data" / options.suite
    out = (
        Path(options.out)
        if options.out
        else folder / "finetuned" / (options.suite + ("-untrained" if options.untrained else ""))
    )
    identity = identity_of(folder, options, recipe)
    check_results(out, identity)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: a file, expected a folder")
    # What is damaged or missing is named before anything is downloaded.
    model, _ = load_run(folder, "cpu", recipe.dropout, options.untrained, 0)
    if kind == "bert" and recipe.max_length > model.config.max_length:
        raise UserError(
            f"--max_length={recipe.max_length}: this model reads at most {model.config.max_length} "
            "tokens"
        )
    del model
    print0(
        f"{relative_path(folder)}{', untrained,' if options.untrained else ''} on "
        f"{', '.join(chosen)} of {options.suite}; results in {relative_path(out)}"
    )
    print0(
        f"  recipe   lr {recipe.lr:g}, {recipe.schedule}, warm-up {recipe.warmup_share:g}, batch "
        f"{recipe.batch}, {recipe.epochs} epochs, "
        f"dropout {recipe.dropout:g}, at most {recipe.max_length} tokens, {recipe.dtype}, seeds "
        f"{', '.join(map(str, seeds))}"
    )
    try:
        for name in chosen:
            data = None
            for seed in seeds:
                path, label = out / f"{name}-seed{seed}.json", f"{name} seed {seed}"
                started, is_kept = time.perf_counter(), path.exists()
                is_named = options.data_dir and data_dir.exists()  # then what is kept must be of it
                if (not is_kept or is_named) and (data is None or suite.MODEL == "t5"):
                    with locked(data_dir, wait=True):
                        training, evaluated = suite.load(
                            name, data_dir, options.base_url or suite.URL, seed
                        )
                    data = data_checksum(training, evaluated, suite, out, name, data_dir)
                if is_kept:
                    print0(f"  {label}: kept")
                    continue
                out.mkdir(parents=True, exist_ok=True)
                model, tokenizer = load_run(folder, "cpu", recipe.dropout, options.untrained, seed)
                model.autocast_dtype = models.DTYPES[recipe.dtype]
                torch.manual_seed(seed)  # of the classifier
                learner = KINDS[kind](model, tokenizer, suite.TASKS[name], recipe)
                with explains_out_of_memory(
                    f"with --batch={recipe.batch} --max_length={recipe.max_length}: this device is "
                    "too small for the recipe"
                ):
                    epochs = finetune(
                        learner.to(device),
                        suite.TASKS[name],
                        training,
                        evaluated,
                        recipe,
                        seed,
                        device,
                        label,
                    )
                last, seconds = epochs[-1]["scores"], time.perf_counter() - started
                best = {metric: max(epoch["scores"][metric] for epoch in epochs) for metric in last}
                write_json(
                    path,
                    {
                        "task": name,
                        "seed": seed,
                        "run": relative_path(folder),
                        "identity": identity,
                        "data_checksum": data,
                        "last": last,
                        "best": best,
                        "epochs": epochs,
                        "training_rows": len(training),
                        "evaluated_rows": sum(map(len, evaluated.values())),
                        "seconds": seconds,
                        "finished": datetime.datetime.now().isoformat(timespec="seconds"),
                        "commit": git_commit(),
                        "device": rst.device_name(device),
                        "torch": torch.__version__,
                    },
                )
                shown_scores = (
                    f"{metric} {100 * score:.1f} (best epoch {100 * best[metric]:.1f})"
                    for metric, score in last.items()
                )
                print0(f"  {label}: {', '.join(shown_scores)} in {seconds:.0f} s")
    except KeyboardInterrupt:
        print0("stopped; what is finished is kept, and the same command goes on with the rest")
        raise
    print0("\n| task | metric | last epoch | best epoch |\n|---|---|---|---|")
    results, problems = results_of(out)
    for name, metrics in tasks.summary(results, suite).items():
        for metric, kinds in metrics.items():
            cells = [tasks.percent(kinds[part].values(), "seed") for part in ("last", "best")]
            print0(f"| {name} | {metric} | {' | '.join(cells)} |")
    for problem in problems:
        print0(problem)


if __name__ == "__main__":
    main()
