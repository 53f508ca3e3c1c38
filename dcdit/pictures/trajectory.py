"""Pictures of a trajectory: x_t with its chunk maps, and tokens, FLOPs and time over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

from ..model.config import DCDiTConfig
from ..model.dcdit import DCDiT
from ..model.flops import dit_flops
from ..model.routing import Routing
from ..sampling.sampler import sample
from ..sampling.trace import Samples, Step, Trace
from .images import enlarge, grid, save_png, to_uint8

TINT = np.array([255, 122, 24])  # kept cells
OUTLINE = np.array([120, 150, 190])  # between chunks
INK, PAPER, MUTED = "#1d2433", "#ffffff", "#8a93a6"
COLOURS = ("#e4572e", "#2e6fe4", "#2a9d62", "#8e44ad")


@dataclass(frozen=True)
class Snapshot:
    """The images on their way: x (N, C, H, W) at `timestep`, and as arrays (N, H, W) the retained cells, bool, and for
    each cell the one that refills it, by raster index."""

    timestep: float
    x: torch.Tensor
    mask: np.ndarray
    source: np.ndarray

    @classmethod
    def of(cls, step: Step) -> Snapshot:
        return cls(step.timestep, step.x.cpu(), *cell_maps(step.routing))


def cell_maps(routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """The retained cells, bool, and for each cell the one that refills it, by raster index: both (N, H, W)."""
    plan, (batch, cells) = routing.plan, routing.boundary_mask.shape
    row = plan.nearest.view(-1, cells)[:batch].long()
    source = plan.token_index[row] - torch.arange(batch, device=row.device)[:, None] * cells
    mask, source = (part.view(batch, *plan.grid).cpu().numpy() for part in (routing.boundary_mask, source))
    return mask, source


def record(model: DCDiT, classes, count: int, **options) -> tuple[Samples, list[Snapshot]]:
    """`sample(model, classes, **options)`, all images in one batch, with `count` snapshots evenly spread over it."""
    steps = options.get("steps", 50)
    wanted = set(np.linspace(0, steps - 1, min(count, steps)).round().astype(int).tolist())
    snapshots = []

    def keep(step: Step) -> None:
        if step.number in wanted:
            snapshots.append(Snapshot.of(step))

    return sample(model, classes, callback=keep, batch_size=len(classes), **options), snapshots


def chunk_map(image: np.ndarray, mask: np.ndarray, source: np.ndarray, side: int = 168) -> np.ndarray:
    """Tint the kept cells of an image and outline the chunks.

    image uint8 (H, W, 3); mask bool and source integer, both (h, w) cells: kept or not, and the cell that refills it.
    Returns uint8, H enlarged to about `side`.
    """
    picture = enlarge(image[None], side)[0].astype(np.float64)
    height, width = picture.shape[0] // mask.shape[0], picture.shape[1] // mask.shape[1]

    def grow(cells: np.ndarray) -> np.ndarray:
        return cells.repeat(height, axis=0).repeat(width, axis=1)

    picture = np.where(grow(mask)[..., None], 0.35 * picture + 0.65 * TINT, 0.75 * picture)
    chunks = grow(source)
    edge = np.zeros(chunks.shape, dtype=bool)
    edge[1:] |= chunks[1:] != chunks[:-1]
    edge[:, 1:] |= chunks[:, 1:] != chunks[:, :-1]
    outline = edge & ~grow(mask)
    picture[outline] = 0.55 * picture[outline] + 0.45 * OUTLINE
    return picture.round().astype(np.uint8)


def draw_chunk_maps(file: Path, samples: Samples, snapshots: list[Snapshot], codec) -> None:
    """For every sample x_t over its chunk map, one column per snapshot and the result at the right; a legend below."""
    # Inches: a picture is `side` wide and `tall` high; two pictures and a line of text make a block.
    side, gap, text, margin, legend = 1.2, 0.07, 0.3, 0.12, 0.32
    tall = side * samples.latents.shape[2] / samples.latents.shape[3]
    block = 2 * tall + gap + text
    high, wide = len(samples.latents) * block + 0.32 + legend, (len(snapshots) + 1) * (side + gap) - gap + 2 * margin
    figure = Figure(figsize=(wide, high), facecolor=PAPER)

    def place(column: int, top: float, image: np.ndarray):
        left = margin + column * (side + gap)
        axis = figure.add_axes([left / wide, 1 - (top + tall) / high, side / wide, tall / high])
        axis.imshow(image, interpolation="nearest")
        axis.set_axis_off()
        return axis

    for j, shot in enumerate(snapshots):
        for i, image in enumerate(to_uint8(codec.decode(shot.x))):
            top = 0.3 + i * block
            axis = place(j, top, image)
            if i == 0:
                axis.set_title(f"t = {shot.timestep:.0f}", fontsize=10, color=INK, pad=5)
            below = place(j, top + tall + gap, chunk_map(image, shot.mask[i], shot.source[i]))
            label = f"{shot.mask[i].mean():.0%} kept"
            below.text(0.5, -0.03, label, transform=below.transAxes, ha="center", va="top", fontsize=9, color=MUTED)
    for i, image in enumerate(to_uint8(codec.decode(samples.latents))):
        axis = place(len(snapshots), 0.3 + i * block + (tall + gap) / 2, image)
        axis.set_title("image", fontsize=10, color=INK, pad=5)
    kept = Patch(color=TINT / 255, label="cell that the transformer sees; always the first and the last")
    chunk = Line2D([], [], color=OUTLINE / 255, label="border of the cells that one kept cell refills")
    figure.legend(handles=[kept, chunk], loc="lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(file, dpi=140)


def draw_poster(file: Path, samples: Samples, last: Snapshot, codec) -> None:
    """The images in one row, and under each its chunk map at the last snapshot."""
    images = enlarge(to_uint8(codec.decode(samples.latents)), 168)
    save_png(file, grid(np.concatenate([images, chunk_maps(samples, last, codec, 168)]), len(images), gap=6))


def chunk_maps(samples: Samples, last: Snapshot, codec, side: int) -> np.ndarray:
    """`chunk_map` of each image (N, H, W, 3), with the cells that the last snapshot keeps."""
    images = to_uint8(codec.decode(samples.latents))
    return np.stack([chunk_map(*parts, side=side) for parts in zip(images, last.mask, last.source, strict=True)])


def draw_animation(file: Path, samples: Samples, snapshots: list[Snapshot], codec) -> None:
    """A GIF of a frame for each snapshot, x_t in one row and its chunk maps below, and at last the images for 2 s."""
    frames = []
    for shot in snapshots:
        images = enlarge(to_uint8(codec.decode(shot.x)), 56)
        maps = [chunk_map(*parts, side=56) for parts in zip(images, shot.mask, shot.source, strict=True)]
        frames.append(grid(np.concatenate([images, np.stack(maps)]), len(images), gap=4))
    last = enlarge(to_uint8(codec.decode(samples.latents)), 56)
    frames.append(grid(np.concatenate([last, np.stack(maps)]), len(last), gap=4))
    first, *rest = (Image.fromarray(frame).quantize(128) for frame in frames)
    first.save(file, "GIF", save_all=True, append_images=rest, duration=[80] * len(rest) + [2000], loop=0)


def draw_budgets(file: Path, images: dict[str, np.ndarray]) -> None:
    """One row of 20 pictures of (N, H, W, 3) for each name, equal samples under each other."""
    rows = [enlarge(row[:20], 84) for row in images.values()]
    sheet = grid(np.concatenate(rows), len(rows[0]), gap=4)
    figure = Figure(figsize=(12, 11 * sheet.shape[0] / sheet.shape[1] + 0.1), facecolor=PAPER, layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet, interpolation="nearest")
    pitch = rows[0].shape[1] + 4
    axis.set_yticks([2 + pitch * (i + 0.5) for i in range(len(rows))], list(images), color=INK, fontsize=11)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.savefig(file, dpi=130)


def draw_curves(file: Path, traces: dict[str, Trace], config: DCDiTConfig, plain_s: float | None = None) -> None:
    """Tokens kept, GFLOP and milliseconds of each step, from noise to image, one colour for each named trace.

    `plain_s` are the seconds of an image by the plain DiT, all its steps together.
    """
    figure = Figure(figsize=(13, 3.5), facecolor=PAPER, layout="constrained")
    kept, flops, seconds = figure.subplots(1, 3)
    halves = 1
    for (name, trace), colour in zip(traces.items(), COLOURS * len(traces), strict=False):
        way = np.linspace(0, 100, len(trace.timesteps))
        share = 100 * trace.tokens / config.cells
        low, high = np.quantile(share, [0.1, 0.9], axis=1)
        kept.fill_between(way, low, high, color=colour, alpha=0.18, linewidth=0)
        kept.plot(way, share.mean(1), color=colour, label=name)
        if trace.uncond_tokens is not None:
            halves = 2
            other = 100 * trace.uncond_tokens.mean(1) / config.cells
            if (other - share.mean(1)).abs().mean() > 1:  # else the two lines would cover each other
                kept.plot(way, other, color=colour, linestyle=":", label=f"{name}, without class")
        flops.plot(way, trace.gflops(config), color=colour)
        seconds.plot(way, 1000 * trace.seconds / trace.tokens.shape[1], color=colour)
    target, plain = 100 / config.target_ratio, halves * dit_flops(config, config.cells / 4)
    _level(kept, target, f"1/N = {target:.0f} %", "bottom")
    _level(flops, plain, "plain DiT, 2×2 patches", "top")
    if plain_s is not None:
        steps = len(next(iter(traces.values())).timesteps)
        _level(seconds, 1000 * plain_s / steps, "plain DiT, 2×2 patches", "top")
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
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(file, dpi=130)


def _level(axis, value: float, text: str, side: str) -> None:
    """A level and its name, at the right, above ("bottom") or below ("top") it; on a ground of its own."""
    axis.axhline(value, color=MUTED, linestyle="--", linewidth=1)
    ground = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    axis.text(98, value, text, ha="right", va=side, fontsize=8.5, color=MUTED, bbox=ground)
