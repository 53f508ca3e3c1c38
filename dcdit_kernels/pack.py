"""pack_rows and unpack_rows: row gather and scatter for any dtype, each the other's gradient."""

from __future__ import annotations

from typing import Any

import torch

from . import extension, reference
from ._check import all_tensors, indices, require, shaped, traced
from ._ops import Backend, Operator

PACK_ROWS, UNPACK_ROWS = (
    Operator(name, native=Backend(f"dcdit_kernels.extension:{name}", extension.why_not))
    for name in ("pack_rows", "unpack_rows")
)


def pack_rows(x: torch.Tensor, index: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """out[i] = x[index[i]], zero where index[i] is -1.

    Args:
        x: (N, ...), any dtype; rows may be apart, as in a view of a fused tensor.
        index: (T,) int32 or int64 in [-1, N). Where x needs a gradient no row may be taken twice: x[index] is for that.

    Returns (T, ...). Raises IndexError for an index out of range, on a CPU ValueError for a row taken twice; on a GPU,
    which the host does not wait for, the launch fails where the index is out of range.
    """
    _check("pack_rows", x, index)
    if x.requires_grad and torch.is_grad_enabled():
        _once("pack_rows: where x needs a gradient a row is taken once", index)
    return _run(PACK_ROWS, backend, x, index)


def unpack_rows(x: torch.Tensor, index: torch.Tensor, rows: int, *, backend: str | None = None) -> torch.Tensor:
    """out[index[i]] = x[i], zero in the other rows; x[i] is left out where index[i] is -1.

    Args:
        x: (T, ...), any dtype.
        index: (T,) int32 or int64 in [-1, rows), each row once.
        rows: rows of the result.

    Returns (rows, ...). Raises IndexError as `pack_rows` does, and on a CPU ValueError for a row filled twice.
    """
    _check("unpack_rows", x, index, rows)
    shaped("unpack_rows", "index", index, x.shape[0])
    _once("unpack_rows: a row is filled once", index)
    return _run(UNPACK_ROWS, backend, x, index, rows)


def _run(operator: Operator, backend: str | None, x: torch.Tensor, *args: Any) -> torch.Tensor:
    if traced(x):  # a graph takes the reference in
        return getattr(reference, operator.name)(x, *args)
    return operator.run(backend, x, *args)


def _once(rule: str, index: torch.Tensor) -> None:
    """Raise where a row comes twice; looked at on a CPU alone."""
    if index.device.type == "cpu" and not traced(index):
        times = torch.bincount(index + 1)[1:]  # -1 may come often
        if (times > 1).any():
            row = int(times.argmax())
            raise ValueError(f"{rule}, got {row} {times[row]} times")


def _check(op: str, x: torch.Tensor, index: torch.Tensor, rows: int | None = None) -> None:
    all_tensors(op, x=x, index=index)
    require(x.dim() >= 1, "{}: x must have rows, got a scalar", op)
    rows = x.shape[0] if rows is None else rows
    shaped(op, "index", index, None)
    require(index.device == x.device, "{}: x is on {} and index on {}", op, x.device, index.device)
    indices(op, "index", index, rows)
