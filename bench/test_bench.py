"""pytest bench/ --benchmark-only: the cases of this machine, with pytest-benchmark's groups, JSON and comparison.

pytest-benchmark keeps the books. The samples come from `bench.measure`, all variants of a case taken in turn (device
time on a GPU), and played back to it; a variant that failed the gate fails here and has no time.
"""

from __future__ import annotations

import functools
import os
from itertools import count

import pytest
import torch

from .cases import MODELS, Case, compiled_too, select
from .headline import saving
from .machine import rates
from .measure import count_launches, measure
from .operators import OURS

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed; python -m bench.run needs none")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATOR_VARIANTS = (*OURS, "flash-attn", "plain", "plain compiled")
MODEL_VARIANTS = ("dcdit", "dcdit reference", "plain", "plain compiled", "dcdit compiled", "DiT/2", "DiT/2 compiled")
FORWARD_VARIANTS = ("plain padded", *(("dcdit graph", "DiT/2 graph") if DEVICE == "cuda" else ()))


@functools.cache
def measured(case: Case) -> dict:
    compiled = compiled_too(case, DEVICE)
    entry = measure(case, DEVICE, compiled, rounds=10, seconds=1.0)
    if DEVICE == "cuda" and case in select(DEVICE, quick=True):
        count_launches(entry, compiled)
    return entry


measured_rates = functools.cache(functools.partial(rates, DEVICE))


def clock() -> float:
    """Time on the tape so far."""
    return clock.now


clock.now = 0.0


def parameters() -> list:
    chosen = []
    for case in select(DEVICE, quick=bool(os.environ.get("QUICK"))):
        more = FORWARD_VARIANTS if case.group == "forward" else ()
        for variant in (*MODEL_VARIANTS, *more) if case.group in MODELS else OPERATOR_VARIANTS:
            if compiled_too(case, DEVICE) or not variant.endswith("compiled"):
                chosen.append(pytest.param(case, variant, id=f"{case.name}-{variant}"))
    return chosen


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("case", "variant"), parameters())
def test_time(benchmark, case: Case, variant: str):
    benchmark.group = case.name
    entry = measured(case)
    mine = entry["variants"].get(variant, {"status": "absent", "reason": f"{case.group} has no {variant}"})
    if mine["status"] == "absent":
        pytest.skip(mine["reason"])
    assert mine["status"] == "ok", mine["reason"]
    number = count()

    def play() -> None:
        clock.now += mine["samples"][next(number) % len(mine["samples"])]

    benchmark.pedantic(play, rounds=len(mine["samples"]))
    machine = measured_rates()
    benchmark.extra_info |= {
        "tokens": entry["tokens"],
        "bytes": entry["bytes"],
        "copy_bandwidth_fraction": entry["bytes"] / mine["seconds"] / machine["copy_bytes_per_s"],
        "flops": entry["flops"],
        "matmul_rate_fraction": entry["flops"] / mine["seconds"] / machine["matmul_flops_per_s"][case.dtype],
        **{key: mine[key] for key in ("clock", "peak_bytes", "launches", "syncs")},
        "over_plain_dit": saving(entry, variant) if "DiT/2" in entry["variants"] else None,
    }
