"""Reference system time (RST): what a computation would have cost on a fixed reference machine.

    python rst.py                     this machine's probe times and its factor for every reference
    python rst.py --save=mine.json    makes this machine a reference: train.py --reference=mine.json

Kaddour et al. 2023 (section 4) charge a run, wherever it runs, the seconds that its iterations took
on one reference machine, looked up in a table of recorded step times. Here the exchange rate is
measured: a probe, one Transformer layer at the paper's shapes, is timed on this machine, and

    factor = probe seconds on the reference / probe seconds here,    RST = seconds here x factor.

The probe is a frozen copy that never imports model.py: faster model code is a gain and must not
change the exchange rate. It is timed again and again during a run, because the speed of a shared
machine changes.
"""

import collections
import contextlib
import ctypes
import dataclasses
import os
import platform
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

# How long an idle thread of GNU OpenMP polls for work before it sleeps; read when torch is loaded.
# By default it polls for milliseconds, and on a busy machine holds the core that another thread of
# the same operation waits for: beside a busy process on two cores an update took 0.31 s in place of
# 0.22 to 0.27 s, and single probes varied by 63% instead of 3 to 8%.
os.environ.setdefault("GOMP_SPINCOUNT", "6000")

import torch
import torch.nn.functional as F

from errors import UserError, exits_on_user_error
from flags import Option, Parser
from parallel import gather, max_over_processes, wait_for_all
from runs import is_a, read_record, write_json

# Seconds per micro-batch of 128 rows of 128 tokens on one RTX 3090 (CUDA 11.7, PyTorch 1.13, fp16
# autocast), forward and backward and 1/12 of an update, with 1 to 16 layers: the record of the
# paper's release, bert/rst/saved_rsts.py. (Its seventh entry must mean 0.1052; it is not used.)
RTX3090_BERT = [
    0.02521, 0.03837, 0.05177, 0.06508, 0.07847, 0.09188, 0.01052, 0.1186, 0.1319, 0.1454, 0.1589,
    0.1722, 0.1857, 0.1988, 0.2120, 0.2253,
]  # fmt: skip
# Seconds per update of 144 rows (512 and 114 tokens) on one A100 80 GB (CUDA 11.8, PyTorch 2.0,
# TF32, compiled), with 1 to 12 layers a stack: the release's t5/t5/utils/train.py.
A100_T5 = [0.129, 0.209, 0.291, 0.373, 0.455, 0.538, 0.619, 0.703, 0.783, 0.865, 0.947, 1.031]


def seconds_per_layer(table):
    """Slope of the line from the first to the last entry of a table of 1, 2, ... layers: every
    other recorded time lies on that line within 1.5%."""
    return (table[-1] - table[0]) / (len(table) - 1)


@dataclass(frozen=True)
class Reference:
    """A machine that budgets are counted on: what a full probe takes there, and how that is
    known."""

    name: str
    probe_seconds: dict  # by probe: {"bert": seconds, "t5": seconds}, one of them at least
    provenance: str


RECORDED = "seconds per layer (of T5: pair of layers), from the release's recorded step times"
REFERENCES = {
    "rtx3090": Reference("rtx3090", {"bert": seconds_per_layer(RTX3090_BERT)}, RECORDED),
    # The table is per 144 rows, the probe has 72.
    "a100": Reference("a100", {"t5": seconds_per_layer(A100_T5) / 2}, RECORDED),
    "this": Reference("this", {}, "plain time on this machine with all its processes, factor 1"),
}


def find_reference(name):
    """The reference of that name, or the one in a file that `python rst.py --save=FILE` wrote."""
    if name in REFERENCES:
        return REFERENCES[name]
    if not os.path.exists(name):
        names = ", ".join(REFERENCES)
        raise UserError(f"--reference={name}: neither one of {names} nor a file")
    stored = read_record(name, {"name": str, "probe_seconds": dict, "provenance": str})
    seconds = {probe: stored["probe_seconds"].get(probe) for probe in PROBES}
    seconds = {probe: value for probe, value in seconds.items() if value is not None}
    if not seconds or not all(is_a(value, float) and value > 0 for value in seconds.values()):
        raise UserError(f"{name}: probe_seconds is {seconds}, expected seconds of a probe")
    return Reference(stored["name"], seconds, stored["provenance"])


# -- The probes: frozen, so that a factor means the same for ever ----------------------------------

WIDTH, HEADS = 768, 12


def attention(queries, keys_values, output, scale=None, bias=None, causal=False):
    q, k, v = (x.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for x in (queries, *keys_values))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return F.linear(y.transpose(1, 2).flatten(2), output)


def bert_layer(x, weights):
    """A pre-norm layer with a gated GELU, as crammed BERT's: (B, 128, 768)."""
    qkv, out, w_in, w_out = weights
    h = F.layer_norm(x, (WIDTH,))
    q, k, v = F.linear(h, qkv).chunk(3, dim=-1)
    x = x + attention(q, (k, v), out)
    a, g = F.linear(F.layer_norm(x, (WIDTH,)), w_in).chunk(2, dim=-1)
    return x + F.linear(a * F.gelu(g), w_out)


def t5_layer_pair(x, y, weights):
    """One encoder layer on (B, 512, 768) and one decoder layer on (B, 114, 768), as T5 v1.1's."""
    qkv, out, w_in, w_out, qkv2, out2, cross_q, cross_kv, cross_out, w_in2, w_out2, bias, bias2 = (
        weights
    )

    def feed_forward(x, w_in, w_out):
        g, a = F.linear(F.rms_norm(x, (WIDTH,)), w_in).chunk(2, dim=-1)
        return x + F.linear(F.gelu(g, approximate="tanh") * a, w_out)

    q, k, v = F.linear(F.rms_norm(x, (WIDTH,)), qkv).chunk(3, dim=-1)
    x = feed_forward(x + attention(q, (k, v), out, bias=bias.to(q.dtype)), w_in, w_out)
    q, k, v = F.linear(F.rms_norm(y, (WIDTH,)), qkv2).chunk(3, dim=-1)
    y = y + attention(q, (k, v), out2, bias=bias2.to(q.dtype))
    k, v = F.linear(x, cross_kv).chunk(2, dim=-1)
    y = y + attention(F.linear(F.rms_norm(y, (WIDTH,)), cross_q), (k, v), cross_out)
    return feed_forward(y, w_in2, w_out2)


# A full probe has `rows` rows. A CPU times one of them and multiplies. So short a probe suffers
# from other load as a training step does: in every operation that is spread over the cores, both
# wait for the slowest (bench.py load).
PROBES = {
    "bert": dict(
        layer=bert_layer,
        rows=128,
        lengths=[128],
        shapes=[(2304, 768), (768, 768), (3072, 768), (768, 1536)],
    ),
    "t5": dict(
        layer=t5_layer_pair,
        rows=72,
        lengths=[512, 114],
        shapes=[(2304, 768), (768, 768), (4096, 768), (768, 2048)]
        + [(2304, 768), (768, 768), (768, 768), (1536, 768), (768, 768)]
        + [(4096, 768), (768, 2048)],
    ),
}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Probe:
    """One Transformer layer, forward and backward with weight gradients, not compiled, in the
    precision that the device trains in unless it is told otherwise."""

    def __init__(self, name, device):
        self.name, self.device = name, torch.device(device)
        self.dtype = DTYPES[default_precision(device)]
        self.full_rows = PROBES[name]["rows"]
        self.rows = 1 if self.device.type == "cpu" else self.full_rows
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, std):  # of ordinary size everywhere, so that no value is denormal
            return (torch.randn(shape, generator=generator) * std).to(self.device)

        self.weights = [normal(*shape, std=0.02) for shape in PROBES[name]["shapes"]]
        lengths = PROBES[name]["lengths"]
        self.inputs = [normal(self.rows, length, WIDTH, std=1.0) for length in lengths]
        self.gradient = normal(self.rows, lengths[-1], WIDTH, std=1.0)
        self.leaves = [tensor.requires_grad_() for tensor in self.inputs + self.weights]
        if name == "t5":
            future = torch.full((114, 114), float("-inf"), device=self.device).triu(1)
            bias = [normal(1, HEADS, length, length, std=0.1) for length in lengths]
            self.weights = [*self.weights, bias[0], bias[1] + future]

    def seconds(self):
        """Times one pass; returns the seconds that a full probe takes at this pace."""
        synchronise(self.device)
        start = time.perf_counter()
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed):
            output = PROBES[self.name]["layer"](*self.inputs, self.weights)
        torch.autograd.grad(output, self.leaves, self.gradient.to(output.dtype))
        synchronise(self.device)
        return (time.perf_counter() - start) * self.full_rows / self.rows


THREADS = Option(0, "CPU threads, 0 for torch's choice", minimum=0, maximum=4096)


def prepare_machine(threads=0):
    """What every program that trains or times does first, so that the probe runs as training does.
    `threads` of the CPU; 0: torch's choice."""
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in the study
    # It plans half a second for every new shape, and masks have made it return NaN.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Numbers below 1e-38 count as 0: T5's first softmax gradients are full of them, and on a CPU
    # they double the time of its backward pass. Threads started later inherit this, others do not.
    torch.set_flush_denormal(True)
    # Freed memory is kept for the next step: giving it back to the system and faulting it in again
    # costs a CPU step 10 to 20%.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # there is no glibc
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def check_device(device):
    """Raises UserError for what is no device of torch's, or is not in this machine."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device={device}: expected cpu, cuda or cuda:NUMBER")
    gpus = torch.cuda.device_count()
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= gpus:
        smaller = " or a smaller number" if gpus else ""
        raise UserError(
            f"--device={device}: torch sees {gpus} GPU(s) here; say --device=cpu{smaller}"
        )


def synchronise(device):
    """Waits until the device has done its work, so that a clock may be read."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def default_precision(device):
    """What a device trains in unless it is told otherwise: "bf16" on a GPU, "fp16" before Ampere,
    where bf16 is emulated, and "fp32" on a CPU, since few have units for 16 bits."""
    if torch.device(device).type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


# -- The clock -------------------------------------------------------------------------------------

PROBE_SHARE = 0.01  # of the time goes into probing
PROBE_MEMORY_SECONDS = 60.0  # a change of load is forgotten after a minute ...
LEAST_PROBES = 4  # ... or after so many probes, where they are rarer
STALL = 10.0  # times the usual time: an update that takes longer is counted and shown


class Clock:
    """Charges a run in reference seconds, and says how much of the budget is spent.

    An update is charged everything between the start and the end of `charged()`, on the slowest
    process, less its `free()` blocks, times the factor. The factor is that of the probes of the
    last minute (of the last four, where they are rarer), without the fastest and the slowest;
    before the run eight are taken.

        On the reference a probe takes 0.20 s. Here the last ones took 0.24, 0.25, 0.26 and 0.90 s:
        without 0.24 and 0.90 the mean is 0.255 s, so the factor is 0.20 / 0.255 = 0.784.
        An update that takes 1.5 s here, 0.2 s of them free, is charged 1.3 x 0.784 = 1.02 s.
        Two processes at that factor are two machines, so theirs add up, to 2 x 0.784 = 1.57: if the
        slower one's update takes these 1.3 s, it is charged 1.3 x 1.57 = 2.04 s.

    Args:
        reference: a `Reference`.
        model: "bert" or "t5": which probe is timed, where the reference has both.
        device: where the probe runs.
        budget_seconds: the budget in reference seconds; or
        budget_updates: the budget in updates (then `progress` counts updates, and time is only
            reported).
        reprobe: whether the probe is timed again during the run.
    """

    def __init__(
        self, reference, model, device, budget_seconds=None, budget_updates=None, reprobe=True
    ):
        self.reference, self.device = reference, torch.device(device)
        self.budget_seconds, self.budget_updates = budget_seconds, budget_updates
        self.reprobe = reprobe
        self.updates, self.spent_seconds, self.free_seconds = 0, 0.0, 0.0
        self.stalls, self.stall_seconds = 0, 0.0
        self.last_seconds = collections.deque(maxlen=50)  # of the last updates, here: what is usual
        self.free_block_seconds = 0.0  # of this update
        self.weights = []  # what may not change in free(): set when there is a model
        self.rehearsed_progress = None  # set while the loop warms up the shapes of a later time
        self.probe, self.probes, self.seconds_since_probe = None, collections.deque(), 0.0
        self.factor, self.factor_history = 1.0, []  # [spent seconds, factor]
        if known := reference.probe_seconds:
            name = model if model in known else next(iter(known))
            self.probe = Probe(name, device)
            self.probe.seconds()  # warm-up
            self.measure(2 * LEAST_PROBES)

    def measure(self, repeats=1):
        """Times the probe, on all processes together, and puts the new factor in force."""
        for _ in range(repeats):
            self.probes.append((self.probe.seconds(), time.perf_counter()))
        oldest = time.perf_counter() - PROBE_MEMORY_SECONDS
        while len(self.probes) > LEAST_PROBES and self.probes[0][1] < oldest:
            self.probes.popleft()
        times = sorted(seconds for seconds, _ in self.probes)
        mean = statistics.mean(times[1:-1])  # of LEAST_PROBES at least
        mine = self.reference.probe_seconds[self.probe.name] / mean
        everyone = gather([mine, mean * self.probe.rows / self.probe.full_rows], self.device)
        self.factor = sum(factor for factor, _ in everyone)
        self.probe_wall_seconds = max(wall for _, wall in everyone)
        self.seconds_since_probe = 0.0
        self.factor_history.append([self.spent_seconds, self.factor])

    def probe_when_due(self):
        """Between updates: keeps the probing at its share of the time. Not charged."""
        if not self.probe or not self.reprobe:
            return
        if self.seconds_since_probe * PROBE_SHARE >= self.probe_wall_seconds:
            self.measure()

    @property
    def progress(self):
        """Share of the budget that is spent, in [0, 1]: what every schedule follows."""
        if self.rehearsed_progress is not None:
            return self.rehearsed_progress
        if self.budget_updates is not None:
            return min(1.0, self.updates / self.budget_updates)
        return min(1.0, self.spent_seconds / self.budget_seconds)

    @contextlib.contextmanager
    def charged(self):
        """One update: what happens in this block is charged, less its free blocks."""
        synchronise(self.device)
        wait_for_all()  # a process that is ready early is not charged for waiting
        self.free_block_seconds, start = 0.0, time.perf_counter()
        yield
        synchronise(self.device)
        mine = [time.perf_counter() - start - self.free_block_seconds, self.free_block_seconds]
        self.charge(*max_over_processes(mine, self.device))

    def charge(self, seconds, free_seconds):
        """Charges an update of so many seconds here, on the slowest process."""
        self.charged_seconds, self.update_free_seconds = seconds * self.factor, free_seconds
        self.updates += 1
        self.spent_seconds += self.charged_seconds
        self.free_seconds += free_seconds
        self.seconds_since_probe += seconds
        if self.last_seconds and seconds > STALL * statistics.median(self.last_seconds):
            self.stalls += 1
            self.stall_seconds += self.charged_seconds
        self.last_seconds.append(seconds)

    @contextlib.contextmanager
    def free(self):
        """A block of work that is reported but not charged. Weights may not change in it:
        checked."""
        synchronise(self.device)
        start, earlier = time.perf_counter(), self.free_block_seconds
        before = fingerprint(self.weights)
        yield
        # Waits for the device; the checking is free, too.
        changed = fingerprint(self.weights) != before
        # Not +=, so that a block inside this one counts once.
        self.free_block_seconds = earlier + time.perf_counter() - start
        if changed:
            raise RuntimeError("weights changed in clock.free(): free work may not train the model")

    def state_dict(self):
        names = ["updates", "spent_seconds", "free_seconds", "stalls", "stall_seconds"]
        names += ["seconds_since_probe", "factor_history"]
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        # The factor is this session's: the run may have moved to another machine.
        for name, value in state.items():
            setattr(self, name, value)
        if self.probe:
            self.factor_history.append([self.spent_seconds, self.factor])


def fingerprint(tensors):
    """Numbers that change with any bit of the tensors; versions notice what adds up to the same."""
    sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors]
    return [tensor._version for tensor in tensors], torch.stack(sums).tolist() if sums else []


# -- The command -----------------------------------------------------------------------------------


def device_name(device):
    """The model of a GPU or of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:  # Linux says it best
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.machine()} CPU"


def peak_memory_bytes(device):
    """The most memory of a GPU that this process has used; None of a CPU."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.max_memory_allocated(device) if on_gpu else None


FLAGS = {
    "save": Option(None, "a file: write this machine's probe times as a reference", kind=str),
    "reference": Option(None, "a file of --save: print its factor, too", kind=str),
    "repeats": Option(30, "how often each probe is timed", minimum=1),
    "threads": THREADS,
    "device": Option("cuda" if torch.cuda.is_available() else "cpu", "what is timed"),
}


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__)
    for name, option in FLAGS.items():
        parser.add(name, option)
    options = parser.parse_args(arguments)
    check_device(options.device)
    references = [*REFERENCES.values()]
    if options.reference:
        references.append(find_reference(options.reference))
    prepare_machine(options.threads)
    machine = (
        f"{device_name(options.device)}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {default_precision(options.device)}"
    )
    print(machine)
    measured = {}
    for name in PROBES:
        probe = Probe(name, options.device)
        probe.seconds()  # warm-up
        times = [probe.seconds() for _ in range(options.repeats)]
        measured[name] = mean = statistics.mean(times)
        print(
            f"{name} probe ({probe.rows} of {probe.full_rows} rows timed): {mean:.4g} s full, "
            f"from {min(times):.4g} to {max(times):.4g} over {len(times)} repeats"
        )
        for reference in references:
            if name in reference.probe_seconds:
                factor = reference.probe_seconds[name] / mean
                hours = f"one {reference.name} hour is {1 / factor:.4g} hours here"
                print(f"  {reference.name}: factor {factor:.5g}; {hours}")
    if options.save:
        saved = Reference(Path(options.save).stem, measured, machine)
        write_json(options.save, dataclasses.asdict(saved))
        print(f"saved: train.py --reference={options.save}")


if __name__ == "__main__":
    main()
