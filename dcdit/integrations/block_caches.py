"""diffusers' caches on a transformer whose blocks are chunked in part.

`FirstBlockCache` and `MagCache` add what the blocks changed in an earlier step and skip the blocks. The chunked ones
are one block to them: it takes and gives the whole grid, however many tokens it keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from ..errors import ConfigError

CACHES = ("FirstBlockCacheConfig", "MagCacheConfig")  # by name: diffusers before 0.37 has no MagCache


def enable_cache_around(chunking: Any, own: Callable[[Any], None], config: Any) -> None:
    """In place of a chunked model's `enable_cache`, which is `own`.

    Raises ConfigError for a cache that keeps tokens of single layers, because they are others in each step, and for a
    first block that is chunked where the cache runs it in every step.
    """
    kind = type(config).__name__
    if kind not in CACHES:
        raise ConfigError(
            "a chunked model takes FirstBlockCacheConfig or MagCacheConfig; other caches keep tokens of layers, which "
            f"change from step to step, got {kind}"
        )
    if kind == "FirstBlockCacheConfig" and chunking.start == 0:
        raise ConfigError(
            "FirstBlockCache runs the first block in every step, so that it must not be chunked: "
            f"blocks=slice(1, None), got slice(0, {chunking.stop})"
        )
    model: Any = own.__self__  # type: ignore[attr-defined]
    name = chunking.LISTS[chunking.place]
    known = TransformerBlockRegistry.get(type(chunking.stack[0]).__bases__[0])
    TransformerBlockRegistry.register(type(chunking), dataclasses.replace(known, _cached_parameter_indices=None))
    setattr(model, name, nn.ModuleList(chunking))  # as a list, in which caches look for blocks
    try:
        own(config)
    finally:
        setattr(model, name, chunking)
