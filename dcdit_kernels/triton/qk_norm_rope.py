"""Triton kernels of `qk_norm_rope`: one launch forward for q and k of both streams, one backward.

Bytes for T rows of H heads of q and k together, W channels each, of e bytes: forward 2·T·H·W·e, backward 3·T·H·W·e. A
program takes some rows and some heads: it reads cos and sin of its rows once, T·W·8 bytes for each block of heads.
Statistics are recomputed in the backward. Gradients of weights are sums over slabs of rows and then over slabs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._launch import jit_kernel
from ._rows import cdiv, next_power_of_2

# Steps of a backward program; they share sums of weight gradients.
STEPS = 8


@triton.jit
def load_pairs(ptr, offset, live, WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Heads (rows, heads) that begin at `offset`: their pairs as two tensors (rows, heads, HALF) of float32."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, None, :]
        x = tl.load(ptr + offset[:, :, None] + column, mask=live[:, :, None] & (column < WIDTH), other=0.0)
        a, b = tl.split(tl.reshape(x.to(tl.float32), [offset.shape[0], offset.shape[1], HALF, 2]))
    else:
        column = tl.arange(0, HALF)[None, None, :]
        mask = live[:, :, None] & (column < WIDTH // 2)
        a = tl.load(ptr + offset[:, :, None] + column, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(ptr + offset[:, :, None] + WIDTH // 2 + column, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(ptr, offset, a, b, live, WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of `load_pairs`, in the tensor's dtype."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, None, :]
        x = tl.reshape(tl.join(a, b), [offset.shape[0], offset.shape[1], 2 * HALF]).to(ptr.dtype.element_ty)
        tl.store(ptr + offset[:, :, None] + column, x, mask=live[:, :, None] & (column < WIDTH))
    else:
        column = tl.arange(0, HALF)[None, None, :]
        mask = live[:, :, None] & (column < WIDTH // 2)
        tl.store(ptr + offset[:, :, None] + column, a.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + offset[:, :, None] + WIDTH // 2 + column, b.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(ptr, WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A weight's pairs, (1, 1, HALF) each."""
    pair = tl.arange(0, HALF)[None, None, :]
    first = 2 * pair if INTERLEAVED else pair
    second = first + (1 if INTERLEAVED else WIDTH // 2)
    inside = pair < WIDTH // 2
    a = tl.load(ptr + first, mask=inside, other=0.0).to(tl.float32)
    return a, tl.load(ptr + second, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_rotation(cos_ptr, sin_ptr, position_ptr, row, live, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """cos and sin of rows, (rows, 1, HALF); 1 and 0 at position -1."""
    position = row
    if position_ptr is not None:
        position = tl.load(position_ptr + row, mask=live, other=-1).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    mask = (live & (position >= 0))[:, None] & (pair < WIDTH // 2)
    place = position[:, None] * (WIDTH // 2) + pair
    cos = tl.load(cos_ptr + place, mask=mask, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + place, mask=mask, other=0.0).to(tl.float32)
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def normalise_pairs(a, b, live, eps, NORM: tl.constexpr, WIDTH: tl.constexpr):
    """Normed pairs, and 1/deviation (rows, heads, 1); zero in rows that are not live."""
    if NORM == "layer":
        mean = ((tl.sum(a, 2) + tl.sum(b, 2)) * (1.0 / WIDTH))[:, :, None]
        inside = tl.arange(0, a.shape[2])[None, None, :] < WIDTH // 2
        a = tl.where(inside, a - mean, 0.0)
        b = tl.where(inside, b - mean, 0.0)
    square = tl.sum(a * a + b * b, 2) * (1.0 / WIDTH)
    rstd = tl.where(live, tl.div_rn(1.0, tl.sqrt_rn(square + eps)), 0.0)[:, :, None]
    return a * rstd, b * rstd, rstd


@triton.jit
def load_streams(
    x_ptr, second_ptr, origin, head, live, first_rows, row_stride, head_stride, second_row_stride, second_head_stride,
    WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Pairs of the rows `origin` of both streams, one after the other, and which rows are the second's (rows, 1, 1)."""
    later = origin >= first_rows
    offset = origin[:, None] * row_stride + head[None, :] * head_stride
    mine = live if second_ptr is None else live & ~later[:, None]
    a, b = load_pairs(x_ptr, offset, mine, WIDTH, HALF, INTERLEAVED)
    if second_ptr is not None:
        offset = (origin - first_rows)[:, None] * second_row_stride + head[None, :] * second_head_stride
        other_a, other_b = load_pairs(second_ptr, offset, live & later[:, None], WIDTH, HALF, INTERLEAVED)
        a += other_a
        b += other_b
    return a, b, later[:, None, None]


@triton.jit
def weigh(a, b, weight_ptr, second_weight_ptr, later, WIDTH: tl.constexpr, HALF: tl.constexpr,
          INTERLEAVED: tl.constexpr):  # fmt: skip
    """Pairs times the weight of their stream; a stream without one is left as it is."""
    if (weight_ptr is not None) or (second_weight_ptr is not None):
        left = tl.full([1, 1, HALF], 1.0, tl.float32)
        right = left
        later_left = left
        later_right = left
        if weight_ptr is not None:
            left, right = load_weight(weight_ptr, WIDTH, HALF, INTERLEAVED)
        if second_weight_ptr is not None:
            later_left, later_right = load_weight(second_weight_ptr, WIDTH, HALF, INTERLEAVED)
        a = a * tl.where(later, later_left, left)
        b = b * tl.where(later, later_right, right)
    return a, b


@triton.jit
def forward_block(
    x_ptr, second_ptr, weight_ptr, second_weight_ptr, cos_ptr, sin_ptr, position_ptr, source_ptr, out_ptr,
    row_stride, head_stride, second_row_stride, second_head_stride, first_rows, total, alive, block, eps,
    COUNT: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Some rows and heads of q or of k."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = block * HEADS + tl.arange(0, HEADS)
    kept = (row < alive) & (row < total)
    origin = row
    if source_ptr is not None:
        origin = tl.load(source_ptr + row, mask=kept, other=0).to(tl.int64)
    live = kept[:, None] & (head < COUNT)[None, :]
    a, b, later = load_streams(
        x_ptr, second_ptr, origin, head, live, first_rows, row_stride, head_stride, second_row_stride,
        second_head_stride, WIDTH, HALF, INTERLEAVED,
    )  # fmt: skip
    if NORM != "none":
        a, b, _ = normalise_pairs(a, b, live, eps, NORM, WIDTH)
        a, b = weigh(a, b, weight_ptr, second_weight_ptr, later, WIDTH, HALF, INTERLEAVED)
    if cos_ptr is not None:
        cos, sin = load_rotation(cos_ptr, sin_ptr, position_ptr, row, kept, WIDTH, HALF)
        a, b = a * cos - b * sin, b * cos + a * sin
    place = row[:, None] * (COUNT * WIDTH) + head[None, :] * WIDTH
    store_pairs(out_ptr, place, a, b, (row < total)[:, None] & (head < COUNT)[None, :], WIDTH, HALF, INTERLEAVED)


@jit_kernel(do_not_specialize=["first_rows", "total", "batch"])
def qk_norm_rope_forward(
    q_ptr, k_ptr, second_q_ptr, second_k_ptr, q_weight_ptr, k_weight_ptr, second_q_weight_ptr, second_k_weight_ptr,
    cos_ptr, sin_ptr, position_ptr, source_ptr, cu_ptr, out_q_ptr, out_k_ptr,
    q_row, q_head, k_row, k_head, second_q_row, second_q_head, second_k_row, second_k_head,
    first_rows, total, batch, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Blocks of q's heads, then of k's."""
    blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    alive = total if cu_ptr is None else tl.load(cu_ptr + batch)
    if tl.program_id(1) < blocks:
        forward_block(
            q_ptr, second_q_ptr, q_weight_ptr, second_q_weight_ptr, cos_ptr, sin_ptr, position_ptr, source_ptr,
            out_q_ptr, q_row, q_head, second_q_row, second_q_head, first_rows, total, alive, tl.program_id(1), eps,
            Q_HEADS, NORM, INTERLEAVED, WIDTH, HALF, ROWS, HEADS,
        )  # fmt: skip
    else:
        forward_block(
            k_ptr, second_k_ptr, k_weight_ptr, second_k_weight_ptr, cos_ptr, sin_ptr, position_ptr, source_ptr,
            out_k_ptr, k_row, k_head, second_k_row, second_k_head, first_rows, total, alive,
            tl.program_id(1) - blocks, eps, K_HEADS, NORM, INTERLEAVED, WIDTH, HALF, ROWS, HEADS,
        )  # fmt: skip


@triton.jit
def backward_block(
    grad_ptr, x_ptr, second_ptr, weight_ptr, second_weight_ptr, cos_ptr, sin_ptr, position_ptr, source_ptr,
    grad_x_ptr, grad_second_ptr, partial_ptr,
    row_stride, head_stride, second_row_stride, second_head_stride, first_rows, total, alive, block, eps,
    COUNT: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS·ROWS rows and some heads of q or of k; the sums for the weights of both streams go to `partial`, (2, W)."""
    head = block * HEADS + tl.arange(0, HEADS)
    sum_a = tl.zeros([ROWS, HEADS, HALF], tl.float32)
    sum_b, later_a, later_b = sum_a, sum_a, sum_a
    for step in range(STEPS):
        row = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        kept = (row < alive) & (row < total)
        origin = row
        if source_ptr is not None:
            origin = tl.load(source_ptr + row, mask=row < total, other=0).to(tl.int64)
        live = kept[:, None] & (head < COUNT)[None, :]
        place = row[:, None] * (COUNT * WIDTH) + head[None, :] * WIDTH
        a, b = load_pairs(grad_ptr, place, live, WIDTH, HALF, INTERLEAVED)
        if cos_ptr is not None:
            cos, sin = load_rotation(cos_ptr, sin_ptr, position_ptr, row, kept, WIDTH, HALF)
            a, b = a * cos + b * sin, b * cos - a * sin
        later = (origin >= first_rows)[:, None, None]
        if NORM != "none":
            left, right, _ = load_streams(
                x_ptr, second_ptr, origin, head, live, first_rows, row_stride, head_stride, second_row_stride,
                second_head_stride, WIDTH, HALF, INTERLEAVED,
            )  # fmt: skip
            left, right, rstd = normalise_pairs(left, right, live, eps, NORM, WIDTH)
            if weight_ptr is not None:
                sum_a += tl.where(later, 0.0, a * left)
                sum_b += tl.where(later, 0.0, b * right)
            if second_weight_ptr is not None:
                later_a += tl.where(later, a * left, 0.0)
                later_b += tl.where(later, b * right, 0.0)
            a, b = weigh(a, b, weight_ptr, second_weight_ptr, later, WIDTH, HALF, INTERLEAVED)
            projection = (tl.sum(a * left + b * right, 2) * (1.0 / WIDTH))[:, :, None]
            level = 0.0
            if NORM == "layer":
                level = ((tl.sum(a, 2) + tl.sum(b, 2)) * (1.0 / WIDTH))[:, :, None]
            a = rstd * (a - level - left * projection)
            b = rstd * (b - level - right * projection)
        known = (row < total)[:, None] & (head < COUNT)[None, :]
        place = origin[:, None] * (COUNT * WIDTH) + head[None, :] * WIDTH
        if grad_second_ptr is None:
            store_pairs(grad_x_ptr, place, a, b, known, WIDTH, HALF, INTERLEAVED)
        else:
            second_place = (origin - first_rows)[:, None] * (COUNT * WIDTH) + head[None, :] * WIDTH
            mine = (origin < first_rows)[:, None]
            store_pairs(grad_x_ptr, place, a, b, known & mine, WIDTH, HALF, INTERLEAVED)
            store_pairs(grad_second_ptr, second_place, a, b, known & ~mine, WIDTH, HALF, INTERLEAVED)
    if partial_ptr is not None:
        pair = tl.arange(0, HALF)
        first = 2 * pair if INTERLEAVED else pair
        second = first + (1 if INTERLEAVED else WIDTH // 2)
        inside = pair < WIDTH // 2
        partial_ptr += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * WIDTH
        tl.store(partial_ptr + first, tl.sum(tl.sum(sum_a, 0), 0), mask=inside)
        tl.store(partial_ptr + second, tl.sum(tl.sum(sum_b, 0), 0), mask=inside)
        tl.store(partial_ptr + WIDTH + first, tl.sum(tl.sum(later_a, 0), 0), mask=inside)
        tl.store(partial_ptr + WIDTH + second, tl.sum(tl.sum(later_b, 0), 0), mask=inside)


@jit_kernel(do_not_specialize=["first_rows", "total", "batch"])
def qk_norm_rope_backward(
    grad_q_ptr, grad_k_ptr, q_ptr, k_ptr, second_q_ptr, second_k_ptr, q_weight_ptr, k_weight_ptr, second_q_weight_ptr,
    second_k_weight_ptr, cos_ptr, sin_ptr, position_ptr, source_ptr, cu_ptr,
    out_q_ptr, out_k_ptr, out_second_q_ptr, out_second_k_ptr, partial_ptr,
    q_row, q_head, k_row, k_head, second_q_row, second_q_head, second_k_row, second_k_head,
    first_rows, total, batch, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Blocks of q's heads, then of k's."""
    blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    alive = total if cu_ptr is None else tl.load(cu_ptr + batch)
    if tl.program_id(1) < blocks:
        backward_block(
            grad_q_ptr, q_ptr, second_q_ptr, q_weight_ptr, second_q_weight_ptr, cos_ptr, sin_ptr, position_ptr,
            source_ptr, out_q_ptr, out_second_q_ptr, partial_ptr, q_row, q_head, second_q_row, second_q_head,
            first_rows, total, alive, tl.program_id(1), eps,
            Q_HEADS, NORM, INTERLEAVED, WIDTH, HALF, ROWS, HEADS, STEPS,
        )  # fmt: skip
    else:
        backward_block(
            grad_k_ptr, k_ptr, second_k_ptr, k_weight_ptr, second_k_weight_ptr, cos_ptr, sin_ptr, position_ptr,
            source_ptr, out_k_ptr, out_second_k_ptr, partial_ptr, k_row, k_head, second_k_row, second_k_head,
            first_rows, total, alive, tl.program_id(1) - blocks, eps,
            K_HEADS, NORM, INTERLEAVED, WIDTH, HALF, ROWS, HEADS, STEPS,
        )  # fmt: skip


@functools.cache
def _tile(q_heads: int, k_heads: int, width: int, elements: int) -> dict[str, int]:
    half = next_power_of_2(width // 2)
    heads = min(next_power_of_2(max(q_heads, k_heads)), 8, max(elements // (2 * half), 1))
    rows = max(elements // (2 * half * heads), 1)
    return {"Q_HEADS": q_heads, "K_HEADS": k_heads, "WIDTH": width, "HALF": half, "ROWS": rows, "HEADS": heads}


def _heads(x: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """x with unit stride inside of a head, and its strides."""
    if x is None:
        return None, 0, 0
    x = x if x.stride(2) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1)


class QkNormRope:
    """Norm, rotation and joined order of q and k."""

    @staticmethod
    def forward(q, k, second_q, second_k, q_weight, k_weight, second_q_weight, second_k_weight, cos, sin, position,
                source, plan, eps, norm, pairing):  # fmt: skip
        total, q_heads, k_heads = (q if source is None else source).shape[0], q.shape[1], k.shape[1]
        outs = q.new_empty(total, *q.shape[1:]), k.new_empty(total, *k.shape[1:])
        if outs[0].numel() or outs[1].numel():
            tile = _tile(q_heads, k_heads, q.shape[2], 4096)
            blocks = cdiv(q_heads, tile["HEADS"]) + cdiv(k_heads, tile["HEADS"])
            tensors, strides = _arguments(q, k, second_q, second_k)
            weights = (_vector(w) for w in (q_weight, k_weight, second_q_weight, second_k_weight))
            cu_seqlens = None if plan is None else plan.cu_seqlens
            qk_norm_rope_forward[(cdiv(total, tile["ROWS"]), blocks)](
                *tensors, *weights, cos, sin, position, source, cu_seqlens, *outs, *strides,
                q.shape[0], total, 0 if plan is None else plan.batch_size, eps,
                NORM=norm, INTERLEAVED=pairing == "interleaved", num_warps=4, **tile,
            )  # fmt: skip
        return outs

    @staticmethod
    def backward(grad_q, grad_k, needs, q, k, second_q, second_k, q_weight, k_weight, second_q_weight, second_k_weight,
                 cos, sin, position, source, plan, eps, norm, pairing):  # fmt: skip
        total, q_heads, k_heads, width = grad_q.shape[0], q.shape[1], k.shape[1], q.shape[2]
        given, weights = (q, k, second_q, second_k), (q_weight, k_weight, second_q_weight, second_k_weight)
        grads = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given]
        tile = _tile(q_heads, k_heads, width, 2048)
        q_blocks, k_blocks = (cdiv(heads, tile["HEADS"]) for heads in (q_heads, k_heads))
        programs, partial = cdiv(total, tile["ROWS"] * STEPS), None
        if any(weight is not None for weight in weights):
            shape = (q_blocks + k_blocks, programs, 2, width)
            partial = torch.empty(shape, dtype=torch.float32, device=q.device)
        if total and width:
            tensors, strides = _arguments(*given)
            cu_seqlens = None if plan is None else plan.cu_seqlens
            qk_norm_rope_backward[(programs, q_blocks + k_blocks)](
                grad_q.contiguous(), grad_k.contiguous(), *tensors, *(_vector(w) for w in weights), cos, sin, position,
                source, cu_seqlens, *grads, partial, *strides,
                q.shape[0], total, 0 if plan is None else plan.batch_size, eps,
                NORM=norm, INTERLEAVED=pairing == "interleaved", STEPS=STEPS, num_warps=4, **tile,
            )  # fmt: skip
        if partial is not None:
            sums = [part.sum((0, 1)) for part in partial.split([q_blocks, k_blocks])]
            pairs = zip(weights, (sums[0][0], sums[1][0], sums[0][1], sums[1][1]), strict=True)
            weights = [None if weight is None else total.to(weight.dtype) for weight, total in pairs]
        return *grads, *weights, None, None, None, None


def _arguments(*tensors: torch.Tensor | None) -> tuple[list[torch.Tensor | None], list[int]]:
    """q and k of both streams as the kernels take them, and the strides of their rows and heads."""
    parts = [_heads(t) for t in tensors]
    return [part[0] for part in parts], [stride for part in parts for stride in part[1:]]


def _vector(weight: torch.Tensor | None) -> torch.Tensor | None:
    """The weight with its elements side by side."""
    return None if weight is None else weight.contiguous()
