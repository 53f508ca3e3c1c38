"""Weights of the public releases of SparseDiT and DyDiT: keys renamed, sizes inferred."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..files import expanded
from ..model.dit_config import DyDiTConfig, SparseDiTConfig
from ..model.dydit import DyDiT
from ..model.sparse_dit import SparseDiT
from .dit import OUTER, reorder_head
from .folder import load_state
from .looks import looks_like
from .release_keys import PARTS
from .safe_pickle import read_state, shape_of, swap_parts, swap_prefix

_SPARSE_OUTER = (
    *OUTER,
    ("poolingformer_blocks.", "pooling."),
    ("dumbbell_blocks.", "groups."),
    ("normal_blocks.", "top."),
)
_SPARSE_PARTS = (
    *PARTS,
    ("attn.q", "q"),
    ("attn.kv", "kv"),
    ("attn.v", "v"),
    ("token_merge_blocks.0", "generate"),
    ("semantic_blocks", "sparse"),
    ("token_recover_blocks.0.merged_layer1", "merge_sparse"),
    ("token_recover_blocks.0.merged_layer2", "merge_dense"),
    ("token_recover_blocks.0", "recover"),
    ("normal_blocks", "dense"),
)

_DYNAMIC_PARTS = (
    *PARTS,
    ("attn_rate.router", "routers.heads"),
    ("mlp_rate.router", "routers.groups"),
    ("token_selection.mlp_head", "routers.tokens"),
)


def load_sparsedit(
    path_or_state: str | Path | dict[str, torch.Tensor], *, num_heads: int, sparse_size: int | tuple[int, int]
) -> SparseDiT:
    """The SparseDiT of a `.pt` of the public release, or of its state dict, in eval mode.

    The release keeps neither its heads nor its sparse grid. Raises CheckpointError for another system's weights, which
    it names, and ConfigError for a sparse grid that does not fit.
    """
    state = _read(path_or_state, "SparseDiT", ("dumbbell_blocks.", "poolingformer_blocks."))
    ours = _renamed(state, sparse_key)
    first = [key.split(".") for key in ours]
    inner = [key[2:] for key in first if key[:2] == ["groups", "0"]]
    config = _config(
        SparseDiTConfig,
        ours,
        num_heads,
        mlp_ratio=_mlp_ratio(ours),
        pooling=_count(key[1] for key in first if key[0] == "pooling"),
        groups=_count(key[1] for key in first if key[0] == "groups"),
        sparse=_count(key[1] for key in inner if key[0] == "sparse"),
        dense=_count(key[1] for key in inner if key[0] == "dense"),
        top=_count(key[1] for key in first if key[0] == "top"),
        sparse_size=sparse_size,
    )
    return _loaded(SparseDiT(config), ours)


def load_dydit(path_or_state: str | Path | dict[str, torch.Tensor], *, num_heads: int) -> DyDiT:
    """The DyDiT of a `.pt` of the public release, or of its state dict, in eval mode.

    Raises CheckpointError for another system's weights, which it names.
    """
    ours = _renamed(_read(path_or_state, "DyDiT", (".attn_rate.",)), dynamic_key)
    depth = _count(key.split(".")[1] for key in ours if key.startswith("blocks."))
    config = _config(DyDiTConfig, ours, num_heads, mlp_ratio=_mlp_ratio(ours), depth=depth)
    return _loaded(DyDiT(config), ours)


def sparse_key(key: str) -> str:
    """Our name of a parameter of SparseDiT's release."""
    return swap_parts(swap_prefix(key, _SPARSE_OUTER) or key, _SPARSE_PARTS)


def dynamic_key(key: str) -> str:
    """Our name of a parameter of DyDiT's release."""
    return swap_parts(swap_prefix(key, OUTER) or key, _DYNAMIC_PARTS)


def _read(source: str | Path | dict[str, torch.Tensor], system: str, signs: tuple[str, ...]) -> dict[str, torch.Tensor]:
    state = source if isinstance(source, dict) else read_state(expanded(source))[0]
    if not any(sign in f".{key}" for sign in signs for key in state):
        raise CheckpointError(f"expected the weights of {system}, these look like {looks_like(state)}")
    return state


def _renamed(state: dict[str, torch.Tensor], key_of: Callable[[str], str]) -> dict[str, torch.Tensor]:
    ours = {key_of(key): tensor for key, tensor in state.items()}
    if "pos_embed" in ours:
        ours["pos_embed"] = ours["pos_embed"].squeeze(0)
    return reorder_head(ours, to_ours=True)


def _config(kind: type, state: dict[str, torch.Tensor], num_heads: int, **sizes: Any) -> Any:
    """Sizes that the tensors' shapes tell, and those given. The release's grids are square."""
    width, channels, patch, _ = shape_of(state, "stem.weight", 4)
    tokens = shape_of(state, "pos_embed", 2)[0]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"pos_embed: expected a square grid, found {tokens} tokens")
    try:
        return kind(
            input_size=(side * patch, side * patch),
            patch=patch,
            in_channels=channels,
            num_classes=shape_of(state, "class_embed.weight", 2)[0] - 1,
            hidden_size=width,
            num_heads=num_heads,
            learn_sigma=shape_of(state, "head.weight", 2)[0] == 2 * channels * patch**2,
            **sizes,
        )
    except ConfigError as error:
        raise ConfigError(f"the checkpoint's sizes and those given: {error}") from error


def _mlp_ratio(state: dict[str, torch.Tensor]) -> float:
    key = next((key for key in state if re.search(r"\.fc1\.weight$", key)), "blocks.0.fc1.weight")
    hidden, width = shape_of(state, key, 2)
    return hidden / width


def _count(names) -> int:
    return len(set(names))


def _loaded(model: Any, state: dict[str, torch.Tensor]) -> Any:
    load_state(model, {key: tensor.to(torch.float32) for key, tensor in state.items()})
    return model.eval()
