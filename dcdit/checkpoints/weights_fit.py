"""Whether a checkpoint's weights fit a model: names, shapes, dtypes and the position table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError, first_line
from ..model.config import DCDiTConfig
from ..model.dcdit import DCDiT
from ..model.embedders import sincos_2d
from ..model.meta import on_meta

FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors names them; those of 8 bits need a scale


def shapes_of(model: DCDiT) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the model's state."""
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def compare_shapes(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError that names the first shape, else the keys that differ: another width has other keys too."""
    for key, shape in expected.items():
        if shape != found.get(key, shape):
            raise CheckpointError(f"{key}: expected shape {shape}, found {found[key]}")
    parts = {"missing": expected.keys() - found.keys(), "unexpected": found.keys() - expected.keys()}
    differing = [f"{what} keys in checkpoint: {some_of(keys)}" for what, keys in parts.items() if keys]
    if differing:
        raise CheckpointError("; ".join(differing))


def check_grid(table: torch.Tensor, config: DCDiTConfig, path: Path) -> None:
    """Raise CheckpointError where the position table belongs to another grid with as many cells."""
    cells, width = config.cells, config.hidden_size
    grids = [config.input_size, *((h, cells // h) for h in range(1, cells + 1) if cells % h == 0)]
    for grid in grids:
        # In units of cells, or of the patches of a DiT that the model comes from; rounded as the table is.
        if any(torch.allclose(table, sincos_2d(width, grid, patch).to(table), atol=1e-4) for patch in (1, 2)):
            if grid != config.input_size:
                ours, theirs = ("×".join(map(str, size)) for size in (config.input_size, grid))
                raise CheckpointError(
                    f"{path}: config.json says a grid of {ours}, the position table is that of {theirs}"
                )
            return


def header_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's weights. Raises CheckpointError where they are no floats."""
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        shapes = {}
        for key in file.keys():
            part = file.get_slice(key)
            shapes[key] = tuple(part.get_shape())
            dtype = part.get_dtype()
            if dtype not in FLOATS:
                known = ", ".join(FLOATS)
                raise CheckpointError(
                    f"{weights}: {key}: expected floating-point weights, found {dtype}; known: {known}"
                )
    return shapes


def check_header(weights: Path, config: DCDiTConfig, parts: dict[str, nn.Module | None]) -> None:
    """Compare a safetensors file's names, shapes and dtypes with a model that has no memory. Raises CheckpointError."""
    shapes = header_shapes(weights)
    blocks = len({key.split(".")[2] for key in shapes if key.startswith("main.blocks.")})
    # The depth first: a thousand million blocks fill the memory even without weights.
    if blocks not in (0, config.depth):
        raise CheckpointError(
            f"{weights.parent}: config.json says depth {config.depth}, the weights have {blocks} blocks"
        )
    try:
        with on_meta():
            model = DCDiT(config if blocks else dataclasses.replace(config, depth=1), **parts)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{weights.parent}: config.json's sizes make no model: {first_line(error)}") from error
    compare_shapes(shapes_of(model), shapes)


def some_of(keys: Iterable[str]) -> str:
    """The first four names, and how many more there are."""
    keys = sorted(keys)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
