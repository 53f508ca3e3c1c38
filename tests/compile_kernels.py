"""Compile every Triton kernel as it is launched, without a GPU; one JSON line for each kernel, case and target.

    python tests/compile_kernels.py CASE… [--count KERNEL,…]

--count: instructions of the named kernels alone, in the first case. Disassembling takes longer than compiling.

A process of its own, because Triton's interpreter and its compiler exclude each other. Launches are recorded and not
run; arguments are specialised as by Triton: 16-divisible integers and pointers, ones, None.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["MLIR_DISABLE_MULTITHREADING"] = "1"  # one process on each core

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dcdit_kernels import plan_chunks
from dcdit_kernels._ops import OPERATORS
from dcdit_kernels.flash import HALF

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

recorded = {}


def record(function, *args, grid, warmup, **kwargs):
    """Stands in for JITFunction.run."""
    options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    # Attributes as Triton's own launcher writes them, so that its cache serves both.
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = values[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        divisible = False
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            divisible = special and value % 16 == 0
            if not special:
                continue
        attributes[(index,)] = [["tt.divisibility", 16]] if divisible else []
    recorded[f"{function.__name__} {signature} {constants} {attributes}"] = (
        function, signature, constants, attributes, options, current,
    )  # fmt: skip


def launch_everything(dtype, grid, width, share, batch=2):
    """Forward and backward of every operator that has kernels, on tensors nobody reads."""
    cells = grid[0] * grid[1]
    prob = torch.where(torch.rand(batch, cells) < share, 0.9, 0.1)
    plan = plan_chunks(prob, grid, backend="reference")
    new = lambda *shape, **kw: torch.empty(*shape, **{"dtype": dtype, **kw})  # noqa: E731
    x, y, h, residual = new(plan.capacity, width), new(plan.capacity, width), new(batch, cells, width), None
    residual = new(batch, cells, width, dtype=torch.float32)
    gate, shift, scale = new(batch, 6 * width).split(width, 1)[:3]
    channels = 8 * (width // 32)
    # Channels last, as the router's convolutions leave them.
    features, vector = (
        new(batch, *grid, channels, dtype=torch.float32).movedim(3, 1),
        new(channels, dtype=torch.float32),
    )
    q, kernel = new(batch, cells, width, dtype=torch.float32), new(width, 3, 3, dtype=torch.float32)
    cu = torch.arange(batch + 1, dtype=torch.int32) * cells
    packed_q = q.view(-1, width)
    layer = {"eps": 1e-6, "norm": "layer", "norm_weight": None}
    rms = {"eps": 1e-6, "norm": "rms", "norm_weight": new(width)}
    cases = [
        *(
            ("chunk", {"h": h, "pos_embed": new(cells, width), "plan": plan, "reduce": reduce}, [x])
            for reduce in ("own", "mean")
        ),
        ("adaln_modulate", {"x": x, "shift": shift, "scale": scale, "plan": plan, **layer}, [x]),
        ("adaln_modulate", {"x": x, "shift": shift, "scale": scale, "plan": plan, **rms}, [x]),
        ("adaln_modulate", {"x": h, "shift": shift, "scale": scale, "plan": None, **layer}, [h]),
        ("gate_residual", {"x": x, "y": y, "gate": gate, "plan": plan}, [x]),
        *(
            (
                "gate_residual_modulate",
                {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale, "plan": plan, **norm},
                [x, x],
            )
            for norm in (layer, rms)
        ),
        ("ema_smooth", {"x": x, "boundary_prob": prob, "plan": plan}, [x]),
        ("boundary_cosine", {"q": q, "k": q, "kernel": kernel, "grid": grid, "cu_seqlens": None}, [prob]),
        (
            "boundary_cosine",
            {"q": packed_q, "k": packed_q, "kernel": None, "grid": None, "cu_seqlens": cu},
            [prob.view(-1)],
        ),
        (
            "boundary_predictability",
            {"features": features, "norm_weight": vector, "norm_bias": vector, "score_weight": vector,
             "score_bias": new(1, dtype=torch.float32), "groups": 8, "eps": 1e-5},
            [prob],
        ),
    ]  # fmt: skip
    # Of encoder and decoder: a quarter of the model's width and all of it.
    norm_groups = 32 if width % 128 == 0 else 8
    for part in (width // 4, width):
        if part % norm_groups == 0:
            picture, affine = new(batch, 8, 40, part).movedim(3, 1), new(part)
            inputs = {
                "x": picture,
                "weight": affine,
                "bias": affine,
                "cond": new(batch, 2 * part)[:, :part],
                "x_bias": affine,
            }
            cases.append(("group_norm_silu", {**inputs, "groups": norm_groups, "eps": 1e-5}, [picture]))
    for smoothing in ("gaussian", "ema", None):
        inputs = {"x": x, "boundary_prob": prob, "residual": residual, "plan": plan}
        cases.append(("dechunk", {**inputs, "sigma": 1.0, "smoothing": smoothing}, [h]))
    head = 128 if width % 128 == 0 else width
    joined = plan.join(plan)
    stream, tables = (
        new(plan.capacity, 3 * width).view(plan.capacity, 3, width // head, head),
        new(2, cells, head // 2, dtype=torch.float32),
    )
    for norm, pairing, second in (("rms", "interleaved", True), ("layer", "half", False)):
        weights = dict.fromkeys(
            ("q_weight", "k_weight", "second_q_weight", "second_k_weight"), new(head) if second else None
        )
        inputs = {"q": stream[:, 0], "k": stream[:, 1], "second_q": None, "second_k": None, **weights}
        inputs |= {"cos": tables[0], "sin": tables[1], "position": plan.cell_index, "source": None, "plan": plan}
        if second:
            inputs |= {"second_q": stream[:, 0], "second_k": stream[:, 1], "source": joined.source, "plan": joined}
            inputs["position"] = torch.cat([plan.cell_index, plan.cell_index])
        grad = new(inputs["plan"].capacity, width // head, head)
        cases.append(("qk_norm_rope", {**inputs, "eps": 1e-6, "norm": norm, "pairing": pairing}, [grad, grad]))
    for op, inputs, grads in cases:
        kernels = OPERATORS[op].backends["triton"].implementation
        floats = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        kernels.forward(**inputs)
        kernels.backward(*grads, [True] * len(floats), **inputs)
    if dtype in HALF:
        from dcdit_kernels.triton import attention  # after `record` has its place, which `_launch` looks at

        qkv = new(plan.capacity, 3, width // 72, 72)
        attention.varlen_attention(*qkv.unbind(1), plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen)


def compiled(function, signature, constants, attributes, options, target, counted):
    """Registers, spills, widths of loads, 64-bit products of a compiled launch; a warp's instructions if `counted`."""
    if target.backend == "hip":
        # As the launcher chooses there.
        names = function.arg_names
        constants = {k: 0 if names[k[0]] == "PARTS" else v for k, v in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=target, options=options)
    wide = len(re.findall(r"arith\.muli[^\n]*i64", kernel.asm["ttir"]))
    if target.backend == "hip":
        spills = [int(n) for n in re.findall(r"[sv]gpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])]
        return {"spills": sum(spills), "i64_products": wide}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = disassembled("-res-usage", file.name)
        counts = instructions(disassembled("-sass", file.name)) if counted else {}
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "loads_16B": len(re.findall(r"ld\.global[^\n]*v4\.b32|ld\.global[^\n]*v2\.b64|cp\.async\.cg[^\n]*0x10", ptx)),
        "i64_products": wide,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        **counts,
    }


def disassembled(option, file):
    """The output of cuobjdump for a cubin."""
    return subprocess.run([CUOBJDUMP, option, file], capture_output=True, text=True, check=True).stdout


def instructions(sass):
    """Instructions that a warp executes once, slow paths and padding counted, and the share inside its longest loop."""
    places = [int(place, 16) for place in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", sass, re.M)]
    jumps = re.findall(r"/\*([0-9a-f]{4,})\*/[^;]*\bBRA\b[^;]*0x([0-9a-f]+)", sass)
    back = [(int(to, 16), int(place, 16)) for place, to in jumps if int(to, 16) < int(place, 16)]
    loops = [sum(first <= place <= last for place in places) for first, last in back]
    return {"instructions": len(places), "loop": max(loops, default=0)}


def line(key, name):
    """The result of one launch for one target; instructions for sm_90, the target that is timed."""
    function, *launch, case = recorded[key]
    constants = {function.arg_names[index]: value for (index,), value in launch[1].items()}
    row = {"kernel": function.__name__, "case": case, "target": name, "constants": constants}
    counted = arguments.count is None or (function.__name__ in arguments.count and case == arguments.cases[0])
    return row | compiled(function, *launch, TARGETS[name], counted and name == "sm_90")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--count", type=lambda names: names.split(","))
    arguments = parser.parse_args()
    JITFunction.run = record
    for current in arguments.cases:
        dtype, height, columns, width, share = current.split(",")
        launch_everything(getattr(torch, dtype), (int(height), int(columns)), int(width), float(share))
    # Workers are forked: they have the record.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        for row in pool.map(line, *zip(*product(recorded, TARGETS), strict=True)):
            print(json.dumps(row), flush=True)
