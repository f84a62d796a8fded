"""Trains a model with a method under a budget of reference system time.

    python train.py                                   what this machine can do in three minutes
    python train.py --method=NAME --budget_hours=12   a method, 12 hours of the reference
    python train.py --resume=runs/NAME                goes on where a run was stopped
    torchrun --nproc_per_node=8 train.py ...          the same on many devices

Every run is a folder: config.json, log.jsonl, checkpoint.pt, model.pt (weights only), the
tokenizer, result.json (written last). The log has an object for each validation and each update:
its loss, lr (of groups whose peak is --lr), gradient_norm (before clipping), rows, progress (when
it began), charged_seconds of the reference and free_seconds of this machine, the factor in force,
skipped (a gradient overflowed in fp16), compilations, and under each method's name its report.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import rst  # sets GOMP_SPINCOUNT, so it must precede torch

# isort: split

import numpy as np
import torch
import torch.distributed as dist

# Its functions have the process group as a default argument: imported once there is one (torch's
# optimizers do), they keep it and its threads alive past destroy_process_group, and the interpreter
# may abort at its end.
import torch.distributed.nn.functional  # noqa: F401
from tqdm import tqdm

import methods
import model as models
from data.corpus import Corpus
from data.prepare import TINY_VOCABULARY, corpus_folder
from errors import UserError, exits_on_user_error, explains_out_of_memory
from flags import Option, Parser
from methods.baseline import SCHEDULES
from parallel import (
    is_main,
    max_over_processes,
    micro_batches,
    print0,
    process,
    processes,
    sum_over_processes,
    wait_for_all,
)
from runs import (
    ROOT,
    git_commit,
    locked,
    read_record,
    read_tensors,
    relative_path,
    write_json,
    write_tensors,
)

WEEK_HOURS = 7 * 24
SEEDS = 2**32  # how many there are: no library refuses one of these


def setting(default, help, choices=(), group=None, **limits):
    """A flag of every run. `group`: the heading in --help of this flag and those that follow."""
    return dataclasses.field(
        default=default, metadata=dict(help=help, choices=choices, group=group, limits=limits)
    )


@dataclass(frozen=True)
class Config:
    """Every flag. None: `resolve` decides."""

    model: str = setting("bert", "which model", tuple(models.SIZES), group="what is trained")
    size: str = setting(None, "base with a GPU, else tiny", ("tiny", "small", "base"))
    method: str = setting("baseline", "a file of methods/, or several joined by +")

    data: str = setting(
        None, "a corpus of data/prepare.py (c4 if it was prepared, else pydocs)", group="on what"
    )
    vocabulary: int = setting(
        None,
        "tokens in its vocabulary (base: bert 32768, t5 32128; else 8192; tiny bert: 2048)",
        minimum=1,
    )
    row_length: int = setting(
        None, "tokens that a row reads (128; t5 from small on: 512)", minimum=1
    )
    holdout: float = setting(
        0.2, "share of rows kept from training, for every method alike", minimum=0, maximum=0.99
    )
    train_on: str = setting("training", "part of the rows to train on", ("training", "holdout"))
    validation_rows: int = setting(
        None, "rows of the fixed validation set (base: 10000, else 1000)", minimum=1
    )

    budget_hours: float = setting(
        None, "budget in hours of the reference (0.05)", minimum=1e-9, group="for how long"
    )
    budget_steps: int = setting(None, "budget in updates instead", minimum=1)
    reference: str = setting(
        None, "this, rtx3090, a100, or a file of rst.py --save (tiny: this; else the study's)"
    )
    reprobe: bool = setting(True, "time the probe again during the run")
    validations: int = setting(
        4, "how often, evenly over the budget; the last at its end", minimum=1
    )

    batch: int = setting(
        None, "rows an update", minimum=1, group="the recipe (defaults by method, model and size)"
    )
    lr: float = setting(None, "peak learning rate", minimum=0)
    schedule: str = setting(None, "of the learning rate, over the budget", tuple(SCHEDULES))
    beta1: float = setting(None, "decay of the first moment", minimum=0, maximum=0.9999999)
    beta2: float = setting(None, "decay of the second moment", minimum=0, maximum=0.9999999)
    eps: float = setting(None, "added to the denominator", minimum=0)
    weight_decay: float = setting(None, "decoupled, on matrices only", minimum=0)
    rms_scaling: bool = setting(None, "scale each tensor's rate by its RMS (t5)")
    clip: float = setting(None, "limit of the global gradient norm", minimum=1e-9)
    seed: int = setting(
        0, "of initial weights, row order and corruption", minimum=0, maximum=SEEDS - 1
    )

    device: str = setting(
        None, "cpu, cuda, cuda:1 (cuda if there is one)", group="how it runs (may change on resume)"
    )
    dtype: str = setting(None, "precision (bf16 on a GPU, fp32 on a CPU)", tuple(models.DTYPES))
    compile: bool = setting(False, "compile the layers one by one, and our own optimizers")
    micro_batch: int = setting(
        None, "rows a forward pass, for speed and memory (8; GPU: bert 128, t5 72)", minimum=1
    )
    threads: int = setting(0, "CPU threads (0: torch's choice)", minimum=0)
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints", minimum=1e-9)
    out: str = setting(None, "the run's folder (runs/, named after the plan)")
    yes: bool = setting(False, "start a plan of over a week")
    options: dict = None  # the method's own


MAY_CHANGE_ON_RESUME = {"device", "dtype", "compile", "micro_batch", "threads"}
MAY_CHANGE_ON_RESUME |= {"checkpoint_minutes", "out", "yes"}
DECIDES_WHAT_AN_HOUR_BUYS = {"dtype", "compile", "micro_batch"}  # of these

# What `resolve` puts where nothing was typed, beside the methods' recipes.
SIZE_DEFAULTS = {
    "bert": {
        "tiny": dict(vocabulary=TINY_VOCABULARY["bert"], row_length=128, validation_rows=1000),
        "small": dict(vocabulary=8192, row_length=128, validation_rows=1000, reference="rtx3090"),
        "base": dict(vocabulary=32768, row_length=128, validation_rows=10_000, reference="rtx3090"),
    },
    "t5": {
        "tiny": dict(vocabulary=TINY_VOCABULARY["t5"], row_length=128, validation_rows=1000),
        "small": dict(vocabulary=8192, row_length=512, validation_rows=1000, reference="a100"),
        "base": dict(vocabulary=32128, row_length=512, validation_rows=10_000, reference="a100"),
    },
}
MICRO_BATCH = {"bert": {"cpu": 8, "cuda": 128}, "t5": {"cpu": 8, "cuda": 72}}
CHECKPOINT = "config corpus model optimizer scaler method clock stream state".split()  # its parts


# -- Flags -----------------------------------------------------------------------------------------


FIELDS = [field for field in dataclasses.fields(Config) if field.metadata]
COMMON = {
    field.name: Option(
        field.default,
        field.metadata["help"],
        field.metadata["choices"],
        **field.metadata["limits"],
        kind=field.type,
    )
    for field in FIELDS
}


def parse(arguments):
    """The flags that were typed, as a dictionary, and the folder of --resume or None."""
    first = Parser(add_help=False)  # the method decides which options there are
    first.add_argument("--method", default="baseline")
    first.add_argument("--resume")
    known, _ = first.parse_known_args(arguments)
    method = known.method
    if known.resume and (Path(known.resume) / "config.json").exists():
        method = read_record(Path(known.resume) / "config.json", {"method": str})["method"]
    options = methods.find(method).options
    if taken := sorted(options.keys() & COMMON):
        raise UserError(
            f"--method={method}: its option {taken[0]} is a common flag, too; rename it"
        )

    parser = Parser(
        description=__doc__,
        argument_default=argparse.SUPPRESS,
        prog="train.py",
        epilog=f"methods: {', '.join(methods.names())}; combine them with +",
    )
    parser.add_argument("--resume", help="the folder of a run that was stopped", metavar="FOLDER")
    for field in FIELDS:
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        parser.add(field.name, COMMON[field.name], group)
    group = parser.add_argument_group(f"options of --method={method}")
    for name, option in options.items():
        parser.add(name, option, group)
    typed = vars(parser.parse_args(arguments))
    resume = typed.pop("resume", None)
    if of_the_method := {name: typed.pop(name) for name in list(typed) if name in options}:
        typed["options"] = of_the_method
    return typed, resume


def resolve(typed):
    """The whole configuration from what was typed: every unset flag gets its value here."""
    values = {name: field.default for name, field in COMMON.items()} | typed
    model, method = values["model"], methods.find(values["method"])
    for name, cls in method.classes.items():
        if model not in cls.models:
            raise UserError(f"--method={name} is for {' and '.join(cls.models)}, not for {model}")
    if typed.get("schedule") and (owner := method.owner["schedule"]):
        raise UserError(f"--schedule={typed['schedule']}: {owner} sets the learning rate itself")
    if values["budget_hours"] is not None and values["budget_steps"] is not None:
        raise UserError("--budget_hours and --budget_steps are two budgets; give one")
    device = values["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = "cuda" if device.startswith("cuda") else "cpu"
    size = values["size"] or ("base" if kind == "cuda" else "tiny")
    recipe = method.defaults(model, size)
    defaults = dict(device=device, size=size, dtype="bf16" if kind == "cuda" else "fp32")
    defaults |= {"reference": "this"} | SIZE_DEFAULTS[model][size] | recipe
    if values["budget_steps"] is None:
        defaults["budget_hours"] = 0.05
    for name in COMMON:
        if values[name] is None:
            values[name] = defaults.get(name)
    if values["micro_batch"] is None:
        values["micro_batch"] = min(values["batch"], MICRO_BATCH[model][kind])
    if values["data"] is None:
        prepared = corpus_folder("c4", model, values["vocabulary"]) / "meta.json"
        values["data"] = "c4" if prepared.exists() else "pydocs"
    own = {name: recipe.get(name, option.default) for name, option in method.options.items()}
    config = Config(**values | {"options": own | typed.get("options", {})})
    check(config)
    return config


def check(config):
    """Refuses values that no run can have, and a device that is not here: of a new run and of a
    resumed one."""
    options = COMMON | methods.find(config.method).options
    for name, value in (dataclasses.asdict(config) | config.options).items():
        if name in options:
            options[name].check(name, value)
    rst.check_device(config.device)
    rst.find_reference(config.reference)


def identity(config):
    """The settings that decide a run's result: two runs that agree in them are the same run."""
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in MAY_CHANGE_ON_RESUME
    }


# -- Run folders -----------------------------------------------------------------------------------


def plan_name(config):
    """The default name of a run's folder: its plan, without what may change on resume."""
    budget = (
        f"{config.budget_steps}steps"
        if config.budget_steps
        else f"{config.budget_hours:g}h-{Path(config.reference).stem}"
    )
    parts = [config.model, config.size, config.method, Path(config.data).name, budget]
    if config.train_on != "training":
        parts.append(config.train_on)
    return "-".join([*parts, f"seed{config.seed}"])


def new_folder(config):
    """The folder of a new run; never one that holds another."""
    folder = Path(config.out) if config.out else ROOT / "runs" / plan_name(config)
    if config.out:
        if (folder / "result.json").exists():
            raise UserError(f"--out={folder} holds a finished run; choose another folder")
        if (folder / "config.json").exists():
            raise UserError(
                f"--out={folder} holds an interrupted run; go on with: python train.py "
                f"--resume={folder}"
            )
        return folder
    number, candidate = 1, folder
    while (candidate / "config.json").exists():
        if not (candidate / "result.json").exists() and is_main():
            print(
                f"note: an unfinished run of this plan is in {relative_path(candidate)} "
                f"(--resume={relative_path(candidate)} goes on with it)"
            )
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def config_of(folder, typed=None):
    """The configuration of a run that exists, with the flags that may change on resume replaced."""
    stored = read_record(Path(folder) / "config.json")
    try:
        config = Config(**stored)
    except TypeError as error:
        raise UserError(
            f"{folder}/config.json is not a configuration of this version: {error}"
        ) from None
    started_with = dataclasses.asdict(config) | config.options
    for name, value in ((typed or {}) | (typed or {}).get("options", {})).items():
        if name not in {"options", *MAY_CHANGE_ON_RESUME} and started_with.get(name) != value:
            raise UserError(
                f"--{name}={value}: this run was started with {started_with.get(name)}, which "
                "decides its result; start a new run"
            )
    return dataclasses.replace(
        config,
        **{name: value for name, value in (typed or {}).items() if name in MAY_CHANGE_ON_RESUME},
    )


# -- Processes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked_log(folder, resume):
    """The log of a run, opened to append, and closed to other processes until it is done; None on
    all but the main process."""
    if not is_main():
        yield None
        return
    is_new = not (folder / "log.jsonl").exists()
    with locked(folder, wait=False), open(folder / "log.jsonl", "a") as log:
        if (folder / "result.json").exists():
            raise UserError(f"{relative_path(folder)}: this run is finished")
        if not resume and (folder / "config.json").exists():
            raise UserError(
                f"{relative_path(folder)}: another run was started here meanwhile; run the same "
                "command again"
            )
        try:
            yield log
        finally:
            # The plan was refused: nothing of it stays.
            if is_new and not (folder / "config.json").exists():
                with contextlib.suppress(OSError):
                    (folder / "log.jsonl").unlink()
                    folder.rmdir()


class StopSignal:
    """Remembers SIGTERM and Ctrl-C, so that the loop can save first. A second Ctrl-C stops at once,
    if it comes seconds later: torchrun repeats the first one."""

    def __init__(self):
        self.number, self.time = 0, 0.0
        self.previous = {
            number: signal.signal(number, self.receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }

    def receive(self, number, frame):
        if not self.number:
            self.number, self.time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self.time + 3:
            raise KeyboardInterrupt

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# -- Training --------------------------------------------------------------------------------------


def validate(model, corpus, rows_per_batch):
    """Mean loss over the predicted tokens of the fixed validation rows, with the layers that there
    are."""
    total = torch.zeros((), dtype=torch.float64, device=corpus.device)
    with torch.no_grad():
        for batch in corpus.validation_batches(rows_per_batch, process(), processes()):
            total += model.loss(batch).double() * batch["labels"].numel()
    sum_over_processes([total])
    return total.item() / (corpus.validation_rows * corpus.predicted_per_row)


@contextlib.contextmanager
@torch.no_grad()
def swapped_weights(weights):
    """Gives parameters other values, {parameter: tensor}, and afterwards their own again."""
    own = [parameter.clone() for parameter in weights]
    for parameter, value in weights.items():
        parameter.copy_(value)
    try:
        yield
    finally:
        for parameter, value in zip(weights, own):
            parameter.copy_(value)


def warm_up(method, model, corpus, config, clock):
    """Trains on throw-away batches, so that compilation and first-time work are done before the
    clock starts: on the shapes that `inputs` makes at any time of the budget, and at both its ends
    (a method may compute something else there), with the layers that there are now. Optimizers
    compile when they are made. Returns the seconds of an update's forward and backward, by the last
    pass over each number of rows."""
    groups = method.groups(np.arange(config.batch))
    sizes = [len(rows) for rows, _ in micro_batches(groups, config.micro_batch)]
    times = np.linspace(clock.progress, 1, 101 if method.owner["inputs"] else 2).tolist()
    seconds, seen = {}, set()
    for number, time_of_budget in enumerate(times):
        clock.rehearsed_progress = time_of_budget
        for size in sorted(set(sizes)):
            batch = method.inputs(np.arange(size))
            shapes = tuple(tensor.shape for tensor in batch.values())
            if shapes in seen and number not in (0, len(times) - 1):
                continue
            seen.add(shapes)
            rst.synchronise(config.device)
            start = time.perf_counter()
            method.loss(batch, model.present_layers).backward()
            rst.synchronise(config.device)
            seconds[size] = time.perf_counter() - start
    clock.rehearsed_progress = None
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.loss(corpus.batch(np.arange(min(config.micro_batch, config.batch))))
    return sum(seconds[size] for size in sizes)


def open_corpus(config):
    """The corpus of a configuration; pydocs is prepared when it is not there yet."""
    named = Path(config.data)
    folder = (
        named
        if (named / "meta.json").exists()
        else corpus_folder(config.data, config.model, config.vocabulary)
    )
    if not (folder / "meta.json").exists():
        arguments = [config.data, f"--model={config.model}", f"--vocabulary={config.vocabulary}"]
        if config.data != "pydocs":
            arguments += [] if config.data == "c4" else ["--files=PATH"]
            raise UserError(
                f"--data={config.data}: not prepared; run: python data/prepare.py "
                f"{' '.join(arguments)}"
            )
        if is_main():
            print0(
                "preparing pydocs, the documentation strings of what is installed (once, about a "
                "minute)"
            )
            if (
                status := subprocess.run(
                    [sys.executable, str(ROOT / "data" / "prepare.py"), *arguments]
                ).returncode
            ) != 0:
                raise UserError(f"preparing pydocs failed (exit status {status})")
    wait_for_all()
    return Corpus(
        folder,
        config.seed,
        config.device,
        config.row_length,
        config.holdout,
        config.train_on,
        config.validation_rows,
    )


def print_plan(config, folder):
    budget = (
        f"{config.budget_steps} updates"
        if config.budget_steps
        else f"{config.budget_hours:g} hours of reference {config.reference}"
    )
    print0(f"{config.model}-{config.size} on {config.data}, method {config.method}, {budget}")
    schedule = methods.find(config.method).owner["schedule"] or config.schedule
    print0(
        f"  recipe   batch {config.batch}, lr {config.lr:g}, {schedule}, betas ({config.beta1:g}, "
        f"{config.beta2:g}), "
        f"{'RMS scaling, ' if config.rms_scaling else ''}"
        f"weight decay {config.weight_decay:g}, clip {config.clip:g}, seed {config.seed}"
    )
    if config.options:
        print0(
            "  options  " + ", ".join(f"{name} {value}" for name, value in config.options.items())
        )
    print0(
        f"  device   {rst.device_name(config.device)}, {processes()} process(es), {config.dtype}, "
        f"micro-batch {config.micro_batch}" + (", compiled" if config.compile else "")
    )
    print0(f"  folder   {relative_path(folder)}")


def train(config, folder, resume=False):
    """Runs a configuration to the end of its budget in `folder`; returns its result.

    Raises SystemExit after SIGTERM or Ctrl-C in an update, when all is saved.
    """
    combination = methods.find(config.method)
    finished_models, finished_runs = {}, {}
    for name, prerequisite in combination.prerequisites(config).items():
        finished = finish(name, prerequisite)
        finished_models[name] = configure(models.load(finished / "model.pt", config.device), config)
        costs = read_record(finished / "result.json")
        finished_runs[name] = {"folder": relative_path(finished)} | {
            key: costs[key]
            for key in ("updates", "charged_seconds", "wall_seconds", "validation_loss")
        }
    with (
        locked_log(folder, resume) as log,
        explains_out_of_memory(
            f"with --micro_batch={config.micro_batch}; a smaller one gives the same result"
        ),
    ):
        return run(config, folder, resume, log, combination, finished_models, finished_runs)


def run(config, folder, resume, log, combination, finished_models, finished_runs):
    """What `train` does when all that it needs is there; `log` is the run's, open and locked."""
    print_plan(config, folder)
    started = time.perf_counter()
    reference = rst.find_reference(config.reference)
    budget_seconds = config.budget_hours and config.budget_hours * 3600
    clock = rst.Clock(
        reference, config.model, config.device, budget_seconds, config.budget_steps, config.reprobe
    )
    if budget_seconds and not resume:
        refuse_long(config, budget_seconds / clock.factor, f"factor {clock.factor:.4g}")
    corpus = open_corpus(config)
    refuse_other_tokens(config, corpus)
    torch.manual_seed(config.seed)
    model = models.build(config.model, config.size, config.vocabulary).to(config.device)
    configure(model, config)
    # From here on one object stands for all methods of the run: each hook is that of the one that
    # overrides it.
    method = combination.start(model, corpus, clock, config, finished_models)
    optimizer = method.optimizer_in_use
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "fp16")
    clock.weights = list(model.parameters())
    state = SimpleNamespace(wall_seconds=0.0, rows=0, skipped=0, validation_loss=None, log_bytes=0)
    if resume:
        load_checkpoint(folder, config, model, optimizer, scaler, method, clock, corpus, state)
        if budget_seconds:
            refuse_long(
                config,
                (budget_seconds - clock.spent_seconds) / clock.factor,
                f"factor {clock.factor:.4g}",
            )
    model.present_layers = method.layers()
    entropy = corpus.unigram_entropy()
    print0(
        f"  corpus   {corpus.rows:,} rows to train on, {corpus.validation_rows:,} to validate on; "
        f"unigram entropy {entropy:.4f} nats"
    )
    update_seconds = warm_up(method, model, corpus, config, clock)
    if config.budget_steps:
        refuse_long(
            config, (config.budget_steps - clock.updates) * update_seconds, "from a warm-up step"
        )

    if is_main():
        log.truncate(state.log_bytes)
        # Fine-tuning needs it with model.pt.
        shutil.copy(corpus.folder / corpus.meta["tokenizer"], folder)
        # Nothing was kept of an earlier process: this one's flags are the run's.
        if not clock.updates:
            write_json(folder / "config.json", dataclasses.asdict(config))
    bar = tqdm(
        total=1.0,
        initial=clock.progress,
        disable=None if is_main() else True,
        desc=config.method,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
    )

    def write_log(**record):
        if is_main():
            state.log_bytes += log.write(json.dumps(record) + "\n")
            log.flush()

    def save_checkpoint():
        if is_main():
            wall_seconds = state.wall_seconds + time.perf_counter() - started
            stored = {
                "config": identity(config),
                "corpus": corpus.meta["checksum"],
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "method": method.state_dict(),
                "clock": clock.state_dict(),
                "stream": corpus.state_dict(),
                "state": vars(state) | {"wall_seconds": wall_seconds},
            }
            write_tensors(folder / "checkpoint.pt", stored)
        wait_for_all()  # or the others would be charged their waiting, in the next update

    stop, stop_signal = StopSignal(), 0
    checkpoint_due = time.perf_counter() + 60 * config.checkpoint_minutes
    wait_for_all()  # whoever was ready first is not charged for the others
    try:
        # ---------------------------------- the training loop ----------------------------------
        while clock.progress < 1:
            progress, graphs = clock.progress, compilations()
            with clock.charged():
                # What the methods decide: growth (here and nowhere else), the rate, the rows.
                method.begin_update()
                model.present_layers = method.layers()
                rate_share = method.schedule(progress)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * rate_share
                positions = method.next_batch()

                # The gradient of the mean over all predicted tokens: every row has as many of them,
                # so a micro-batch weighs its share of the rows, and how rows are split changes
                # nothing. A process has its part of the rows; the sums are in place, so they reach
                # the parameters.
                loss = torch.zeros((), device=config.device)
                for rows, layers in micro_batches(method.groups(positions), config.micro_batch):
                    part = method.loss(method.inputs(rows), layers) * (len(rows) / len(positions))
                    scaler.scale(part).backward()
                    loss += part.detach()
                gradients = [
                    parameter.grad for parameter in model.parameters() if parameter.grad is not None
                ]
                sum_over_processes([loss, *gradients])
                scaler.unscale_(optimizer)

                # The only wait for the device: what is not finite must not reach the weights.
                gradient_norm = torch.nn.utils.get_total_norm(gradients)
                loss, norm = torch.stack([loss, gradient_norm]).tolist()
                # Overflow in fp16: the scale is lowered.
                skipped = scaler.is_enabled() and not math.isfinite(norm)
                refuse_not_finite(loss, 0.0 if skipped else norm, clock, config, folder)

                method.before_step(gradient_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if not skipped:
                    method.after_step()
                report = method.report()  # of this update: the clock moves on when it ends

            # From here to the next update nothing is charged.
            state.rows += len(positions)
            state.skipped += skipped
            write_log(
                update=clock.updates,
                loss=loss,
                lr=config.lr * rate_share,
                progress=progress,
                gradient_norm=None if skipped else norm,
                rows=len(positions),
                skipped=skipped,
                charged_seconds=clock.charged_seconds,
                free_seconds=clock.update_free_seconds,
                spent_seconds=clock.spent_seconds,
                factor=clock.factor,
                compilations=compilations() - graphs,
                **report,
            )
            bar.set_postfix_str(f"loss {loss:.3f}, {spent_text(clock)}", refresh=False)
            bar.update(clock.progress - bar.n)
            if int(clock.progress * config.validations) > int(progress * config.validations):
                with swapped_weights(method.evaluation_weights()):
                    state.validation_loss = validate(model, corpus, config.micro_batch)
                write_log(
                    update=clock.updates,
                    validation_loss=state.validation_loss,
                    progress=clock.progress,
                    lr=config.lr * method.schedule(clock.progress),
                    spent_seconds=clock.spent_seconds,
                )
                print0(
                    f"  {100 * clock.progress:3.0f}%  update {clock.updates:6d}  validation loss "
                    f"{state.validation_loss:.4f}"
                )
            save_now = time.perf_counter() >= checkpoint_due
            stop_signal, save_now = max_over_processes([stop.number, save_now], config.device)
            if stop_signal or save_now:
                save_checkpoint()
                checkpoint_due = time.perf_counter() + 60 * config.checkpoint_minutes
            if stop_signal and clock.progress < 1:
                bar.close()
                print0(
                    f"stopped after update {clock.updates}; go on with: python train.py "
                    f"--resume={relative_path(folder)}"
                )
                raise SystemExit(128 + int(stop_signal))
            clock.probe_when_due()
        # ---------------------------------------------------------------------------------------
    finally:
        bar.close()
        stop.restore()
    save_checkpoint()
    state.wall_seconds += time.perf_counter() - started
    result = {
        "command": shlex.join(sys.argv),
        "commit": git_commit(),
        "finished": datetime.datetime.now().isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": rst.device_name(config.device),
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "config": dataclasses.asdict(config),
        "method_files": method.source_hashes(),
        "corpus": corpus.meta["checksum"],
        "updates": clock.updates,
        "layers": len(model.present_layers),
        "rows": state.rows,
        "skipped_updates": state.skipped,
        "validation_loss": state.validation_loss,
        "unigram_entropy": entropy,
        "reference": dataclasses.asdict(reference),
        "factor_history": clock.factor_history,
        "charged_seconds": clock.spent_seconds,
        "free_seconds": clock.free_seconds,
        "stalls": clock.stalls,
        "stall_seconds": clock.stall_seconds,
        "wall_seconds": state.wall_seconds,
        "prerequisites": finished_runs,
    }
    with swapped_weights(method.evaluation_weights()):
        if is_main():
            models.save(model, folder / "model.pt")
    if is_main():
        write_json(folder / "result.json", result)
    wait_for_all()  # whoever needs the finished run next finds it whole
    print0(
        f"validation loss {state.validation_loss:.4f} after {clock.updates} updates, "
        f"{state.rows:,} rows; "
        f"unigram entropy {entropy:.4f} (difference {entropy - state.validation_loss:.4f})"
    )
    stalls = f" ({clock.stalls} stalls: {clock.stall_seconds:.3g} s)" if clock.stalls else ""
    print0(
        f"charged {clock.spent_seconds:.6g} s of {config.reference}{stalls}, free "
        f"{clock.free_seconds:.4g} s, "
        f"wall {state.wall_seconds:.0f} s; in {relative_path(folder)}"
    )
    if result["layers"] < len(model.layers):
        print0(
            f"note: the model has {result['layers']} of its {len(model.layers)} layers; "
            f"the budget ended before --method={config.method} used them all"
        )
    if stop_signal:  # it came in the last update; whoever wanted this run first has to stop, too
        raise SystemExit(128 + int(stop_signal))
    return result


def refuse_other_tokens(config, corpus):
    """Raises UserError for a corpus of the other model or of another vocabulary."""
    if corpus.meta["model"] != config.model:
        raise UserError(
            f"--data={config.data} has the tokens of --model={corpus.meta['model']}, not of "
            f"{config.model}"
        )
    if corpus.vocabulary_size != config.vocabulary:
        raise UserError(
            f"--data={config.data} has a vocabulary of {corpus.vocabulary_size}, not "
            f"{config.vocabulary}"
        )


def refuse_not_finite(loss, gradient_norm, clock, config, folder):
    """Raises UserError for a loss or a gradient that is not finite, before it does harm."""
    if not math.isfinite(loss) or not math.isfinite(gradient_norm):
        raise UserError(
            f"the loss is {loss} and its gradient's norm {gradient_norm} in update "
            f"{clock.updates + 1}; lower --lr "
            f"(it is {config.lr:g}) or --clip. What was saved before is in {relative_path(folder)}"
        )


def configure(model, config):
    """Sets how a model computes in this run: the precision, and whether layers are compiled."""
    model.autocast_dtype = models.DTYPES[config.dtype]
    if config.compile:
        model.compile_layers()
    return model


def compilations():
    """Graphs that torch.compile has made so far in this process. Those of the warm-up are not
    charged; one that a later update needs is part of its time, and of its line in the log."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def spent_text(clock):
    if clock.budget_updates:
        return f"update {clock.updates} of {clock.budget_updates}"
    return f"{clock.spent_seconds / 3600:.4g} of {clock.budget_seconds / 3600:.4g} h spent"


def refuse_long(config, seconds, how):
    """Says how long the run will take here; over a week it wants --yes."""
    hours = seconds / 3600
    length = (
        f"{seconds / 60:.1f} minutes"
        if hours < 2
        else f"{hours:.1f} hours"
        if hours < 48
        else f"{hours / 24:.1f} days"
    )
    print0(f"  time     about {length} here ({how}), plus what is not charged")
    if hours > WEEK_HOURS and not config.yes:
        raise UserError(
            f"this plan takes about {hours / 24:.0f} days on this machine; add --yes to start it, "
            "or lower the budget or the size"
        )


def load_checkpoint(folder, config, model, optimizer, scaler, method, clock, corpus, state):
    """Puts everything back as it was after the checkpoint's update."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        print0("  resumed from the start: the run was stopped before its first checkpoint")
        return
    stored = read_tensors(path, CHECKPOINT, config.device)
    theirs, ours = stored["config"], identity(config)
    different = [name for name in ours if theirs.get(name) != ours[name]]
    if different:
        name = different[0]
        raise UserError(
            f"{path} is of another configuration: its {name} is {theirs.get(name)}, that of "
            f"config.json {ours[name]}"
        )
    if stored["corpus"] != corpus.meta["checksum"]:
        raise UserError(
            f"{path} was trained on another preparation of {config.data}: {corpus.folder} has "
            "changed"
        )
    model.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    if stored["scaler"]:  # empty unless the run was in fp16; a resumed one may change to it
        scaler.load_state_dict(stored["scaler"])
    method.load_state_dict(stored["method"])
    clock.load_state_dict(stored["clock"])
    corpus.load_state_dict(stored["stream"])
    vars(state).update(stored["state"])
    log = folder / "log.jsonl"
    if is_main() and (not log.exists() or log.stat().st_size < state.log_bytes):
        raise UserError(
            f"{log} is shorter than at the checkpoint's update {clock.updates}; it was changed"
        )
    print0(f"  resumed after update {clock.updates}")


def holds_run(folder, config):
    """Whether a folder has the run of this configuration, on the corpus as it is now."""
    if identity(config_of(folder)) != identity(config):
        return False
    result = folder / "result.json"
    return (
        not result.exists()
        or read_record(result).get("corpus") == open_corpus(config).meta["checksum"]
    )


def find_run(config):
    """The folder of this configuration's run, "finished", "interrupted" or "new"."""
    plan, number = ROOT / "runs" / plan_name(config), 1
    folder = plan
    # Same name, another plan.
    while (folder / "config.json").exists() and not holds_run(folder, config):
        number += 1
        folder = plan.with_name(f"{plan.name}-{number}")
    return folder, "finished" if (folder / "result.json").exists() else "interrupted" if (
        folder / "config.json"
    ).exists() else "new"


def finish(name, config):
    """Reuses, resumes or makes the run that a method needs first; returns its folder."""
    folder, state = find_run(config)
    if state == "finished":
        print0(f"{name}: reusing {relative_path(folder)}")
        return folder
    print0(
        f"{name}: {'resuming' if state == 'interrupted' else 'training'} {relative_path(folder)} "
        "first; it is not charged to the run that needs it"
    )
    try:
        train(config, folder, resume=state == "interrupted")
    except SystemExit:
        print0(f"that was the {name}; the command that you gave goes on with it, too")
        raise
    return folder


def start_processes(config):
    """Joins the processes of torchrun, one device each; returns the configuration of this one."""
    if "LOCAL_RANK" in os.environ:
        if config.device.startswith("cuda"):
            config = dataclasses.replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(config.device)
        dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo")
    rst.prepare_machine(config.threads)
    return config


@exits_on_user_error
def main(arguments=None):
    typed, resumed = parse(sys.argv[1:] if arguments is None else arguments)
    if resumed:
        folder = Path(resumed)
        config = config_of(folder, typed)
        check(config)
        config = start_processes(config)
        if (folder / "result.json").exists():
            raise UserError(f"--resume={folder}: this run is finished")
    else:
        config = start_processes(resolve(typed))
        folder = new_folder(config)
    try:
        return train(config, folder, resume=bool(resumed))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
