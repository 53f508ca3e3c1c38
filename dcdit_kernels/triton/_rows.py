"""Launch rules that the row kernels share. They depend on shapes alone: nothing is tuned on the first call.

Counts that change from step to step (rows, batch) are not specialised on, so that no step meets a compiler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Programs that fill the GPUs these kernels are for several times over (132 SMs on an H200).
FILL = 1024


def next_power_of_2(n: int) -> int:
    """Triton's own is for kernels, and takes the host microseconds a call."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def pointer_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """(…, D) as rows (N, D) with unit stride inside a row; copied only where the strides do not allow it."""
    if x is None or (x.dim() == 2 and x.stride(1) == 1):
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def warps_for_row(width: int) -> int:
    """Warps for a program that holds one row in registers: 8 elements or so a thread."""
    return min(max(next_power_of_2(width) // 256, 1), 16)


def segments(batch: int, total: int, longest: int) -> tuple[int, int]:
    """(rows a program, programs a sample) for sums over the rows of a sample.

    Few rows where there are few tokens, to fill the GPU; at most 32, beyond which partial sums cost nothing.
    """
    rows = min(max(total // FILL, 1), 32)
    return rows, max(cdiv(longest, rows), 1)


@dataclass(frozen=True)
class RowTile:
    """Rows × columns that one program moves; enough bytes in flight, and 16-byte accesses along the columns."""

    rows: int
    columns: int
    width: int

    def grid(self, total: int) -> tuple[int, int]:
        """Programs that cover `total` rows."""
        return cdiv(total, self.rows), cdiv(self.width, self.columns)

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": 4}


def row_tile(width: int) -> RowTile:
    """A tile of 4096 elements: whole rows where they are short, pieces of 512 columns where they are long.

    A quarter of that where rows do not start at 16 bytes: loads are narrow then, and each needs its own address.
    """
    columns = min(next_power_of_2(width), 512)
    return RowTile((4096 if width % 16 == 0 else 1024) // columns, columns, width)
