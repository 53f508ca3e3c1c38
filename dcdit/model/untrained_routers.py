"""Routers without parameters, for models that nobody trains: by motion, by the last predictions, by a given map.

Each answers with p above 1/2 for every cell that may be kept, the higher the sooner; the budget of a forward
(`drop_fraction` and its like) says how many are.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError

ROUNDING = 1e-5  # relative; what changes less stands still


class MotionRouter(nn.Module):
    """Video: the first frame, then the cells that differ from the frame before, the most changed first.

    A cell that stands still has p = 1/2 and is never kept: a still background is kept once, in the first frame.
    """

    def forward(self, h: torch.Tensor, *, grid: tuple[int, ...]) -> torch.Tensor:
        """h (B, L, D) on a grid (F, H, W) → boundary_prob (B, L). Raises ConfigError on another grid."""
        if len(grid) != 3:
            raise ConfigError(f'router="motion" needs a grid (F, H, W), got {grid}')
        frames = h.unflatten(1, grid)
        first = torch.ones_like(frames[:, :1, ..., 0])
        if grid[0] == 1:
            return first.flatten(1)
        score = (frames[:, 1:] - frames[:, :-1]).square().mean(-1).sqrt()
        size = frames[:, 1:].square().mean(-1).sqrt()
        score = score.masked_fill(score <= ROUNDING * size, 0)
        return torch.cat([first, boundary_prob(score.flatten(1)).unflatten(1, (grid[0] - 1, *grid[1:]))], 1).flatten(1)


class MapRouter(nn.Module):
    """The caller's map: an edit mask, a saliency, (H, W), (F, H, W) or with a batch in front, of any size.

    `map` is set before a forward. On a map finer than the grid a cell takes its highest value; a cell of 0 is never
    kept. `DynamicChunking.keep` keeps further cells, such as every fourth of every fourth row outside of a mask.
    """

    def __init__(self, map: torch.Tensor | None = None) -> None:
        super().__init__()
        self.map = map

    def forward(self, h: torch.Tensor, *, grid: tuple[int, ...]) -> torch.Tensor:
        """h (B, L, D) → boundary_prob (B, L). Raises ConfigError where there is no map or it does not fit."""
        if self.map is None:
            raise ConfigError('router="map" needs a map: set chunking.router.map, got None')
        if not isinstance(self.map, torch.Tensor) or not self.map.numel():
            raise ConfigError(f"map must be a tensor of one value or more, got {self.map!r}")
        looked_at = self.map.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_at and not ((self.map >= 0) & (self.map < math.inf)).all():
            raise ConfigError(f"map must be 0 or more and finite, got {self.map.min():g} to {self.map.max():g}")
        given = self.map.to(h)
        given = given if given.dim() > len(grid) else given[None]
        if given.dim() != len(grid) + 1 or len(given) not in (1, len(h)):
            raise ConfigError(f"map must have the axes of the grid {grid}, got shape {tuple(self.map.shape)}")
        return boundary_prob(on_cells(given[:, None], grid, F.adaptive_max_pool3d).expand(len(h), -1))


class DifferenceRouter(nn.Module):
    """Cells by the change of their prediction between the last two steps of a trajectory, for each pass of guidance.

    Before there are two, where time turns back (another trajectory) or stands still, the cells are spread evenly.
    `watch` lets it see a model's predictions. `passing` names the pass: each has a history of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passing: str | None = None
        self.time: torch.Tensor | float = 0.0
        self.history: dict[str | None, list[tuple[torch.Tensor | float, torch.Tensor]]] = {}
        self.hooks: tuple = ()

    def watch(self, model: nn.Module) -> None:
        """See the time and the prediction of each forward of the model."""
        before = model.register_forward_pre_hook(self._before, with_kwargs=True)
        self.hooks = before, model.register_forward_hook(self._after)

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        self.time = given.get("timestep", given.get("t"))

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        out = output if isinstance(output, torch.Tensor) else output[0]
        out = torch.stack(list(out)) if isinstance(out, list | tuple) else out
        self.history[self.passing] = [*self.history.get(self.passing, [])[-1:], (self.time, out.detach())]

    def forward(self, h: torch.Tensor, *, grid: tuple[int, ...]) -> torch.Tensor:
        """h (B, L, D) → boundary_prob (B, L)."""
        even = spread(grid, h.device).to(h.dtype).expand(len(h), -1)
        seen = self.history.get(self.passing, [])
        if len(seen) < 2 or not len(seen[0][1]) == len(seen[1][1]) == len(h):
            return boundary_prob(even)
        (time, earlier), (later_time, later) = seen
        score = (later - earlier).to(h.dtype).square()
        # Tokens (B, L, C), or latents (B, C, …) of which a cell holds some.
        tokens = score.dim() == 3 and score.shape[1] == h.shape[1]
        score = score.mean(2) if tokens else on_cells(score.mean(1, keepdim=True), grid, F.adaptive_avg_pool3d)
        onward = torch.as_tensor((self.time - later_time) * (later_time - time) > 0, device=h.device)
        return boundary_prob(torch.where(onward.reshape(-1, 1), score.sqrt(), even))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "history": {}}  # of trajectories, no state of the module


UNTRAINED: dict[str, type[nn.Module]] = {"motion": MotionRouter, "difference": DifferenceRouter, "map": MapRouter}


def boundary_prob(score: torch.Tensor) -> torch.Tensor:
    """Scores (B, n) of 0 or more → probabilities from 1/2, for a score of 0, to 1, for the sample's highest."""
    top = score.amax(1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
    return 0.5 + 0.5 * score / top


def on_cells(x: torch.Tensor, grid: tuple[int, ...], pool: Any) -> torch.Tensor:
    """x (B, 1, …) of any size as (B, L) on the grid; axes of length 1 that the grid lacks do not matter."""
    size = (1, 1, *grid)[-3:]
    volume = x.reshape(len(x), 1, *(1, 1, *x.shape[2:])[-3:])
    return pool(volume, size).flatten(1)


def spread(grid: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Scores (L,) in (0, 1]; the cells above any score lie evenly on the grid. The constants are those of Roberts' R
    sequence, a recurrence of additions, here taken along the axes."""
    n = len(grid)
    base = 2.0
    for _ in range(64):  # the root of x^(n + 1) = x + 1
        base = (1 + base) ** (1 / (n + 1))
    score = torch.zeros((), dtype=torch.float64, device=device)
    for axis, side in enumerate(grid, 1):
        score = score[..., None] + torch.arange(side, dtype=torch.float64, device=device) / math.pow(base, axis)
    return 1 - score.flatten() % 1
