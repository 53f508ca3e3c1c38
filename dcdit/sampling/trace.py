"""Cost and decisions of a sampling run, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ..model.config import DCDiTConfig
from ..model.rival_macs import image_gflops
from ..model.routing import Routing


@dataclass(frozen=True)
class Step:
    """A callback's view before each update: x (B, C, H, W) at `timestep` (0 data to 1000 noise), the images' indices
    (B,), and the Routing of the conditional half (its plan covers both halves where there is guidance)."""

    number: int
    steps: int
    timestep: float
    x: torch.Tensor
    indices: torch.Tensor
    routing: Routing


@dataclass(frozen=True)
class Trace:
    """The cost of a run: `timesteps` (S,), `seconds` (S,) over all images, and the retained tokens of each image,
    `tokens` (S, N) and `uncond_tokens` (S, N); the latter None without guidance, NaN in steps without it. 0 tokens are
    a step that a policy did not compute. `decided` has the decisions for each step and image, (S, N) each, by the
    names of a policy's parts; NaN where nothing was. `sizes` has each step's grid (H, W) where they differ."""

    timesteps: torch.Tensor
    seconds: torch.Tensor
    tokens: torch.Tensor
    uncond_tokens: torch.Tensor | None
    decided: dict[str, torch.Tensor] = field(default_factory=dict)
    sizes: list[tuple[int, int]] | None = None

    def gflops(self, config: DCDiTConfig, router: torch.nn.Module | None = None) -> torch.Tensor:
        """GFLOP of each step, mean over the images, both halves together: (S,); `router` as in `dcdit_flops`."""
        halves = [self.tokens] if self.uncond_tokens is None else [self.tokens, self.uncond_tokens]
        configs = [config] * len(self.timesteps)
        if self.sizes is not None:
            configs = [dataclasses.replace(config, input_size=size) for size in self.sizes]
        costs = [
            [np.mean([image_gflops(sizes, m, router) for m in row]) for sizes, row in zip(configs, h, strict=True)]
            for h in (half.tolist() for half in halves)
        ]
        return torch.tensor(costs).nan_to_num(0.0).sum(0)

    def table(self) -> str:
        """Decisions and tokens: a line for each step, noise first. Images that differ have the least and the most."""
        columns = {"t": self.timesteps[:, None], **self.decided, "tokens": self.tokens}
        if self.uncond_tokens is not None:
            columns["without class"] = self.uncond_tokens
        rows = [["step", *columns]]
        rows += [[str(i), *map(_spread, step)] for i, step in enumerate(zip(*columns.values(), strict=True))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


@dataclass(frozen=True)
class Samples:
    """Clean latents (N, C, H, W), float32 on the CPU, and the Trace of the run."""

    latents: torch.Tensor
    trace: Trace


class Decided:
    """Decisions for each of `steps` steps and `count` images, by name: `values`, (S, N) each."""

    def __init__(self, steps: int, count: int) -> None:
        self.shape, self.values = (steps, count), dict[str, torch.Tensor]()

    def add(self, step: int, part: slice, decided: Mapping[str, float | torch.Tensor]) -> None:
        """Values of the images in `part`, numbers or (B,); of a tensor that has both halves the first is taken."""
        for name, value in decided.items():
            row = self.values.setdefault(name, torch.full(self.shape, torch.nan))[step, part]
            row.copy_(value[: len(row)] if isinstance(value, torch.Tensor) else torch.tensor(float(value)))


def _spread(values: torch.Tensor) -> str:
    known = values[values.isfinite()]
    if not len(known):
        return "–"
    low, high = f"{float(known.min()):.4g}", f"{float(known.max()):.4g}"
    return low if low == high else f"{low}–{high}"
