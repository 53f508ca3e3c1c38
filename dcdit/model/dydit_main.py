"""DyDiT's gates (arXiv 2410.03456) in DC-DiT's main network: of fewer cells fewer heads, channels and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dcdit_kernels import Packing

from .blocks import MainNetwork, Stream
from .config import DCDiTConfig
from .dcdit import DCDiT
from .dydit_block import DyBlock
from .gates import Gates
from .width_table import WidthTable


class DyMain(MainNetwork):
    """A main network of DyDiT's blocks on packed tokens. After a forward `decided` holds the gates of each block.

    `gates.tokens` are (T, 1), packed as the tokens are; in inference by a table (T,).
    """

    decided: Sequence[Gates] = ()

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(width, 0, heads, mlp_ratio)
        self.blocks = nn.ModuleList(DyBlock(width, heads, mlp_ratio) for _ in range(depth))

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        packing: Packing,
        *,
        te: torch.Tensor | None = None,
        table: WidthTable | None = None,
        time: float = 0.0,
    ) -> torch.Tensor:
        """x (T, D) packed, c (B, D), the embedded time te (B, D) → (T, D), gated.

        With a `table` all samples are at `time`. With neither the gates are left out: the complete pass.
        """
        stream, active, decided = Stream(x), F.silu(c), []
        if table is not None:
            stream, gates = table.run(time, stream, active, packing)
            decided = [Gates(*parts) for parts in zip(*gates, strict=True)]
        elif te is None:
            stream = self.run(stream, active, packing)
        else:
            for block in self.blocks:
                stream, own = block.gated(stream, active, packing, te)
                decided.append(own)
        self.decided = decided
        return self.norm(stream.hidden(packing))


class DyDCDiT(DCDiT):
    """A DC-DiT with a `DyMain` for its main network; `router` as in DCDiT."""

    def __init__(self, config: DCDiTConfig, *, router: nn.Module | None = None) -> None:
        main = DyMain(config.hidden_size, config.depth, config.num_heads, config.mlp_ratio)
        super().__init__(config, router=router, backbone=main)

    @classmethod
    def from_dcdit(cls, model: DCDiT) -> DyDCDiT:
        """A model with the weights of a DC-DiT and every gate open; the router is the given model's own."""
        dynamic = cls(model.config, router=model.router if "router" in model.own_parts else None)
        dynamic.load_state_dict(model.state_dict(), strict=False)
        return dynamic

    def forward(
        self, x: Any, t: torch.Tensor, y: torch.Tensor, *args: Any, complete: bool = False, **options: Any
    ) -> Any:
        """As `DCDiT.forward`. `complete` leaves the gates out."""
        te = None if complete else self.time_embed(t)
        return super().forward(x, t, y, *args, te=te, **options)

    def tabulate(self, timesteps: Sequence[float] | torch.Tensor, share: float | None = None) -> TabulatedDyDCDiT:
        """The model for these timesteps, computing nothing masked; see `WidthTable`."""
        return TabulatedDyDCDiT(self, timesteps, share)


class TabulatedDyDCDiT(nn.Module):
    """A DyDCDiT in inference, all samples of a call at one time of the table; see `WidthTable`."""

    def __init__(self, model: DyDCDiT, timesteps: Sequence[float] | torch.Tensor, share: float | None = None) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.table = WidthTable(model.main.blocks, model.time_embed, timesteps, share)

    @torch.no_grad()
    def forward(self, x: Any, t: torch.Tensor, y: torch.Tensor, *args: Any, **options: Any) -> Any:
        """As `DCDiT.forward`. Raises ValueError for samples at different times, or at one that was not tabulated."""
        times = self.table.distinct(t)
        if len(times) != 1:
            raise ValueError(f"t must be one time for all samples, got {len(times)}")
        return DCDiT.forward(self.model, x, t, y, *args, table=self.table, time=times[0], **options)
