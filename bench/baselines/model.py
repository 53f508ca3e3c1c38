"""The whole DC-DiT with the straightforward operators, on the weights of a `dcdit.DCDiT`.

Attention is the project's own, so that everything else differs, or runs on padded samples under a mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dcdit import DCDiT
from dcdit.model.blocks import DiTBlock
from dcdit.model.routers import PredictabilityRouter
from dcdit_kernels import use_backend, varlen_attention

from .attention import attention
from .boundary import predictability
from .chunk import chunk
from .dechunk import dechunk
from .plan import pad_rows, places, plan


def dcdit_forward(
    net: DCDiT,
    x: torch.Tensor,
    t: torch.Tensor,
    y: torch.Tensor,
    drop_fraction: float | torch.Tensor,
    block: Callable[..., torch.Tensor],
    pad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(prediction, boundary_prob) of `net`, with a `bench.models.FixedRouter`; `block` is `dit_block`, with
    `pad` its attention is the padded one."""
    grid = net.config.input_size
    c = net.time_embed(t) + net.class_embed(y)
    active = F.silu(c)
    with use_backend("reference"):  # GroupNorm and SiLU one after the other
        h = net.encoder(net.stem(x), active)
    with torch.autocast(x.device.type, enabled=False):
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        residual = net.residual_proj(wide)
        prob = net.router.fix(scores(net.router.inner, wide))
    padded = plan(prob.detach(), grid, drop_fraction)
    valid, place = padded.valid, places(padded)
    rows = chunk(h, padded, net.pos_embed).flatten(0, 1).index_select(0, place)
    cu_seqlens = F.pad(valid.sum(1).cumsum(0), (1, 0)).int()
    longest = valid.shape[1]
    sample_index = place // longest
    for weights in net.main.blocks:
        rows = block(weights, rows, c, sample_index, cu_seqlens, longest, (valid, place) if pad else None)
    rows = net.main.norm(rows)
    with torch.autocast(x.device.type, enabled=False):
        refilled = dechunk(pad_rows(rows, valid, place), prob, padded, residual, grid, net.config.sigma)
    with use_backend("reference"):
        out = net.decoder(refilled.transpose(1, 2).unflatten(2, grid), active)
    shift, scale = net.final.adaln(c)[:, None].chunk(2, dim=2)
    out = net.final.linear(F.layer_norm(out, out.shape[-1:], eps=1e-6) * (1 + scale) + shift)
    stride = net.config.encoder_stride
    out = out.transpose(1, 2).unflatten(2, [side // stride for side in grid])
    return (out if stride == 1 else F.pixel_shuffle(out, stride)), prob


def dit_block(
    weights: DiTBlock,
    x: torch.Tensor,
    c: torch.Tensor,
    sample_index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    padding: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """An adaLN-Zero block on packed rows (T, D), modulators expanded to (T, 6·D)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = weights.adaln(c)[sample_index].chunk(6, dim=1)
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
    qkv = weights.qkv(normed).view(x.shape[0], 3, weights.heads, -1)
    if padding is None:
        # The yardstick of float32: a GPU's fused attention takes float32 apart for its tensor cores.
        backend = "reference" if x.is_cuda and x.dtype == torch.float32 else None
        out = varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest, exact=True, backend=backend)
    else:
        out = attention(qkv, *padding)
    x = x + gate1 * weights.proj(out.reshape(x.shape))
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
    return x + gate2 * weights.mlp(normed)


def scores(router: PredictabilityRouter, h: torch.Tensor) -> torch.Tensor:
    """boundary_prob (B, L) of h (B, L, D)."""
    z = router.proj(h.transpose(1, 2).unflatten(2, router.grid))
    features = router.scorer(z - router.context(z))
    weight = router.score.weight.flatten()
    return predictability(features, router.norm.weight, router.norm.bias, weight, router.score.bias)
