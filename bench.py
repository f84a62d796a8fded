"""Speed, measured side by side on this machine. Nothing here is a test.

    python bench.py speed     a training step next to transformers', as share of the matmul peak
    python bench.py generate  T5's greedy generation with its cache and without
    python bench.py input     the input pipeline's share of a step
    python bench.py depth     cost of 4 to 16 active layers next to the release's recorded times
    python bench.py step      every optimizer's step at tiny and small, as a share of an update
    python bench.py costs     an update of every method next to the baseline's and theory, memory
    python bench.py load      updates that a budget buys with one thread, two, and on a busy machine

What is compared is interleaved in one run, because a shared machine's speed changes from minute to
minute; every time is the median over the repeats (`load` prints every repeat).
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import math
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

import methods
import model as models
import train
from data.corpus import OBJECTIVES
from data.prepare import SENTINELS
from errors import UserError, exits_on_user_error
from flags import Parser
from methods.baseline import Method
from methods.sophia import ROWS_SHARE
from optimizers import hidden_matrices

ROOT = Path(__file__).resolve().parent


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions, repeats, warm_up=2):
    """Median seconds of each function, run in turns."""
    times = [[timed(function) for function in functions] for _ in range(warm_up + repeats)][
        warm_up:
    ]
    return [statistics.median(column) for column in zip(*times)]


def matmul_peak():
    """A function that multiplies two 2048 x 2048 fp32 matrices, and its floating-point
    operations."""
    a, b = torch.randn(2, 2048, 2048)
    return lambda: a @ b, 2 * 2048**3


def random_batch(config, rows):
    """A batch of random tokens with the shapes that `config` trains on."""
    ids = {
        "vocabulary_size": config.vocabulary,
        "first_sentinel": config.vocabulary - 1,
        "separator": 1,
    }
    objective = OBJECTIVES[config.model](config.row_length, ids)
    tokens = torch.randint(
        5,
        config.vocabulary - SENTINELS,
        (rows, objective.raw_length),
        generator=torch.Generator().manual_seed(0),
    )
    return objective(tokens, torch.arange(rows), key=0)


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
    model = models.build(config.model, config.size, config.vocabulary)
    optimizer = Method(model, None, None, config, {}).optimizer()
    rows, predicted = batch["labels"].shape
    step = training_step(model, lambda: model.loss(batch), optimizer, config.clip)
    return step, rows * model.training_flops_per_row(batch["tokens"].shape[1], predicted)


def transformers_step(config, batch):
    """The same of transformers' model of this depth and width, with fused AdamW."""
    try:
        from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
    except ImportError:
        raise UserError(
            "bench.py speed compares with transformers: pip install -r requirements-dev.txt"
        ) from None
    shape, (rows, predicted), row_length = (
        models.SIZES[config.model][config.size],
        batch["labels"].shape,
        batch["tokens"].shape[1],
    )
    width, depth = shape["d_model"], shape["n_layers"]
    if config.model == "bert":  # its head on the predicted positions only
        model = BertForMaskedLM(
            BertConfig(
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
        layer_flops = 6 * 12 * width**2 * row_length + 3 * 4 * row_length**2 * width
        flops = rows * (
            depth * layer_flops + 6 * predicted * (width**2 + config.vocabulary * width)
        )

        def loss():
            h = model.bert(input_ids=batch["tokens"]).last_hidden_state
            h = h.gather(1, batch["positions"][:, :, None].expand(-1, -1, width))
            return torch.nn.functional.cross_entropy(
                model.cls(h).flatten(0, 1), batch["labels"].flatten()
            )

    else:
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=config.vocabulary,
                d_model=width,
                d_kv=models.T5Config.d_head,
                d_ff=shape["d_ff"],
                num_layers=depth,
                num_heads=shape["n_heads"],
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                decoder_start_token_id=0,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
        flops = rows * models.build("t5", config.size, config.vocabulary).training_flops_per_row(
            row_length, predicted
        )

        def loss():
            return model(input_ids=batch["tokens"], labels=batch["labels"]).loss

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return training_step(model, loss, optimizer, config.clip), flops


def speed(repeats):
    print(f"training step, fp32, {torch.get_num_threads()} threads, {repeats} interleaved repeats")
    print(
        "| model | size | micro-batch | code | seconds | share of matmul peak "
        "|\n|---|---|---|---|---|---|"
    )
    for model, size, rows in (
        ("bert", "tiny", 32),
        ("bert", "base", 8),
        ("t5", "tiny", 16),
        ("t5", "base", 2),
    ):
        config = train.resolve({"model": model, "size": size, "device": "cpu", "batch": rows})
        batch = random_batch(config, rows)
        (peak, peak_flops), (ours, our_flops), (theirs, their_flops) = (
            matmul_peak(),
            our_step(config, batch),
            transformers_step(config, batch),
        )
        peak_seconds, our_seconds, their_seconds = interleaved([peak, ours, theirs], repeats)
        peak_rate = peak_flops / peak_seconds
        for name, seconds, flops in (
            ("ours", our_seconds, our_flops),
            ("transformers", their_seconds, their_flops),
        ):
            share = f"{flops / seconds / peak_rate:.1%} of {peak_rate / 1e9:.0f} GFLOP/s"
            print(f"| {model} | {size} | {rows} | {name} | {seconds:.3f} | {share} |", flush=True)
        del ours, theirs
        gc.collect()


def generation(repeats, tokens=64, rows=16):
    """Greedy generation of T5-tiny with the cache and without; it never ends early here."""
    config = train.resolve({"model": "t5", "size": "tiny", "device": "cpu"})
    model, batch = models.build("t5", "tiny", config.vocabulary).eval(), random_batch(config, rows)
    cached, uncached = interleaved(
        [lambda on=on: model.generate(batch, tokens, end=-1, use_cache=on) for on in (True, False)],
        repeats,
        warm_up=1,
    )
    print(
        f"{tokens} tokens for {rows} rows: {cached:.2f} s with the cache, {uncached:.2f} s "
        f"without, {uncached / cached:.1f} times as long"
    )


def input_pipeline(repeats):
    config = train.resolve({"size": "tiny", "device": "cpu", "batch": 32})
    corpus = train.open_corpus(config)
    model = models.build("bert", "tiny", config.vocabulary)

    def make():
        return corpus.batch(corpus.draw(32))

    def step():
        model.loss(batch).backward()
        model.zero_grad(set_to_none=True)

    batch = make()
    input_seconds, step_seconds = interleaved([make, step], repeats)
    print(
        f"input of 32 rows {1000 * input_seconds:.2f} ms, forward and backward at tiny "
        f"{1000 * step_seconds:.0f} ms: {input_seconds / step_seconds:.2%}"
    )


def depth(repeats):
    config = train.resolve({"size": "base", "device": "cpu"})
    model, batch = models.build("bert", "base", config.vocabulary), random_batch(config, 8)
    depths = [4, 8, 12, 16]

    def step_of(layers):
        def step():
            model.loss(batch, layers=list(range(layers))).backward()
            model.zero_grad(set_to_none=True)

        return step

    seconds = interleaved([step_of(layers) for layers in depths], repeats, warm_up=1)
    print("| active layers | seconds | relative to 16 | release's table |\n|---|---|---|---|")
    for layers, value in zip(depths, seconds):
        print(
            f"| {layers} | {value:.2f} | {value / seconds[-1]:.3f} | "
            f"{rst.RTX3090_BERT[layers - 1] / rst.RTX3090_BERT[-1]:.3f} |"
        )


def optimizer_of(name, model, config):
    """The optimizer that a method makes for a model."""
    return methods.find(name).start(model, None, None, config, {}).optimizer_in_use


def optimizer_steps(repeats):
    """Each optimizer has its own state; they share the weights and a gradient. In turns with them,
    an update's forward and backward pass of one micro-batch, from which the share of an update
    follows."""
    torch._dynamo.config.recompile_limit = 99  # a run has a handful of graphs; here are many runs'
    print(
        "| model, size | parameters | optimizer | ms a step | share of an update | more than fused "
        "AdamW, share |\n|---|---|---|---|---|---|"
    )
    for name, size in itertools.product(models.SIZES, ("tiny", "small")):
        config = train.resolve({"model": name, "size": size, "device": "cpu"})
        model, rows = (
            models.build(name, size, config.vocabulary),
            min(config.batch, 4 if size == "small" else 8),
        )
        batch = random_batch(config, rows)

        def forward_backward():
            loss = model.loss(batch)
            for parameter, gradient in zip(
                model.parameters(), torch.autograd.grad(loss, list(model.parameters()))
            ):
                parameter.grad.copy_(gradient)

        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        steps = {
            "AdamW, fused": optimizer_of(
                "baseline", model, dataclasses.replace(config, rms_scaling=False, lr=1e-6)
            ).step
        }
        for method in ("baseline", "lion", "sophia", "schedule_free", "muon"):
            recipe = dataclasses.replace(
                train.resolve({"model": name, "size": size, "device": "cpu", "method": method}),
                lr=1e-6,
            )
            label = "AdamWScale" if method == "baseline" else method
            for compiled in (False, True):
                if method == "baseline" and not recipe.rms_scaling or method == "muon" and compiled:
                    continue  # the same as fused AdamW; Muon compiles nothing of its own
                optimizer = optimizer_of(
                    method, model, dataclasses.replace(recipe, compile=compiled)
                )
                steps[f"{label}{', compiled' if compiled else ''}"] = optimizer.step
        *seconds, update = interleaved([*steps.values(), forward_backward], repeats)
        update *= config.batch / rows
        count = sum(parameter.numel() for parameter in model.parameters())
        for label, value in zip(steps, seconds):
            print(
                f"| {name}, {size} | {count:,} | {label} | {1000 * value:.1f} | "
                f"{value / update:.2%} | {(value - seconds[0]) / update:+.2%} |",
                flush=True,
            )


# In so few updates: growth at a quarter and a half, and layers dropped at the final rate from the
# second update on.
COST_FLAGS = {"stacking": ["--growth_times=0.25,0.5"], "layer_drop": ["--gamma=1000"]}


def costs(repeats, chosen=tuple(models.SIZES), updates=12):
    """Runs of the loop at size small on the documentation strings, each beside a run of the
    baseline, both with half of the threads: at the same time on the same machine, so that its other
    work slows both. What a method needs first stays in runs/."""
    threads = torch.get_num_threads()
    half = max(1, threads // 2)
    for model, batch in (pair for pair in (("bert", 8), ("t5", 2)) if pair[0] in chosen):
        flags = [
            f"--model={model}",
            "--size=small",
            "--data=pydocs",
            "--device=cpu",
            f"--batch={batch}",
            f"--micro_batch={batch}",
            f"--threads={half}",
            "--validations=1",
            "--validation_rows=10",
            "--yes",
        ]
        configs = {
            method: train.resolve(
                train.parse(
                    [
                        *flags,
                        f"--method={method}",
                        f"--budget_steps={updates}",
                        *COST_FLAGS.get(method, []),
                    ]
                )[0]
            )
            for method in ["baseline", *sorted(set(methods.names()) - {"baseline"})]
        }
        for method, config in configs.items():
            for name, prerequisite in methods.find(method).prerequisites(config).items():
                train.ensure_run(name, prerequisite)
        torch.set_num_threads(half)  # as the runs
        try:
            constant, per_layer = cost_of_layers(configs["baseline"], batch)
        finally:
            torch.set_num_threads(threads)
        print(
            f"{model}-small, {batch} rows, {updates} updates, {repeats} times; an update with n "
            f"layers takes {constant:.3f} + {per_layer:.3f} n s"
        )
        print(
            "| method | an update, relative to the baseline's | theory | gap | peak memory, GB "
            "|\n|---|---|---|---|---|"
        )
        for method, config in configs.items():
            ratios, memory = [], 0.0
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as folder:
                    records, others, peak = run_beside_baseline(method, config, flags, folder)
                local = [
                    statistics.mean(line["charged_seconds"] / line["factor"] for line in run)
                    for run in (records, others)
                ]
                ratios.append(local[0] / local[1])
                memory = max(memory, peak)
            measured, expected = (
                statistics.median(ratios),
                theory(method, config, records, constant, per_layer),
            )
            print(
                f"| {method} | {measured:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | "
                f"{expected:.3f} | {measured / expected - 1:+.1%} | {memory:.2f} |",
                flush=True,
            )


def run_beside_baseline(method, config, flags, folder):
    """(lines of its updates, those of the baseline beside it, its peak memory in GB)."""
    mine, beside = (
        [sys.executable, "train.py", *flags, f"--out={folder}/{name}"]
        for name in ("mine", "beside")
    )
    mine += [
        f"--method={method}",
        f"--budget_steps={config.budget_steps}",
        *COST_FLAGS.get(method, []),
    ]
    with open(f"{folder}/messages", "w+") as messages:
        streams = dict(cwd=ROOT, stdout=messages, stderr=messages)
        other = subprocess.Popen([*beside, "--budget_steps=1000000"], **streams)
        try:
            process, peak = subprocess.Popen(mine, **streams), math.nan
            while process.poll() is None:
                peak = peak_memory(process.pid) or peak
                time.sleep(0.05)
            ended = other.poll()
        finally:
            other.kill()
            other.wait()
        if process.returncode != 0 or ended is not None:
            raise UserError(
                f"{method} or the baseline beside it failed: "
                f"{Path(messages.name).read_text()[-500:]}"
            )
    logs = []
    for name in ("mine", "beside"):
        text = (Path(folder) / name / "log.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
        logs.append([line for line in lines if "loss" in line])
    if not logs[1]:
        raise UserError(
            f"{method} ended before the baseline beside it made an update: this machine is too "
            "busy to compare them; try again"
        )
    return *logs, peak


def peak_memory(pid):
    """The most memory that a process has had, in GB; None where the system does not say. (Resource
    usage does not do: a process begins with the peak of the one that started it.)"""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**20  # of kB


# For an objective that is asked for its shapes only.
NO_TOKENS = {
    "vocabulary_size": 0,
    "first_sentinel": 0,
    "separator": 0,
}


def theory(method, config, records, constant, per_layer):
    """What an update of a method costs, relative to the baseline's, for the updates that these
    lines of a log are of.

    A pass without gradients is a third of a training pass. Layers cost what `cost_of_layers`
    measured; other shapes and Muon's products cost as their floating-point operations, those in
    bf16 as much less as this machine multiplies faster in it.
    """
    model, batch = models.build(config.model, config.size, config.vocabulary), config.batch
    objective = functools.partial(OBJECTIVES[config.model], meta=NO_TOKENS)

    def flops(row_length=config.row_length, mask_share=None, layers=None):
        rows = objective(row_length)
        rows = rows.with_mask_share(mask_share, NO_TOKENS) if mask_share else rows
        return model.training_flops_per_row(
            getattr(rows, "read_length", row_length), rows.predicted_per_row, layers
        )

    reports = [line.get(method, {}) for line in records]
    layers = len(model.layers)
    if method in ("stacking", "layer_drop"):
        return statistics.mean(constant + per_layer * report["layers"] for report in reports) / (
            constant + per_layer * layers
        )
    if method == "selective_backprop":
        return 1 + statistics.mean(report["candidates"] for report in reports) / batch / 3
    if method == "rho":
        return 1 + config.options["mega_batch_factor"] / 3
    if method == "token_rho":
        return 1 + 1 / 3
    if method == "sophia":
        return 1 + ROWS_SHARE[config.model] * (
            len(records) // config.options["hessian_interval"]
        ) / len(records)
    if method == "muon":
        sides = [sorted(matrix.shape) for matrix in hidden_matrices(model).values()]
        products = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)
        return 1 + products * product_seconds(torch.bfloat16) / product_seconds(torch.float32) / (
            batch * flops()
        )
    if method == "length_warmup":
        return (
            statistics.mean(flops(row_length=report["row_length"]) for report in reports) / flops()
        )
    if method == "mask_schedule":
        return (
            statistics.mean(flops(mask_share=report["mask_share"]) for report in reports) / flops()
        )
    if method == "token_dropping":
        dropping = sum(
            line["progress"] < 1 - config.options["full_phase"] for line in records
        ) / len(records)
        width = getattr(objective(config.row_length), "read_length", config.row_length)
        saved = token_dropping_saves(
            model, config.model, width, round(config.options["keep"] * width)
        )
        return 1 - dropping * saved / flops()
    return 1.0


def product_seconds(dtype, size=1024):
    """Seconds of a product of two square matrices."""
    matrix = torch.randn(size, size).to(dtype)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def token_dropping_saves(model, name, width, kept):
    """Floating-point operations of a row that the middle layers save by reading `kept` of `width`
    tokens."""
    c, layers = model.config, len(model.layers)
    if name == "bert":
        one = [model.training_flops_per_row(length, 0, [0]) for length in (width, kept)]
        # Of the layer in which the kept tokens attend to all.
        keys_values = 6 * 2 * c.d_model**2 * (width - kept)
        products = 12 * c.d_model * kept * (width - kept)
        return (layers // 2) * (one[0] - one[1]) - keys_values - products
    inner = c.n_heads * c.d_head
    weights = 4 * c.d_model * inner + 3 * c.d_model * c.d_ff
    whole, part = (6 * weights * length + 12 * inner * length**2 for length in (width, kept))
    return (layers - 2) * (whole - part)


def cost_of_layers(config, rows, repeats=5):
    """(a, b) of the seconds a + b n that an update with n layers takes, from a quarter of them, and
    all."""
    model, batch = (
        models.build(config.model, config.size, config.vocabulary),
        random_batch(config, rows),
    )
    optimizer, layers = Method(model, None, None, config, {}).optimizer(), len(model.layers)
    few, all_of_them = interleaved(
        [
            training_step(
                model,
                lambda count=count: model.loss(batch, layers=list(range(count))),
                optimizer,
                config.clip,
            )
            for count in (layers // 4, layers)
        ],
        repeats,
    )
    per_layer = (all_of_them - few) / (layers - layers // 4)
    return few - per_layer * (layers // 4), per_layer


def load(repeats, chosen=tuple(models.SIZES)):
    """Runs of the tiny models budgeted in the reference's time under four loads, with and without
    re-probing."""
    print(
        "| model, updates within its budget | re-probing | 1 thread | 2 threads | beside a busy "
        "process | beside it in the first half | spread |\n|---|---|---|---|---|---|---|"
    )
    budgets = [("bert", "rtx3090", 6e-5), ("t5", "a100", 1e-4)]
    for (model, reference, budget_hours), reprobe in itertools.product(
        (budget for budget in budgets if budget[0] in chosen), ("true", "false") * repeats
    ):
        updates, walls = [], []
        for threads, busy in ((1, "never"), (2, "never"), (2, "always"), (2, "first half")):
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    "train.py",
                    f"--model={model}",
                    "--size=tiny",
                    "--device=cpu",
                    f"--threads={threads}",
                    f"--reference={reference}",
                ]
                command += [
                    f"--budget_hours={budget_hours}",
                    f"--reprobe={reprobe}",
                    f"--out={folder}/run",
                    "--validations=1",
                    "--validation_rows=10",
                ]
                beside = (
                    subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    if busy != "never"
                    else None
                )
                timer = (
                    threading.Timer(walls[-1] / 2, beside.kill) if busy == "first half" else None
                )
                try:
                    if timer:
                        timer.start()
                    done = subprocess.run(
                        command,
                        cwd=ROOT,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                finally:
                    if timer:
                        timer.cancel()
                    if beside:
                        beside.kill()
                        beside.wait()
                if done.returncode != 0:
                    raise UserError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
                result = json.loads((Path(folder) / "run" / "result.json").read_text())
                updates.append(result["updates"])
                walls.append(result["wall_seconds"])
        cells = [f"{count} in {wall:.0f} s" for count, wall in zip(updates, walls)]
        print(
            f"| {model} | {'yes' if reprobe == 'true' else 'no'} | {' | '.join(cells)} | "
            f"{max(updates) / min(updates) - 1:.1%} |",
            flush=True,
        )


@exits_on_user_error
def main(arguments=None):
    benches = {
        "speed": (speed, 10),
        "generate": (generation, 3),
        "input": (input_pipeline, 20),
        "depth": (depth, 5),
        "step": (optimizer_steps, 10),
        "costs": (costs, 1),
        "load": (load, 1),
    }
    parser = Parser(description=__doc__)
    parser.add_argument("bench", choices=list(benches))
    parser.add_argument("--repeats", type=int)
    parser.add_argument(
        "--model", choices=list(models.SIZES), help="of costs and load: only this one"
    )
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 1:
        raise UserError(f"--repeats={options.repeats}: expected at least 1")
    rst.prepare_machine()
    function, repeats = benches[options.bench]
    if options.model and options.bench not in ("costs", "load"):
        raise UserError(f"--model={options.model}: only costs and load have it")
    function(options.repeats or repeats, *([(options.model,)] if options.model else []))


if __name__ == "__main__":
    main()
