"""DyDiT's blocks in inference: heads and MLP groups by a table over the time, tokens gathered (arXiv 2410.03456)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dcdit_kernels import Packing

from ..errors import ConfigError
from .blocks import Stream
from .dydit_block import narrow, skip_tokens
from .gates import Gates, first_on


class WidthTable(nn.Module):
    """What heads and groups are on at each of `timesteps`, and the blocks' weights without the others.

    Both depend on the time alone. The weights are copied once for each choice that occurs; later changes of the
    blocks' own are not seen. `time_embed` is the model's. With a `share` in (0, 1] so many of all blocks' heads, and of
    their groups, are on at each time: the first of each block, then those of the largest logits. At 1 all gates are
    left out, those of tokens as well. Raises ConfigError for another share.
    """

    @torch.no_grad()
    def __init__(
        self,
        blocks: nn.ModuleList,
        time_embed: Callable[[torch.Tensor], torch.Tensor],
        timesteps: Sequence[float] | torch.Tensor,
        share: float | None = None,
    ) -> None:
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"the share of open gates must be in (0, 1], got {share}")
        super().__init__()
        self.blocks, self.complete = blocks, share == 1
        device = blocks[0].fc1.weight.device
        times = torch.as_tensor(timesteps, dtype=torch.float32, device=device).flatten().unique()
        te = time_embed(times)
        self.narrow = nn.ModuleDict()
        self.names: dict[float, list[str]] = {t: [] for t in times.tolist()}
        self.on: dict[str, tuple[tuple[bool, ...], tuple[bool, ...]]] = {}
        both = [torch.stack([getattr(block.routers, part)(te) for block in blocks], 1) for part in ("heads", "groups")]
        opened = [_opened(logits.float(), share) for logits in both]
        for number, block in enumerate(blocks):
            decided = [part[:, number].tolist() for part in opened]
            for names, heads, groups in zip(self.names.values(), *decided, strict=True):
                name = f"{number} {_bits(heads)} {_bits(groups)}"
                names.append(name)
                if name not in self.narrow:
                    self.on[name] = tuple(heads), tuple(groups)
                    self.narrow[name] = narrow(block, *self.on[name])

    def distinct(self, times: torch.Tensor) -> list[float]:
        """The different ones of times (B,), read by the host. Raises ValueError for one that is not in the table."""
        distinct = times.float().unique().tolist()
        for time in distinct:
            if time not in self.names:
                raise ValueError(f"t must be one of the {len(self.names)} timesteps that were tabulated, got {time:g}")
        return distinct

    def run(self, time: float, stream: Stream, active: torch.Tensor, packing: Packing) -> tuple[Stream, Gates]:
        """Stream of (T, D), the conditioning (B, D) through its SiLU, all samples at one time → Stream and gates.

        `heads` and `groups` are (depth, H), `tokens` (depth, T).
        """
        tokens = []
        if self.complete:
            for block in self.blocks:
                stream = block(stream, active, packing)
            widths = active.new_ones(len(self.blocks), self.blocks[0].heads)
            return stream, Gates(widths, widths, active.new_ones(len(self.blocks), len(stream.x)))
        for name, block in zip(self.names[time], self.blocks, strict=True):
            stream, on = skip_tokens(self.narrow[name], block.routers, stream, active, packing)
            tokens.append(on)
        heads, groups = (active.new_tensor(part) for part in zip(*(self.on[n] for n in self.names[time]), strict=True))
        return stream, Gates(heads, groups, torch.stack(tokens).to(active.dtype))


def _opened(logits: torch.Tensor, share: float | None) -> torch.Tensor:
    """Logits (S, depth, H − 1) of all but the first gates → which are on, bool (S, depth, H)."""
    if share is None:
        on = torch.sigmoid(logits) > 0.5
    else:
        steps, depth, others = logits.shape
        count = max(0, round(share * depth * (others + 1)) - depth)
        largest = logits.flatten(1).topk(count, dim=1).indices
        on = torch.zeros(steps, depth * others, dtype=torch.bool, device=logits.device)
        on = on.scatter_(1, largest, True).view_as(logits)
    return first_on(on.float()) > 0


def _bits(on: list[bool]) -> str:
    return "".join("01"[gate] for gate in on)
