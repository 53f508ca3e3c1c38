"""The host's side of launches: the bytes that reach the driver, and the number of functions a public operator calls.

Triton's genuine launcher runs over a stand-in for libcuda.so.1, which `test_aot_launches` builds and names in the
environment. A process of its own, as compile_kernels is. Prints a JSON object.
"""

import ctypes
import functools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import compile_kernels  # before triton: it turns the interpreter off
import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

import dcdit_kernels as K
from dcdit import DCDiT, DCDiTConfig
from dcdit.model import PredictabilityRouter
from dcdit_kernels import _triton_support, flash
from dcdit_kernels.triton import _launch
from dcdit_kernels.triton.chunk import chunk_forward

STUB = ctypes.CDLL(Path(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"))
SIZES = {"i32": 4, "fp32": 4}  # others are of 8 bytes
own_launch = _launch.Kernel.__getitem__
same = 0


def use_stub(stream=7):
    """Triton's own launcher for CUDA, without a device."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: stream,
        get_current_target=lambda: compile_kernels.TARGETS["sm_90"],
        allocate_default_profile_scratch=lambda *args: None,
        launcher_cls=CudaLauncher,
    )
    triton.runtime.driver.set_active(driver)
    driver.utils = CudaUtils()


def taken():
    out = ctypes.create_string_buffer(1024)
    count = STUB.stub_take(out)
    return out.raw[:count]


def compare(self, grid, *args, **constants):
    """In place of a Kernel's launch: Triton's launch, one that is new here and one that is kept."""
    global same
    if constants:
        compare(self.bind(**constants), grid, *args)
        return
    STUB.stub_expect(0, None)
    compiled = self.function[grid](*args, **self.constants)
    types = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    sizes = [SIZES.get(kind, 8) for kind in types] + [8, 8]  # and Triton's two scratch buffers
    STUB.stub_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    launches = []
    for launch in (lambda: self.function[grid](*args, **self.constants), *[lambda: own_launch(self, grid)(*args)] * 2):
        launch()
        launches.append(taken())
    assert launches[0] == launches[1] == launches[2], f"{self.function.__name__}: {launches}"
    assert launches[0][:4] != b"\xff" * 4, "nothing was launched"
    same += 1


def awkward():
    """Arguments that Triton takes for others: addresses off 16 bytes, none, ones, integers beyond 32 bits."""
    h, token, out = torch.empty(1024), torch.zeros(64, dtype=torch.int32), torch.empty(1024)
    for part in (h, h[1:], h[4:], h.bfloat16(), torch.nn.Parameter(h)):
        for pos in (None, h, h[2:]):
            for stride in (1, 8, 16, 2**31, 2**40 + 1):
                chunk_forward[(3, 2)](part, pos, token, out, stride, 16, 4, 5, stride, ROWS=8, COLUMNS=64, num_warps=4)


def hooked():
    """Launches that a hook sees, of two by Triton and two by us."""
    seen = []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    x = torch.empty(64)
    triton.knobs.runtime.launch_enter_hook.add(hook)
    for launch in (chunk_forward, chunk_forward.function) * 2:
        launch[(1,)](x, None, x.int(), x, 8, 0, 4, 5, 8, ROWS=8, COLUMNS=64)
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    return seen


def functions_called(call):
    """By Python and by C, as sys.setprofile sees them, once everything is kept."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    for _ in range(3):
        call()
    sys.setprofile(note)
    call()
    sys.setprofile(None)
    return count


def operators():
    """name → a call of a public operator, with tensors of a CPU in a GPU's place."""
    batch, width = 4, 64
    prob = torch.rand(batch, 64)
    plan = K.plan_chunks(prob, (8, 8))
    x, y = (torch.empty(plan.capacity, width) for _ in range(2))
    gate, shift, scale = torch.empty(batch, 6 * width).split(width, 1)[:3]
    h, pos = torch.empty(batch, 64, width), torch.empty(64, width)
    features = torch.empty(batch, width, 8, 8).contiguous(memory_format=torch.channels_last)
    qkv = torch.empty(plan.capacity, 3, 2, 32, dtype=torch.bfloat16).unbind(1)
    lengths = plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen
    vector, leaf = torch.empty(width), torch.empty(plan.capacity, width, requires_grad=True)
    return {
        "adaln_modulate": lambda: K.adaln_modulate(x, shift, scale, plan),
        "gate_residual": lambda: K.gate_residual(x, y, gate, plan),
        "gate_residual_modulate": lambda: K.gate_residual_modulate(x, y, gate, shift, scale, plan),
        "gate_residual_modulate with gradients": lambda: K.gate_residual_modulate(leaf, y, gate, shift, scale, plan),
        "chunk": lambda: K.chunk(h, plan, pos),
        "dechunk": lambda: K.dechunk(x, prob, plan, h),
        "ema_smooth": lambda: K.ema_smooth(x, prob, plan),
        "group_norm_silu": lambda: K.group_norm_silu(features, vector, vector, 8, gate),
        "boundary_predictability": lambda: K.boundary_predictability(features, vector, vector, vector, vector[:1]),
        "boundary_cosine": lambda: K.boundary_cosine(h, h),
        "varlen_attention": lambda: K.varlen_attention(*qkv, *lengths, packing=plan),
        "plan_chunks": lambda: K.plan_chunks(prob, (8, 8), capacity=256),
    }


class FixedRouter(PredictabilityRouter):
    """Runs the router, whose kernels launch nothing, and keeps every other cell."""

    def forward(self, h, c=None, *, grid=None):
        super().forward(h, c, grid=grid)
        return torch.tensor([0.9, 0.1]).repeat(h.shape[0], h.shape[1] // 2)


def forward_calls():
    """Functions that a forward of a DC-DiT calls outside of its blocks, and in each block."""
    counts = []
    for depth in (1, 2):
        config = DCDiTConfig(input_size=(4, 4), hidden_size=64, depth=depth, num_heads=2, encoder_width=32)
        net = DCDiT(config, router=FixedRouter(config)).bfloat16().requires_grad_(False)
        inputs = torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16), torch.ones(1), torch.ones(1, dtype=torch.int64)
        counts.append(functions_called(lambda: net(*inputs)))  # noqa: B023
    return {"DC-DiT outside of blocks": 2 * counts[0] - counts[1], "DC-DiT block": counts[1] - counts[0]}


if __name__ == "__main__":
    use_stub()
    _launch.Kernel.__getitem__ = lambda self, grid: functools.partial(compare, self, grid)
    # The kernels of test_aot_kernels, which may be in Triton's cache.
    for dtype, grid, width, batch in ((torch.bfloat16, (32, 32), 1152, 5), (torch.float32, (7, 9), 72, 1)):
        compile_kernels.launch_everything(dtype, grid, width, 0.3, batch)
    awkward()
    _launch.Kernel.__getitem__ = own_launch
    STUB.stub_expect(0, None)
    _triton_support._interpreted = lambda: True  # a CPU's tensors pass for a GPU's
    flash._refuses_device, flash.LIBRARIES = lambda *_: None, [x for x in flash.LIBRARIES if x.keywords == flash.TRITON]
    with K.use_backend("triton"):
        calls = {name: functions_called(call) for name, call in operators().items()}
        _triton_support.INTERPRETED_WRONGLY = ()
        calls |= forward_calls()
    print(json.dumps({"same": same, "hooked": hooked(), "calls": calls}))
