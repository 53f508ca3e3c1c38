"""ChunkPlan: every integer that an operator on packed tokens needs, computed once per forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ._check import all_tensors, one_device, require
from ._rules import Rule
from .packing import Packing, take_rows


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
    - `overflow` int32 (): cells that were to stay and were dropped as a sample's rows past a given `max_seqlen`, or as
      rows past a fixed `capacity`: the least probable of the sample, or of the batch.

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

    @property
    def cell_index(self) -> torch.Tensor:
        """The cell of each packed row within its sample, int32 (capacity,); -1 past the last live row."""
        return torch.where(self.token_index < 0, -1, self.token_index % self.cells)

    def rows(self, table: torch.Tensor, per: str | None = None) -> torch.Tensor:
        """The entry of `table` for each packed row: rotary tables, position ids, embeddings of a sample's time.

        Args:
            table: any dtype, with one entry for each cell of each sample (B, L, …), for each cell (L, …), or for each
                sample (B, …).
            per: "token", "cell" or "sample" says which of the three; None: the first that fits the shape.

        Returns (capacity, …), zero past the last live row. Raises TypeError where the table is no tensor, ValueError
        where it does not fit, and where B = L leaves open which is meant.
        """
        all_tensors("rows", table=table)
        one_device("rows", self.cu_seqlens, {"table": table})
        shape, batch, cells = table.shape, self.batch_size, self.cells
        fits = {
            "token": tuple(shape[:2]) == (batch, cells),
            "cell": shape[:1] == (cells,),
            "sample": shape[:1] == (batch,),
        }
        if per is None:
            require(batch != cells or not any(fits.values()), "rows: with B = L = {}, say per=", cells)
            per = next((name for name, good in fits.items() if good), None)
        if not fits.get(per or "", False):
            message = "rows: table must be (B, L, …), (L, …) or (B, …) with B = {} and L = {}, got {}"
            raise ValueError(message.format(batch, cells, tuple(shape)))
        if per == "token":
            return take_rows(table.flatten(0, 1), self.token_index)
        return take_rows(table, self.cell_index if per == "cell" else self.sample_index)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        cells = self.batch_size * self.cells
        rows = {"token_index": (self.capacity,), "member_offsets": (self.capacity + 1,)}
        return {**super()._shapes(), **rows, "nearest": (cells,), "member_index": (cells,), "overflow": ()}

    def _rules(self) -> list[Rule]:
        token, nearest, capacity, live = self.token_index, self.nearest, self.capacity, self.cu_seqlens[-1]
        row = torch.arange(capacity, device=token.device)
        cell = torch.arange(nearest.numel(), device=token.device)
        # An index that is out of range fails its own rule; the others follow a spare entry in its place.
        before = torch.cat([token.new_full((1,), -1), token])[:-1]
        mine = token.div(self.cells, rounding_mode="floor") == self.sample_index
        placed = torch.where(row < live, (token > before) & mine, token == -1)
        refill = torch.where((nearest >= 0) & (nearest < live), nearest, capacity)
        sample = torch.cat([self.sample_index, token.new_full((1,), -1)])[refill]
        local = (nearest == -1) | (sample == cell // self.cells)
        own_row = torch.full((cell.numel() + 1,), -1, device=token.device)
        own_row[torch.where((token >= 0) & (token < cell.numel()), token, -1)] = row
        counts = torch.zeros_like(own_row[:1]).expand(capacity + 1).index_add(0, refill, torch.ones_like(cell))
        ends = torch.cat([counts[:1] * 0, counts[:capacity].cumsum(0)])
        members = torch.where(cell < ends[-1], refill.argsort(stable=True), -1)
        own = (own_row[:-1] < 0) | (nearest == own_row[:-1])
        return [
            *super()._rules(),
            Rule("token_index", placed, "a cell of the row's sample past the row before's, or -1 in a spare row"),
            Rule("nearest", local, "a live row of the cell's sample, or -1"),
            Rule("nearest", own, "a retained cell's own row"),
            Rule("member_offsets", self.member_offsets == ends, "the members of the rows before, of nearest inverted"),
            Rule(
                "member_index", self.member_index == members, "the next cell of nearest inverted, or -1 past the last"
            ),
            Rule("overflow", self.overflow >= 0, "0 or more"),
        ]
