"""Trains a model with a method under a budget of reference system time.

    python train.py                                   what this machine can do in three minutes
    python train.py --method=NAME --budget_hours=12   a method, 12 hours of the reference
    python train.py --resume=runs/NAME                goes on where a run was stopped
    torchrun --nproc_per_node=8 train.py ...          the same on many devices

Every run is a folder: config.json, log.jsonl, checkpoint.pt, model.pt (weights only), the
tokenizer, result.json (written last). The log has an object for each validation and each update:
its loss, lr (of groups whose peak is --lr), gradient_norm (before clipping), rows, progress (when
it began), charged_seconds of the reference (spent_seconds: of all updates so far) and free_seconds
of this machine, the factor in force, skipped (a gradient overflowed in fp16), compilations, and
under each method's name its report.
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
import threading
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
import runs
import sample
from data.corpus import MASK_SHARE, MOST_MASKS, Corpus, load_meta
from data.prepare import TINY_VOCABULARY, corpus_folder
from errors import UserError, exits_on_user_error, explains_out_of_memory
from flags import Option, Parser
from methods.baseline import SCHEDULES, rows_at_once
from parallel import (
    Gradients,
    in_parts,
    is_main,
    max_over_processes,
    micro_batches,
    print0,
    process,
    processes,
    sum_over_processes,
    wait_for_all,
)

WEEK_MINUTES = 7 * 24 * 60


def setting(default, help, choices=(), **limits):
    """A flag of every run."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, **limits))


@dataclass(frozen=True)
class Config:
    """Every flag. None: `resolve` decides."""

    model: str = setting("bert", "which model", tuple(models.SIZES))
    size: str = setting(None, "base with a GPU, else tiny", ("tiny", "small", "base"))
    method: str = setting("baseline", "a file of methods/, or several joined by +")

    data: str = setting(None, "a corpus of data/prepare.py (c4 if it is there, else pydocs)")
    vocabulary: int = setting(None, "tokens (8192; tiny: 1024; base: 32768, 32128)", minimum=1)
    row_length: int = setting(None, "tokens read of a row (128; t5: 512; tiny: 32, 64)", minimum=8)
    mask_share: float = setting(
        None, "share of tokens predicted (0.15; tiny: 0.3)", minimum=0.01, maximum=MOST_MASKS
    )
    holdout: float = setting(0.2, "share of rows that none trains on", minimum=0, maximum=0.99)
    train_on: str = setting("training", "part of the rows to train on", ("training", "holdout"))
    validation_rows: int = setting(None, "how many at most (base: 10000, else 1000)", minimum=1)

    budget_hours: float = setting(None, "budget in hours of the reference (0.05)", minimum=1e-9)
    budget_steps: int = setting(None, "budget in updates instead", minimum=1)
    reference: str = setting(None, "this, rtx3090, a100, or a file of rst.py --save (tiny: this)")
    reprobe: bool = setting(True, "time the probe again during the run")
    validations: int = setting(4, "how many, evenly over the budget, one at its end", minimum=1)

    batch: int = setting(None, "rows an update", minimum=1, maximum=2**24)
    lr: float = setting(None, "peak learning rate", minimum=0)
    schedule: str = setting(None, "of the learning rate, over the budget", tuple(SCHEDULES))
    beta1: float = setting(None, "decay of the first moment", minimum=0, maximum=0.9999999)
    beta2: float = setting(None, "decay of the second moment", minimum=0, maximum=0.9999999)
    eps: float = setting(None, "added to the denominator", minimum=0)
    weight_decay: float = setting(None, "decoupled, on matrices only", minimum=0)
    rms_scaling: bool = setting(None, "scale each tensor's rate by its RMS (t5)")
    clip: float = setting(None, "limit of the global gradient norm", minimum=1e-9)
    seed: int = setting(0, "of weights, row order, corruption", minimum=0, maximum=2**32 - 1)

    device: str = setting(None, "cpu, cuda, cuda:1 (cuda if there is one)")
    dtype: str = setting(None, "precision (bf16 on a GPU, fp32 on a CPU)", tuple(models.DTYPES))
    compile: bool = setting(None, "compile layers, loss and our own optimizers (true on a GPU)")
    micro_batch: int = setting(
        None, "rows a forward pass (8 or 1024 tokens; GPU: as its memory allows)", minimum=1
    )
    threads: int = setting(0, rst.THREADS.help, minimum=0, maximum=rst.THREADS.maximum)
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints", minimum=1e-9)
    out: str = setting(None, "the run's folder (runs/, named after the plan)")
    yes: bool = setting(False, "start a plan of over a week")
    options: dict = None  # the method's own


HEADINGS = {  # of --help, before these flags
    "model": "what is trained",
    "data": "on what",
    "budget_hours": "for how long",
    "batch": "the recipe (defaults by method, model and size)",
    "device": "how it runs (may change on resume)",
}
# The last two decide the result, but a run may move to a machine that has others.
MAY_CHANGE_ON_RESUME = runs.NOT_IN_ID - {"reference"} | {"dtype", "compile"}

# What `resolve` puts where nothing was typed, beside the methods' recipes.
SIZE_DEFAULTS = {
    "bert": {
        "tiny": dict(
            vocabulary=TINY_VOCABULARY, row_length=32, mask_share=0.3, validation_rows=1000
        ),
        "small": dict(vocabulary=8192, row_length=128, validation_rows=1000, reference="rtx3090"),
        "base": dict(vocabulary=32768, row_length=128, validation_rows=10_000, reference="rtx3090"),
    },
    "t5": {
        "tiny": dict(
            vocabulary=TINY_VOCABULARY, row_length=64, mask_share=0.3, validation_rows=1000
        ),
        "small": dict(vocabulary=8192, row_length=512, validation_rows=1000, reference="a100"),
        "base": dict(vocabulary=32128, row_length=512, validation_rows=10_000, reference="a100"),
    },
}
# On a CPU: at least 8 rows and 1024 tokens a forward pass.
MICRO_BATCH, MICRO_BATCH_TOKENS = 8, 1024


# -- Flags -----------------------------------------------------------------------------------------


COMMON = {
    field.name: Option(field.default, **field.metadata, kind=field.type)
    for field in dataclasses.fields(Config)
    if field.metadata
}


RESUME = Option(None, "the folder of a run that was stopped", kind=str)


def parse(arguments):
    """The flags that were typed, as a dictionary, and the folder of --resume or None."""
    first = Parser(add_help=False)  # the method decides which options there are
    first.add_argument("--method", default="baseline")
    first.add("resume", RESUME)
    known, _ = first.parse_known_args(arguments)
    method = known.method
    if known.resume:
        path = Path(known.resume) / "config.json"
        method = runs.read_record(path, {"config": {"method": str}})["config"]["method"]
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
    parser.add("resume", RESUME)
    for name, option in COMMON.items():
        if name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[name])
        parser.add(name, option, group)
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
    rst.check_device(device)
    kind = "cuda" if device.startswith("cuda") else "cpu"
    size = values["size"] or ("base" if kind == "cuda" else "tiny")
    recipe = method.defaults(model, size, typed | typed.get("options", {}))
    dtype = rst.low_precision(device)
    dtype = dtype if method.trains_in(dtype) else "fp32"
    defaults = dict(device=device, size=size, dtype=dtype, compile=kind == "cuda")
    defaults |= {"reference": "this", "mask_share": MASK_SHARE}
    defaults |= SIZE_DEFAULTS[model][size] | recipe
    if values["budget_steps"] is None:
        defaults["budget_hours"] = 0.05
    for name in COMMON:
        if values[name] is None:
            values[name] = defaults.get(name)
    if values["micro_batch"] is None:
        most = max(MICRO_BATCH, MICRO_BATCH_TOKENS // values["row_length"])
        most = rows_that_fit(values) if kind == "cuda" else most
        values["micro_batch"] = min(values["batch"], most)
    if values["data"] is None:
        prepared = corpus_folder("c4", model, values["vocabulary"]) / "meta.json"
        values["data"] = "c4" if prepared.exists() else "pydocs"
    own = {name: recipe.get(name, option.default) for name, option in method.options.items()}
    config = Config(**values | {"options": own | typed.get("options", {})})
    check(config)
    return config


def check(config):
    """Refuses values that no run can have, and a device or compiler that is not here: of a new run
    and of a resumed one."""
    rst.check_device(config.device)
    method = methods.find(config.method)
    for name, cls in method.classes.items():
        if config.dtype not in cls.dtypes:
            known = " or ".join(cls.dtypes)
            raise UserError(f"--dtype={config.dtype}: {name} trains in {known} only")
    options = COMMON | method.options
    for name, value in (dataclasses.asdict(config) | config.options).items():
        if name in options:
            options[name].check(name, value)
    compilers = ("cc", "gcc", "clang") if config.device != "cpu" else ("c++", "g++", "clang++")
    if config.compile and not any(map(shutil.which, compilers)):
        missing = f"--compile: none of {', '.join(compilers)} is here"
        raise UserError(f"{missing}; install a compiler, or say --compile=false")


def rows_that_fit(values):
    """The default --micro_batch on a GPU: an update's rows in equal parts that its memory holds.
    (Any other gives the same result.)"""
    with torch.device("meta"):
        model = models.build(values["model"], values["size"], values["vocabulary"])
    model.autocast_dtype = models.DTYPES[values["dtype"]]
    memory = torch.cuda.mem_get_info(values["device"])[1]
    # fp32 weights, gradients and two moments, and as much again for a second model and averages.
    free = 0.8 * memory - 2 * 16 * sum(parameter.numel() for parameter in model.parameters())
    most = max(1, int(free / model.training_bytes_per_row(values["row_length"])))
    rows = -(-values["batch"] // int(os.environ.get("WORLD_SIZE", 1)))  # of this process
    parts = -(-rows // most)
    return -(-rows // parts)


# -- A run before it runs --------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is run, and where. The folder's name ends in the id, a hash of what decides the
    result."""

    config: Config
    started: Config  # as `config`, in the precision that the run was started with
    reference: rst.Reference
    corpus_folder: Path
    checksum: str  # of the corpus
    folder: Path
    id: str


def plan(config, reference=None, folder=None, stored=None):
    """The `Plan` of a configuration.

    Args:
        reference: its record, where this plan belongs to a run that has one.
        folder, stored: of a run that is resumed, and its config.json.
    """
    if not reference:
        reference = rst.find_reference(config.reference)
        if not reference.probe_seconds:  # then an hour is what it is here
            here = f"plain time of {rst.device_name(config.device)}, --threads={config.threads}"
            reference = dataclasses.replace(reference, provenance=here)
    started = config
    if stored:
        before = {name: stored["config"][name] for name in ("dtype", "compile")}
        started = dataclasses.replace(config, **before)
    corpus_folder, checksum = find_corpus(config, stored and stored["corpus"])
    settings = dataclasses.asdict(started)
    deciding = {name: settings[name] for name in settings.keys() - runs.NOT_IN_ID}
    hour = None if config.budget_steps else reference.probe_seconds or reference.provenance
    run_id = runs.identify(deciding, checksum, hour)
    if not folder:
        folder = Path(config.out) if config.out else runs.find(plan_name(config), run_id)
    if runs.status(folder) != "new":
        found = runs.read_record(folder / "config.json", runs.CONFIG)["id"]
        if found != run_id:
            what = "its config.json was changed" if stored else "choose another --out"
            place = runs.relative_path(folder)
            raise UserError(f"{place} holds the run {found}, and this is {run_id}; {what}")
    return Plan(config, started, reference, corpus_folder, checksum, folder, run_id)


def plan_name(config):
    """What a person reads in a folder's name, before the id."""
    budget = f"{config.budget_steps}steps"
    if config.budget_hours:
        budget = f"{config.budget_hours:g}h-{Path(config.reference).stem}"
    parts = [config.model, config.size, config.method, Path(config.data).name, budget]
    if config.train_on != "training":
        parts.append(config.train_on)
    return "-".join([*parts, f"seed{config.seed}"])


def resumed(folder, typed):
    """(configuration, config.json) of a run that exists: as it was started, but for the flags that
    may change."""
    types = {name: (option.kind, None) for name, option in COMMON.items()} | {"options": dict}
    if "out" in typed:
        raise UserError(f"--out={typed['out']}: the run's folder is that of --resume={folder}")
    stored = runs.read_record(folder / "config.json", runs.CONFIG | {"config": types})
    config = Config(**{name: stored["config"][name] for name in types})
    started = dataclasses.asdict(config) | config.options
    for name, value in (typed | typed.get("options", {})).items():
        if name not in {"options", *MAY_CHANGE_ON_RESUME} and started.get(name) != value:
            raise UserError(
                f"--{name}={value}: this run was started with {started.get(name)}, which decides "
                "its result; start a new run"
            )
    changes = {name: typed[name] for name in typed.keys() & MAY_CHANGE_ON_RESUME}
    return dataclasses.replace(config, **changes), stored


def find_corpus(config, checksum=None):
    """(folder, checksum) of a configuration's corpus; pydocs is prepared when it is not there yet.
    With a checksum it is the corpus that has it, wherever it lies."""
    folder = Path(config.data)
    if not (folder / "meta.json").exists():
        folder = corpus_folder(config.data, config.model, config.vocabulary)
    if checksum:
        everywhere = [folder, *sorted((runs.ROOT / "data").glob("*/*"))]
        for folder in everywhere:
            if (folder / "meta.json").exists() and load_meta(folder)["checksum"] == checksum:
                return folder, checksum
        raise UserError(
            f"the corpus that this run was started on, {config.data}, is not here (its checksum is "
            f"{checksum[:8]}); say where with --data=FOLDER, or prepare it again"
        )
    if not (folder / "meta.json").exists():
        prepare_corpus(config)
    wait_for_all()
    meta = load_meta(folder)
    for name, found, wanted in (
        ("model", meta["model"], config.model),
        ("vocabulary", meta["vocabulary_size"], config.vocabulary),
    ):
        if found != wanted:
            raise UserError(f"--data={config.data} is of --{name}={found}, not {wanted}")
    return folder, meta["checksum"]


def open_corpus(config, folder=None):
    """The rows of a configuration's corpus."""
    return Corpus(
        folder or find_corpus(config)[0],
        config.seed,
        config.device,
        config.row_length,
        config.holdout,
        config.train_on,
        config.validation_rows,
        config.mask_share,
    )


def prepare_corpus(config):
    """Makes pydocs; of another corpus it says how to."""
    arguments = [config.data, f"--model={config.model}", f"--vocabulary={config.vocabulary}"]
    if config.data not in ("pydocs", "c4"):
        arguments.append("--files=PATH")
    if config.data != "pydocs":
        command = f"python data/prepare.py {' '.join(arguments)}"
        raise UserError(f"--data={config.data}: not prepared; run: {command}")
    if is_main():
        print0("preparing pydocs, the docstrings of what is installed (once, about a minute)")
        done = subprocess.run([sys.executable, str(runs.ROOT / "data" / "prepare.py"), *arguments])
        if done.returncode:  # it said why
            raise SystemExit(done.returncode)


def ensure_run(name, config, reference=None):
    """Reuses, resumes or makes the run that a method needs first; returns its folder."""
    needed = plan(config, reference)
    place = runs.relative_path(needed.folder)
    if is_main():
        with runs.locked(needed.folder, wait=True):  # another run may be making it
            pass
    wait_for_all()
    if runs.status(needed.folder) == "finished":
        print0(f"{name}: reusing {place}")
        return needed.folder
    print0(f"{name}: training {place} first; it is not charged to the run that needs it")
    try:
        train(needed)
    except SystemExit:
        print0(f"that was the {name}; the command that you gave goes on with it, too")
        raise
    return needed.folder


# -- Training --------------------------------------------------------------------------------------


def train(planned):
    """Trains to the end of the budget, from the start or from the last checkpoint; returns the
    result. Raises SystemExit after SIGTERM or Ctrl-C in an update, when all is saved."""
    config, folder = planned.config, planned.folder
    finished_models, finished_runs = {}, {}
    for name, needed in methods.find(config.method).prerequisites(planned.started).items():
        place = ensure_run(name, needed, planned.reference)
        finished_models[name] = configure(models.load(place / "model.pt", config.device), config)
        numbers = ("updates", "charged_seconds", "wall_seconds", "validation_loss")
        costs = runs.read_record(place / "result.json", dict.fromkeys(numbers, float))
        finished_runs[name] = {"folder": runs.relative_path(place)} | {n: costs[n] for n in numbers}
    lock = runs.locked(folder, wait=False) if is_main() else contextlib.nullcontext()
    smaller = f"with --micro_batch={config.micro_batch}; a smaller one gives the same result"
    with lock, explains_out_of_memory(smaller):
        if runs.status(folder) == "finished":
            place = runs.relative_path(folder)
            raise UserError(f"{place}: this run is finished; --out=FOLDER repeats it elsewhere")
        print_plan(planned)
        training = Training(planned, finished_models)
        corpus, entropy = training.corpus, training.corpus.unigram_entropy()
        print0(
            f"  corpus   {corpus.rows:,} rows to train on, {corpus.validation_rows:,} to validate "
            f"on; unigram entropy {entropy:.4f} nats"
        )
        if runs.status(folder) == "interrupted":
            training.load_checkpoint()
        training.warm_up()
        with training.open_log(), StopSignal() as stop:
            stop_signal = training.loop(stop)
        result = training.finish(finished_runs)
    if stop_signal:  # it came in the last update; whoever wanted this run first has to stop, too
        raise SystemExit(128 + int(stop_signal))
    return result


def print_plan(planned):
    config = planned.config
    budget = f"{config.budget_steps} updates"
    if config.budget_hours:
        budget = f"{config.budget_hours:g} hours of reference {config.reference}"
    print0(f"{config.model}-{config.size} on {config.data}, method {config.method}, {budget}")
    schedule = methods.find(config.method).owner["schedule"] or config.schedule
    recipe = [f"batch {config.batch}, lr {config.lr:g}, {schedule}"]
    recipe += [f"betas ({config.beta1:g}, {config.beta2:g})"] + ["RMS scaling"] * config.rms_scaling
    recipe += [f"weight decay {config.weight_decay:g}, clip {config.clip:g}, seed {config.seed}"]
    print0(f"  recipe   {', '.join(recipe)}")
    if config.options:
        options = (f"{name} {value}" for name, value in config.options.items())
        print0(f"  options  {', '.join(options)}")
    device = [rst.device_name(config.device), f"{torch.get_num_threads()} threads"]
    device += [f"{processes()} process(es), {config.dtype}, micro-batch {config.micro_batch}"]
    print0(f"  device   {', '.join(device + ['compiled'] * config.compile)}")
    print0(f"  folder   {runs.relative_path(planned.folder)}")


def configure(model, config):
    """Sets how a model computes in this run: the precision, and whether layers are compiled."""
    model.autocast_dtype = models.DTYPES[config.dtype]
    if config.compile:
        model.compile_parts()
    return model


class Counters(SimpleNamespace):
    """What a run counts beside its clock."""

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, counted):
        vars(self).update(counted)


class Training:
    """A run in memory, between its plan and its result."""

    def __init__(self, planned, finished_models):
        config = planned.config
        self.config, self.folder, self.planned = config, planned.folder, planned
        self.started_seconds = time.perf_counter()
        self.clock = rst.Clock(
            planned.reference,
            config.model,
            config.device,
            budget_seconds=config.budget_hours and 3600 * config.budget_hours,
            budget_updates=config.budget_steps,
            reprobe=config.reprobe,
        )
        self.corpus = open_corpus(config, planned.corpus_folder)
        torch.manual_seed(config.seed)
        model = models.build(config.model, config.size, config.vocabulary).to(config.device)
        self.model = configure(model, config)
        # From here on one object stands for all methods of the run: each hook is that of the one
        # that overrides it.
        self.method = methods.find(config.method).start(
            model, self.corpus, self.clock, config, finished_models
        )
        self.optimizer = self.method.optimizer_in_use
        kind = torch.device(config.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=config.dtype == "fp16")
        self.clock.weights = list(model.parameters())
        self.counters = Counters(
            rows=0, skipped=0, validation_loss=None, wall_seconds=0.0, log_bytes=0
        )
        self.parts = dict(  # of a checkpoint
            model=model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            method=self.method,
            clock=self.clock,
            stream=self.corpus,
            counters=self.counters,
        )

    def wall_seconds(self):
        """Of all sessions of this run so far."""
        return self.counters.wall_seconds + time.perf_counter() - self.started_seconds

    # The loop

    def loop(self, stop):
        """Trains until the budget is spent; returns the signal that came in the last update, or
        0."""
        config, model, method, clock = self.config, self.model, self.method, self.clock
        optimizer, scaler, counters = self.optimizer, self.scaler, self.counters
        gradients = Gradients(model.parameters())
        checkpoint_due = time.perf_counter() + 60 * config.checkpoint_minutes
        bar = tqdm(
            total=1.0,
            initial=clock.progress,
            disable=None if is_main() else True,
            desc=config.method,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        if not clock.updates:
            self.save_checkpoint()  # so that a log without one is noticed
        # ------------------------------------ the training loop ----------------------------------
        while clock.progress < 1:
            # Schedules see where the update begins; the clock moves on only at its end, for the
            # methods and their reports alike.
            progress, graphs = clock.progress, compilations()
            with clock.charged():
                # What the methods decide: growth (here and nowhere else), the rate, the rows.
                method.begin_update()
                model.present_layers = method.layers()
                lr_share = method.schedule(progress)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * lr_share
                positions = method.next_batch()

                # The gradient of the mean over all predicted tokens: every row has as many of them,
                # so a micro-batch weighs its share of the rows, and how rows are split changes
                # nothing. A process has its part of the rows; the sums are in place, so they reach
                # the parameters.
                loss = torch.zeros((), device=config.device)
                parts = micro_batches(method.groups(positions), config.micro_batch)
                inputs = method.inputs(np.concatenate([rows for rows, _ in parts]))
                batches = in_parts(inputs, [len(rows) for rows, _ in parts])
                gradients.start()
                for batch, (rows, layers) in zip(batches, parts):
                    part = method.loss(batch, layers) * (len(rows) / len(positions))
                    gradients.backward(scaler.scale(part), is_last=batch is batches[-1])
                    loss += part.detach()
                loss = gradients.finish(loss)
                scaler.unscale_(optimizer)

                # The only wait for the device: what is not finite must not reach the weights. (But
                # an overflow in fp16 is ordinary: the step is skipped, and the scale lowered.)
                gradient_norm = torch.nn.utils.get_total_norm(gradients.tensors())
                loss, norm = gradients.read(loss, gradient_norm)
                skipped = scaler.is_enabled() and not math.isfinite(norm)
                self.refuse_not_finite("the loss", loss, clock.updates + 1)
                if not skipped:
                    self.refuse_not_finite("the gradient's norm", norm, clock.updates + 1)

                method.before_step(gradient_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if not skipped:
                    method.after_step()
                report = method.report()  # of this update: the clock moves on when it ends

            # From here to the next update nothing is charged. If one process is to stop or to save,
            # all are.
            wishes = [stop.number, time.perf_counter() >= checkpoint_due]
            stop_signal, save_now = max_over_processes(wishes, config.device)
            counters.rows += len(positions)
            counters.skipped += skipped
            self.write_log(
                update=clock.updates,
                loss=loss,
                lr=config.lr * lr_share,
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
            bar.set_postfix_str(f"loss {loss:.3f}, update {clock.updates}", refresh=False)
            bar.update(clock.progress - bar.n)
            if int(clock.progress * config.validations) > int(progress * config.validations):
                self.validate()
            if stop_signal or save_now:
                self.save_checkpoint()
                checkpoint_due = time.perf_counter() + 60 * config.checkpoint_minutes
            if stop_signal and clock.progress < 1:
                bar.close()
                place = runs.relative_path(self.folder)
                print0(
                    f"stopped after update {clock.updates}; go on with: python train.py "
                    f"--resume={place}"
                )
                raise SystemExit(128 + int(stop_signal))
            clock.probe_when_due()
        # -----------------------------------------------------------------------------------------
        bar.close()
        (stop_signal,) = max_over_processes([stop.number], config.device)  # since the last update
        return stop_signal

    # Around the loop

    def warm_up(self):
        """Trains on throw-away batches, so that compilation and first-time work are done before the
        clock starts: on the shapes that `inputs` makes at any time of the budget, and at both its
        ends (a method may compute something else there), at the current depth. (Optimizers compile
        when they are made.) Then it says how long the run will take."""
        config, clock, method, model = self.config, self.clock, self.method, self.model
        model.present_layers = method.layers()
        groups = method.groups(np.arange(config.batch))
        sizes = [len(rows) for rows, _ in micro_batches(groups, config.micro_batch)]
        times = np.linspace(clock.progress, 1, 101 if method.owner["inputs"] else 2).tolist()
        seconds, seen = {}, set()  # seconds of the last pass over so many rows
        for number, time_of_budget in enumerate(times):
            clock.rehearsed_progress = time_of_budget
            batch = method.inputs(np.arange(min(sizes)))
            shapes = tuple(tensor.shape for tensor in batch.values())
            if shapes in seen and number not in (0, len(times) - 1):
                continue
            seen.add(shapes)
            for size in sorted(set(sizes)):
                batch = method.inputs(np.arange(size))
                rst.synchronise(config.device)
                start = time.perf_counter()
                method.loss(batch, model.present_layers).backward()
                rst.synchronise(config.device)
                seconds[size] = time.perf_counter() - start
            model.zero_grad(set_to_none=True)
            method.warm_up()
        clock.rehearsed_progress = None
        mine = len(range(process(), self.corpus.validation_rows, processes()))
        at_once = rows_at_once(config)
        with torch.no_grad():  # the shapes of validation, its last one, too
            for rows in {min(mine, at_once), mine % at_once} - {0}:
                model.loss(self.corpus.batch(np.arange(rows)))
        if config.budget_steps:
            update_seconds = sum(seconds[size] for size in sizes)
            left, how = (config.budget_steps - clock.updates) * update_seconds, "a warm-up step"
        else:
            left = (clock.budget_seconds - clock.spent_seconds) / clock.factor
            how = f"factor {clock.factor:.4g}"
        minutes = left / 60
        length = f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
        print0(f"  time     about {length} here ({how}), plus what is not charged")
        if minutes > WEEK_MINUTES and not config.yes:
            raise UserError(
                f"this plan takes about {minutes / 1440:.0f} days on this machine; add --yes to "
                "start it, or lower the budget or the size"
            )

    @contextlib.contextmanager
    def open_log(self):
        """From here on the folder holds a run. The log has as much as the checkpoint knows of."""
        if not is_main():
            yield
            return
        tokenizer = self.corpus.folder / self.corpus.meta["tokenizer"]
        with runs.written_whole(self.folder / tokenizer.name) as copy:  # without its permissions
            copy.write(tokenizer.read_bytes())
        if not self.clock.updates:  # nothing was kept of an earlier process: these are its flags
            record = {
                "id": self.planned.id,
                "config": dataclasses.asdict(self.config),
                "corpus": self.planned.checksum,
                "reference": dataclasses.asdict(self.planned.reference),
            }
            runs.write_json(self.folder / "config.json", record)
        # As it is everywhere: the log's length is counted in the checkpoint.
        with open(self.folder / "log.jsonl", "a", encoding="utf-8", newline="\n") as self.log:
            self.log.truncate(self.counters.log_bytes)
            yield

    def write_log(self, **record):
        if is_main():
            with runs.names_file(self.log.name):
                self.counters.log_bytes += self.log.write(json.dumps(record) + "\n")
                self.log.flush()

    def validate(self):
        """Validates, and logs it."""
        config, clock = self.config, self.clock
        with swapped_weights(self.method.evaluation_weights()):
            loss = validate(self.model, self.corpus, rows_at_once(config))
        self.refuse_not_finite("the validation loss", loss, clock.updates)
        self.counters.validation_loss = loss
        self.write_log(
            update=clock.updates,
            validation_loss=loss,
            progress=clock.progress,
            lr=config.lr * self.method.schedule(clock.progress),
            spent_seconds=clock.spent_seconds,
        )
        print0(
            f"  {100 * clock.progress:3.0f}%  update {clock.updates:6d}  validation loss {loss:.4f}"
        )

    def refuse_not_finite(self, what, value, update):
        """Raises UserError, before it does harm."""
        if not math.isfinite(value):
            raise UserError(
                f"{what} is {value} in update {update}; lower --lr (it is {self.config.lr:g}) or "
                f"--clip. What was saved before is in {runs.relative_path(self.folder)}"
            )

    @torch.no_grad()
    def save_checkpoint(self):
        norm = torch.nn.utils.get_total_norm(list(self.model.parameters())).item()
        self.refuse_not_finite("the weights' norm", norm, self.clock.updates)
        if is_main():
            stored = {name: part.state_dict() for name, part in self.parts.items()}
            stored["counters"]["wall_seconds"] = self.wall_seconds()
            runs.write_tensors(self.folder / "checkpoint.pt", {"id": self.planned.id} | stored)

    def load_checkpoint(self):
        """Puts everything back as it was after the checkpoint's update."""
        path, log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        if not path.exists():  # it is older than the log's first line
            if log.exists() and log.stat().st_size:
                raise UserError(
                    f"{path} is missing, and without it the updates in {log} are lost; put it "
                    "back, or start a new run with another --out"
                )
            print0("  resumed from the start: the run was stopped before its first update")
            return
        stored = runs.read_tensors(path, ["id", *self.parts], self.config.device)
        if stored["id"] != self.planned.id:
            raise UserError(f"{path} is of the run {stored['id']}, not of {self.planned.id}")
        for name, part in self.parts.items():
            if stored[name]:  # (of a scaler that is not in use it is empty)
                part.load_state_dict(stored[name])
        updates = self.clock.updates
        if is_main() and (not log.exists() or log.stat().st_size < self.counters.log_bytes):
            raise UserError(f"{log} is shorter than at the checkpoint's update {updates}")
        print0(f"  resumed after update {updates}")

    def finish(self, finished_runs):
        """Saves the run's last state, its weights and its result."""
        config, clock, corpus, counters = self.config, self.clock, self.corpus, self.counters
        self.save_checkpoint()
        with swapped_weights(self.method.evaluation_weights()):
            if is_main():
                models.save(self.model, self.folder / "model.pt")
        versions = {"torch": torch.__version__, "numpy": np.__version__}
        entropy, layers = corpus.unigram_entropy(), len(self.model.present_layers)
        result = {
            "command": shlex.join(sys.argv),
            "commit": runs.git_commit(),
            "finished": datetime.datetime.now().isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version()} | versions,
            "device": rst.device_name(config.device),
            "threads": torch.get_num_threads(),
            "processes": processes(),
            "config": dataclasses.asdict(config),
            "method_files": self.method.source_hashes(),
            "updates": clock.updates,
            "layers": layers,
            "rows": counters.rows,
            "skipped_updates": counters.skipped,
            "validation_loss": counters.validation_loss,
            "unigram_entropy": entropy,
            "tokenizer_checksum": corpus.meta["tokenizer_checksum"],
            "factor_history": clock.factor_history,
            "charged_seconds": clock.spent_seconds,
            "free_seconds": clock.free_seconds,
            "stalls": clock.stalls,
            "stall_seconds": clock.stall_seconds,
            "wall_seconds": self.wall_seconds(),
            "peak_device_bytes": rst.peak_memory_bytes(config.device),
            "prerequisites": finished_runs,
        }
        if is_main():
            runs.write_json(self.folder / "result.json", result)
            # Not the compiled one: a single row and its generation have shapes of their own.
            sample.print_rows(models.load(self.folder / "model.pt"), corpus, 1)
        wait_for_all()  # whoever needs the finished run next finds it whole
        loss = counters.validation_loss
        print0(
            f"validation loss {loss:.4f} after {clock.updates} updates, {counters.rows:,} rows; "
            f"unigram entropy {entropy:.4f} (difference {entropy - loss:.4f})"
        )
        stalls = f" ({clock.stalls} stalls: {clock.stall_seconds:.3g} s)" if clock.stalls else ""
        print0(
            f"charged {clock.spent_seconds:.6g} s of {config.reference}{stalls}, free "
            f"{clock.free_seconds:.4g} s, wall {result['wall_seconds']:.0f} s; in "
            f"{runs.relative_path(self.folder)}"
        )
        if layers < len(self.model.layers):
            print0(
                f"note: the model has {layers} of its {len(self.model.layers)} layers; the budget "
                f"ended before --method={config.method} used them all"
            )
        return result


@torch.no_grad()
def validate(model, corpus, rows_per_batch):
    """Mean loss over the predicted tokens of the fixed validation rows, at the current depth."""
    total = torch.zeros((), dtype=torch.float64, device=corpus.device)
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


def compilations():
    """Graphs that torch.compile has made so far in this process. Those of the warm-up are not
    charged; one that a later update needs is part of its time, and of its line in the log."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class StopSignal:
    """Remembers SIGTERM and Ctrl-C, so that the loop can save first. A second Ctrl-C stops at once,
    if it comes seconds later: torchrun repeats the first one."""

    def __enter__(self):
        self.number, self.time, numbers = 0, 0.0, (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            numbers = ()  # only the main thread is told of signals
        self.previous = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def receive(self, number, frame):
        if not self.number:
            self.number, self.time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self.time + 3:
            raise KeyboardInterrupt

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# -- The command -----------------------------------------------------------------------------------


def start_processes(config):
    """Joins the processes of torchrun, one device each; returns the configuration of this one."""
    rank, on_gpu = os.environ.get("LOCAL_RANK"), config.device.startswith("cuda")
    if rank and on_gpu:
        config = dataclasses.replace(config, device=f"cuda:{rank}")
        rst.check_device(config.device)  # more processes than GPUs
    if on_gpu:
        torch.cuda.set_device(config.device)  # or libraries would also open the first GPU
    if rank and on_gpu:
        dist.init_process_group("nccl", device_id=torch.device(config.device))
    elif rank:
        dist.init_process_group("gloo")
    rst.prepare_machine(config.threads)
    return config


@exits_on_user_error
def main(arguments=None):
    typed, folder = parse(sys.argv[1:] if arguments is None else arguments)
    stored = reference = None
    if folder:
        config, stored = resumed(Path(folder), typed)
        reference = rst.Reference(**stored["reference"])
        check(config)
    else:
        config = resolve(typed)
    config = start_processes(config)
    try:
        return train(plan(config, reference, folder and Path(folder), stored))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
