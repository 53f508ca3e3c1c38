"""The backbone: DiT blocks on packed tokens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dcdit_kernels import Packing, adaln_modulate, gate_residual, gate_residual_modulate, varlen_attention

from .aside import aside, captured
from .layers import RMSNorm, linear_gelu


class Stream(NamedTuple):
    """The hidden states between two halves of DiT blocks, x + gate·y, before they are added up.

    The sum is left to whoever comes next, because the kernel that adds also normalises and modulates.

    x, y: (T, D) packed; gate: (B, D). Without y the hidden states are x.
    """

    x: torch.Tensor
    y: torch.Tensor | None = None
    gate: torch.Tensor | None = None

    def hidden(self, packing: Packing) -> torch.Tensor:
        """The hidden states (T, D)."""
        return self.x if self.y is None else gate_residual(self.x, self.y, self.gate, packing)

    def modulate(self, shift: torch.Tensor, scale: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, ...]:
        """The hidden states (T, D), and LayerNorm of them · (1 + scale) + shift, with shift and scale (B, D)."""
        if self.y is None:
            return self.x, adaln_modulate(self.x, shift, scale, packing)
        return gate_residual_modulate(self.x, self.y, self.gate, shift, scale, packing)


class DiTBlock(nn.Module):
    """An adaLN-Zero block on packed tokens (DiT, arXiv 2212.09748 section 3.2)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        hidden = int(width * mlp_ratio)
        self._attention(width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def _attention(self, width: int) -> None:
        """The layers in front of attention; other kinds of blocks differ here."""
        self.qkv = nn.Linear(width, 3 * width)

    @staticmethod
    def from_qkv(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A block's state dict from a DiT block's."""
        return state

    def forward(
        self, stream: Stream, c: torch.Tensor, packing: Packing, modulators: torch.Tensor | None = None
    ) -> Stream:
        """Stream of (T, D), c (B, D) → Stream; `stream.hidden(packing)` gives the block's output itself.

        c comes through the SiLU of adaLN-Zero already, which `MainNetwork` computes once for all blocks. `modulators`
        (B, 6D) are the map of c, where it was made before.
        """
        modulators = self.adaln[1](c) if modulators is None else modulators
        shift1, scale1, gate1, shift2, scale2, gate2 = modulators.chunk(6, dim=1)
        x, normed = stream.modulate(shift1, scale1, packing)
        stream = Stream(x, self.attend(normed, packing), gate1)
        x, normed = stream.modulate(shift2, scale2, packing)
        return Stream(x, self.mlp(normed), gate2)

    def attend(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """(T, D) → (T, D): attention within each sample."""
        return self.proj(self.mix(x, packing).flatten(1))

    def mix(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """(T, D) → (T, heads, D/heads): the output of each head."""
        qkv = self.qkv(x)
        q, k, v = qkv.view(qkv.shape[0], 3, self.heads, qkv.shape[1] // (3 * self.heads)).unbind(1)
        lengths = (packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen)
        return varlen_attention(q, k, v, *lengths, packing=packing)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, D)."""
        return self.fc2(linear_gelu(self.fc1, x))


class MainNetwork(nn.Module):
    """The backbone: DiT blocks, then RMSNorm, on packed tokens. The next block's kernel adds each gated residual.

    Where `record` is a list, a forward appends each block's output (T, D) to it, at the price of one more pass over x
    per block. With `gradient_checkpointing` a backward computes each block again instead of keeping its activations.
    """

    record: list[torch.Tensor] | None = None
    gradient_checkpointing = False
    _gradient_checkpointing_func = staticmethod(functools.partial(checkpoint, use_reentrant=False))  # diffusers' name

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = RMSNorm(width, eps=1e-5)

    def ahead(self, c: torch.Tensor) -> dict[str, Any]:
        """What `forward` may be given that needs c (B, D) alone. In a CUDA graph the blocks' modulators are made beside
        what stands before the backbone; elsewhere nothing is gained, and each block makes its own."""
        if not captured(c):
            return {}

        def modulators() -> list[torch.Tensor]:
            active = F.silu(c)
            return [block.adaln[1](active) for block in self.blocks]

        return {"modulators": aside(modulators, c)}

    def forward(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        packing: Packing,
        run: Callable[..., Stream] | None = None,
        modulators: Callable[[], list[torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """x (T, D) packed, c (B, D) → (T, D). `run` stands for the method of this name, which runs the blocks;
        `modulators` is what `ahead` gives, where there is no `run`."""
        if modulators is not None:  # of all blocks, which then do not read c
            stream = self.run(Stream(x), c, packing, modulators=modulators())
        else:
            stream = (run or self.run)(Stream(x), F.silu(c), packing)
        return self.norm(stream.hidden(packing))

    def run(
        self,
        stream: Stream,
        c: torch.Tensor,
        packing: Packing,
        blocks: Iterable[DiTBlock] | None = None,
        modulators: Iterable[torch.Tensor] | None = None,
    ) -> Stream:
        """Stream of (T, D) → Stream, through `blocks` (None: all), with c (B, D) and each block's modulators as
        `DiTBlock.forward` takes them."""
        blocks = self.blocks if blocks is None else blocks
        for block, made in zip(blocks, itertools.repeat(None) if modulators is None else modulators, strict=False):
            inputs = (stream, c, packing) if made is None else (stream, c, packing, made)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                stream = self._gradient_checkpointing_func(block, *inputs)
            else:
                stream = block(*inputs)
            if self.record is not None:
                stream = Stream(stream.hidden(packing))
                self.record.append(stream.x)
        return stream
