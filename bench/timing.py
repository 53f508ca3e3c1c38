"""Interleaved rounds: every variant once per round, in an order that turns, so that drift hits all alike.

On a CPU a sample is the wall clock of some 10 ms of calls. On a GPU it is the time between two events around
one pass over copies of the inputs that together exceed the L2 cache twice, each with separate outputs, replayed as a
CUDA graph where the variant never waits for the host.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .problem import Problem, Tensors, Variant, as_tuple

LEAST_ROUNDS = 5  # the median of three moved by 4 % from run to run
CYCLES_PER_SECOND = 2e9  # of a GPU, about; a delay that is a little longer or shorter does no harm
SAMPLE_SECONDS = 10e-3  # of a CPU sample, longer than a busy machine's time slices


def interleave(clocks: dict[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each variant, up to `rounds` samples (at least LEAST_ROUNDS) within about `seconds`."""
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    names, begin = list(clocks), time.perf_counter()
    for number in range(rounds if clocks else 0):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(clocks[name]())
    return samples


def make_call(variant: Variant, inputs: Tensors, backward: bool) -> Callable[[], object]:
    """One call of a variant on inputs in its own layout, with the backward pass where asked for."""
    if variant.timed:
        return variant.timed
    own = [t.detach().clone() for t in variant.prepare(*inputs)]
    if not backward:

        def forward() -> object:
            with torch.no_grad(), variant.around():
                return variant.run(*own)

        return forward
    leaves = [t.requires_grad_() for t in own if t.is_floating_point()]
    with variant.around():
        weights = [torch.randn_like(out) for out in as_tuple(variant.run(*own))]

    def both() -> object:
        with variant.around():
            return torch.autograd.grad(as_tuple(variant.run(*own)), leaves, weights)

    return both


def cpu_clock(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Seconds per call by the wall clock, or another one, after a warm-up."""
    call()
    begin = clock()
    call()
    repeats = max(1, round(SAMPLE_SECONDS / (clock() - begin)))

    def sample() -> float:
        begin = clock()
        for _ in range(repeats):
            call()
        return (clock() - begin) / repeats

    return sample


def gpu_wall_clock(call: Callable[[], object]) -> Callable[[], float]:
    """Seconds per call as the host sees them: launches and waits included."""
    for _ in range(3):
        call()

    def sample() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    return sample


def gpu_event_clock(calls: list[Callable[[], object]], graph: bool) -> Callable[[], float]:
    """Seconds of device time per call; `calls` work on copies of the inputs. Raises RuntimeError where a graph cannot
    be captured."""
    go = captured(calls) if graph else functools.partial(one_pass, calls)
    go()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    go()
    launching = time.perf_counter() - begin

    def sample() -> float:
        delay("cuda", launching)
        start = stamp("cuda")
        go()
        end = stamp("cuda")
        end.synchronize()
        return between(start, end) / len(calls)

    return sample


def one_pass(calls: list[Callable[[], object]]) -> list[object]:
    """The results of all calls, alive together: each call writes to separate memory, uncached like its inputs."""
    return [call() for call in calls]


def delay(device: str, seconds: float) -> None:
    """Keep a GPU busy while the host launches the timed calls, so that the GPU waits for no launch."""
    if device == "cuda":
        torch.cuda._sleep(int(CYCLES_PER_SECOND * min(1.5 * seconds + 0.5e-3, 0.2)))


def stamp(device: str) -> Any:
    """A point in time: an event on the GPU's stream, or the clock's reading."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before: Any, after: Any) -> float:
    """Seconds from one stamp to the next."""
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3


def captured(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """The calls as one CUDA graph, warmed up on a side stream as capture demands."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # around the capture too: one that fails does not restore the stream
        one_pass(calls[:2])
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            one_pass(calls)
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay


def copies(inputs: Tensors, cache_bytes: int) -> list[Tensors]:
    """The inputs and copies, together past twice the cache, 64 at most."""
    size = sum(t.nbytes for t in inputs)
    count = min(64, 1 + -(-2 * cache_bytes // max(1, size)))
    return [inputs, *(tuple(t.clone() for t in inputs) for _ in range(count - 1))]


def ratios(samples: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of time over the baseline's, round by round."""
    paired = sorted(a / b for a, b in zip(samples, base, strict=True))
    low, middle, high = statistics.quantiles(paired, n=4, method="inclusive")
    return middle, low, high


def clock_of(problem: Problem, name: str, device: str, syncs: int | None) -> tuple[Callable[[], float], str]:
    """A variant's clock and how it measures; `syncs` counts the host synchronisations of one call on a GPU."""
    variant = problem.variants[name]
    if device == "cpu":
        return cpu_clock(make_call(variant, problem.inputs, problem.backward)), "wall"
    if problem.clock == "wall":
        return gpu_wall_clock(make_call(variant, problem.inputs, problem.backward)), "wall"
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    calls = [make_call(variant, part, problem.backward) for part in copies(problem.inputs, cache)]
    if problem.clock == "graph" and not syncs:
        try:
            return gpu_event_clock(calls, graph=True), "graph"
        except RuntimeError as error:
            print(f"{name}: no CUDA graph, timed by events: {error}".splitlines()[0], flush=True)
    return gpu_event_clock(calls, graph=False), "events"
