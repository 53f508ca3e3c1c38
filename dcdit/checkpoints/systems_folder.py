"""Folders of systems other than DC-DiT: a SparseDiT, DyDiT, PatchDiT or DyDCDiT as `save_checkpoint` wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..model.config import DCDiTConfig, check_keys
from ..model.dit_config import DyDiTConfig, PatchDiTConfig, SparseDiTConfig
from ..model.dydit import DyDiT
from ..model.dydit_main import DyDCDiT
from ..model.meta import on_meta
from ..model.patch_dit import PatchDiT
from ..model.sparse_dit import SparseDiT

SYSTEMS: dict[str, tuple[Any, Any]] = {
    "sparse": (SparseDiT, SparseDiTConfig),
    "dydit": (DyDiT, DyDiTConfig),
    "patches": (PatchDiT, PatchDiTConfig),
    "dydcdit": (DyDCDiT, DCDiTConfig),
}


def system_of(model: torch.nn.Module) -> dict[str, str]:
    """{"kind": …} of one of SYSTEMS, as config.json holds it; nothing of a DC-DiT."""
    return next(({"kind": kind} for kind, (cls, _) in SYSTEMS.items() if type(model) is cls), {})


def empty_system(kind: str, sizes: dict[str, Any], shapes: dict[str, tuple[int, ...]], path: Path) -> Any:
    """The model of config.json's `kind` and `sizes`, without memory. Raises CheckpointError where it makes none.

    `shapes` are the weights' shapes: their blocks are counted before a model is made.
    """
    try:
        check_keys([kind], SYSTEMS, "kind")
        cls, sizes_of = SYSTEMS[kind]
        config = sizes_of.from_dict(sizes)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    blocks = len({key.rsplit("fc1", 1)[0] for key in shapes if "fc1" in key})
    if blocks != config.depth:
        raise CheckpointError(f"{path}: config.json says depth {config.depth}, the weights have {blocks} blocks")
    try:
        with on_meta():
            return cls(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: config.json's sizes make no model: {str(error).splitlines()[0]}") from error
