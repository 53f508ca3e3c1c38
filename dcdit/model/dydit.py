"""DyDiT (arXiv 2410.03456): a DiT that leaves out heads and MLP channels by time, and tokens of the MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import check_kind
from .blocks import Stream
from .dit_config import DyDiTConfig
from .dit_shell import DiTShell, dense_packing
from .dydit_block import DyBlock
from .gates import Gates
from .plain_dit import PlainDiT, check_start
from .width_table import WidthTable


class DyDiT(DiTShell):
    """(B, C, H, W) → (B, C or 2C, H, W). It computes everything and masks; `tabulate` computes less."""

    def __init__(self, config: DyDiTConfig) -> None:
        check_kind(config, DyDiTConfig, "config")
        super().__init__(config, config.patch)
        sizes = config.hidden_size, config.num_heads, config.mlp_ratio
        self.blocks = nn.ModuleList(DyBlock(*sizes) for _ in range(config.depth))

    @classmethod
    def from_dit(cls, dit: PlainDiT, config: DyDiTConfig) -> DyDiT:
        """A DyDiT with the weights of a DiT and every gate open. Raises ConfigError where sizes differ."""
        model = cls(config)
        check_start(model, dit)
        model.load_state_dict(dit.state_dict(), strict=False)
        return model

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        return_gates: bool = False,
        *,
        gates: Gates | None = None,
        complete: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Gates]:
        """x (B, C, H, W), t and y (B,) → (B, C, H, W), or (B, 2C, H, W) with config.learn_sigma.

        In training mode the gates are drawn, else they are decided. With `return_gates` also the Gates, through which
        gradients reach the routers. `gates` stands for the routers' own; `complete` leaves all gates out, the pass that
        training has beside the gated one. Raises ValueError for inputs of another shape.
        """
        self.check(x, t, y)
        te = self.time_embed(t)
        active = F.silu(te + self.class_embed(y))
        packing = dense_packing(len(x), len(self.pos_embed), x.device)
        stream, decided = Stream(self.patches(x).flatten(0, 1)), []
        for number, block in enumerate(self.blocks):
            if complete:
                stream = block(stream, active, packing)
                continue
            given = None if gates is None else Gates(*(part[:, number] for part in gates))
            if given is not None:
                given = given._replace(tokens=given.tokens.reshape(-1, 1))
            stream, own = block.gated(stream, active, packing, te, given)
            decided.append(own)
        out = self.finish(stream, active, packing)
        if not return_gates:
            return out
        if complete:
            raise ValueError("the complete pass has no gates to return")
        heads, groups, tokens = (torch.stack(part, 1) for part in zip(*decided, strict=True))
        return out, Gates(heads, groups, tokens.view(len(x), -1, len(decided)).transpose(1, 2))

    def tabulate(self, timesteps: Sequence[float] | torch.Tensor, share: float | None = None) -> TabulatedDyDiT:
        """The model for these timesteps, with their heads and groups alone; see `WidthTable`."""
        return TabulatedDyDiT(self, timesteps, share)


class TabulatedDyDiT(nn.Module):
    """A DyDiT in inference that computes nothing masked, see `WidthTable`."""

    def __init__(self, model: DyDiT, timesteps: Sequence[float] | torch.Tensor, share: float | None = None) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.table = WidthTable(model.blocks, model.time_embed, timesteps, share)

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, return_gates: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, Gates]:
        """As `DyDiT.forward`, for times t (B,) of the table; the host reads them. Raises ValueError for others.

        Samples of different times are computed one time after the other.
        """
        self.model.check(x, t, y)
        times = t.float()
        rows = [(times == time).nonzero().squeeze(1) for time in self.table.distinct(times)]
        parts = [self._at(x[own], times[own], y[own]) for own in rows]
        back = torch.cat(rows).argsort()
        out = torch.cat([out for out, _ in parts])[back]
        if not return_gates:
            return out
        return out, Gates(*(torch.cat(part)[back] for part in zip(*(gates for _, gates in parts), strict=True)))

    def _at(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, Gates]:
        model, batch = self.model, len(x)
        active = F.silu(model.time_embed(t) + model.class_embed(y))
        packing = dense_packing(batch, len(model.pos_embed), x.device)
        stream, gates = self.table.run(float(t[0]), Stream(model.patches(x).flatten(0, 1)), active, packing)
        heads, groups = (part.expand(batch, -1, -1) for part in gates[:2])
        tokens = gates.tokens.unflatten(1, (batch, -1)).transpose(0, 1)
        return model.finish(stream, active, packing), Gates(heads, groups, tokens)
