"""The blocks that only SparseDiT has: a mean in place of attention, and attention from one grid to another."""

from __future__ import annotations

import torch
from torch import nn

from dcdit_kernels import Packing, adaln_modulate, varlen_attention

from .blocks import DiTBlock, Stream


class PoolingBlock(DiTBlock):
    """Poolingformer: every token gets the mean of its sample's values, then the MLP (arXiv 2412.06028 section 3).

    `v` and `proj` see the mean of the modulated tokens alone, once: both are linear.
    """

    def _attention(self, width: int) -> None:
        self.v = nn.Linear(width, width)

    @staticmethod
    def from_qkv(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict of a DiT's block with v alone in place of qkv."""
        return _split(state, (("v", slice(2, 3)),))

    def attend(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """(B·N, D) → (B·N, D), one row for all of a sample."""
        tokens = x.unflatten(0, (packing.batch_size, -1))
        mean = self.proj(self.v(tokens.mean(1)))
        return mean[:, None].expand_as(tokens).flatten(0, 1)


class CrossBlock(DiTBlock):
    """A block with keys and values from another grid of its samples."""

    def _attention(self, width: int) -> None:
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    @staticmethod
    def from_qkv(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict of a DiT's block with q and kv in place of qkv."""
        return _split(state, (("q", slice(0, 1)), ("kv", slice(1, 3))))

    def forward(  # type: ignore[override]
        self, stream: Stream, c: torch.Tensor, packing: Packing, other: torch.Tensor, others: Packing
    ) -> Stream:
        """Stream of (T, D), c (B, D) through its SiLU, `other` (T', D) packed by `others` → Stream of (T, D).

        One shift and scale serve both grids.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln[1](c).chunk(6, dim=1)
        x, normed = stream.modulate(shift1, scale1, packing)
        other = adaln_modulate(other, shift1, scale1, others)
        stream = Stream(x, self.attend_to(normed, other, packing, others), gate1)
        x, normed = stream.modulate(shift2, scale2, packing)
        return Stream(x, self.mlp(normed), gate2)

    def attend_to(self, x: torch.Tensor, other: torch.Tensor, packing: Packing, others: Packing) -> torch.Tensor:
        """x (T, D), other (T', D) → (T, D): attention from each sample's x to its other rows."""
        q = self.q(x).unflatten(1, (self.heads, -1))
        k, v = self.kv(other).unflatten(1, (2, self.heads, -1)).unbind(1)
        offsets = packing.cu_seqlens, others.cu_seqlens, packing.max_seqlen, others.max_seqlen
        return self.proj(varlen_attention(q, k, v, *offsets, packing=packing).reshape(x.shape))


def _split(state: dict[str, torch.Tensor], parts: tuple[tuple[str, slice], ...]) -> dict[str, torch.Tensor]:
    """qkv's rows under other names; of its three thirds each part takes some."""
    rest = {key: value for key, value in state.items() if not key.startswith("qkv.")}
    for kind in ("weight", "bias"):
        thirds = state[f"qkv.{kind}"].unflatten(0, (3, -1))
        rest |= {f"{name}.{kind}": thirds[rows].flatten(0, 1) for name, rows in parts}
    return rest
