"""python -m bench.mixed: pictures of several sizes in one batch, beside a loop over the sizes.

The digits' sizes with random weights, eight pictures of four sizes. Both take turns in one run; the seconds are the
process's own, which other processes disturb least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from dcdit.model.config import preset
from dcdit.model.dcdit import DCDiT

from .arguments import positive

SIZES = [(14, 14), (8, 20), (20, 8), (10, 12)] * 2


def loop(model: DCDiT, samples: list[torch.Tensor], t: torch.Tensor, y: torch.Tensor) -> None:
    """A call for each size."""
    for size in dict.fromkeys(tuple(x.shape[1:]) for x in samples):
        places = [i for i, x in enumerate(samples) if tuple(x.shape[1:]) == size]
        model(torch.stack([samples[i] for i in places]), t[places], y[places])


@torch.no_grad()
def main() -> None:
    """Print the median seconds of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = DCDiT(preset("digits")).eval()
    torch.nn.init.constant_(model.router.score.bias, -0.3)  # keeps about a quarter of the cells
    samples = [torch.randn(4, *size) for size in SIZES]
    t, y = 1000 * torch.rand(len(samples)), torch.arange(len(samples))
    calls: dict[str, Callable] = {
        "loop over sizes": lambda: loop(model, samples, t, y),
        "one batch": lambda: model(samples, t, y),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds + 2):  # the first two rounds warm up
        for name, call in calls.items():
            begin = time.process_time()
            call()
            seconds[name].append(time.process_time() - begin)
    slow, fast = (statistics.median(seconds[name][2:]) for name in calls)
    kept = model(samples, t, y, return_routing=True)[1].kept.mean()
    print(
        f"kept {kept:.0%}; loop over sizes {1e3 * slow:.1f} ms, one batch {1e3 * fast:.1f} ms: {slow / fast:.2f} times"
    )


if __name__ == "__main__":
    main()
