"""Shape and dtype of an npy file without its data, and its data."""

from __future__ import annotations

import tokenize
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

Header = dict[str, tuple[tuple[int, ...], str]]  # of each tensor its shape, and its dtype as safetensors calls it
HEADERS: dict[tuple[int, int], Callable] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_header(stream: Any) -> tuple[tuple[int, ...], str]:
    """Shape, and dtype as safetensors calls it. Raises ValueError where it is no npy."""
    version = np.lib.format.read_magic(stream)
    if version not in HEADERS:
        raise ValueError(f"its npy format is {version}, expected 1.0 or 2.0")
    try:
        shape, _, dtype = HEADERS[version](stream)
    except tokenize.TokenError as error:  # numpy lets it through
        raise ValueError(f"its npy header is broken: {error}") from error
    if any(side < 0 for side in shape):
        raise ValueError(f"its npy header is broken: it has the shape {shape}")
    return shape, f"F{8 * dtype.itemsize}" if dtype.kind == "f" else dtype.name


def read_tensor(stream: BinaryIO) -> torch.Tensor:
    """The array, whose header `read_header` has read. Raises ValueError where it is cut off."""
    with stream:
        return to_tensor(np.lib.format.read_array(stream, allow_pickle=False))


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """The array's numbers, also of the other byte order. Raises TypeError for a dtype that torch lacks."""
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
