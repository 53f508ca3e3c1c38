"""A DiT with several patch sizes (dynamic tokenisation, arXiv 2602.16968): a step may take p, 2p or 4p cells a side."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError, check_kind
from .dit_config import PatchDiTConfig
from .embedders import sincos_2d
from .layers import check_dtype, gelu_tanh
from .plain_dit import PlainBlock, PlainDiT, check_start


class PatchDiT(PlainDiT):
    """(B, C, H, W) → (B, C or 2C, H, W). At scale 1 it is the plain DiT; at s its patches have s times the side."""

    config: PatchDiTConfig

    def __init__(self, config: PatchDiTConfig) -> None:
        check_kind(config, PatchDiTConfig, "config")
        super().__init__(config, config.patch)
        self.coarse = nn.ModuleDict({str(scale): CoarsePatches(config, scale) for scale in config.scales[1:]})

    def block(self, config: PatchDiTConfig) -> PatchBlock:
        """One fresh block."""
        return PatchBlock(config.hidden_size, config.num_heads, config.mlp_ratio, config.rank)

    @classmethod
    def from_dit(cls, dit: PlainDiT, config: PatchDiTConfig) -> PatchDiT:
        """A PatchDiT on a frozen DiT: its own weights alone require gradients.

        Each scale begins with the DiT's embedding and de-embedding, resized; adapters and vectors begin at 0. Raises
        ConfigError where sizes differ.
        """
        model = cls(config)
        check_start(model, dit)
        base = dit.state_dict()
        model.load_state_dict(base, strict=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in base)
        for part in model.coarse.values():
            part.resize_from(dit)
        return model

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """x (B, C, H, W), t and y (B,) → (B, C, H, W), or (B, 2C, H, W) with config.learn_sigma.

        Raises ConfigError for a `scale` that the model has not.
        """
        if scale == 1:
            return super().forward(x, t, y)
        if type(scale) is not int or scale not in self.config.scales:
            raise ConfigError(f"scale must be one of {', '.join(map(str, self.config.scales))}, got {scale}")
        self.check(x, t, y)
        patches: CoarsePatches = self.coarse[str(scale)]  # type: ignore[assignment]
        c = self.time_embed(t) + self.class_embed(y)
        h = patches.embed(x)
        for block in self.blocks:
            h = block(h, c, block.adapted_mlp)
        shift, scaling = self.adaln(c)[:, None].chunk(2, dim=2)
        return patches.pixels(self.norm(h) * (1 + scaling) + shift)


class CoarsePatches(nn.Module):
    """Embedding, positions, de-embedding and vector of the patches of one scale."""

    pos_embed: torch.Tensor

    def __init__(self, config: PatchDiTConfig, scale: int) -> None:
        super().__init__()
        width, self.side = config.hidden_size, scale * config.patch
        self.grid = config.grid[0] // scale, config.grid[1] // scale
        self.stem = nn.Conv2d(config.in_channels, width, self.side, stride=self.side)
        self.head = nn.Linear(width, self.side**2 * config.out_channels)
        self.vector = nn.Parameter(torch.zeros(width))
        # A patch lies where its middle is, in the unit of the base patches.
        self.register_buffer("pos_embed", sincos_2d(width, self.grid, 1 / scale))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) → tokens (B, M, D)."""
        check_dtype(x, self.stem.weight)
        return self.stem(x).flatten(2).transpose(1, 2).contiguous() + (self.pos_embed + self.vector)

    def pixels(self, h: torch.Tensor) -> torch.Tensor:
        """Normalised tokens (B, M, D) → (B, C or 2C, H, W)."""
        return F.pixel_shuffle(self.head(h).transpose(1, 2).unflatten(2, self.grid), self.side)

    @torch.no_grad()
    def resize_from(self, dit: PlainDiT) -> None:
        """Take the embedding and de-embedding of a DiT's patches, resized."""
        self.stem.weight.copy_(resized_filters(dit.stem.weight, self.side))
        self.stem.bias.copy_(dit.stem.bias)
        cells = -1, dit.patch**2
        self.head.weight.copy_(resized_rows(dit.head.weight.unflatten(0, cells), self.side))
        self.head.bias.copy_(resized_rows(dit.head.bias.unflatten(0, cells), self.side))


class PatchBlock(PlainBlock):
    """A plain block whose feed-forward layers have a low-rank addition (LoRA, arXiv 2106.09685) for coarse patches."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, rank: int) -> None:
        super().__init__(width, heads, mlp_ratio)
        hidden = self.fc1.out_features
        self.fc1_adapter, self.fc2_adapter = low_rank(width, rank, hidden), low_rank(hidden, rank, width)

    def adapted_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, D), for `forward` in place of `mlp`."""
        x = gelu_tanh(self.fc1(x) + self.fc1_adapter(x))
        return self.fc2(x) + self.fc2_adapter(x)


def low_rank(inputs: int, rank: int, outputs: int) -> nn.Sequential:
    """A linear map of a rank, 0 at the start."""
    layers = nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False))
    nn.init.zeros_(layers[1].weight)
    return layers


def resized_filters(weight: torch.Tensor, side: int) -> torch.Tensor:
    """Filters (…, p, p) of an embedding → (…, side, side), by FlexiViT (arXiv 2212.08013 section 3.4).

    With B the bilinear resize the new filter is pinv(B)ᵀ·w, so that a resized patch B·x gets the token of x.
    """
    inverse = bilinear(weight.shape[-1], side).pinverse().to(weight.device)
    return (weight.flatten(-2).double() @ inverse).unflatten(-1, (side, side)).to(weight.dtype)


def resized_rows(weight: torch.Tensor, side: int) -> torch.Tensor:
    """Rows (C, p², …) of a de-embedding → (C·side², …): the new output is B times the old one, which pinv(B) takes
    back."""
    resize = bilinear(math.isqrt(weight.shape[1]), side).to(weight.device)
    return torch.tensordot(weight.double(), resize, ([1], [1])).movedim(-1, 1).flatten(0, 1).to(weight.dtype)


def bilinear(side: int, larger: int) -> torch.Tensor:
    """The bilinear resize of side×side cells to larger×larger as a matrix (larger², side²), float64 on the CPU."""
    each = torch.eye(side**2, dtype=torch.float64, device="cpu").view(-1, 1, side, side)
    return F.interpolate(each, (larger, larger), mode="bilinear").flatten(1).T.contiguous()
