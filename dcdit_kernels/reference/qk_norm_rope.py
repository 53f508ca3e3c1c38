"""Norm of each head and rotary embedding in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..packing import Packing
from ._packed import accumulate_dtype


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    second_q: torch.Tensor | None = None,
    second_k: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    second_q_weight: torch.Tensor | None = None,
    second_k_weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    plan: Packing | None = None,
    eps: float = 1e-6,
    norm: str = "rms",
    pairing: str = "interleaved",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dcdit_kernels.qk_norm_rope`; `source` is `plan.source` where there is a second stream."""
    dtype = accumulate_dtype(q, k)
    if cos is not None and sin is not None:
        cos, sin = (t.to(dtype) for t in (cos, sin))
        if position is None:
            rows = q.shape[0] if source is None else source.shape[0]
            cos, sin = cos[:rows], sin[:rows]
        else:
            fixed = (position < 0)[:, None]
            place = position.clamp(min=0)
            cos, sin = cos[place].masked_fill(fixed, 1), sin[place].masked_fill(fixed, 0)
    masked = plan is not None and not plan.exact
    outs = []
    for x, other, *weights in ((q, second_q, q_weight, second_q_weight), (k, second_k, k_weight, second_k_weight)):
        parts = [x] if other is None else [x, other]
        if masked:
            parts = [
                torch.where(live[:, None, None], part, 0.0)
                for part, live in zip(parts, _live(parts, plan, source), strict=True)
            ]
        rows = [_norm(part.to(dtype), weight, eps, norm) for part, weight in zip(parts, weights, strict=False)]
        out = rows[0] if source is None else torch.cat(rows)[source]
        if cos is not None and sin is not None:
            out = _rotate(out, cos[:, None], sin[:, None], pairing)
        if masked:
            out = torch.where(plan.live[:, None, None], out, 0.0)
        outs.append(out.to(x.dtype))
    return outs[0], outs[1]


def _live(parts: list[torch.Tensor], plan: Packing, source: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The live rows of each stream, bool."""
    live = plan.live if source is None else torch.empty_like(plan.live).index_copy_(0, source.long(), plan.live)
    return live.split([len(part) for part in parts])


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, norm: str) -> torch.Tensor:
    if norm == "none":
        return x
    weight = None if weight is None else weight.to(x.dtype)
    return (F.rms_norm if norm == "rms" else F.layer_norm)(x, x.shape[-1:], weight, eps=eps)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: str) -> torch.Tensor:
    """x (T, heads, head_dim), cos and sin (T, 1, head_dim / 2)."""
    if pairing == "half":
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))  # one pass over x
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
