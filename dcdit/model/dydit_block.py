"""DyDiT's block: a DiT's, with gates over heads, MLP groups and MLP tokens."""

from __future__ import annotations

import torch
from torch import nn

from dcdit_kernels import Packing, adaln_modulate, gate_residual
from dcdit_kernels.packing import take_rows

from .blocks import DiTBlock, Stream
from .gates import Gates, Routers, decide, first_on
from .layers import gelu_tanh


class DyBlock(DiTBlock):
    """An adaLN-Zero block on packed tokens with gates (arXiv 2410.03456 section 3). `DiTBlock.forward` opens all."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(width, heads, mlp_ratio)
        self.routers = Routers(width, heads)

    def gated(
        self, stream: Stream, c: torch.Tensor, packing: Packing, te: torch.Tensor, given: Gates | None = None
    ) -> tuple[Stream, Gates]:
        """Stream of (T, D), c (B, D) through its SiLU, the embedded time te (B, D) → Stream, and this block's gates.

        Everything is computed and then masked, as gradients need. `given` stands for the routers' gates.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln[1](c).chunk(6, dim=1)
        x, normed = stream.modulate(shift1, scale1, packing)
        heads = first_on(decide(self.routers.heads(te), self.training)) if given is None else given.heads
        mixed = self.mix(normed, packing)
        y = self.proj((mixed * _rows(heads, packing, mixed)[:, :, None]).flatten(1))
        x = gate_residual(x, y, gate1, packing)
        tokens = decide(self.routers.tokens(x), self.training) if given is None else given.tokens
        groups = first_on(decide(self.routers.groups(te), self.training)) if given is None else given.groups
        hidden = self.fc1(adaln_modulate(x, shift2, scale2, packing)).unflatten(1, (self.heads, -1))
        hidden = (hidden * _rows(groups, packing, hidden)[:, :, None]).flatten(1)
        y = tokens.to(x.dtype) * self.fc2(gelu_tanh(hidden))
        return Stream(x, y, gate2), Gates(heads, groups, tokens)


def _rows(gates: torch.Tensor, packing: Packing, like: torch.Tensor) -> torch.Tensor:
    """(B, H) → (T, H): each row's gates."""
    return take_rows(gates.to(like.dtype), packing.sample_index)


def narrow(block: DiTBlock, heads: tuple[bool, ...], groups: tuple[bool, ...]) -> DiTBlock:
    """The block with the heads and MLP groups that are on, and no others: its weights are slices, copied.

    adaLN is the block's own.
    """
    on_heads, on_groups = (torch.tensor(on).nonzero().flatten().to(block.fc1.weight.device) for on in (heads, groups))
    with torch.device("meta"):
        slim = DiTBlock(block.proj.out_features, len(on_heads), 1.0)
    qkv, fc1 = ((3, len(heads), -1), on_heads, 1), ((len(groups), -1), on_groups, 0)
    proj, fc2 = ((len(heads), -1), on_heads), ((len(groups), -1), on_groups)
    for name, (shape, on, dim) in {"qkv": qkv, "fc1": fc1}.items():
        layer = getattr(block, name)
        parts = (
            part.unflatten(0, shape).index_select(dim, on).flatten(0, dim + 1) for part in (layer.weight, layer.bias)
        )
        setattr(slim, name, _linear(*parts))
    for name, (shape, on) in {"proj": proj, "fc2": fc2}.items():
        layer = getattr(block, name)
        setattr(slim, name, _linear(layer.weight.unflatten(1, shape).index_select(1, on).flatten(1), layer.bias))
    slim.adaln = block.adaln
    return slim


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(part.detach(), requires_grad=False) for part in (weight, bias))
    return layer


def skip_tokens(
    slim: DiTBlock, routers: Routers, stream: Stream, c: torch.Tensor, packing: Packing
) -> tuple[Stream, torch.Tensor]:
    """A narrow block; its MLP sees the tokens that the router picks, gathered.

    Returns the Stream, and the picks, bool (T,). On a GPU the host waits for their number.
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = slim.adaln[1](c).chunk(6, dim=1)
    x, normed = stream.modulate(shift1, scale1, packing)
    x = gate_residual(x, slim.attend(normed, packing), gate1, packing)
    on = (torch.sigmoid(routers.tokens(x)) > 0.5).squeeze(1) & packing.live
    rows = on.nonzero().squeeze(1)
    if len(rows):
        picked, some = x[rows], sub_packing(packing, rows)
        y = slim.mlp(adaln_modulate(picked, shift2, scale2, some))
        x.index_copy_(0, rows, gate_residual(picked, y, gate2, some))
    return Stream(x), on


def sub_packing(packing: Packing, rows: torch.Tensor) -> Packing:
    """The packing of some live rows, in rising order: integers (T',)."""
    samples = packing.sample_index[rows]
    batch = torch.arange(packing.batch_size + 1, dtype=torch.int32, device=rows.device)
    cu_seqlens = torch.searchsorted(samples, batch, out_int32=True)
    return Packing.from_cu_seqlens(cu_seqlens, packing.max_seqlen, len(rows), exact=True)
