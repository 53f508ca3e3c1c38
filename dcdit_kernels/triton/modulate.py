"""Triton kernels of adaLN: LayerNorm, modulation and gated residual in one pass over the rows.

Bytes for T rows of D elements of e bytes. Forward: adaln_modulate 2·T·D·e, gate_residual 3·T·D·e, fused 4·T·D·e.
Backward: 3, 4 and 6·T·D·e. The modulators (B, D) and their partial sums are small beside them.
Statistics are recomputed in the backward, which holds the row in registers anyway.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._launch import jit_kernel
from ._rows import cdiv, load_columns, load_rows, pieces, pointer_rows, segments, store_rows, strided_rows


@triton.jit
def normalise(xs, live, eps, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """(LayerNorm of rows in pieces, 1/deviation (rows, 1)); zero in rows that are not live."""
    total = xs[0]
    for i in tl.static_range(1, len(xs)):
        total += xs[i]
    mean = tl.div_rn(tl.sum(total, 1), WIDTH + 0.0)[:, None]
    centred = ()
    squares = tl.zeros_like(total)
    for i in tl.static_range(len(xs)):
        apart = xs[i] - mean
        if (i + 1) * COLUMNS > WIDTH:
            apart = tl.where((i * COLUMNS + tl.arange(0, COLUMNS) < WIDTH)[None, :], apart, 0.0)
        squares += apart * apart
        centred += (apart,)
    rstd = tl.where(live, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 1) * (1.0 / WIDTH) + eps)), 0.0)[:, None]
    normed = ()
    for i in tl.static_range(len(xs)):
        normed += (centred[i] * rstd,)
    return normed, rstd


@jit_kernel(do_not_specialize=["cells", "total"])
def modulate_forward(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, mixed_ptr, out_ptr, sample_ptr,
    x_stride, y_stride, gate_stride, shift_stride, scale_stride, cells, total, eps,
    GATE: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Some rows: mixed = x + gate·y where GATE, out = LayerNorm(mixed)·(1 + scale) + shift where NORM."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if PACKED:
        sample = tl.load(sample_ptr + row, mask=row < total, other=-1).to(tl.int64)
    else:
        sample = tl.where(row < total, row // cells, -1)
    xs = ()
    for i in tl.static_range(PIECES):
        column = i * COLUMNS + tl.arange(0, COLUMNS)
        x = load_rows(x_ptr, row, x_stride, column, sample >= 0, WIDTH)
        if GATE:
            gate = load_rows(gate_ptr, sample, gate_stride, column, sample >= 0, WIDTH)
            y = load_rows(y_ptr, row, y_stride, column, sample >= 0, WIDTH)
            mixed = (x + gate * y).to(mixed_ptr.dtype.element_ty)
            store_rows(mixed_ptr, row, column, mixed, row < total, WIDTH)
            x = mixed.to(tl.float32)  # the norm sees what the next operator will read
        xs += (x,)
    if NORM:
        normed, _ = normalise(xs, sample >= 0, eps, WIDTH, COLUMNS)
        for i in tl.static_range(PIECES):
            column = i * COLUMNS + tl.arange(0, COLUMNS)
            scale = load_rows(scale_ptr, sample, scale_stride, column, sample >= 0, WIDTH)
            shift = load_rows(shift_ptr, sample, shift_stride, column, sample >= 0, WIDTH)
            store_rows(out_ptr, row, column, normed[i] * (1 + scale) + shift, row < total, WIDTH)


@jit_kernel(do_not_specialize=["batch", "cells", "capacity", "slab_rows"])
def modulate_backward(
    grad_mixed_ptr, grad_out_ptr, x_ptr, y_ptr, gate_ptr, scale_ptr, cu_ptr,
    grad_x_ptr, grad_y_ptr, partial_ptr,
    grad_mixed_stride, grad_out_stride, x_stride, y_stride, gate_stride, scale_stride,
    batch, cells, capacity, slab_rows, eps,
    GATE: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A slab of rows of one sample: their gradients, and the slab's sums for gate, shift and scale.

    The programs past the last sample write the zeros of the rows past the last live one.
    """
    sample = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    slabs = tl.num_programs(1)
    zero = tl.zeros([ROWS, COLUMNS], tl.float32)
    if PACKED:
        start = tl.load(cu_ptr + sample).to(tl.int64)
        if sample == batch:
            for tail in range(start + slab * ROWS, capacity, slabs * ROWS):
                row = tail + tl.arange(0, ROWS)
                for i in tl.static_range(PIECES):
                    column = i * COLUMNS + tl.arange(0, COLUMNS)
                    store_rows(grad_x_ptr, row, column, zero, row < capacity, WIDTH)
                    if GATE:
                        store_rows(grad_y_ptr, row, column, zero, row < capacity, WIDTH)
            return
        end = tl.load(cu_ptr + sample + 1).to(tl.int64)
    else:
        start = sample * cells
        end = start + cells
    gates, factors, gate_sums, shift_sums, scale_sums = (), (), (), (), ()
    for i in tl.static_range(PIECES):
        column = i * COLUMNS + tl.arange(0, COLUMNS)
        if GATE:
            gates += (load_columns(gate_ptr + sample * gate_stride, column, WIDTH)[None, :],)
            gate_sums += (zero,)
        if NORM:
            factors += (1 + load_columns(scale_ptr + sample * scale_stride, column, WIDTH)[None, :],)
            shift_sums += (zero,)
            scale_sums += (zero,)
    first = start + slab * slab_rows
    stop = tl.minimum(first + slab_rows, end)
    # 64-bit, as start is; the next rows are on their way, for which a gate leaves no registers.
    for base in tl.range(first, stop, ROWS, num_stages=3 - 2 * GATE):
        row = base + tl.arange(0, ROWS)
        xs, ys, grad_outs = (), (), ()
        for i in tl.static_range(PIECES):
            column = i * COLUMNS + tl.arange(0, COLUMNS)
            if GATE:
                ys += (load_rows(y_ptr, row, y_stride, column, row < stop, WIDTH),)
            if NORM:
                x = load_rows(x_ptr, row, x_stride, column, row < stop, WIDTH)
                if GATE:
                    x = (x + gates[i] * ys[i]).to(x_ptr.dtype.element_ty).to(tl.float32)
                xs += (x,)
                grad_outs += (load_rows(grad_out_ptr, row, grad_out_stride, column, row < stop, WIDTH),)
        if NORM:
            normed, rstd = normalise(xs, row < stop, eps, WIDTH, COLUMNS)
            inners, shifts, scales, level, along = (), (), (), zero, zero
            for i in tl.static_range(PIECES):
                shifts += (shift_sums[i] + grad_outs[i],)
                scales += (scale_sums[i] + grad_outs[i] * normed[i],)
                inner = grad_outs[i] * factors[i]
                level += inner
                along += inner * normed[i]
                inners += (inner,)
            shift_sums, scale_sums = shifts, scales
            level = (tl.sum(level, 1) * (1.0 / WIDTH))[:, None]  # the compiler's own division is off by 2⁻²²
            along = (tl.sum(along, 1) * (1.0 / WIDTH))[:, None]
        sums = ()
        for i in tl.static_range(PIECES):
            column = i * COLUMNS + tl.arange(0, COLUMNS)
            if NORM:
                grad = rstd * (inners[i] - level - normed[i] * along)
            if GATE:
                grad_mixed = load_rows(grad_mixed_ptr, row, grad_mixed_stride, column, row < stop, WIDTH)
                grad = grad_mixed + grad if NORM else grad_mixed
            store_rows(grad_x_ptr, row, column, grad, row < stop, WIDTH)
            if GATE:
                sums += (gate_sums[i] + grad * ys[i],)
                store_rows(grad_y_ptr, row, column, grad * gates[i], row < stop, WIDTH)
        gate_sums = sums
    sums_ptr = partial_ptr + (sample * slabs + slab) * (GATE + 2 * NORM) * WIDTH
    for i in tl.static_range(PIECES):
        column = i * COLUMNS + tl.arange(0, COLUMNS)
        if GATE:
            tl.store(sums_ptr + column, tl.sum(gate_sums[i], 0), mask=column < WIDTH)
        if NORM:
            tl.store(sums_ptr + GATE * WIDTH + column, tl.sum(shift_sums[i], 0), mask=column < WIDTH)
            tl.store(sums_ptr + (GATE + 1) * WIDTH + column, tl.sum(scale_sums[i], 0), mask=column < WIDTH)


def _forward(x, y, gate, shift, scale, plan, eps):
    """(mixed, out), either of them None where gate or scale is None; contiguous, in x's dtype."""
    mixed = torch.empty_like(x, memory_format=torch.contiguous_format) if gate is not None else None
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if scale is not None else None
    x, x_stride = strided_rows(x)
    y, y_stride = strided_rows(y)
    gate, gate_stride = strided_rows(gate)
    shift, shift_stride = strided_rows(shift)
    scale, scale_stride = strided_rows(scale)
    total, width = x.shape
    if total and width:
        rows, kernel = _forward_kernel(width, gate is not None, scale is not None, plan is not None)
        cells = total // (scale if gate is None else gate).shape[0] if plan is None else 0
        kernel[(cdiv(total, rows),)](
            x, y, gate, shift, scale, mixed, out, None if plan is None else plan.sample_index,
            x_stride, y_stride, gate_stride, shift_stride, scale_stride, cells, total, eps,
        )  # fmt: skip
    return mixed, out


@functools.cache
def _forward_kernel(width, gate, norm, packed):
    """(rows of a program, its kernel)."""
    split = pieces(width, 16)
    rows = min(4 * max(8 // split["PIECES"], 1), 16)  # more where they are narrow
    return rows, modulate_forward.bind(
        GATE=gate, NORM=norm, PACKED=packed, ROWS=rows, WIDTH=width, **split, num_warps=min(split["COLUMNS"] // 64, 32)
    )


def _backward(grad_mixed, grad_out, x, y, gate, shift, scale, plan, eps):
    """Gradients of x and y in their shapes, and of gate, shift, scale (B, D); None where the input is None. Without a
    scale only shape and dtype of x are looked at."""
    shape, width, dtype = x.shape, x.shape[-1], x.dtype
    device = (grad_out if grad_mixed is None else grad_mixed).device
    batch = (scale if gate is None else gate).shape[0]
    dtypes = [None if t is None else t.dtype for t in (gate, shift, scale)]
    total = x.numel() // max(width, 1)
    x = None if scale is None else x
    x, y, gate, scale, grad_mixed, grad_out = (pointer_rows(t) for t in (x, y, gate, scale, grad_mixed, grad_out))
    cells = total // max(batch, 1)
    split = pieces(width, 3)  # sums of rows stay in registers, and there is room for three pieces
    tile = max(1024 // split["COLUMNS"], 1)
    rows, slabs = segments(batch, total, cells if plan is None else plan.max_seqlen, tile)
    grad_x = torch.empty(shape, dtype=dtype, device=device)
    grad_y = None if y is None else torch.empty(shape, dtype=y.dtype, device=device)
    kinds = [gate is not None, scale is not None, scale is not None]
    partial = torch.empty(batch, slabs, sum(kinds), width, dtype=torch.float32, device=device)
    if partial.numel() or grad_x.numel():
        modulate_backward[(batch + (plan is not None), slabs)](
            grad_mixed, grad_out, x, y, gate, scale, None if plan is None else plan.cu_seqlens,
            grad_x, grad_y, partial,
            *(0 if t is None else t.stride(0) for t in (grad_mixed, grad_out, x, y, gate, scale)),
            batch, cells, total, rows, eps,
            GATE=gate is not None, NORM=scale is not None, PACKED=plan is not None,
            ROWS=tile, WIDTH=width, **split, num_warps=min(max(split["COLUMNS"] // 256, 4), 32),
        )  # fmt: skip
    sums = iter(partial.sum(1).unbind(1))
    modulators = [next(sums).to(dtype) if kind else None for kind, dtype in zip(kinds, dtypes, strict=True)]
    return grad_x, grad_y, *modulators


class AdalnModulate:
    """LayerNorm(x)·(1 + scale) + shift."""

    @staticmethod
    def forward(x, shift, scale, plan, eps):
        return _forward(x, None, None, shift, scale, plan, eps)[1]

    @staticmethod
    def backward(grad, needs, x, shift, scale, plan, eps):
        grad_x, _, _, *modulators = _backward(None, grad, x, None, None, shift, scale, plan, eps)
        return grad_x, *modulators


class GateResidual:
    """x + gate·y."""

    @staticmethod
    def forward(x, y, gate, plan):
        return _forward(x, y, gate, None, None, plan, 0.0)[0]

    @staticmethod
    def backward(grad, needs, x, y, gate, plan):
        return _backward(grad, None, x, y, gate, None, None, plan, 0.0)[:3]


class GateResidualModulate:
    """Both, x and y read once."""

    @staticmethod
    def forward(x, y, gate, shift, scale, plan, eps):
        return _forward(x, y, gate, shift, scale, plan, eps)

    @staticmethod
    def backward(grad_mixed, grad_out, needs, x, y, gate, shift, scale, plan, eps):
        return _backward(grad_mixed, grad_out, x, y, gate, shift, scale, plan, eps)
