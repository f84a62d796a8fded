"""A CUDA device that is not there, for the tests of a machine without a GPU.

    with fake_cuda() as gpu:
        train.main(["--device=cuda", ...])      # the project's own code, as it is

Tensors on it have a device, a dtype and a shape, and no values (torch's FakeTensorMode); it works
with a CPU build of torch. What would go wrong or slowly on a GPU is recorded in `gpu.waits` or
raises: an operation on tensors of two devices, one without a CUDA kernel, and wherever the host
waits for the device. `.item()` and `.tolist()` give ones.
"""

import collections
import contextlib
import ctypes
import re
import traceback
import weakref
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent
FOLDERS = ROOT, ROOT / "data", ROOT / "methods", ROOT / "tasks"  # and not a .venv beside them
aten, CUDA, META = torch.ops.aten, torch.device("cuda:0"), torch.device("meta")
# Autograd's engine asks the build for a guard of the device. That of "meta" (number 14) does
# nothing, and takes the place of CUDA's (number 1).
LIBRARY = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
GUARDS = (ctypes.c_void_p * 21).in_dll(LIBRARY, "_ZN3c104impl26device_guard_impl_registryE")
# Operations whose result's shape depends on values: the host has to know them.
WAITING = {aten.nonzero.default, aten.masked_select.default, aten.equal.default}
NO_KERNEL = {"empty", "empty_strided", "empty_like", "detach", "lift_fresh", "_unsafe_view"}


def operators_without_cuda():
    """Names of the operators that have kernels, and none for CUDA, by torch's own table of them."""
    table = Path(torch.__file__).parents[1] / "torchgen/packaged/ATen/native/native_functions.yaml"
    found = set()
    for entry in table.read_text().split("\n- func: ")[1:]:
        _, has_kernels, kernels = entry.partition("dispatch:")
        if has_kernels and not re.search("CUDA|Composite", kernels):
            if "structured_delegate" in entry:
                continue  # its kernels are another operator's
            found.add(entry.partition("(")[0])
    return found


def place():
    """The innermost function of the project that is being executed: "file.py, function"."""
    for frame, _ in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        is_ours = path.parent in FOLDERS and path != Path(__file__).resolve()
        if is_ours and not frame.f_code.co_name.startswith("<"):
            return f"{path.name}, {frame.f_code.co_name}"
    return "?"


class FakeGPU(TorchDispatchMode):
    """Sees every operation, above FakeTensorMode.

    waits: {(what, "file.py, function"): how often} the host waited for the device
    kernels: {operator: how often} launched
    attention: {"flash", "efficient" or "math": how often}, forward
    peak_bytes: the most memory that tensors took
    """

    def __init__(self):
        super().__init__()
        self.waits, self.kernels = collections.Counter(), collections.Counter()
        self.attention, self.live, self.bytes, self.peak_bytes = collections.Counter(), {}, 0, 0
        self.without_cuda = operators_without_cuda()
        self.in_backward = self.in_operation = False

    def wait(self, what):
        self.waits[what, place()] += 1

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if function is torch.ops.prim.device.default and self.in_backward and not self.in_operation:
            return META  # or the engine would ask for streams
        if keywords.get("device") == META:
            keywords["device"] = CUDA
        inputs = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)]
        if function is aten._local_scalar_dense.default:
            if inputs[0].is_cuda:
                self.wait("item")
            return {torch.bool: True}.get(
                inputs[0].dtype, 1.0 if inputs[0].is_floating_point() else 1
            )
        outer, self.in_operation = self.in_operation, True
        try:
            # (fused AdamW has no version for tensors without values; it returns nothing.)
            fused = function is aten._fused_adamw_.default
            result = None if fused else function(*arguments, **keywords)
        finally:
            self.in_operation = outer
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if any(x.is_cuda for x in inputs + outputs):
            self.check(function, arguments, keywords, inputs, outputs)
        return result

    def check(self, function, arguments, keywords, inputs, outputs):
        """Records an operation on the device."""
        for tensor in outputs:
            self.remember(tensor)
        if function.namespace != "aten" or function.is_view:
            return
        name = function.name().removeprefix("aten::")
        self.kernels[name] += 1
        if name in self.without_cuda:
            raise NotImplementedError(f"{name} has no CUDA kernel, in {place()}")
        if function in WAITING:
            self.wait(name)
        if function in (aten._to_copy.default, aten.copy_.default):
            source, target = (inputs[0], outputs[0]) if len(inputs) == 1 else inputs[1::-1]
            asynchronous = keywords.get("non_blocking") or arguments[2:3] == (True,)
            if source.is_cuda != target.is_cuda and not asynchronous:
                self.wait("copy")
            return
        for tensor in inputs:
            if tensor.dim() and not tensor.is_cuda:  # an index, say
                self.wait("copy")
            if tensor.dtype == torch.uint16 and name not in NO_KERNEL:  # it has hardly any kernels
                raise NotImplementedError(f"{name} of {tensor.dtype}, in {place()}")

    def remember(self, tensor):
        """Counts the memory of a new tensor, as long as it lives."""
        storage = tensor.untyped_storage()
        if tensor.is_cuda and storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.bytes -= self.live.pop(key, 0)

    def scaled_dot_product_attention(
        self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None
    ):
        """Which kernel torch takes from Ampere on (sdp_utils.cpp), called as torch does."""
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            q, k, v = (x.to(dtype) for x in (q, k, v))
            attn_mask = attn_mask if attn_mask is None else attn_mask.to(dtype)
        if attn_mask is None and q.dtype != torch.float32:
            self.attention["flash"] += 1
            flash = aten._scaled_dot_product_flash_attention
            return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        if attn_mask is None or attn_mask.stride(-1) == 1 and attn_mask.dtype == q.dtype:
            self.attention["efficient"] += 1
            if attn_mask is not None:
                room = F.pad(attn_mask, (0, -attn_mask.shape[-1] % 16))  # rows of whole blocks
                attn_mask = room[..., : k.shape[2]].expand(*q.shape[:3], k.shape[2])
            efficient, grad = aten._scaled_dot_product_efficient_attention, torch.is_grad_enabled()
            return efficient(q, k, v, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]
        self.attention["math"] += 1
        math = aten._scaled_dot_product_attention_math
        return math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def fake_cuda(capability=(8, 0), memory_bytes=80 << 30):
    """Everything in this block may use the device "cuda"; gives the `FakeGPU`."""
    gpu, run_engine, torch_tensor = FakeGPU(), torch.autograd._engine_run_backward, torch.tensor

    def run_backward(*arguments, **keywords):
        gpu.in_backward = True
        try:
            with torch.autograd.set_multithreading_enabled(False):
                return run_engine(*arguments, **keywords)
        finally:
            gpu.in_backward = False

    def tolist(tensor):
        if tensor.is_cuda:
            gpu.wait("tolist")
        return np.ones(
            tuple(tensor.shape), dtype=float if tensor.is_floating_point() else int
        ).tolist()

    def to(module, device):  # the original writes into the parameters, which a fake cannot have
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    moved = parameter.detach().to(device, non_blocking=True)
                    part._parameters[name] = torch.nn.Parameter(moved)
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer.to(device, non_blocking=True)
        return module

    def tensor(data, *arguments, device=None, **keywords):
        made = torch_tensor(data, *arguments, **keywords)
        if device is None or torch.device(device).type != "cuda":
            return made
        gpu.wait("copy")
        return torch.zeros(made.shape, dtype=made.dtype, device=device)

    replaced = {
        torch.cuda: dict(
            is_available=lambda: True,
            device_count=lambda: 1,
            get_device_name=lambda *_: "fake",
            get_device_capability=lambda *_: capability,
            mem_get_info=lambda *_: (memory_bytes, memory_bytes),
            is_bf16_supported=lambda *_: True,
            synchronize=lambda *_: gpu.wait("synchronize"),
            set_device=lambda *_: None,
            is_current_stream_capturing=lambda: False,
        ),
        torch: dict(tensor=tensor),
        torch.Tensor: dict(pin_memory=lambda tensor: tensor),
        torch.nn.Module: dict(to=to),
        torch.autograd: dict(_engine_run_backward=run_backward),
        fake_tensor: dict(init_gpu_context=lambda device: None),
        fake_tensor.FakeTensor: dict(tolist=tolist),
        F: dict(scaled_dot_product_attention=gpu.scaled_dot_product_attention),
    }
    guard, GUARDS[1] = GUARDS[1], GUARDS[14]
    with contextlib.ExitStack() as stack:
        stack.callback(GUARDS.__setitem__, 1, guard)
        for owner, attributes in replaced.items():
            stack.enter_context(patch.multiple(owner, **attributes))
        stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(gpu)
