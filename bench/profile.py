"""python -m bench.profile step | forward | kernels: where the time goes, and our kernels alone, for ncu."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from .arguments import add_device
from .cases import select
from .lists import at_hand, largest
from .lists import forward as passes
from .measure import build
from .timing import make_call


def step(device: str, trace: str | None) -> None:
    """The operators of one warm training step by their time on the device; all events as a Chrome trace."""
    case = select(device, ("train",))[0 if device == "cuda" else -1]
    call = build(case, device).variants["dcdit"].timed
    for _ in range(3):
        call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as prof:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    print(case.name)
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(prof.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=50))
    if trace:
        prof.export_chrome_trace(trace)


def forward(device: str) -> None:
    """The kernels of forward passes by their time on the device: the model's and the plain DiT's."""
    for size, batch in (("XL", 64), ("XL", 8), ("S", 64), ("XL", 1), ("S", 1)):
        ((case, _),) = at_hand([(passes(size, batch), ())], device)
        problem = build(case, device)
        for name in ("dcdit", "DiT/2"):
            call = make_call(problem.variants[name], problem.inputs, False)
            call()
            call()
            print(f"{case.name}: {name}")
            print(table(call, device, 40), flush=True)


def table(call: Callable[[], object], device: str, rows: int) -> str:
    """Operators and kernels of one call, the slowest on the device first."""
    activities = [ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as prof:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return prof.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=70)


def kernels(device: str) -> None:
    """One call of each operator at XL, batch 64, between the marks that a profiler of kernels waits for."""
    for group in ("plan", "modulate", "dechunk", "cosine", "boundary", "scaffold"):
        ((case, _),) = at_hand([(largest(group, group not in ("plan", "cosine")), ())], device)
        problem = build(case, device)
        name = next(name for name in ("triton", "dcdit", "native", "reference") if name in problem.variants)
        call = make_call(problem.variants[name], problem.inputs, problem.backward)
        call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(f"{case.name}: {name}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("what", choices=["step", "forward", "kernels"])
    add_device(parser, "cuda")
    parser.add_argument("--trace", help="file of the trace, .json or .json.gz")
    args = parser.parse_args()
    if args.what == "step":
        step(args.device, args.trace)
    else:
        {"forward": forward, "kernels": kernels}[args.what](args.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
