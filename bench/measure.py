"""One case, start to end: build, gate, count, time. The result is a dict of JSON types."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from . import timing
from .cases import MODELS, Case
from .gate import check, one_line
from .models import model_problem
from .operators import BUILDERS
from .problem import Problem

GATE_BATCH = 4  # a model in float64 with its gradients does not fit at every batch size


def build(case: Case, device: str, compiled: bool = False) -> Problem:
    """The problem of any case."""
    torch.manual_seed(0)
    return (model_problem if case.group in MODELS else BUILDERS[case.group])(case, device, compiled)


@functools.cache  # sizes of a group share a verdict, and all other groups come between them
def gate(case: Case, device: str, compiled: bool) -> tuple[Case, dict[str, str | None]]:
    """The verdicts of `check`, and the case they were reached on: that of a model at GATE_BATCH at most."""
    if case.group in MODELS and case.batch > GATE_BATCH and not compiled:  # compiled code is of one batch size
        return gate(dataclasses.replace(case, batch=GATE_BATCH), device, compiled)
    return case, check(build(case, device, compiled))


def measure(case: Case, device: str, compiled: bool, rounds: int, seconds: float) -> dict:
    """Samples in seconds of each variant that passed the gate, and what it moved and computed.

    `compiled` adds the compiled baselines. Each entry of "variants" has a "status": ok, failed (with "reason"; no time)
    or absent (with "reason").
    """
    gated, verdicts = gate(case, device, compiled)
    problem = build(case, device, compiled)
    variants: dict[str, dict] = {name: {"status": "absent", "reason": why} for name, why in problem.absent.items()}
    counts, clocks = {}, {}
    for name, wrong in verdicts.items():
        try:
            if wrong is None:
                call = timing.make_call(problem.variants[name], problem.inputs, problem.backward)
                counts[name] = count(call, device)
                clocks[name] = timing.clock_of(problem, name, device, counts[name]["syncs"])
        except Exception as error:  # too large for this machine, say: the others go on
            wrong = one_line(error)
        if wrong is not None:
            variants[name] = {"status": "failed", "reason": wrong}
    samples = timing.interleave({name: clock for name, (clock, _) in clocks.items()}, rounds, seconds)
    for name, (_, kind) in clocks.items():
        variants[name] = {
            "status": "ok",
            "clock": kind,
            "seconds": statistics.median(samples[name]),
            "samples": [float(f"{s:.4g}") for s in samples[name]],
            "gflop_per_image": problem.gflop.get(name),
            **counts[name],
        }
    return {
        "name": case.name,
        "case": dataclasses.asdict(case),
        "gate_batch": gated.batch,
        **dataclasses.asdict(problem.work),
        "variants": variants,
    }


def count(call: Callable[[], object], device: str) -> dict[str, int | None]:
    """Of one warm call: peak bytes on top of its inputs; on a GPU also waits of the host. Launches are for
    `count_launches`."""
    call()
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            call()
        moves = (e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
        return {"peak_bytes": max(itertools.accumulate(moves, initial=0)), "launches": None, "syncs": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    syncs = host_waits(call)
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "launches": None, "syncs": syncs}


def host_waits(call: Callable[[], object]) -> int:
    """How often PyTorch makes the host wait for the GPU during a call; waits inside an extension are not seen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Switching the mode on warns as well, in other words.
    return sum("called a synchronizing" in str(w.message) for w in caught)


def count_launches(entry: dict, compiled: bool) -> None:
    """Add to the result of a case on a GPU what each variant launches. Apart from `measure`, because a profiler that
    has run may slow what comes after it."""
    problem = build(Case(**entry["case"]), "cuda", compiled)
    for name, variant in entry["variants"].items():
        if variant["status"] == "ok":
            call = timing.make_call(problem.variants[name], problem.inputs, problem.backward)
            call()
            variant["launches"] = kernels(call)


def kernels(call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that a call puts on the GPU; None where the profiler sees no GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in prof.events()) or None
