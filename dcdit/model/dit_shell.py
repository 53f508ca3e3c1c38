"""The shell around the blocks of a DiT: patches, positions, time and class in front, pixels of patches behind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dcdit_kernels import Packing, adaln_modulate

from ..errors import ConfigError, check_kind
from .blocks import Stream
from .config import DCDiTConfig
from .dit_config import DiTConfig
from .embedders import TimestepEmbedding, positions_of, sincos_2d
from .layers import check_dtype
from .mixed import check_inputs


class DiTShell(nn.Module):
    """A DiT (arXiv 2212.09748) without its blocks.

    `config` is a DCDiTConfig or a DiTConfig; `patch`×`patch` cells are a token.
    """

    pos_embed: torch.Tensor

    def __init__(self, config: Any, patch: int) -> None:
        super().__init__()
        check_kind(config, (DCDiTConfig, DiTConfig), "config")
        if not isinstance(patch, int) or patch < 1 or any(side % patch for side in config.input_size):
            raise ConfigError(f"patch must divide input_size {config.input_size}, got {patch!r}")
        self.config = config
        self.patch, self.grid = patch, tuple(n // patch for n in config.input_size)
        width = config.hidden_size
        self.stem = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.time_embed = TimestepEmbedding(width)
        self.class_embed = nn.Embedding(config.num_classes + 1, width)  # the last class is 'no label'
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, patch**2 * config.out_channels)
        self.register_buffer("pos_embed", sincos_2d(width, self.grid))

    def grid_of(self, x: torch.Tensor) -> tuple[int, ...]:
        """The tokens' grid of x (B, C, H, W). Raises ValueError where `patch` does not divide the sides."""
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(f"x must have sides that patch {self.patch} divides, got {tuple(x.shape[2:])}")
        return tuple(side // self.patch for side in x.shape[2:])

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) → tokens (B, N, D), their positions added. Raises ValueError for another dtype than the
        model's."""
        # Token after token in memory: the transposed view would make each pass over h in every block a strided one.
        check_dtype(x, self.stem.weight)
        tokens = self.stem(x).flatten(2).transpose(1, 2).contiguous()
        grid = self.grid_of(x)
        return tokens + (self.pos_embed if grid == self.grid else positions_of(self.pos_embed, grid))

    def pixels(self, out: torch.Tensor, grid: tuple[int, ...] | None = None) -> torch.Tensor:
        """Head outputs (B, N, patch²·C) → (B, C, H, W); `grid` is the tokens', None: the configured one."""
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, grid or self.grid), self.patch)

    def finish(self, stream: Stream, active: torch.Tensor, packing: Packing) -> torch.Tensor:
        """The last blocks' Stream of (B·N, D), and the conditioning (B, D) through its SiLU → the prediction."""
        shift, scale = self.adaln[1](active).chunk(2, dim=1)
        out = self.head(adaln_modulate(stream.hidden(packing), shift, scale, packing))
        return self.pixels(out.unflatten(0, (packing.batch_size, len(self.pos_embed))))

    def check(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> None:
        """Raise ValueError where the inputs are not x (B, C, H, W) of the configured grid, and t and y (B,)."""
        shape = (self.stem.in_channels, *(side * self.patch for side in self.grid))
        if not isinstance(x, torch.Tensor) or x.dim() != 4 or tuple(x.shape[1:]) != shape:
            came = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"x must have shape (B, {', '.join(map(str, shape))}), got {came}")
        check_inputs(x, t, y, shape[0], self.class_embed.num_embeddings - 1)


def dense_packing(batch: int, tokens: int, device: torch.device) -> Packing:
    """The packing of `batch` samples of `tokens` rows each."""
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
    return Packing.from_cu_seqlens(cu_seqlens, tokens, batch * tokens, exact=True)
