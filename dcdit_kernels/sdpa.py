"""varlen_attention by PyTorch's fused attention, sample after sample: on a CPU faster than padding, but for samples of
a few dozen rows.

On a GPU too, for inputs that no FlashAttention takes; the lengths are read there, one synchronisation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cpu._rows import with_tail

# Below so many keys a CPU's backward takes 1.5 to 5 times as long in bfloat16 as in float32 (2.13, with AMX).
SHORT = 192


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """See `dcdit_kernels.varlen_attention`."""
    lengths_q, lengths_k = torch.stack([cu_seqlens_q, cu_seqlens_k]).diff().tolist()
    parts = zip(_samples(q, lengths_q), _samples(k, lengths_k), _samples(v, lengths_k), strict=True)
    outs = [_attend(*part, softmax_scale, causal).squeeze(0).transpose(0, 1) for part in parts]
    return with_tail(torch.cat([q[:0], *outs]), q.shape[0])


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool) -> torch.Tensor:
    """Attention of one sample, (1, heads, M, d)."""
    rows, keys = q.shape[2], k.shape[2]
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if wanted and keys < SHORT and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _attend(q.float(), k.float(), v.float(), scale, causal).to(q.dtype)
    if not causal or rows == keys:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)
    blind = max(0, rows - keys)  # rows that see no key
    mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)[blind:]
    out = F.scaled_dot_product_attention(q[:, :, blind:], k, v, mask, scale=scale)
    return torch.cat([torch.zeros_like(q[:, :, :blind]), out], dim=2)


def _samples(x: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """(T, heads, d) → one (1, heads, M_b, d) for each sample."""
    # split, not slices: its backward is one concatenation; a slice's fills a tensor as large as x.
    parts = x.split([*lengths, x.shape[0] - sum(lengths)])[:-1]
    return [part.transpose(0, 1).unsqueeze(0) for part in parts]
