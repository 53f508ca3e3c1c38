"""Pictures of a trajectory: x_t with its chunk maps, and tokens, FLOPs and time over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .config import DCDiTConfig
from .flops import dit_flops
from .model import DCDiT
from .pictures import to_uint8
from .sampling import Samples, Step, Trace, sample

TINT = np.array([255, 122, 24])  # kept cells
INK, PAPER, MUTED = "#1d2433", "#ffffff", "#8a93a6"
COLOURS = ("#e4572e", "#2e6fe4", "#2a9d62", "#8e44ad")


@dataclass(frozen=True)
class Snapshot:
    """The images on their way: x (N, C, H, W) at `timestep`, the retained cells (N, L) bool, and for every cell the
    cell that refills it (N, L)."""

    timestep: float
    x: torch.Tensor
    mask: torch.Tensor
    source: torch.Tensor

    @classmethod
    def of(cls, step: Step) -> Snapshot:
        plan, (batch, cells) = step.routing.plan, step.routing.boundary_mask.shape
        row = plan.nearest.view(-1, cells)[:batch].long()
        source = plan.token_index[row] - torch.arange(batch, device=row.device)[:, None] * cells
        return cls(step.timestep, step.x.cpu(), step.routing.boundary_mask.cpu(), source.cpu())


def record(model: DCDiT, classes, count: int = 6, **options) -> tuple[Samples, list[Snapshot]]:
    """`sample(model, classes, **options)`, all images in one batch, with `count` snapshots evenly spread over it."""
    steps = options.get("steps", 50)
    wanted = set(np.linspace(0, steps - 1, min(count, steps)).round().astype(int).tolist())
    snapshots = []

    def keep(step: Step) -> None:
        if step.number in wanted:
            snapshots.append(Snapshot.of(step))

    options = {**options, "batch_size": len(classes)}
    return sample(model, classes, callback=keep, **options), snapshots


def chunk_map(image: np.ndarray, mask: np.ndarray, source: np.ndarray, side: int = 168) -> np.ndarray:
    """Tint the kept cells of an image and outline the chunks.

    image uint8 (H, W, 3); mask bool and source integer, both (h, w) cells: kept or not, and the cell that refills it.
    Returns uint8, H enlarged to about `side`.
    """
    factor = max(1, side // image.shape[0])
    scale = image.shape[0] * factor // mask.shape[0], image.shape[1] * factor // mask.shape[1]
    grow = lambda cells: cells.repeat(scale[0], axis=0).repeat(scale[1], axis=1)  # noqa: E731
    picture = image.repeat(factor, axis=0).repeat(factor, axis=1).astype(np.float64)
    picture = np.where(grow(mask)[..., None], 0.35 * picture + 0.65 * TINT, 0.75 * picture)
    chunks = grow(source)
    edge = np.zeros(chunks.shape, dtype=bool)
    edge[1:] |= chunks[1:] != chunks[:-1]
    edge[:, 1:] |= chunks[:, 1:] != chunks[:, :-1]
    picture[edge & ~grow(mask)] = 0.6 * picture[edge & ~grow(mask)] + 0.4 * 110
    return picture.round().astype(np.uint8)


def draw_chunk_maps(file: Path, samples: Samples, snapshots: list[Snapshot], codec, config: DCDiTConfig) -> None:
    """For every sample x_t over its chunk map, one column per snapshot and the result at the right."""
    from matplotlib.figure import Figure

    rows, columns = len(samples.latents), len(snapshots) + 1
    high, wide = config.input_size
    figure = Figure(figsize=(1.25 * columns + 0.3, rows * 2.72 * high / wide + 0.45), facecolor=PAPER)
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.02, right=0.98, top=1 - 0.35 / figure.get_figheight(), bottom=0.04, hspace=0.06, wspace=0.06
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for j, shot in enumerate(snapshots):
        images = to_uint8(codec.decode(shot.x))
        axes[0, j].set_title(f"t = {shot.timestep:.0f}", fontsize=10, color=INK)
        for i, image in enumerate(images):
            mask, source = (cells[i].view(high, wide).numpy() for cells in (shot.mask, shot.source))
            axes[2 * i, j].imshow(image, interpolation="nearest")
            axes[2 * i + 1, j].imshow(chunk_map(image, mask, source))
            _below(axes[2 * i + 1, j], f"{mask.mean():.0%} kept")
    axes[0, -1].set_title("image", fontsize=10, color=INK)
    for i, image in enumerate(to_uint8(codec.decode(samples.latents))):
        axes[2 * i, -1].imshow(image, interpolation="nearest")
    figure.savefig(file, dpi=130)


def draw_curves(file: Path, traces: dict[str, Trace], config: DCDiTConfig) -> None:
    """Tokens kept, GFLOP and milliseconds of each step, from noise to image, one colour for each named trace."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), facecolor=PAPER, layout="constrained")
    kept, flops, seconds = figure.subplots(1, 3)
    cells = math.prod(config.input_size)
    halves = 1
    for (name, trace), colour in zip(traces.items(), COLOURS * len(traces), strict=False):
        way = np.linspace(0, 100, len(trace.timesteps))
        share = 100 * trace.tokens / cells
        low, high = np.quantile(share, [0.1, 0.9], axis=1)
        kept.fill_between(way, low, high, color=colour, alpha=0.18, linewidth=0)
        kept.plot(way, share.mean(1), color=colour, label=name)
        if trace.uncond_tokens is not None:
            halves = 2
            kept.plot(way, 100 * trace.uncond_tokens.mean(1) / cells, color=colour, linestyle=":", linewidth=1.4)
        flops.plot(way, trace.gflops(config), color=colour)
        seconds.plot(way, 1000 * trace.seconds / trace.tokens.shape[1], color=colour)
    target, plain = 100 / config.target_ratio, halves * dit_flops(config, cells / 4)
    _level(kept, target, f"1/N = {target:.0f} %")
    _level(flops, plain, "plain DiT, 2×2 patches")
    titles = ("Tokens kept, % of cells", "GFLOP per step and image", "Milliseconds per step and image")
    for axis, title in zip((kept, flops, seconds), titles, strict=True):
        axis.set_title(title, loc="left", fontsize=11, color=INK)
        axis.set_xlabel("way from noise to image, %", color=MUTED)
        axis.set_xlim(0, 100)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#c9ceda")
        axis.tick_params(colors=MUTED)
        axis.grid(axis="y", color="#eceef3")
        axis.set_axisbelow(True)
    if halves == 2:
        kept.plot([], [], color=MUTED, linestyle=":", linewidth=1.4, label="without class")
    kept.legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(file, dpi=130)


def _below(axis, text: str) -> None:
    axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=8.5, color=INK)


def _level(axis, value: float, text: str) -> None:
    axis.axhline(value, color=MUTED, linestyle="--", linewidth=1)
    axis.text(99, value, text, ha="right", va="bottom", fontsize=8.5, color=MUTED)
