"""Flags, their values, and the plan of a run.

`parse` reads what was typed, `resolve` makes it a whole `Config`, and `plan` finds what that needs:
corpus, reference, folder. A run that is resumed has a configuration already (`resumed`).
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import rst  # sets GOMP_SPINCOUNT, so it must precede torch

# isort: split

import torch

import methods
import model as models
import runs
from data.corpus import MASK_SHARE, MOST_MASKS, Corpus, load_meta
from data.prepare import TINY_VOCABULARY, corpus_folder
from errors import UserError
from flags import Option, Parser
from methods.baseline import SCHEDULES
from parallel import is_main, print0, wait_for_all


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
    holdout: float = setting(
        0.2, "share of rows held back from training, for second models", minimum=0, maximum=0.99
    )
    train_on: str = setting("training", "part of the rows to train on", ("training", "holdout"))
    validation_rows: int = setting(None, "how many at most (base: 10000, else 1000)", minimum=1)

    budget_hours: float = setting(None, "budget in hours of the reference (0.05)", minimum=1e-9)
    budget_steps: int = setting(None, "budget in updates instead", minimum=1)
    reference: str = setting(None, "this, rtx3090, a100, or a file of rst.py --save (tiny: this)")
    reprobe: bool = setting(True, "time the probe again during the run")
    validations: int = setting(4, "how many, evenly over the budget, one at its end", minimum=1)

    batch: int = setting(None, "rows per update", minimum=1, maximum=2**24)
    lr: float = setting(None, "peak learning rate", minimum=0)
    schedule: str = setting(None, "shape of the learning rate over the budget", tuple(SCHEDULES))
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
        None, "rows per forward pass (CPU: 8, or 1024 tokens; GPU: what fits)", minimum=1
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


def parse(arguments, description=None):
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
        description=description,
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
    dtype = rst.default_precision(device)
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
    edited: tuple = ()  # methods whose files were edited since the folder's run began

    @property
    def note(self):
        """What to say of a run that there is already."""
        files = ", ".join(f"methods/{name}.py" for name in self.edited)
        return f", before {files} was edited (delete the folder to make it again)" if files else ""


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
    edited = ()
    if runs.status(folder) != "new":
        record = runs.read_record(folder / "config.json", runs.CONFIG)
        if record["id"] != run_id:
            what = "its config.json was changed" if stored else "choose another --out"
            place = runs.relative_path(folder)
            raise UserError(f"{place} holds the run {record['id']}, and this is {run_id}; {what}")
        then, now = record.get("method_files", {}), methods.find(config.method).source_hashes()
        edited = tuple(name for name in then if now.get(name) != then[name])
    return Plan(config, started, reference, corpus_folder, checksum, folder, run_id, edited)


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
        damaged = []
        for folder in everywhere:
            try:
                if (folder / "meta.json").exists() and load_meta(folder)["checksum"] == checksum:
                    return folder, checksum
            except UserError as error:  # it may be another corpus
                damaged.append(f"; {error}")
        raise UserError(
            f"the corpus that this run was started on, {config.data}, is not here (its checksum is "
            f"{checksum[:8]}); say where with --data=FOLDER, or prepare it again{''.join(damaged)}"
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
