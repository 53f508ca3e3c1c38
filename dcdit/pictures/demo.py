"""The demo: digits from the shipped checkpoint at several budgets, with the saving and the cost of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..model.dcdit import DCDiT
from ..model.flops import dit_flops
from ..model.plain_dit import PlainDiT
from ..sampling.sampler import sample
from ..sampling.trace import Samples, Step
from .images import to_uint8

LATE = 0.8  # of the way from noise to image
TIMED, TURNS = 10, 3  # steps of a draw that is timed, and how many such draws each row of the table has
Plain = tuple[int, int, float, str]  # of a plain DiT: blocks, tokens, GFLOP per image, how many are recognised


@dataclass(frozen=True)
class Budget:
    """One row of the table: the cost of N samples at one ρ, and how many the classifier took for the wanted class.

    `share` is the mean share of cells kept by the conditional half, over images and steps. `ink` and `blank` are the
    shares of inked and of blank cells kept late in sampling.
    """

    drop_fraction: float
    samples: Samples
    images: np.ndarray
    share: float
    gflops: float
    recognised: int
    ink: float
    blank: float


def run_budget(model: DCDiT, codec, classify, drop_fraction: float, classes: np.ndarray, **options) -> Budget:
    """Sample `classes` (N,) at ρ and measure. `options` are `sample`'s; `classify` maps uint8 (N, 28, 28) to
    digits (N,)."""
    cells = model.config.cells
    kept = torch.zeros(len(classes), cells)
    late_steps = 0

    def count(step: Step) -> None:
        nonlocal late_steps
        if step.number >= int(LATE * step.steps):  # the last step at least
            kept[step.indices] += step.routing.boundary_mask.cpu().float()
            late_steps += int(step.indices[0] == 0)

    result = sample(model, classes, drop_fraction=drop_fraction, callback=count, **options)
    trace = result.trace
    images = to_uint8(codec.decode(result.latents))
    brightest = result.latents.amax(1).flatten(1)  # the codec's channels are a cell's pixels
    often = kept / late_steps
    return Budget(
        drop_fraction=drop_fraction,
        samples=result,
        images=images,
        share=float(trace.tokens.mean()) / cells,
        gflops=float(trace.gflops(model.config).sum()),
        recognised=int((classify(images[..., 0]) == classes).sum()),
        ink=float(often[brightest > 0].mean()),
        blank=float(often[brightest < -0.8].mean()),
    )


def run_plain_dit(
    model: PlainDiT, codec, classify, classes: np.ndarray, guidance: float, steps: int, **options
) -> tuple[Plain, np.ndarray]:
    """Sample `classes` (N,) by a trained plain DiT: its row of the table, and uint8 pictures (N, 28, 28, 3)."""
    result = sample(model, classes, guidance=guidance, steps=steps, **options)
    images = to_uint8(codec.decode(result.latents))
    right = int((classify(images[..., 0]) == classes).sum())
    return (*plain_dit_cost(model, steps * (1 if guidance == 1 else 2)), f"{right} of {len(classes)}"), images


def plain_dit_cost(model: PlainDiT, forwards: int) -> tuple[int, int, float]:
    """Blocks, tokens, and GFLOP of `forwards` forward passes of one image."""
    tokens = model.grid[0] * model.grid[1]
    return len(model.blocks), tokens, dit_flops(model.config, tokens) * forwards


def seconds_in_turns(draws: Sequence[Callable[..., Samples]], steps: int) -> list[float]:
    """Seconds of an image's `steps` steps by each of `draws`, which draw some images in draw(steps=…).

    They take turns, so that another load on the machine meets all of them alike; medians of TURNS, TIMED steps each.
    """
    timed = min(TIMED, steps)

    def seconds(draw: Callable[..., Samples]) -> float:
        samples = draw(steps=timed)
        return float(samples.trace.seconds.sum()) / len(samples.latents)

    turns = [[seconds(draw) for draw in draws] for _ in range(TURNS)]
    return (np.median(turns, axis=0) * steps / timed).tolist()


def table(budgets: list[Budget], plain: list[Plain], seconds: list[float], cells: int) -> str:
    """The table as text, one row for each budget, then the plain DiTs; `seconds` of an image for each row."""
    lines = [f"{'':<22}{'tokens kept':>18}{'GFLOP/image':>14}{'s/image':>10}{'recognised':>14}"]
    rows = [
        (f"DC-DiT  ρ = {b.drop_fraction:g}", f"{b.share * cells:.1f} ({b.share:.1%})", b.gflops,
         f"{b.recognised} of {len(b.images)}")
        for b in budgets
    ]  # fmt: skip
    for blocks, tokens, gflops, recognised in plain:
        rows.append((f"plain DiT, {blocks} blocks", f"{tokens} ({tokens / cells:.1%})", gflops, recognised))
    for (name, kept, gflops, recognised), spent in zip(rows, seconds, strict=True):
        lines.append(f"{name:<22}{kept:>18}{gflops:14.2f}{spent:10.3f}{recognised:>14}")
    return "\n".join(lines)
