"""Triton kernels of adaLN: LayerNorm, modulation and gated residual in one pass over the rows.

Bytes for T rows of D elements of e bytes. Forward: adaln_modulate 2·T·D·e, gate_residual 3·T·D·e, fused 4·T·D·e.
Backward: 3, 3 and 6·T·D·e. The modulators (B, D) and their partial sums are small beside them.
Statistics are recomputed in the backward, which holds the row in registers anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._rows import next_power_of_2, pointer_rows, segments, warps_for_row


@triton.jit(do_not_specialize=["cells"])
def modulate_forward(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, mixed_ptr, out_ptr, sample_ptr,
    x_stride, y_stride, gate_stride, shift_stride, scale_stride, cells, width, eps,
    GATE: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: mixed = x + gate·y where GATE, out = LayerNorm(mixed)·(1 + scale) + shift where NORM."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    sample = tl.load(sample_ptr + row).to(tl.int64) if PACKED else row // cells
    live = column < tl.where(sample >= 0, width, 0)
    x = tl.load(x_ptr + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    if GATE:
        y = tl.load(y_ptr + row * y_stride + column, mask=live, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + sample * gate_stride + column, mask=live, other=0.0).to(tl.float32)
        mixed = (x + gate * y).to(mixed_ptr.dtype.element_ty)
        tl.store(mixed_ptr + row * width + column, mixed, mask=inside)
        x = mixed.to(tl.float32)  # the norm sees what the next operator will read
    if NORM:
        mean = tl.div_rn(tl.sum(x), width + 0.0)
        centred = tl.where(inside, x - mean, 0.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred) / width + eps))
        scale = tl.load(scale_ptr + sample * scale_stride + column, mask=live, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + sample * shift_stride + column, mask=live, other=0.0).to(tl.float32)
        out = tl.where(live, centred * rstd * (1 + scale) + shift, 0.0)
        tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "cells", "capacity", "rows"])
def modulate_backward(
    grad_mixed_ptr, grad_out_ptr, x_ptr, y_ptr, gate_ptr, scale_ptr, cu_ptr,
    grad_x_ptr, grad_y_ptr, partial_ptr,
    grad_mixed_stride, grad_out_stride, x_stride, y_stride, gate_stride, scale_stride,
    batch, cells, capacity, rows, width, eps,
    GATE: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A slab of rows of one sample: their gradients, and the slab's sums for gate, shift and scale.

    The programs past the last sample write the zeros of the rows past the last live one.
    """
    sample = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    slabs = tl.num_programs(1)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if PACKED:
        start = tl.load(cu_ptr + sample).to(tl.int64)
        if sample == batch:
            zero = tl.zeros([BLOCK], tl.float32)
            for tail in range(start + slab, capacity, slabs):
                place = tail * width + column
                tl.store(grad_x_ptr + place, zero.to(grad_x_ptr.dtype.element_ty), mask=inside)
                if GATE:
                    tl.store(grad_y_ptr + place, zero.to(grad_y_ptr.dtype.element_ty), mask=inside)
            return
        end = tl.load(cu_ptr + sample + 1).to(tl.int64)
    else:
        start = sample * cells
        end = start + cells
    gate = tl.zeros([BLOCK], tl.float32)
    factor = tl.zeros([BLOCK], tl.float32)
    if GATE:
        gate = tl.load(gate_ptr + sample * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        factor = 1 + tl.load(scale_ptr + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    first = start + slab * rows
    for row in range(first, tl.minimum(first + rows, end)):  # 64-bit, as start is
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.zeros([BLOCK], tl.float32)
        if GATE:
            y = tl.load(y_ptr + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
            x = (x + gate * y).to(x_ptr.dtype.element_ty).to(tl.float32)
            grad = tl.load(grad_mixed_ptr + row * grad_mixed_stride + column, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.div_rn(tl.sum(x), width + 0.0)
            centred = tl.where(inside, x - mean, 0.0)
            rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred) / width + eps))
            normed = centred * rstd
            grad_out = tl.load(grad_out_ptr + row * grad_out_stride + column, mask=inside, other=0.0).to(tl.float32)
            shift_sum += grad_out
            scale_sum += grad_out * normed
            inner = grad_out * factor
            grad += rstd * (inner - tl.sum(inner) / width - normed * (tl.sum(inner * normed) / width))
        tl.store(grad_x_ptr + row * width + column, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if GATE:
            gate_sum += grad * y
            tl.store(grad_y_ptr + row * width + column, (grad * gate).to(grad_y_ptr.dtype.element_ty), mask=inside)
    sums = partial_ptr + ((sample * slabs + slab) * (GATE + 2 * NORM)) * width + column
    if GATE:
        tl.store(sums, gate_sum, mask=inside)
        sums += width
    if NORM:
        tl.store(sums, shift_sum, mask=inside)
        tl.store(sums + width, scale_sum, mask=inside)


def _forward(x, y, gate, shift, scale, plan, eps):
    """(mixed, out), either of them None where gate or scale is None; contiguous, in x's dtype."""
    width = x.shape[-1]
    x, y, gate, shift, scale = (pointer_rows(t) for t in (x, y, gate, shift, scale))
    shape = (plan.capacity, width) if plan is not None else (len(scale if gate is None else gate), -1, width)
    mixed = torch.empty_like(x, memory_format=torch.contiguous_format) if gate is not None else None
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if scale is not None else None
    if x.numel():
        batch = (scale if gate is None else gate).shape[0]
        modulate_forward[(x.shape[0],)](
            x, y, gate, shift, scale, mixed, out, None if plan is None else plan.sample_index,
            *(0 if t is None else t.stride(0) for t in (x, y, gate, shift, scale)), x.shape[0] // batch, width, eps,
            GATE=gate is not None, NORM=scale is not None, PACKED=plan is not None,
            BLOCK=next_power_of_2(width), num_warps=warps_for_row(width),
        )  # fmt: skip
    return tuple(None if t is None else t.view(shape) for t in (mixed, out))


def _backward(grad_mixed, grad_out, x, y, gate, scale, plan, eps):
    """Gradients of x and y in their shapes, and of gate, shift, scale (B, D); None where the input is None."""
    shape, width = x.shape, x.shape[-1]
    batch = (scale if gate is None else gate).shape[0]
    dtypes = [None if t is None else t.dtype for t in (gate, scale, scale)]
    x, y, gate, scale, grad_mixed, grad_out = (pointer_rows(t) for t in (x, y, gate, scale, grad_mixed, grad_out))
    cells = x.shape[0] // max(batch, 1)
    rows, slabs = segments(batch, x.shape[0], cells if plan is None else plan.max_seqlen)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_y = None if y is None else torch.empty(y.shape, dtype=y.dtype, device=y.device)
    kinds = [gate is not None, scale is not None, scale is not None]
    partial = torch.empty(batch, slabs, sum(kinds), width, dtype=torch.float32, device=x.device)
    if partial.numel() or x.numel():
        modulate_backward[(batch + (plan is not None), slabs)](
            grad_mixed, grad_out, x, y, gate, scale, None if plan is None else plan.cu_seqlens,
            grad_x, grad_y, partial,
            *(0 if t is None else t.stride(0) for t in (grad_mixed, grad_out, x, y, gate, scale)),
            batch, cells, x.shape[0], rows, width, eps,
            GATE=gate is not None, NORM=scale is not None, PACKED=plan is not None,
            BLOCK=next_power_of_2(width), num_warps=warps_for_row(width),
        )  # fmt: skip
    sums = iter(partial.sum(1).unbind(1))
    modulators = [next(sums).to(dtype) if kind else None for kind, dtype in zip(kinds, dtypes, strict=True)]
    return grad_x.view(shape), None if grad_y is None else grad_y.view(shape), *modulators


class AdalnModulate:
    """LayerNorm(x)·(1 + scale) + shift."""

    @staticmethod
    def forward(x, shift, scale, plan, eps):
        return _forward(x, None, None, shift, scale, plan, eps)[1]

    @staticmethod
    def backward(grad, needs, x, shift, scale, plan, eps):
        grad_x, _, _, *modulators = _backward(None, grad, x, None, None, scale, plan, eps)
        return grad_x, *modulators


class GateResidual:
    """x + gate·y."""

    @staticmethod
    def forward(x, y, gate, plan):
        return _forward(x, y, gate, None, None, plan, 0.0)[0]

    @staticmethod
    def backward(grad, needs, x, y, gate, plan):
        return _backward(grad, None, x, y, gate, None, plan, 0.0)[:3]


class GateResidualModulate:
    """Both, x and y read once."""

    @staticmethod
    def forward(x, y, gate, shift, scale, plan, eps):
        return _forward(x, y, gate, shift, scale, plan, eps)

    @staticmethod
    def backward(grad_mixed, grad_out, needs, x, y, gate, shift, scale, plan, eps):
        return _backward(grad_mixed, grad_out, x, y, gate, scale, plan, eps)
