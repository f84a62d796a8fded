"""Speed, measured side by side on this machine. Nothing here is a test.

    python bench.py speed     training step next to transformers' BERT, as share of the matmul peak
    python bench.py input     the input pipeline's share of a step
    python bench.py depth     cost of 4, 8, 12, 16 active layers next to the release's recorded times
    python bench.py load      updates that a budget buys with one thread, two, and two beside a busy process

What is compared is interleaved in one run, because a shared machine's speed changes from minute to
minute; every time is the median over the repeats (`load` prints every repeat).
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rst  # before torch: it says how OpenMP's threads wait

import torch

import model as models
import train
from data.corpus import MASK_SHARE
from errors import Parser, UserError, exits_on_user_error
from methods.baseline import parameter_groups

ROOT = Path(__file__).resolve().parent
ROW_LENGTH = 128
PREDICTED = round(MASK_SHARE * ROW_LENGTH)


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions, repeats, warm_up=2):
    """Median seconds of each function, run in turns."""
    times = [[timed(function) for function in functions] for _ in range(warm_up + repeats)][warm_up:]
    return [statistics.median(column) for column in zip(*times)]


def matmul_peak():
    """A function that multiplies two 2048 x 2048 fp32 matrices, and its floating-point operations."""
    a, b = torch.randn(2, 2048, 2048)
    return lambda: a @ b, 2 * 2048**3


def random_batch(rows, vocabulary_size):
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(5, vocabulary_size, (rows, ROW_LENGTH), generator=generator),
        "positions": torch.rand(rows, ROW_LENGTH, generator=generator).argsort(1)[:, :PREDICTED].contiguous(),
        "labels": torch.randint(5, vocabulary_size, (rows, PREDICTED), generator=generator),
    }


def training_step(parameters, loss, groups):
    """Forward, backward, clip, fused AdamW: what the loop does for an update of one micro-batch."""
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-12, fused=True)

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(size, vocabulary_size, rows):
    model, batch = models.build("bert", size, vocabulary_size), random_batch(rows, vocabulary_size)
    step = training_step(list(model.parameters()), lambda: model.loss(batch), parameter_groups(model, 0.01))
    return step, rows * model.training_flops_per_row(ROW_LENGTH, PREDICTED)


def transformers_bert(size, vocabulary_size, rows):
    """BertForMaskedLM of the same depth and width, its head on the predicted positions only."""
    try:
        from transformers import BertConfig, BertForMaskedLM
    except ImportError:
        raise UserError("bench.py speed compares with transformers: pip install -r requirements-dev.txt") from None
    shape = models.SIZES["bert"][size]
    width, depth = shape["d_model"], shape["n_layers"]
    config = BertConfig(
        vocab_size=vocabulary_size, hidden_size=width, num_hidden_layers=depth, num_attention_heads=shape["n_heads"],
        intermediate_size=4 * width, max_position_embeddings=ROW_LENGTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    model, batch = BertForMaskedLM(config), random_batch(rows, vocabulary_size)

    def loss():
        h = model.bert(input_ids=batch["tokens"]).last_hidden_state
        h = h.gather(1, batch["positions"][:, :, None].expand(-1, -1, width))
        return torch.nn.functional.cross_entropy(model.cls(h).flatten(0, 1), batch["labels"].flatten())

    layer_flops = 6 * 12 * width**2 * ROW_LENGTH + 3 * 4 * ROW_LENGTH**2 * width
    flops = rows * (depth * layer_flops + 6 * PREDICTED * (width**2 + vocabulary_size * width))
    return training_step(list(model.parameters()), loss, model.parameters()), flops


def speed(repeats):
    print(f"BERT training step, fp32, {torch.get_num_threads()} threads, {repeats} interleaved repeats")
    print("| size | micro-batch | model | seconds | share of matmul peak |\n|---|---|---|---|---|")
    for size, vocabulary_size, rows in (("tiny", 8192, 32), ("base", 32768, 8)):
        peak, peak_flops = matmul_peak()
        (our_step, our_flops), (their_step, their_flops) = ours(size, vocabulary_size, rows), transformers_bert(size, vocabulary_size, rows)
        peak_seconds, our_seconds, their_seconds = interleaved([peak, our_step, their_step], repeats)
        peak_rate = peak_flops / peak_seconds
        for name, seconds, flops in (("ours", our_seconds, our_flops), ("transformers", their_seconds, their_flops)):
            print(f"| {size} | {rows} | {name} | {seconds:.3f} | {flops / seconds / peak_rate:.0%} of {peak_rate / 1e9:.0f} GFLOP/s |", flush=True)
        del our_step, their_step
        gc.collect()


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
    print(f"input of 32 rows {1000 * input_seconds:.2f} ms, forward and backward at tiny {1000 * step_seconds:.0f} ms: {input_seconds / step_seconds:.2%}")


def depth(repeats):
    model, batch = models.build("bert", "base", 32768), random_batch(8, 32768)
    depths = [4, 8, 12, 16]

    def step_of(layers):
        def step():
            model.loss(batch, layers=list(range(layers))).backward()
            model.zero_grad(set_to_none=True)

        return step

    seconds = interleaved([step_of(layers) for layers in depths], repeats, warm_up=1)
    print("| active layers | seconds | relative to 16 | release's table |\n|---|---|---|---|")
    for layers, value in zip(depths, seconds):
        print(f"| {layers} | {value:.2f} | {value / seconds[-1]:.3f} | {rst.RTX3090_BERT[layers - 1] / rst.RTX3090_BERT[-1]:.3f} |")


def load(repeats, budget_hours=6e-5):
    """Runs of the tiny model budgeted in rtx3090 time under three loads, with and without re-probing."""
    print(f"updates within {budget_hours:g} hours of rtx3090\n| re-probing | 1 thread | 2 threads | 2 threads beside a busy process | spread |\n|---|---|---|---|---|")
    for reprobe in ("true", "false") * repeats:
        updates, walls = [], []
        for threads, busy in ((1, False), (2, False), (2, True)):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "train.py", "--size=tiny", "--device=cpu", f"--threads={threads}", "--reference=rtx3090"]
                command += [f"--budget_hours={budget_hours}", f"--reprobe={reprobe}", f"--out={folder}/run", "--validations=1", "--validation_rows=10"]
                beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
                try:
                    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                finally:
                    if beside:
                        beside.kill()
                        beside.wait()
                if done.returncode != 0:
                    raise UserError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
                result = json.loads((Path(folder) / "run" / "result.json").read_text())
                updates.append(result["updates"])
                walls.append(result["wall_seconds"])
        cells = [f"{count} in {wall:.0f} s" for count, wall in zip(updates, walls)]
        print(f"| {'yes' if reprobe == 'true' else 'no'} | {' | '.join(cells)} | {max(updates) / min(updates) - 1:.1%} |", flush=True)


@exits_on_user_error
def main(arguments=None):
    benches = {"speed": (speed, 10), "input": (input_pipeline, 20), "depth": (depth, 5), "load": (load, 1)}
    parser = Parser(description=__doc__)
    parser.add_argument("bench", choices=list(benches))
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 1:
        raise UserError(f"--repeats={options.repeats}: expected at least 1")
    train.keep_freed_memory()
    function, repeats = benches[options.bench]
    function(options.repeats or repeats)


if __name__ == "__main__":
    main()
