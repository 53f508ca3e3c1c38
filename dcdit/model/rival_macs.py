"""Multiply-adds of one image through SparseDiT, DyDiT and PatchDiT: all products, attention's included."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .config import DCDiTConfig
from .dit_config import DiTConfig, DyDiTConfig, PatchDiTConfig, SparseDiTConfig, fitting_size
from .flops import dcdit_flops
from .gates import Gates


def sparse_dit_macs(config: SparseDiTConfig, sparse_size: Any = None, released: bool = False) -> float:
    """Multiply-adds of a SparseDiT at a sparse grid; None: the configuration's.

    `released` counts as the public release computes: values of every token and a mean by an N×N product in the
    pooling blocks, and a merge after upsampling. The figures published with it leave out the products of attention.
    Raises ConfigError for a sparse grid larger than the grid of tokens.
    """
    height, width = config.sparse_size if sparse_size is None else fitting_size(sparse_size, config.grid)
    return _sparse_macs(config, height * width, released)


def _sparse_macs(config: SparseDiTConfig, m: float, released: bool) -> float:
    n, d2 = config.tokens, config.hidden_size**2
    mlp = 2 * config.mlp_ratio * d2
    pooling = n * mlp + (2 * n * d2 + n * n * config.hidden_size if released else 2 * d2)
    generation = m * mlp + (2 * m + 2 * n) * d2 + 2 * m * n * config.hidden_size
    merge = 2 * n * d2 if released else (n + m) * d2
    recovery = merge + n * mlp + (2 * n + 2 * m) * d2 + 2 * m * n * config.hidden_size
    sparse, dense = (sum(block_macs(tokens, config.hidden_size, config.mlp_ratio)) for tokens in (m, n))
    groups = config.groups * (generation + recovery + config.sparse * sparse + config.dense * dense)
    return config.pooling * pooling + groups + config.top * dense + _shell_macs(config, config.depth)


def dydit_macs(config: DyDiTConfig, rate: float = 1.0, routers: bool = True) -> float:
    """Multiply-adds of a DyDiT, its gates leaving `rate` of the blocks' products, as `gate_rates` counts.

    `routers` are left out in the complete pass, and are not there in a plain DiT.
    """
    n, d = config.tokens, config.hidden_size
    blocks = config.depth * sum(block_macs(n, d, config.mlp_ratio))
    return rate * blocks + gate_macs(config, n) * routers + _shell_macs(config, config.depth)


def gate_macs(config: DyDiTConfig | DCDiTConfig, tokens: Any) -> Any:
    """Multiply-adds of the routers of all gates, of an image of so many tokens: a number or a tensor."""
    d = config.hidden_size
    return config.depth * (tokens * (d + 1) * (d // 16) + 2 * d * (config.num_heads - 1))


def patch_dit_macs(config: PatchDiTConfig, scale: float = 1) -> float:
    """Multiply-adds of a PatchDiT at a scale; at 1 those of the plain DiT."""
    n, d = config.tokens / scale**2, config.hidden_size
    added = 2 * n * config.rank * (1 + config.mlp_ratio) * d if scale > 1 else 0
    return config.depth * (sum(block_macs(n, d, config.mlp_ratio)) + added) + _shell_macs(config, config.depth)


def gate_rates(gates: Gates, tokens: int, width: int, mlp_ratio: float = 4.0) -> torch.Tensor:
    """The share of the blocks' multiply-adds that open gates leave, (B,); gradients go through the gates.

    Heads scale attention; channel groups times tokens, each as a mean, scale the MLP. `tokens` and `width` belong to
    the model that is counted (DyDiT, arXiv 2410.03456 section 3.4).
    """
    attention, mlp = block_macs(tokens, width, mlp_ratio)
    spent = gates.heads.mean(2) * attention + gates.groups.mean(2) * gates.tokens.mean(2) * mlp
    return spent.mean(1) / (attention + mlp)


def image_gflops(config: DCDiTConfig | DiTConfig, tokens: float, router: nn.Module | None = None) -> float:
    """GFLOP of one image at a step of sampling that cost so many tokens; 0 tokens are a step that was not computed.

    A SparseDiT's are the sparse ones, a DyDiT's all of its tokens times the share of its products, a PatchDiT's those
    of the step's scale.
    """
    if not tokens > 0:
        return 0.0
    if isinstance(config, SparseDiTConfig):
        return 2e-9 * _sparse_macs(config, tokens, False)
    if isinstance(config, DyDiTConfig):
        return 2e-9 * dydit_macs(config, tokens / config.tokens)
    if isinstance(config, PatchDiTConfig):
        return 2e-9 * patch_dit_macs(config, (config.tokens / tokens) ** 0.5)
    return dcdit_flops(config, tokens, router)["total"]


def block_macs(tokens: float, width: int, mlp_ratio: float = 4.0) -> tuple[float, float]:
    """Multiply-adds of one DiT block's attention and of its MLP, adaLN left out."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width, 2 * mlp_ratio * tokens * width**2


def _shell_macs(config: DiTConfig, depth: int) -> float:
    """Parts that no system changes: adaLN of `depth` blocks and of the output, embedders, patches and head."""
    width, cells = config.hidden_size, config.tokens * config.patch**2
    ends = cells * (config.in_channels + config.out_channels) * width
    return (6 * depth + 2) * width**2 + 256 * width + width**2 + ends


def sparse_on(config: DCDiTConfig) -> SparseDiTConfig:
    """A SparseDiT of the sizes and depth of a DC-DiT's backbone, its layout the published one as far as it goes.

    XL's is 2 pooling blocks, 4 groups of 6 and 2 dense blocks. The sparse grid has half the side, at least 1. Raises
    ConfigError for a depth below 6.
    """
    if config.depth < 6:
        raise ConfigError(f"a SparseDiT has a depth of at least 6, got {config.depth}")
    groups = max(1, (config.depth - 4) // 6)
    rest = config.depth - 6 * groups
    pooling = min(2, rest // 2)
    sides = [max(1, side // 4) for side in config.input_size]
    return SparseDiTConfig(
        **_common(config), pooling=pooling, groups=groups, top=rest - pooling, sparse_size=(sides[0], sides[1])
    )


def dydit_on(config: Any, patch: int = 2) -> DyDiTConfig:
    """A DyDiT of the sizes and depth of a DC-DiT's backbone, or of another DiT."""
    return DyDiTConfig(**_common(config), depth=config.depth, patch=patch)


def patch_on(config: DCDiTConfig, patch: int = 2, scales: tuple[int, ...] = (1, 2, 4)) -> PatchDiTConfig:
    """A PatchDiT of the sizes and depth of a DC-DiT's backbone. Raises ConfigError where its patches do not fit."""
    return PatchDiTConfig(**_common(config), depth=config.depth, patch=patch, scales=scales)


def _common(config: Any) -> dict[str, Any]:
    names = ("input_size", "in_channels", "num_classes", "hidden_size", "num_heads", "mlp_ratio", "learn_sigma")
    return {name: getattr(config, name) for name in names}
