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

from . import ablation, timing
from .cases import MODELS, Case
from .gate import check, one_line
from .models import model_problem
from .operators import BUILDERS
from .problem import Problem

GATE_BATCH = 4  # a model in float64 with its gradients does not fit at every batch size


def build(case: Case, device: str, compiled: bool = False, names: tuple[str, ...] | None = None) -> Problem:
    """The problem of any case; with `names` only these variants and the gate's yardsticks."""
    torch.manual_seed(0)
    builders = {**BUILDERS, **dict.fromkeys(MODELS, model_problem), "scaffold": ablation.scaffold_problem}
    problem = builders[case.group](case, device, compiled)
    if case.ablation:
        problem.variants.update(ablation.variants(case, device, problem))
    return problem if names is None else problem.only(names)


def gated_case(case: Case, compiled: bool) -> Case:
    """The case that the gate runs: a model at GATE_BATCH at most; compiled code is of one batch size."""
    small = case.group in MODELS and not compiled
    return dataclasses.replace(case, batch=min(case.batch, GATE_BATCH)) if small else case


@functools.cache  # sizes of a group share a verdict, and all other groups come between them
def gate(case: Case, device: str, names: tuple[str, ...] | None) -> dict[str, str | None]:
    """The verdicts of `check` on a smaller case."""
    return check(build(case, device, False, names))


def measure(
    case: Case, device: str, compiled: bool, rounds: int, seconds: float, names: tuple[str, ...] | None = None
) -> dict:
    """Samples in seconds of each variant that passed the gate, with its bytes and operations.

    `compiled` adds the compiled baselines; `names` are the variants to time, None for all. Each entry of "variants" has
    a "status": ok, failed (with "reason"; no time) or absent (with "reason").
    """
    gated = gated_case(case, compiled)
    smaller = gate(gated, device, names) if gated != case else None
    problem = build(case, device, compiled, names)
    verdicts = smaller or check(problem)
    variants: dict[str, dict] = {name: {"status": "absent", "reason": why} for name, why in problem.absent.items()}
    counts, clocks = {}, {}
    for name, wrong in verdicts.items():
        if names is not None and name not in names:
            continue
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


def count_launches(entry: dict, compiled: bool, names: tuple[str, ...] | None = None) -> None:
    """Add each variant's launches to the result of a case on a GPU. Apart from `measure`, because a profiler that
    has run may slow later timings."""
    problem = build(Case(**entry["case"]), "cuda", compiled, names)
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
