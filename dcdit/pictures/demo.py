"""The demo: digits from the shipped checkpoint at several budgets, with the saving and the cost of each."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from ..model.config import DCDiTConfig
from ..model.dcdit import DCDiT
from ..model.flops import dit_flops
from ..model.plain_dit import PlainDiT
from ..sampling.sampler import sample
from ..sampling.trace import Samples, Step
from .images import to_uint8

LATE = 0.8  # of the way from noise to image
Plain = tuple[int, float, float, str]  # of a plain DiT: tokens, GFLOP and seconds per image, how many are recognised


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
    seconds: float
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
        seconds=float(trace.seconds.sum()) / len(classes),
        recognised=int((classify(images[..., 0]) == classes).sum()),
        ink=float(often[brightest > 0].mean()),
        blank=float(often[brightest < -0.8].mean()),
    )


def run_plain_dit(
    model: PlainDiT, codec, classify, classes: np.ndarray, guidance: float, steps: int, **options
) -> tuple[Plain, np.ndarray]:
    """Sample `classes` (N,) by a trained plain DiT: its row of the table, and uint8 pictures (N, 28, 28, 3)."""
    result = sample(model, classes, guidance=guidance, steps=steps, **options)
    images, tokens = to_uint8(codec.decode(result.latents)), model.grid[0] * model.grid[1]
    gflops = dit_flops(model.config, tokens) * steps * (1 if guidance == 1 else 2)
    seconds = float(result.trace.seconds.sum()) / len(classes)
    right = int((classify(images[..., 0]) == classes).sum())
    return (tokens, gflops, seconds, f"{right} of {len(classes)}"), images


@torch.no_grad()
def time_plain_dit(
    config: DCDiTConfig, patch: int, images: int, steps: int, halves: int, like: torch.Tensor, repeats: int = 5
) -> Plain:
    """The row of a plain DiT with random weights over a whole trajectory, for its cost alone.

    The median of `repeats` forwards on `halves` times `images`, times `steps`, in the dtype and on the device of
    `like`.
    """
    model = PlainDiT(config, patch).to(like).eval()
    batch, device = images * halves, like.device
    x = torch.randn(batch, config.in_channels, *config.input_size).to(like)
    t, y = torch.full((batch,), 500.0, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        model(x, t, y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    tokens = model.grid[0] * model.grid[1]
    return tokens, dit_flops(config, tokens) * steps * halves, float(np.median(seconds[1:])) * steps / images, "–"


def table(budgets: list[Budget], plain: list[Plain], cells: int) -> str:
    """The table as text, one row for each budget, then the plain DiTs."""
    lines = [
        f"{'':<22}{'tokens kept':>18}{'GFLOP/image':>14}{'s/image':>10}{'recognised':>14}",
        *(
            f"{f'DC-DiT  ρ = {b.drop_fraction:g}':<22}{f'{b.share * cells:.1f} ({b.share:.1%})':>18}{b.gflops:14.2f}"
            f"{b.seconds:10.3f}{f'{b.recognised} of {len(b.images)}':>14}"
            for b in budgets
        ),
    ]
    for tokens, gflops, seconds, recognised in plain:
        name = f"plain DiT, {'2×2' if tokens < cells else '1×1'} patches"
        lines.append(f"{name:<22}{f'{tokens} ({tokens / cells:.1%})':>18}{gflops:14.2f}{seconds:10.3f}{recognised:>14}")
    return "\n".join(lines)
