"""Speed, measured side by side on this machine, and runs killed at random. Nothing here is a test.

    python bench.py speed     a training step next to transformers', as share of the matmul peak
    python bench.py generate  T5's greedy generation with its cache and without
    python bench.py step      every optimizer's step, as a share of an update
    python bench.py costs     an update of every method next to the baseline's, peak memory
    python bench.py load      updates that a budget buys with one thread, two, and on a busy machine
    python bench.py kills     every method, killed at random moments and resumed: the same bits?

With --device=cuda `speed`, `step` and `costs` are those of base on a GPU, compiled and in its
precision, and `load` compares what an update is charged there and on the CPU.

What is compared is interleaved in one run (`costs` on a GPU is not), because a shared machine's
speed changes from minute to minute; every time is the median over the repeats (`load` prints every
repeat).
"""

import contextlib
import dataclasses
import functools
import itertools
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import rst  # sets GOMP_SPINCOUNT, so it must precede torch

# isort: split

import torch
import torch.nn.functional as F

import methods
import model as models
import runs
import train
from config import find_corpus, parse, resolve
from data.corpus import OBJECTIVES, to_device
from data.prepare import SENTINELS
from errors import UserError, exits_on_user_error
from flags import Option, Parser
from methods.baseline import STUDY_MICRO_BATCH, Method


def timed(function, device="cpu"):
    rst.synchronise(device)
    start = time.perf_counter()
    function()
    rst.synchronise(device)
    return time.perf_counter() - start


def interleaved(functions, repeats, device="cpu", warm_up=2):
    """Median seconds of each function, run in turns."""
    times = [[timed(function, device) for function in functions] for _ in range(warm_up + repeats)]
    return [statistics.median(column) for column in zip(*times[warm_up:])]


def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_header(*cells):
    print_row(*cells)
    print(f"|{'---|' * len(cells)}")


def config_of(model, size, device="cpu", **flags):
    return resolve({"model": model, "size": size, "device": device, **flags})


def random_batch(config, rows):
    """A batch of random tokens with the shapes that `config` trains on."""
    sentinel = config.vocabulary - 1
    meta = dict(tokenizer_size=config.vocabulary, first_sentinel=sentinel, separator=1)
    objective = OBJECTIVES[config.model](config.row_length, meta)
    shape, generator = (rows, objective.raw_length), torch.Generator().manual_seed(0)
    tokens = torch.randint(5, config.vocabulary - SENTINELS, shape, generator=generator)
    batch = objective(tokens, torch.arange(rows), key=0)
    return {name: to_device(tensor, config.device) for name, tensor in batch.items()}


# -- A training step -------------------------------------------------------------------------------


def training_step(model, loss, optimizer, clip):
    """What the loop does for an update of one micro-batch: forward, backward, clip, step."""
    parameters = list(model.parameters())

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(config, batch):
    """The baseline's update, and its floating-point operations."""
    model = models.build(config.model, config.size, config.vocabulary).to(config.device)
    model = train.configure(model, config)
    optimizer = Method(model, None, None, config, {}).optimizer()
    rows, predicted = batch["labels"].shape
    step = training_step(model, lambda: model.loss(batch), optimizer, config.clip)
    return step, rows * model.training_flops_per_row(batch["tokens"].shape[1], predicted)


def transformers_step(config, batch):
    """The same of transformers' model of this depth and width, with fused AdamW; compiled, where
    ours is."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "bench.py speed compares with transformers: pip install -r requirements-dev.txt"
        ) from None
    model, loss, flops_per_row = (
        transformers_bert(transformers, config, batch)
        if config.model == "bert"
        else transformers_t5(transformers, config, batch)
    )
    model.to(config.device).train()
    if config.compile:
        for part in (model, *model.children()):  # of BERT's the parts are called
            part.compile(dynamic=False)
    dtype = models.DTYPES[config.dtype]
    device = torch.device(config.device).type
    autocast = torch.autocast(device, dtype=dtype, enabled=dtype is not None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = training_step(model, autocast(loss), optimizer, config.clip)
    return step, len(batch["tokens"]) * flops_per_row


def transformers_bert(transformers, config, batch):
    """(model, its loss, floating-point operations a row), the head on the predicted positions."""
    shape = models.SIZES["bert"][config.size]
    width, depth = shape["d_model"], shape["n_layers"]
    row_length, predicted = batch["tokens"].shape[1], batch["labels"].shape[1]
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=config.vocabulary,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=shape["n_heads"],
            intermediate_size=4 * width,
            max_position_embeddings=row_length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
    )

    def loss():
        h = model.bert(input_ids=batch["tokens"]).last_hidden_state
        h = h.gather(1, batch["positions"][:, :, None].expand(-1, -1, width))
        return F.cross_entropy(model.cls(h).flatten(0, 1), batch["labels"].flatten())

    layer = 6 * 12 * width**2 * row_length + 3 * 4 * row_length**2 * width
    return model, loss, depth * layer + 6 * predicted * (width**2 + config.vocabulary * width)


def transformers_t5(transformers, config, batch):
    """The same of T5, whose layers have our shapes."""
    ours = models.build("t5", config.size, config.vocabulary)
    shape = ours.config
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocabulary,
            d_model=shape.d_model,
            d_kv=shape.d_head,
            d_ff=shape.d_ff,
            num_layers=shape.n_layers,
            num_heads=shape.n_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )

    def loss():
        return model(input_ids=batch["tokens"], labels=batch["labels"]).loss

    lengths = batch["tokens"].shape[1], batch["labels"].shape[1]
    return model, loss, ours.training_flops_per_row(*lengths)


CPU_CASES = ("bert", "tiny", 32), ("bert", "small", 16), ("bert", "base", 8)
CPU_CASES += ("t5", "tiny", 16), ("t5", "small", 4), ("t5", "base", 2)


def speed(repeats, device):
    on_gpu, width = device != "cpu", 2048 if device == "cpu" else 8192
    cases = [(model, "base", None) for model in models.SIZES] if on_gpu else CPU_CASES
    print(f"training step, {rst.device_name(device)}, {repeats} interleaved repeats")
    print_header("model", "size", "micro-batch", "code", "seconds", "share of matmul peak", "GB")
    for model, size, rows in cases:
        config = config_of(
            model, size, device, **(dict(batch=rows, micro_batch=rows) if rows else {})
        )
        batch = random_batch(config, config.micro_batch)
        steps = {"ours": our_step(config, batch), "transformers": transformers_step(config, batch)}
        a, b = torch.randn(2, width, width, device=device, dtype=models.DTYPES[config.dtype])
        functions = [lambda a=a, b=b: a @ b, *(step for step, _ in steps.values())]
        peak_seconds, *seconds = interleaved(functions, repeats, device)
        peak = 2 * width**3 / peak_seconds
        for (name, (step, flops)), taken in zip(steps.items(), seconds):
            share = f"{flops / taken / peak:.1%} of {peak / 1e12:.3g} TFLOP/s"
            memory = f"{memory_of(step, device):.1f}" if on_gpu else "-"
            print_row(model, size, config.micro_batch, name, f"{taken:.4f}", share, memory)


def memory_of(step, device):
    """GB of GPU memory that a step takes on top of weights and optimizer."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def generation(repeats, tokens=64, rows=16):
    """Greedy generation of T5-tiny with the cache and without; it never ends early here."""
    config = config_of("t5", "tiny")
    model, batch = models.build("t5", "tiny", config.vocabulary).eval(), random_batch(config, rows)
    generate = functools.partial(model.generate, batch, tokens, end=-1)
    ways = [functools.partial(generate, use_cache=on) for on in (True, False)]
    cached, uncached = interleaved(ways, repeats, warm_up=1)
    print(
        f"{tokens} tokens for {rows} rows: {cached:.2f} s with the cache, {uncached:.2f} s "
        f"without, {uncached / cached:.1f} times as long"
    )


# -- Optimizers ------------------------------------------------------------------------------------


def optimizer_step(method, model, config):
    """A step of the optimizer that a method makes for a model."""
    config = dataclasses.replace(config, lr=1e-6)
    return methods.find(method).start(model, None, None, config, {}).optimizer_in_use.step


def optimizer_steps(repeats, device):
    """Each optimizer has its own state; they share the weights and a gradient. Interleaved with
    them, for the share of an update: the forward and backward pass of one micro-batch."""
    torch._dynamo.config.recompile_limit = 99  # a run has a handful of graphs; here are many runs'
    print_header(
        "model, size", "parameters", "optimizer", "ms a step", "share of an update", "over AdamW"
    )
    sizes = ("tiny", "small") if device == "cpu" else ("base",)
    for name, size in itertools.product(models.SIZES, sizes):
        config = config_of(name, size, device)
        model = models.build(name, size, config.vocabulary).to(device)
        model = train.configure(model, config)
        rows = min(config.batch, {"tiny": 8, "small": 4, "base": config.micro_batch}[size])
        batch, parameters = random_batch(config, rows), list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-3
        plain = dataclasses.replace(config, rms_scaling=False, compile=False)
        steps = {"AdamW, fused": optimizer_step("baseline", model, plain)}
        for method in ("baseline", "lion", "sophia", "schedule_free", "muon"):
            recipe = config_of(name, size, device, method=method, compile=False)
            label = "AdamWScale" if method == "baseline" else method
            if label == "AdamWScale" and not recipe.rms_scaling:
                continue  # BERT's baseline is fused AdamW
            steps[label] = optimizer_step(method, model, recipe)
            if method != "muon":  # which compiles nothing of its own
                compiled = dataclasses.replace(recipe, compile=True)
                steps[f"{label}, compiled"] = optimizer_step(method, model, compiled)

        def forward_backward(model=model, batch=batch, parameters=parameters):
            return torch.autograd.grad(model.loss(batch), parameters)

        *seconds, update = interleaved([*steps.values(), forward_backward], repeats, device)
        update *= config.batch / rows
        count = f"{sum(parameter.numel() for parameter in parameters):,}"
        for label, taken in zip(steps, seconds):
            shares = f"{taken / update:.2%}", f"{(taken - seconds[0]) / update:+.2%}"
            print_row(f"{name}, {size}", count, label, f"{1000 * taken:.1f}", *shares)


# -- What an update of a method costs --------------------------------------------------------------

# In so few updates: growth at a quarter and a half, and layers dropped at the final rate from the
# second update on.
COST_FLAGS = {"stacking": ["--growth_times=0.25,0.5"], "layer_drop": ["--gamma=1000"]}


def costs(repeats, device, chosen=tuple(models.SIZES), updates=12):
    """Runs of the loop on pydocs, each with a run of the baseline. On a CPU at size small, side by
    side with half of the threads, so that other work on the machine slows both; on a GPU at base,
    one after the other. What a method needs first stays in runs/."""
    threads, on_gpu = max(1, torch.get_num_threads() // 2), device != "cpu"
    size, updates = ("base", 30) if on_gpu else ("small", updates)
    for model in chosen:
        batch = STUDY_MICRO_BATCH[model] * 2 if on_gpu else {"bert": 8, "t5": 2}[model]
        flags = [f"--model={model}", f"--size={size}", "--data=pydocs", f"--device={device}"]
        flags += [f"--batch={batch}", f"--threads={threads}", "--yes", "--reference=this"]
        flags += ["--validations=1", "--validation_rows=10", f"--budget_steps={updates}"]
        print(f"{model}-{size}, {batch} rows, {updates} updates, {repeats} times")
        print_header("method", "an update, in the baseline's", "peak memory, GB")
        for method in methods.names():
            own = [*flags, f"--method={method}", *COST_FLAGS.get(method, [])]
            config = resolve(parse(own)[0])
            find_corpus(config)  # prepared now, not by both runs
            for name, needed in methods.find(method).prerequisites(config).items():
                train.ensure_run(name, needed)
            compared = run_after_baseline if on_gpu else run_beside_baseline
            ratios, peaks = zip(*(compared(own, flags) for _ in range(repeats)))
            spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
            print_row(method, f"{statistics.median(ratios):.3f} {spread}", f"{max(peaks):.2f}")


def run_after_baseline(own, flags):
    """As `run_beside_baseline`, one after the other; the memory is the GPU's."""
    seconds = []
    for command in (flags, own):
        result, log = run_to_its_end(command)
        seconds.append(statistics.mean(line["charged_seconds"] for line in log))
    return seconds[1] / seconds[0], result["peak_device_bytes"] / 1e9


def run_beside_baseline(own, flags):
    """(mean seconds of its updates in those of the baseline beside it, its peak memory in GB)."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/messages", "w+") as messages:

        def start(name, flags):
            command = [sys.executable, "train.py", *flags, f"--out={folder}/{name}"]
            return subprocess.Popen(command, cwd=runs.ROOT, stdout=messages, stderr=messages)

        other = start("other", [*flags, "--budget_steps=1000000"])
        try:
            process, peak = start("own", own), 0.0
            while process.poll() is None:
                peak = max(peak, peak_memory(process.pid))
                time.sleep(0.05)
            both_ran = process.returncode == 0 and other.poll() is None
        finally:
            other.kill()
            other.wait()
        if not both_ran:
            reason = Path(messages.name).read_text()[-500:]
            raise UserError(f"{own} or the baseline beside it failed: {reason}")
        log = Path(folder) / "other" / "log.jsonl"
        with open(log, "rb+") as file:  # the killed run's last line may be cut short
            file.truncate(file.read().rfind(b"\n") + 1)
        seconds = {
            name: [
                line["charged_seconds"] / line["factor"]
                for line in runs.read_log(Path(folder) / name)
                if "loss" in line
            ]
            for name in ("own", "other")
        }
    if not seconds["other"]:
        raise UserError(
            "the baseline made no update beside it: this machine is too busy; try again"
        )
    return statistics.mean(seconds["own"]) / statistics.mean(seconds["other"]), peak


def peak_memory(pid):
    """The most memory that a process has had, in GB; 0 where the system does not say. (Resource
    usage does not do: a process begins with the peak of the one that started it.)"""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**20  # of kB
    return 0.0


# -- Runs on a busy machine, and runs that are killed ----------------------------------------------


def load(repeats, device, chosen=tuple(models.SIZES)):
    """Runs of the tiny models budgeted in the reference's time under four loads, with and without
    re-probing; with a GPU, what an update of the base models is charged on both devices."""
    if device != "cpu":
        return charged_on_both(device, chosen)
    print_header(
        "model, updates within its budget", "re-probing", "1 thread", "2 threads",
        "beside a busy process", "beside it in the first half", "spread",
    )  # fmt: skip
    budgets = {"bert": ("rtx3090", 6e-5), "t5": ("a100", 1e-4)}
    loads = ((1, "never"), (2, "never"), (2, "always"), (2, "first half"))
    for model, reprobe in itertools.product(chosen, ("true", "false") * repeats):
        reference, hours = budgets[model]
        results, wall = [], 0.0
        for threads, busy in loads:
            flags = [f"--model={model}", "--size=tiny", "--device=cpu", f"--threads={threads}"]
            flags += [f"--reference={reference}", f"--budget_hours={hours}", f"--reprobe={reprobe}"]
            with beside_a_busy_process(busy, wall / 2):
                results.append(run_to_its_end([*flags, "--validation_rows=10"])[0])
            wall = results[-1]["wall_seconds"]
        counts = [result["updates"] for result in results]
        cells = [f"{result['updates']} in {result['wall_seconds']:.0f} s" for result in results]
        print_row(model, reprobe, *cells, f"{max(counts) / min(counts) - 1:.1%}")


@contextlib.contextmanager
def beside_a_busy_process(busy, seconds):
    """Another process that computes: "never", "always", or in the "first half"."""
    if busy == "never":
        yield
        return
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    timer = threading.Timer(seconds if busy == "first half" else 1e6, beside.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        beside.kill()
        beside.wait()


def run_to_its_end(flags):
    """The result of a run with these flags, and its log of updates."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *flags, "--validations=1", f"--out={folder}/run"]
        done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
        folder = Path(folder) / "run"
        log = [line for line in runs.read_log(folder) if "loss" in line]
        return runs.read_record(folder / "result.json"), log


def charged_on_both(device, chosen, updates=20):
    """Reference seconds that 20 updates of a micro-batch of the study are charged."""
    print_header("model", "reference", "rows", "CPU", rst.device_name(device), "CPU / GPU")
    for model in chosen:
        rows, charged = STUDY_MICRO_BATCH[model], []
        for place, count in (("cpu", 2), (device, updates)):
            flags = [f"--model={model}", "--size=base", "--data=pydocs", f"--device={place}"]
            flags += [f"--batch={rows}", f"--budget_steps={count}", "--validation_rows=1"]
            result, _ = run_to_its_end(flags)
            charged.append(result["charged_seconds"] * updates / count)
        cells = [f"{seconds:.4g} s" for seconds in charged] + [f"{charged[0] / charged[1]:.2f}"]
        print_row(model, result["config"]["reference"], rows, *cells)


def kills(repeats, chosen=tuple(models.SIZES), updates=40):
    """Every method once to its end, and again, killed `repeats` times (SIGKILL, at any moment from
    its start on) and resumed; a run that ends before is begun anew. Prints the losses and weights
    that differ: there should be none."""
    flags = "--size=tiny --data=pydocs --device=cpu --threads=1 --batch=16 --row_length=32 "
    flags += f"--validations=2 --validation_rows=20 --budget_steps={updates}"
    moments, count = random.Random(0), 0
    for model, method in itertools.product(chosen, methods.names()):
        with tempfile.TemporaryDirectory() as folder:
            plain, killed = Path(folder) / "plain", Path(folder) / "killed"
            command = [sys.executable, "train.py", *flags.split()]
            command += [f"--model={model}", f"--method={method}", "--checkpoint_minutes=0.001"]
            run = functools.partial(subprocess.Popen, cwd=runs.ROOT, stdout=subprocess.DEVNULL)
            start = time.perf_counter()
            if run([*command, f"--out={plain}"]).wait():
                raise UserError(f"{' '.join(command)} failed")
            seconds, kills_here, differing = time.perf_counter() - start, 0, set()
            while kills_here < repeats or runs.status(killed) == "interrupted":
                process = run([*command, f"--out={killed}"])
                until = moments.uniform(0.3, 1) * seconds if kills_here < repeats else None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(until)
                kills_here += process.poll() is None
                process.kill()
                if process.wait() > 0:
                    raise UserError(f"{' '.join(command)} cannot go on after a kill")
                if runs.status(killed) == "finished":
                    differing |= set(differences(plain, killed))
                    shutil.rmtree(killed)
        count += kills_here
        same = "different: " + ", ".join(sorted(differing)) if differing else "the same bits"
        print(f"{model}, {method}: {kills_here} kills, {same}", flush=True)
    print(f"{count} kills in all")


def differences(one, other):
    """What of two runs' logs and weights is not the same, as a list of names."""
    kept = ("update", "loss", "validation_loss")
    logs, weights = [], []
    for folder in (one, other):
        logs.append([[line.get(name) for name in kept] for line in runs.read_log(folder)])
        weights.append(models.load(folder / "model.pt").state_dict())
    one, other = weights
    return ["log"] * (logs[0] != logs[1]) + [
        name for name in one if not one[name].equal(other[name])
    ]


BENCHES = {  # and how often they are repeated
    "speed": (speed, 10),
    "generate": (generation, 3),
    "step": (optimizer_steps, 10),
    "costs": (costs, 1),
    "load": (load, 1),
    "kills": (kills, 4),
}


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("bench", choices=list(BENCHES))
    parser.add("repeats", Option(None, "number of repeats (each has its own)", kind=int, minimum=1))
    parser.add(
        "model", Option(None, "of costs, load, kills: only this one", tuple(models.SIZES), kind=str)
    )
    parser.add("device", Option("cpu", "of speed, step, costs, load: cpu or cuda"))
    options = parser.parse_args(arguments)
    function, repeats = BENCHES[options.bench]
    rst.check_device(options.device)
    has_device = function in (speed, optimizer_steps, costs, load)
    if options.device != "cpu" and not has_device:
        raise UserError(f"--device={options.device}: {options.bench} runs on the CPU only")
    if options.model and function not in (costs, load, kills):
        raise UserError(f"--model={options.model}: only costs, load and kills take it")
    rst.prepare_machine()
    keywords = {"device": options.device} if has_device else {}
    keywords |= {"chosen": (options.model,)} if options.model else {}
    function(options.repeats or repeats, **keywords)


if __name__ == "__main__":
    main()
