"""ChunkPlan: every integer that an operator on packed tokens needs, computed once per forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .packing import Packing, Rule


@dataclass(frozen=True, eq=False, kw_only=True)
class ChunkPlan(Packing):
    """Which cells of a batch of grids stay, where they go, and who refills whom.

    The retained cells of each sample, in raster order, are the rows of a `Packing`. With L = prod(grid) cells per
    sample:

    - `token_index` int32 (capacity,): flat cell b·L + l of each packed row; -1 past the last live row.
    - `nearest` int32 (batch_size·L,): the packed row that refills each cell; -1 where no row does
      (an empty sample; with "previous", cells before the sample's first retained one).
      A retained cell is always refilled by its own row.
    - `member_offsets` int32 (capacity + 1,), `member_index` int32 (batch_size·L,): `nearest` inverted, as CSR.
      Row r refills the cells `member_index[member_offsets[r]:member_offsets[r + 1]]`, in ascending order;
      entries past `member_offsets[-1]` are -1.
    - `overflow` int32 (): boundary cells that did not fit into a fixed `capacity` (0 in exact mode); rows are
      cut from the end of the batch.

    `max_seqlen` is exact unless `capacity` was given, and so is every row live (`exact`).
    """

    grid: tuple[int, ...]
    token_index: torch.Tensor
    nearest: torch.Tensor
    member_offsets: torch.Tensor
    member_index: torch.Tensor
    overflow: torch.Tensor

    @property
    def cells(self) -> int:
        """L, the cells of one sample."""
        return math.prod(self.grid)

    @property
    def boundary_mask(self) -> torch.Tensor:
        """Retained cells after the tail drop, bool (batch_size, L)."""
        cell = torch.arange(self.nearest.numel(), device=self.nearest.device, dtype=torch.int32)
        tokens = torch.cat([self.token_index, self.token_index.new_full((1,), -1)])  # the last is for no row, -1
        return (tokens[self.nearest] == cell).view(self.batch_size, self.cells)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        cells = self.batch_size * self.cells
        rows = {"token_index": (self.capacity,), "member_offsets": (self.capacity + 1,)}
        return {**super()._shapes(), **rows, "nearest": (cells,), "member_index": (cells,), "overflow": ()}

    def _rules(self) -> list[Rule]:
        token, nearest, live = self.token_index, self.nearest, self.cu_seqlens[-1]
        row = torch.arange(self.capacity, device=token.device)
        cell = torch.arange(nearest.numel(), device=token.device)
        before = torch.cat([token.new_full((1,), -1), token[:-1]])[: self.capacity]
        ascending = (row >= live) | (token > before)
        mine = torch.div(token, self.cells, rounding_mode="floor") == self.sample_index
        # A bad index is replaced before it is followed, and fails a rule of its own.
        own_row = cell.new_full((nearest.numel() + 1,), -1)
        own_row[torch.where((token >= 0) & (token < nearest.numel()), token, -1)] = row
        own_row = own_row[:-1]
        refilled = (nearest >= 0) & (nearest < live)
        samples = torch.cat([self.sample_index, token.new_full((1,), -1)])
        sample = samples[torch.where(refilled, nearest, -1)]
        local = (nearest == -1) | (refilled & (sample == cell // self.cells))
        counts = cell.new_zeros(self.capacity + 1).index_add(
            0, torch.where(refilled, nearest, -1) % (self.capacity + 1), torch.ones_like(cell)
        )
        ends = torch.cat([counts.new_zeros(1), counts[:-1].cumsum(0)])
        order = torch.argsort(torch.where(refilled, nearest, self.capacity), stable=True)
        members = torch.where(cell < ends[-1], order, -1)
        return [
            *super()._rules(),
            Rule(
                "token_index",
                ascending & mine,
                "a cell of the row's sample after the row before's, or -1 past the live rows",
            ),
            Rule("nearest", local, "a live row of the cell's sample, or -1"),
            Rule("nearest", (own_row < 0) | (nearest == own_row), "a retained cell's own row"),
            Rule("member_offsets", self.member_offsets == ends, "the members of the rows before, of nearest inverted"),
            Rule(
                "member_index", self.member_index == members, "the next cell of nearest inverted, or -1 past the last"
            ),
            Rule("overflow", self.overflow >= 0, "0 or more"),
        ]
