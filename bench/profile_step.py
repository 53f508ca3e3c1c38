"""python -m bench.profile_step: where the time of one training step goes, operator by operator."""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from .cases import select
from .measure import build


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_step", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    device = parser.parse_args().device
    case = select(device, ("train",))[0 if device == "cuda" else -1]
    step = build(case, device, compiled=False).variants["dcdit"].timed
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as prof:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    print(case.name)
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(prof.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=40))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
