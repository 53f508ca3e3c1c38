"""FLOPs of one forward: 2 per multiply-add of convolutions, linears and attention (arXiv 2603.06351)."""

from __future__ import annotations

import functools
import math
from numbers import Real

from torch import nn

from ..errors import ConfigError, check_kind
from .config import DCDiTConfig
from .meta import on_meta
from .routers import make_router


def dcdit_flops(config: DCDiTConfig, tokens: float, router: nn.Module | None = None) -> dict[str, float]:
    """GFLOP of one image by component, `tokens` being the retained tokens of that image.

    `total` has the paper's parts (arXiv 2603.06351): encoder, router, main, dechunk and decoder.
    `uncounted` has the parts that the paper leaves out: stem, embedders, the residual projection and the output layer.
    A `router` of your own says its multiply-adds by `macs(cells)`; raises ConfigError where it does not.
    """
    check_kind(config, DCDiTConfig, "config")
    width, narrow, cells = config.hidden_size, config.encoder_width, config.cells
    conv_stack: float
    if config.encoder_stride == 1:
        conv_stack = 9 * narrow * narrow * 3 + 9 * narrow * width + (narrow * width if narrow != width else 0)
    else:
        conv_stack = 9 * narrow * narrow * 4 / config.encoder_stride**2 + narrow * width
    outside = 9 * config.in_channels * narrow + width**2 + narrow * config.out_channels
    embedders = 256 * width + width**2 + 2 * narrow * width
    macs = {
        "encoder": cells * conv_stack + 2 * narrow * width,
        "router": _named_router(config) if router is None else _macs(router, cells),
        "main": _blocks(config, tokens),
        "dechunk": tokens**2 * width,
        "decoder": cells * conv_stack + 2 * narrow * width,
    }
    flops = {name: 2e-9 * count for name, count in macs.items()}
    flops["total"] = sum(flops.values())
    flops["uncounted"] = 2e-9 * (cells * outside + embedders)
    return flops


def dit_flops(config: DCDiTConfig, tokens: float) -> float:
    """GFLOP of an image by the plain DiT of equal backbone on `tokens` tokens (2×2 patches). Raises ConfigError."""
    patches = 4 * config.in_channels + 4 * config.out_channels
    return 2e-9 * (_blocks(config, tokens) + tokens * patches * config.hidden_size)


@functools.cache
def _named_router(config: DCDiTConfig) -> float:
    with on_meta():
        return _macs(make_router(config), config.cells)


def _macs(router: nn.Module, cells: int) -> float:
    if not hasattr(router, "macs"):
        raise ConfigError(f"the FLOPs of {type(router).__name__} are unknown: give it macs(cells), see dcdit.router")
    return router.macs(cells)  # type: ignore[operator]


def _blocks(config: DCDiTConfig, tokens: float) -> float:
    """Multiply-adds of the DiT blocks: qkv, proj and MLP, attention, modulators. Raises ConfigError."""
    if not (isinstance(tokens, Real) and 0 <= tokens < math.inf):
        raise ConfigError(f"tokens must be a number of at least 0, got {tokens!r}")
    width = config.hidden_size
    linears = tokens * (4 + 2 * config.mlp_ratio) * width**2
    return config.depth * (linears + 2 * tokens**2 * width + 6 * width**2)
