"""ChunkPlan: every integer that an operator on packed tokens needs, computed once per forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class ChunkPlan:
    """Which cells of a batch of grids stay, where they go, and who refills whom.

    With L = prod(grid) cells per sample in raster order, and the live rows `[0, cu_seqlens[-1])`:

    - `cu_seqlens` int32 (batch_size + 1,): packed rows of sample b are `cu_seqlens[b]:cu_seqlens[b + 1]`.
    - `token_index` int32 (capacity,): flat cell b·L + l of each packed row; -1 past the last live row.
    - `sample_index` int32 (capacity,): sample of each packed row; -1 past the last live row.
    - `nearest` int32 (batch_size·L,): the packed row that refills each cell; -1 where no row does
      (an empty sample; with "previous", cells before the sample's first retained one).
      A retained cell is always refilled by its own row.
    - `member_offsets` int32 (capacity + 1,), `member_index` int32 (batch_size·L,): `nearest` inverted, as CSR.
      Row r refills the cells `member_index[member_offsets[r]:member_offsets[r + 1]]`, in ascending order;
      entries past `member_offsets[-1]` are -1.
    - `overflow` int32 (): boundary cells that did not fit into a fixed `capacity` (0 in exact mode); rows are
      cut from the end of the batch.
    - `exact`: every row of the capacity is live, which a plan without a given `capacity` promises.
    - `max_seqlen`: an upper bound of the rows of any sample, exact unless `capacity` was given.

    Rows past the last live one are zero in every operator's outputs and gradients, and are never read.
    """

    grid: tuple[int, ...]
    batch_size: int
    capacity: int
    max_seqlen: int
    cu_seqlens: torch.Tensor
    token_index: torch.Tensor
    sample_index: torch.Tensor
    nearest: torch.Tensor
    member_offsets: torch.Tensor
    member_index: torch.Tensor
    overflow: torch.Tensor
    exact: bool = False

    @property
    def cells(self) -> int:
        """L, the cells of one sample."""
        return math.prod(self.grid)

    @property
    def lengths(self) -> torch.Tensor:
        """Retained tokens per sample, int32 (batch_size,)."""
        return self.cu_seqlens.diff()

    @property
    def boundary_mask(self) -> torch.Tensor:
        """Retained cells after the tail drop, bool (batch_size, L)."""
        cell = torch.arange(self.nearest.numel(), device=self.nearest.device, dtype=torch.int32)
        tokens = torch.cat([self.token_index, self.token_index.new_full((1,), -1)])  # the last is for no row, -1
        return (tokens[self.nearest] == cell).view(self.batch_size, self.cells)
