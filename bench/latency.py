"""Latency of a step with an exact budget: python -m bench.latency [--device cuda] [--batches N]

For each size and batch size: the exact path (ρ = 0: the host waits for the number of tokens) and `dcdit.graphed` with a
budget of as many tokens, in turns over batches with new data. Printed are the median milliseconds, by how much times
differ (the standard deviation over the mean, and the slowest over the median), and the ratio of the two medians. On a
CPU there is no graph: the budget then runs eagerly, and the run is a rehearsal.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from dcdit import DCDiT, graphed
from dcdit.model.precision import cast_weights

from .arguments import add_device, positive
from .cases import Case
from .models import make_net


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of a call as the host sees them."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def spread(seconds: list[float]) -> str:
    """Median, deviation and the slowest, in words."""
    median = statistics.median(seconds)
    deviation = statistics.pstdev(seconds) / statistics.fmean(seconds)
    return f"{1e3 * median:8.2f} ms ± {deviation:5.1%}, slowest {max(seconds) / median - 1:+6.1%}"


@torch.no_grad()
def measure(case: Case, device: str, batches: int) -> dict[str, list[float]]:
    """Seconds of each batch by the exact path and with a budget."""
    net = cast_weights(make_net(DCDiT, case, device).eval(), case.torch_dtype)
    graph, config = graphed(net), case.config
    tokens = round(case.share * config.cells)
    samples: dict[str, list[float]] = {"exact": [], "budget": []}
    for number in range(batches + 3):
        x = torch.randn(case.batch, config.in_channels, *config.input_size, device=device).to(case.torch_dtype)
        t = 1000 * torch.rand(case.batch, device=device)
        y = torch.randint(config.num_classes, (case.batch,), device=device)
        calls = {"exact": lambda: net(x, t, y), "budget": lambda: graph(x, t, y, budget_per_sample=tokens)}  # noqa: B023
        for name in sorted(calls, reverse=bool(number % 2)):
            seconds = timed(calls[name], device)
            if number >= 3:  # the first compile and capture
                samples[name].append(seconds)
    if device == "cuda" and graph.eager:
        raise RuntimeError(graph.summary())
    return samples


def main(argv: list[str] | None = None) -> None:
    """Print a line for each size and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--batches", type=positive, default=100)
    args = parser.parse_args(argv)
    sizes = [("S", 32), ("B", 32)] if args.device == "cuda" else [("digits", 14)]
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    for size, side in sizes:
        for batch in (1, 2, 4, 8):
            samples = measure(Case("forward", size, side, batch, dtype=dtype), args.device, args.batches)
            exact, budget = (statistics.median(samples[name]) for name in ("exact", "budget"))
            for name, seconds in samples.items():
                print(f"{size:7}B = {batch}  {name:7}{spread(seconds)}", flush=True)
            print(f"{size:7}B = {batch}  exact over budget {exact / budget:.2f}", flush=True)


if __name__ == "__main__":
    main()
