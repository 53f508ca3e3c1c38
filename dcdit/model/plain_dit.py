"""The plain DiT of a DC-DiT's backbone (arXiv 2212.09748): the yardstick for its time, without trained weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError, check_kind
from .blocks import DiTBlock
from .config import DCDiTConfig
from .dit_config import DiTConfig
from .dit_shell import DiTShell
from .mixed import Samples, by_size, check_inputs

# What the blocks of two models must share, and what is around the blocks of DiTs.
BLOCKS = ("hidden_size", "depth", "num_heads", "mlp_ratio")
SIZES = (*BLOCKS, "patch", "input_size", "in_channels", "num_classes", "learn_sigma")


class PlainDiT(DiTShell):
    """`patch`×`patch` cells to a token, DiT blocks on all tokens, and back: (B, C, H, W) → (B, C or 2C, H, W)."""

    def __init__(self, config: DCDiTConfig | DiTConfig, patch: int = 2) -> None:
        super().__init__(config, patch)
        if not hasattr(config, "depth"):
            raise ConfigError(f"config must have a depth, as a DCDiTConfig has, got a {type(config).__name__}")
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.depth))

    def block(self, config: Any) -> PlainBlock:
        """One fresh block."""
        return PlainBlock(config.hidden_size, config.num_heads, config.mlp_ratio)

    def forward(self, x: torch.Tensor | Sequence[torch.Tensor], t: torch.Tensor, y: torch.Tensor) -> Samples:
        """x (B, C, H, W), t and y (B,) → (B, C, H, W), or (B, 2C, H, W) with config.learn_sigma.

        A list of B samples (C, H, W) of different sizes gives a list; the blocks run once for each size. Raises
        ValueError where `patch` does not divide the sides.
        """
        check_inputs(x, t, y, self.stem.in_channels, self.class_embed.num_embeddings - 1)
        return by_size(self._predict, x, self.time_embed(t) + self.class_embed(y))

    def _predict(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), c (B, D) → the prediction."""
        grid = self.grid_of(x)
        h = self.patches(x)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.adaln(c)[:, None].chunk(2, dim=2)
        return self.pixels(self.head(self.norm(h) * (1 + scale) + shift), grid)


class PlainBlock(DiTBlock):
    """The whole of an adaLN-Zero block on (B, M, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(width, heads, mlp_ratio)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def forward(self, h: torch.Tensor, c: torch.Tensor, mlp: Callable | None = None) -> torch.Tensor:
        """h (B, M, D), c (B, D) → (B, M, D); `mlp` stands for the block's own."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)[:, None].chunk(6, dim=2)
        q, k, v = self.qkv(self.norm(h) * (1 + scale1) + shift1).unflatten(2, (3, self.heads, -1)).unbind(2)
        out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        h = h + gate1 * self.proj(out.transpose(1, 2).flatten(2))
        return h + gate2 * (mlp or self.mlp)(self.norm(h) * (1 + scale2) + shift2)


def check_start(model: nn.Module, dit: PlainDiT, names: Sequence[str] = SIZES) -> None:
    """Raise ConfigError unless `dit` is a PlainDiT that `model`, with a `config`, can take weights from: its sizes of
    these `names` are the model's. The number of heads shows in no shape."""
    check_kind(dit, PlainDiT, "the DiT to start from", "load_dit reads one")
    for name in names:
        ours, theirs = getattr(model.config, name), getattr(dit if name == "patch" else dit.config, name)
        if ours != theirs:
            raise ConfigError(f"the {type(model).__name__} has {name} {ours}, the DiT to start from has {theirs}")
