"""qk_norm_rope: norm of each head of q and k, rotary embedding by row position, and the joined order, in one pass."""

from __future__ import annotations

from typing import Any

import torch

from . import _triton_support
from ._check import indices, no_plan, not_negative, one_device, require, shaped
from ._ops import Backend, Differentiable
from .packing import JoinedPacking, Packing

NORMS = ("rms", "layer", "none")
PAIRINGS = ("interleaved", "half")


def _fake(q: torch.Tensor, k: torch.Tensor, source: torch.Tensor | None, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = q.shape[0] if source is None else source.shape[0]
    return q.new_empty(rows, *q.shape[1:]), k.new_empty(rows, *k.shape[1:])


OPERATOR = Differentiable(
    "qk_norm_rope",
    "Tensor q, Tensor k, Tensor? second_q, Tensor? second_k, Tensor? q_weight, Tensor? k_weight, "
    "Tensor? second_q_weight, Tensor? second_k_weight, Tensor? cos, Tensor? sin, Tensor? position, Tensor? source",
    "float eps, str norm, str pairing",
    _fake,
    outputs=2,
    integers=("cos", "sin", "position", "source"),
    triton=Backend("dcdit_kernels.triton.qk_norm_rope:QkNormRope", _triton_support.why_not),
)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    plan: Packing | None = None,
    second: tuple[torch.Tensor | None, ...] | None = None,
    *,
    norm: str = "rms",
    eps: float = 1e-6,
    pairing: str = "interleaved",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys as attention wants them: norm by head, then the rotation of RoPE (arXiv 2104.09864 eq. 34).

    A pair (a, b) of a head's channels in a row at position p becomes (a·cos_p − b·sin_p, b·cos_p + a·sin_p).

    Args:
        q: (T, heads, head_dim); k: (T, heads of k, head_dim), head_dim even; views of a fused qkv are fine.
        cos, sin: (P, head_dim / 2) float32, contiguous: one number for each pair, for as many axes as the model has.
            They get no gradient. None: no rotation.
        position: int32 or int64, the row of cos and sin for each row of the result, -1 for a row that is not rotated.
            On a GPU a position beyond the table is undefined. None: each row's number.
        q_weight, k_weight: (head_dim,) of the norm, or None.
        plan: the packing of the rows. Rows past the last live one are zero and never read. None: all are live.
        second: (q, k) or (q, k, q_weight, k_weight) of the second stream where `plan` is a JoinedPacking; q and k are
            then the first stream's, and the result has the joined rows, (T1 + T2, heads, head_dim).
        norm: "rms", "layer" (without bias) or "none".
        pairing: "interleaved" pairs channels 2i and 2i + 1, "half" i and i + head_dim / 2.

    Returns (q, k) in their dtypes; statistics and rotation in float32. Raises ValueError or TypeError where shapes,
    dtypes or options do not fit.
    """
    second_q, second_k, second_q_weight, second_k_weight = (*(second or ()), None, None, None, None)[:4]
    source = None
    if second is not None:
        kind = type(plan).__name__
        require(isinstance(plan, JoinedPacking), "qk_norm_rope: second needs a JoinedPacking as plan, got {}", kind)
        assert isinstance(plan, JoinedPacking)
        source = plan.source
    elif isinstance(plan, JoinedPacking):
        require(q.shape[0] == plan.capacity, "qk_norm_rope: q must have {} rows, or second be given", plan.capacity)
    tensors = {
        "q": q,
        "k": k,
        "second_q": second_q,
        "second_k": second_k,
        "q_weight": q_weight,
        "k_weight": k_weight,
        "second_q_weight": second_q_weight,
        "second_k_weight": second_k_weight,
        "cos": cos,
        "sin": sin,
        "position": position,
        "source": source,
    }
    _check(tensors, plan, eps, norm, pairing)
    return OPERATOR(backend, **tensors, plan=plan, eps=eps, norm=norm, pairing=pairing)


def _check(tensors: dict[str, torch.Tensor | None], plan: Packing | None, eps: float, norm: str, pairing: str) -> None:
    op = "qk_norm_rope"
    require(norm in NORMS, "{}: norm must be one of {}, got {!r}", op, NORMS, norm)
    require(pairing in PAIRINGS, "{}: pairing must be one of {}, got {!r}", op, PAIRINGS, pairing)
    not_negative(op, "eps", eps)
    q, k = tensors["q"], tensors["k"]
    for name, tensor in (("q", q), ("k", k)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor)}")
    assert q is not None and k is not None
    try:
        capacity = None if plan is None else plan.capacity
    except AttributeError:
        raise no_plan(op, plan) from None
    streams = [len(t) for t in (getattr(plan, "first_row", None), getattr(plan, "second_row", None)) if t is not None]
    joined = tensors["source"] is not None
    rows = None if plan is None else streams[0] if joined else capacity
    shaped(op, "q", q, rows, None, None)
    shaped(op, "k", k, q.shape[0], None, q.shape[2])
    width = q.shape[2]
    require(width % 2 == 0, "{}: head_dim must be even, got {}", op, width)
    if joined:
        for name, like in (("second_q", q), ("second_k", k)):
            other = tensors[name]
            require(other is not None, "{}: second must hold q and k, got neither or one", op)
            assert other is not None
            shaped(op, name, other, streams[1], like.shape[1], width)
            require(other.dtype == like.dtype, "{}: {} must be {}, got {}", op, name, like.dtype, other.dtype)
    for name in ("q_weight", "k_weight", "second_q_weight", "second_k_weight"):
        weight = tensors[name]
        if weight is not None:
            shaped(op, name, weight, width)
            require(norm != "none", "{}: {} needs a norm, got norm='none'", op, name)
    _check_tables(op, tensors, q.shape[0] if plan is None else plan.capacity, width // 2)


def _check_tables(op: str, tensors: dict[str, torch.Tensor | None], rows: int, pairs: int) -> None:
    q, cos, sin, position = (tensors[name] for name in ("q", "cos", "sin", "position"))
    assert q is not None
    one_device(op, q, {"cos": cos, "sin": sin, "position": position})
    require((cos is None) == (sin is None), "{}: cos and sin must be given together", op)
    if position is not None:
        shaped(op, "position", position, rows)
        require(cos is not None, "{}: position needs cos and sin", op)
    if cos is None or sin is None:
        return
    shaped(op, "cos", cos, None, pairs)
    shaped(op, "sin", sin, *cos.shape)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} must be float32 or float64, got {table.dtype}")
        require(not table.requires_grad, "{}: {} gets no gradient; detach it", op, name)
        require(table.is_contiguous(), "{}: {} must be contiguous, got strides {}", op, name, table.stride())
    if position is not None:
        indices(op, "position", position, cos.shape[0])
    else:
        require(cos.shape[0] >= rows, "{}: cos must have a row for each of {} rows, got {}", op, rows, cos.shape[0])
