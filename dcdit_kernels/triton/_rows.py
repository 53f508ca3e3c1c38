"""Launch rules that the row kernels share. They depend on shapes alone: nothing is tuned on the first call.

Counts that change from step to step (rows, batch) are not specialised on, so that no step meets a compiler.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# Programs that fill a GPU several times over (132 SMs on an H200).
FILL = 1024


def next_power_of_2(n: int) -> int:
    """Triton's own is for kernels, and takes the host microseconds a call."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def pointer_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """(…, D) as rows (N, D) with unit stride inside a row; copied only where the strides do not allow it."""
    return strided_rows(x)[0]


def strided_rows(x: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """`pointer_rows` of x, and the elements from one row to the next; (None, 0) of None."""
    if x is None:
        return None, 0
    strides = x.stride()
    if len(strides) != 2 or strides[1] != 1:
        x = x.reshape(-1, x.shape[-1])
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        strides = x.stride()
    return x, strides[0]


@functools.cache
def pieces(width: int, most: int, least: int = 128) -> dict[str, int]:
    """A row of `width` as at most `most` pieces of one power of two, at least `least` columns each.

    As one power of two, 1152 columns would cost the arithmetic of 2048.
    """
    columns = max(next_power_of_2(cdiv(width, most)), least)
    return {"COLUMNS": columns, "PIECES": cdiv(width, columns)}


@triton.jit
def load_rows(ptr, row, stride, column, live, width):
    """Columns of rows (int64) in float32, zero outside and in rows that are not live."""
    mask = live[:, None] & (column < width)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_columns(ptr, column, width):
    """The first `width` columns of one row in float32, zero outside."""
    return tl.load(ptr + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, row, column, values, live, width):
    """Columns of live rows (int64) of a contiguous tensor, in its dtype."""
    mask = live[:, None] & (column < width)[None, :]
    tl.store(ptr + row[:, None] * width + column[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_zeros(ptr, first, capacity, step, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in each `step`-th block of rows from the row `first` on."""
    zero = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, capacity, step):
        row = start + tl.arange(0, ROWS)
        for column in range(0, WIDTH, COLUMNS):
            store_rows(ptr, row, column + tl.arange(0, COLUMNS), zero, row < capacity, WIDTH)


@functools.cache
def tiled(kernel: Any, width: int) -> tuple[RowTile, Any]:
    """`row_tile` of this width, and the kernel for it."""
    tile = row_tile(width)
    return tile, kernel.bind(**tile.launch)


@dataclass(frozen=True)
class RowTile:
    """Rows × columns that one program moves; enough bytes in flight, and 16-byte accesses along the columns."""

    rows: int
    columns: int
    width: int

    def grid(self, total: int) -> tuple[int, int]:
        """Programs that cover `total` rows."""
        return cdiv(total, self.rows), cdiv(self.width, self.columns)

    @functools.cached_property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": 4}


@functools.cache
def row_tile(width: int) -> RowTile:
    """A tile of 4096 elements: whole rows where they are short, pieces of 512 columns where they are long.

    A quarter of that where rows do not start at 16 bytes: loads are narrow then, and each needs its own address.
    """
    columns = min(next_power_of_2(width), 512)
    return RowTile((4096 if width % 16 == 0 else 1024) // columns, columns, width)
