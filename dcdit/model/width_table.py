"""DyDiT's blocks in inference: heads and MLP groups by a table over the time, tokens gathered (arXiv 2410.03456)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dcdit_kernels import Packing

from .blocks import Stream
from .dydit_block import narrow, skip_tokens
from .gates import Gates, first_on


class WidthTable(nn.Module):
    """What heads and groups are on at each of `timesteps`, and the blocks' weights without the others.

    Both depend on the time alone. The weights are copied once for each choice that occurs; later changes of the
    blocks' own are not seen. `time_embed` is the model's.
    """

    @torch.no_grad()
    def __init__(
        self,
        blocks: nn.ModuleList,
        time_embed: Callable[[torch.Tensor], torch.Tensor],
        timesteps: Sequence[float] | torch.Tensor,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        device = blocks[0].fc1.weight.device
        times = torch.as_tensor(timesteps, dtype=torch.float32, device=device).flatten().unique()
        te = time_embed(times)
        self.narrow = nn.ModuleDict()
        self.names: dict[float, list[str]] = {t: [] for t in times.tolist()}
        self.on: dict[str, tuple[tuple[bool, ...], tuple[bool, ...]]] = {}
        for number, block in enumerate(blocks):
            logits = block.routers.heads(te), block.routers.groups(te)
            decided = [(first_on(torch.sigmoid(part.float()) - 0.5) > 0).tolist() for part in logits]
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
        for name, block in zip(self.names[time], self.blocks, strict=True):
            stream, on = skip_tokens(self.narrow[name], block.routers, stream, active, packing)
            tokens.append(on)
        heads, groups = (active.new_tensor(part) for part in zip(*(self.on[n] for n in self.names[time]), strict=True))
        return stream, Gates(heads, groups, torch.stack(tokens).to(active.dtype))


def _bits(on: list[bool]) -> str:
    return "".join("01"[gate] for gate in on)
