"""Triton kernels of the causal smoothing x̄_t = p̃_t x_t + (1 - p̃_t) x̄_{t-1}: a scan inside each sample.

One program scans one block of columns of one sample, BLOCK_T rows at a time. Backward, with G the gradient of x̄:
    g_t = G_t + (1 - p̃_{t+1}) g_{t+1},   dx_t = p̃_t g_t,   dp̃_t = g_t·(x_t - x̄_{t-1})
and p̃ = 1, without a gradient, at a sample's first token.

Bytes for T rows of D elements of e bytes: forward 2·T·D·e, backward T·D·(2·e + 8).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import jit_kernel
from ._rows import cdiv, pointer_rows
from .confidence import clamp_confidence, prob_gradient

BLOCK_T = 32
BLOCK_D = 32


@triton.jit
def compose(decay1, value1, decay2, value2):
    """Two steps x ↦ decay·x + value, one after the other."""
    return decay1 * decay2, decay2 * value1 + value2


@triton.jit
def confidences(prob_ptr, token_ptr, row, start, end):
    """p̃ of rows of a sample [start, end): 1 at its first row, 0 outside. Without tokens p is given by row."""
    inside = (row >= start) & (row < end)
    if token_ptr is None:
        token = tl.where(inside, row, -1)
    else:
        token = tl.load(token_ptr + row, mask=inside, other=-1)
    p = tl.load(prob_ptr + token, mask=token >= 0, other=0.0)
    p = tl.where(token >= 0, clamp_confidence(p), 0.0)
    return tl.where(row == start, 1.0, p)


@jit_kernel(do_not_specialize=["batch", "capacity"])
def scan_forward_kernel(
    x_ptr, prob_ptr, token_ptr, cu_ptr, out_ptr, x_stride, batch, capacity, width,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x̄ of one sample; the program past the last sample writes the zeros of the tail."""
    sample = tl.program_id(0)
    step = tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column[None, :] < width
    start = tl.load(cu_ptr + sample)
    end = tl.load(cu_ptr + sample + 1, mask=sample < batch, other=0)
    limit = tl.where(sample < batch, end, capacity)
    state = tl.zeros([BLOCK_D], tl.float32)
    for base in range(start, limit, BLOCK_T):
        row = base + step
        wide = row.to(tl.int64)[:, None]
        p = confidences(prob_ptr, token_ptr, row, start, end)[:, None]
        x = tl.load(x_ptr + wide * x_stride + column[None, :], mask=(row[:, None] < end) & inside, other=0.0)
        decay = tl.broadcast_to(1 - p, [BLOCK_T, BLOCK_D])
        decay, value = tl.associative_scan((decay, p * x.to(tl.float32)), 0, compose)
        value += decay * state[None, :]
        state = tl.sum(tl.where(step[:, None] == BLOCK_T - 1, value, 0.0), 0)
        value = tl.where(row[:, None] < end, value, 0.0)
        place = out_ptr + wide * width + column[None, :]
        tl.store(place, value.to(out_ptr.dtype.element_ty), mask=(row[:, None] < limit) & inside)


@jit_kernel(do_not_specialize=["batch", "capacity"])
def scan_backward_kernel(
    grad_ptr, x_ptr, rows_ptr, prob_ptr, token_ptr, cu_ptr, grad_x_ptr, partial_ptr,
    grad_stride, x_stride, batch, capacity, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The recurrence from the last row to the first; dp̃ of these columns goes to partial (column blocks, capacity)."""
    sample = tl.program_id(0)
    step = tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column[None, :] < width
    start = tl.load(cu_ptr + sample)
    end = tl.load(cu_ptr + sample + 1, mask=sample < batch, other=0)
    limit = tl.where(sample < batch, end, capacity)
    tiles = tl.cdiv(limit - start, BLOCK_T)
    state = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(0, tiles):
        row = start + (tiles - 1 - tile) * BLOCK_T + step
        wide = row.to(tl.int64)[:, None]
        live = (row[:, None] < end) & inside
        p = confidences(prob_ptr, token_ptr, row, start, end)[:, None]
        p_next = confidences(prob_ptr, token_ptr, row + 1, start, end)[:, None]
        grad = tl.load(grad_ptr + wide * grad_stride + column[None, :], mask=live, other=0.0).to(tl.float32)
        decay = tl.broadcast_to(1 - p_next, [BLOCK_T, BLOCK_D])
        decay, value = tl.associative_scan((decay, grad), 0, compose, reverse=True)
        value += decay * state[None, :]
        state = tl.sum(tl.where(step[:, None] == 0, value, 0.0), 0)
        x = tl.load(x_ptr + wide * x_stride + column[None, :], mask=live, other=0.0).to(tl.float32)
        before = tl.load(rows_ptr + (wide - 1) * width + column[None, :], mask=live & (row[:, None] > start), other=0.0)
        moved = tl.where(live & (row[:, None] > start), value * (x - before), 0.0)
        tl.store(partial_ptr + tl.program_id(1) * capacity + row, tl.sum(moved, 1), mask=row < limit)
        place = grad_x_ptr + wide * width + column[None, :]
        grad_x = tl.where(live, p * value, 0.0)
        tl.store(place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=(row[:, None] < limit) & inside)


def tokens_of(prob, plan):
    """Where each row's probability is, or None where `prob` has one for each row."""
    return plan.token_index if prob.dim() == 2 else None


def scan(x, prob, plan, dtype=torch.float32):
    """x̄ (capacity, D), zero in the tail. `prob` (B, L) or (capacity,) in float32, contiguous."""
    x = pointer_rows(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel():
        scan_forward_kernel[(plan.batch_size + 1, cdiv(x.shape[1], BLOCK_D))](
            x, prob, tokens_of(prob, plan), plan.cu_seqlens, out, x.stride(0), plan.batch_size, *x.shape,
            BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return out


def scan_backward(grad, x, rows, prob, plan):
    """grad_x in x's dtype and the parts of dp̃ (parts, capacity); `rows` is x̄ in float32."""
    x, grad = pointer_rows(x), pointer_rows(grad)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = cdiv(x.shape[1], BLOCK_D)
    partial = torch.empty(parts, plan.capacity, dtype=torch.float32, device=x.device)
    if grad_x.numel():
        scan_backward_kernel[(plan.batch_size + 1, parts)](
            grad, x, rows, prob, tokens_of(prob, plan), plan.cu_seqlens, grad_x, partial, grad.stride(0), x.stride(0),
            plan.batch_size, *x.shape, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return grad_x, partial


class EmaSmooth:
    """x̄ as a separate operator."""

    @staticmethod
    def forward(x, boundary_prob, plan):
        return scan(x, boundary_prob.float().contiguous(), plan, x.dtype)

    @staticmethod
    def backward(grad, needs, x, boundary_prob, plan):
        prob = boundary_prob.float().contiguous()
        grad_x, partial = scan_backward(grad, x, scan(x, prob, plan), prob, plan)
        if prob.dim() == 2:
            return grad_x, prob_gradient(boundary_prob, prob, plan, partial)
        moved = torch.where((prob >= 1e-4) & (prob <= 1 - 1e-4), partial.sum(0), 0.0)
        return grad_x, moved.to(boundary_prob.dtype)
