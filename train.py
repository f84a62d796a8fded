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

import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
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
from config import check, open_corpus, parse, plan, resolve, resumed
from errors import UserError, exits_on_user_error, explains_out_of_memory
from methods.baseline import rows_at_once
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
            note = f"this run is finished{planned.note}; --out=FOLDER repeats it elsewhere"
            raise UserError(f"{place}: {note}")
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


def ensure_run(name, config, reference=None):
    """Reuses, resumes or makes the run that a method needs first; returns its folder."""
    needed = plan(config, reference)
    place = runs.relative_path(needed.folder)
    # Another run may be making it. Every process waits here: at a barrier they would time out.
    with runs.locked(needed.folder, wait=True, shared=True):
        pass
    wait_for_all()
    if runs.status(needed.folder) == "finished":
        print0(f"{name}: reusing {place}{needed.note}")
        return needed.folder
    print0(f"{name}: training {place} first; it is not charged to the run that needs it")
    try:
        train(needed)
    except SystemExit:
        print0(f"(that was {name}, which your command needs first; the same command resumes it)")
        raise
    return needed.folder


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
            self.save_checkpoint()  # so that a log without a checkpoint is known to have lost it
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

                # Waits for the device: what is not finite must not reach the weights. (But an
                # overflow in fp16 is ordinary: the step is skipped, and the scale lowered.)
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
        """From here on the folder holds a run. A resumed run's log is cut to where its checkpoint
        was made."""
        if not is_main():
            yield
            return
        tokenizer = self.corpus.folder / self.corpus.meta["tokenizer"]
        content = tokenizer.read_bytes()
        with runs.written_whole(self.folder / tokenizer.name) as copy:
            copy.write(content)
        if not self.clock.updates:  # no update was kept of an earlier process, if there was one
            record = {
                "id": self.planned.id,
                "config": dataclasses.asdict(self.planned.started),  # what the id is made of
                "corpus": self.planned.checksum,
                "reference": dataclasses.asdict(self.planned.reference),
                "method_files": self.method.source_hashes(),
            }
            runs.write_json(self.folder / "config.json", record)
        # A line ends in one byte on every system: the checkpoint counts the log's bytes.
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
        if not path.exists():  # it is written before the log's first line
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
        print0(f"  resumed after update {updates}{self.planned.note}")

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
    arguments = sys.argv[1:] if arguments is None else arguments
    typed, folder = parse(arguments, __doc__)
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
