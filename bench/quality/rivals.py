"""The rivals of DC-DiT in its own trainer and sampler: other boundaries, and the plain DiT."""

from __future__ import annotations

import math

import torch
from torch import nn

from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.model.layers import init_linears
from dcdit.model.plain_dit import PlainDiT
from dcdit.model.routing import Routing, regular_cells
from dcdit.training.trainer import Trainer


class RandomRouter(nn.Module):
    """L/N random cells of each sample, drawn anew at each call; the cells of `keep_grid` are always among them."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.kept = round(config.cells / config.target_ratio)
        self.stride, self.grid = config.keep_grid, config.input_size

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """h (B, L, D) → boundary_prob (B, L): 1 at the cells of the draw, 0 elsewhere."""
        lots = torch.rand(h.shape[:2], device=h.device)
        if self.stride:
            lots = lots + regular_cells(self.grid, self.stride, h.device)
        chosen = lots.topk(self.kept, dim=1).indices
        return torch.zeros_like(h[..., 0]).scatter_(1, chosen, 1.0)

    def macs(self, cells: int) -> float:
        """Multiply-adds of one image."""
        return 0.0


class GridRouter(nn.Module):
    """Every √N-th cell of every √N-th row."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.stride, self.grid = math.isqrt(int(config.target_ratio)), config.input_size

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """h (B, L, D) → boundary_prob (B, L), alike for all samples."""
        return regular_cells(self.grid, self.stride, h.device).to(h.dtype).expand(h.shape[:2])

    def macs(self, cells: int) -> float:
        """Multiply-adds of one image."""
        return 0.0


class PlainRival(PlainDiT):
    """The plain DiT behind the calls of a DCDiT; it keeps its own tokens, one of each 2×2 cells, and routes nothing."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__(config)
        self.config, self.own_parts, self.main = config, {"model": "PlainDiT"}, nn.Identity()
        init_linears(self, ("adaln.1", "head"))
        nn.init.xavier_uniform_(self.stem.weight.flatten(1))
        nn.init.zeros_(self.stem.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)

    def forward(self, x, t, y, drop_fraction=0.0, return_routing: bool = False, **limits):
        """As DCDiT's; the routing is a regular grid with as many tokens as patches, whose rows `limits` may fix."""
        out = super().forward(x, t, y)
        if not return_routing:
            return out
        prob = GridRouter(self.config)(x.flatten(1)[:, : self.config.cells, None], t)
        return out, Routing.of(prob, self.config.input_size, **limits)


ROUTERS = {"random": RandomRouter, "grid": GridRouter}


def make_rival(config: DCDiTConfig, kind: str) -> nn.Module:
    """`kind` learned, random, grid or plain."""
    if kind == "plain":
        return PlainRival(config)
    return DCDiT(config, router=ROUTERS[kind](config) if kind in ROUTERS else None)


class RivalTrainer(Trainer):
    """The trainer of `dcdit train`, of another model."""

    kind = "learned"

    def blank(self) -> nn.Module:
        return make_rival(self.config.model, self.kind)
