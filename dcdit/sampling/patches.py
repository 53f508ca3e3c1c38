"""The patch size of each sampling step, from the latents' own history (arXiv 2602.16968)."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..model.patch_dit import PatchDiT
from ..model.routing import Routing
from .paced import Answer, Paced

PERCENTILE = 0.4


class PatchChoice(Paced):
    """A PatchDiT at the largest scale whose patches are smoother than τ = `threshold`, a sample at a time.

    The first three steps of a batch are at scale 1, and so are all steps at threshold 0.
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        super().__init__(model)
        if not isinstance(model, PatchDiT):
            raise ConfigError(f"patches is of a PatchDiT, this model is a {type(model).__name__}")
        self.threshold = checked_threshold(threshold)

    def begin(self, timesteps: torch.Tensor) -> None:
        self.history: list[torch.Tensor] = []

    def observe(self, x: torch.Tensor) -> None:
        self.history = [*self.history[-3:], x]
        self.scale = torch.ones(len(x), dtype=torch.long)
        for scale, rough in roughness(self.history, self.model.config).items():
            self.scale[(rough < self.threshold).cpu()] = scale

    def forward(self, x, t, y, drop_fraction=0.0, return_routing: bool = True, rows=None, **budget: Any) -> Answer:
        self.refuse(drop_fraction, budget)
        rows = torch.arange(len(x)) if rows is None else rows.cpu()
        scale = self.scale[rows % len(self.scale)]  # both halves of guidance see one x
        parts = [(s, (scale == s).nonzero().squeeze(1).to(x.device)) for s in scale.unique().tolist()]
        outs = [self.model(x[own], t[own], y[own], s) for s, own in parts]
        out = torch.cat(outs)[torch.cat([own for _, own in parts]).argsort()]
        tokens = len(self.model.pos_embed)
        self.spent, self.decided = tokens / scale.float() ** 2, {"patches": self.config.patch * scale}
        return out, Routing.of(torch.ones(len(x), tokens, device=x.device), self.model.grid)


def checked_threshold(threshold: Any) -> float:
    """τ, as it is. Raises ConfigError for anything but a finite number of at least 0."""
    if not isinstance(threshold, Real) or not 0 <= threshold < float("inf"):
        raise ConfigError(f"patches must be a threshold of at least 0, got {threshold!r}")
    return threshold


def third_difference(history: list[torch.Tensor]) -> torch.Tensor:
    """z(t−1) − 3·z(t) + 3·z(t+1) − z(t+2) of the last four latents, the latest last. 0 where they follow a parabola."""
    oldest, older, old, new = history[-4:]
    return (new - oldest) + 3 * (older - old)


def roughness(history: list[torch.Tensor], config) -> dict[int, torch.Tensor]:
    """Of each coarse scale, float32 (B,): the deviation of the third difference in a patch, at the 40th percentile over
    the patches. Nothing of fewer than four latents (B, C, H, W)."""
    if len(history) < 4:
        return {}
    change = third_difference(history).float()
    values = {}
    for scale in config.scales[1:]:
        side = scale * config.patch
        patches = change.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        values[scale] = patches.std(3, correction=0).flatten(1).quantile(PERCENTILE, dim=1)
    return values
