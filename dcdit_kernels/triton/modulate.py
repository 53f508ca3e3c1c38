"""Triton kernels of adaLN: norm, modulation and gated residual in one pass over the rows.

Bytes for T rows of D elements of e bytes. Forward: adaln_modulate 2·T·D·e, gate_residual 3·T·D·e, fused 4·T·D·e.
Backward: 3, 4 and 6·T·D·e. The modulators (B, D) and their partial sums are small beside them.
Statistics are recomputed in the backward, which holds the row in registers anyway. Sums over a sample's rows are taken
over slabs of them and then over slabs, in an order that the sample alone decides.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._launch import jit_kernel
from ._rows import cdiv, load_columns, load_rows, pieces, pointer_rows, store_rows, strided_rows, write_zeros

# The forward's elements of each piece of a program's rows, which read a sample's modulators from L2 once.
FORWARD_ELEMENTS = 1024
# The backward's rows of a sample in a program, whatever the batch, and elements of each piece at a time: a row of XL.
SLAB, ELEMENTS = 16, 512


@triton.jit
def normalise(xs, live, eps, CENTRED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """(LayerNorm or, not CENTRED, RMSNorm of rows in pieces, 1/deviation (rows, 1)); zero in rows that are not live."""
    centred = xs
    if CENTRED:
        total = xs[0]
        for i in tl.static_range(1, len(xs)):
            total += xs[i]
        mean = tl.div_rn(tl.sum(total, 1), WIDTH + 0.0)[:, None]
        centred = ()
        for i in tl.static_range(len(xs)):
            delta = xs[i] - mean
            if (i + 1) * COLUMNS > WIDTH:
                delta = tl.where((i * COLUMNS + tl.arange(0, COLUMNS) < WIDTH)[None, :], delta, 0.0)
            centred += (delta,)
    squares = tl.zeros_like(xs[0])
    for i in tl.static_range(len(xs)):
        squares += centred[i] * centred[i]
    rstd = tl.where(live, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 1) * (1.0 / WIDTH) + eps)), 0.0)[:, None]
    normed = ()
    for i in tl.static_range(len(xs)):
        normed += (centred[i] * rstd,)
    return normed, rstd


@jit_kernel(do_not_specialize=["cells", "total"])
def modulate_forward(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, mixed_ptr, out_ptr, sample_ptr,
    x_stride, y_stride, gate_stride, shift_stride, scale_stride, cells, total, eps,
    GATE: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Some rows: mixed = x + gate·y where GATE, out = norm(mixed)·weight·(1 + scale) + shift where NORM."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if PACKED:
        sample = tl.load(sample_ptr + row, mask=row < total, other=-1).to(tl.int64)
    else:
        sample = tl.where(row < total, row // cells, -1)
    live = sample >= 0
    # All loads come before the first store, which the compiler lets no load pass: a row waits for memory once.
    xs, ys, gates, factors, shifts = (), (), (), (), ()
    for i in tl.static_range(PIECES):
        column = i * COLUMNS + tl.arange(0, COLUMNS)
        xs += (load_rows(x_ptr, row, x_stride, column, live, WIDTH),)
        if GATE:
            ys += (load_rows(y_ptr, row, y_stride, column, live, WIDTH),)
            gates += (load_rows(gate_ptr, sample, gate_stride, column, live, WIDTH),)
        if NORM:
            factor = 1 + load_rows(scale_ptr, sample, scale_stride, column, live, WIDTH)
            if weight_ptr is not None:
                factor *= load_rows(weight_ptr, 0 * row, 0, column, live, WIDTH)  # as rows, in the layout of the rest
            factors += (factor,)
            shifts += (load_rows(shift_ptr, sample, shift_stride, column, live, WIDTH),)
    if GATE:
        mixed, stored = (), ()
        for i in tl.static_range(PIECES):
            mixed += ((xs[i] + gates[i] * ys[i]).to(mixed_ptr.dtype.element_ty),)
            stored += (mixed[i].to(tl.float32),)
            column = i * COLUMNS + tl.arange(0, COLUMNS)
            store_rows(mixed_ptr, row, column, mixed[i], row < total, WIDTH)
        xs = stored  # the norm sees x as stored
    if NORM:
        normed, _ = normalise(xs, live, eps, CENTRED, WIDTH, COLUMNS)
        for i in tl.static_range(PIECES):
            column = i * COLUMNS + tl.arange(0, COLUMNS)
            store_rows(out_ptr, row, column, normed[i] * factors[i] + shifts[i], row < total, WIDTH)


@triton.jit
def store_sums(ptr, pieces, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over the rows of each piece."""
    for i in tl.static_range(len(pieces)):
        column = i * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(ptr + column, tl.sum(pieces[i], 0), mask=column < WIDTH)


@jit_kernel(do_not_specialize=["batch", "cells", "capacity"])
def modulate_backward(
    grad_mixed_ptr, grad_out_ptr, x_ptr, y_ptr, gate_ptr, scale_ptr, weight_ptr, cu_ptr,
    grad_x_ptr, grad_y_ptr, partial_ptr,
    x_stride, y_stride, gate_stride, scale_stride, batch, cells, capacity, eps,
    GATE: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, SLAB: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """SLAB rows of one sample: their gradients, and the slab's sums for gate, shift and scale / weight, (kinds, WIDTH).

    With `cu` samples are packed, and the programs past the last sample write the zeros of the rows past the last live
    one.
    """
    sample = tl.program_id(0).to(tl.int64)
    if cu_ptr is None:
        start = sample * cells
        end = start + cells
    else:
        start = tl.load(cu_ptr + sample).to(tl.int64)
        if sample == batch:
            start += tl.program_id(1) * ROWS
            step = tl.num_programs(1) * ROWS
            write_zeros(grad_x_ptr, start, capacity, step, ROWS, WIDTH, COLUMNS)
            if GATE:
                write_zeros(grad_y_ptr, start, capacity, step, ROWS, WIDTH, COLUMNS)
            return
        end = tl.load(cu_ptr + sample + 1).to(tl.int64)
    first = start + tl.program_id(1) * SLAB
    if first >= end:
        return
    stop = tl.minimum(end - first, SLAB).to(tl.int32)
    grad_x_ptr += first * WIDTH
    if GATE:
        y_ptr += first * y_stride
        grad_mixed_ptr, grad_y_ptr = grad_mixed_ptr + first * WIDTH, grad_y_ptr + first * WIDTH
    if NORM:
        x_ptr, grad_out_ptr = x_ptr + first * x_stride, grad_out_ptr + first * WIDTH
    gate_sums, shift_sums, scale_sums, gates, factors = (), (), (), (), ()
    for i in tl.static_range(PIECES):
        column = i * COLUMNS + tl.arange(0, COLUMNS)
        zero = tl.zeros([ROWS, COLUMNS], tl.float32)
        gate_sums += (zero,)
        shift_sums += (zero,)
        scale_sums += (zero,)
        if GATE:
            gates += (load_columns(gate_ptr + sample * gate_stride, column, WIDTH)[None, :],)
        if NORM:
            factor = 1 + load_columns(scale_ptr + sample * scale_stride, column, WIDTH)[None, :]
            if weight_ptr is not None:
                factor *= load_columns(weight_ptr, column, WIDTH)[None, :]
            factors += (factor,)
    # The next rows are on their way while these are worked on.
    for base in tl.range(0, stop, ROWS, num_stages=3):
        row = base + tl.arange(0, ROWS)
        live = row < stop
        ys, xs, grad_outs = (), (), ()
        for i in tl.static_range(PIECES):
            column = i * COLUMNS + tl.arange(0, COLUMNS)
            if GATE:
                ys += (load_rows(y_ptr, row, y_stride, column, live, WIDTH),)
            if NORM:
                x = load_rows(x_ptr, row, x_stride, column, live, WIDTH)
                if GATE:
                    x = (x + gates[i] * ys[i]).to(x_ptr.dtype.element_ty).to(tl.float32)
                xs += (x,)
                grad_outs += (load_rows(grad_out_ptr, row, WIDTH, column, live, WIDTH),)
        if NORM:
            normed, rstd = normalise(xs, live, eps, CENTRED, WIDTH, COLUMNS)
            shifts, scales = (), ()
            mean_grad = tl.zeros([ROWS, COLUMNS], tl.float32)
            mean_grad_x = tl.zeros([ROWS, COLUMNS], tl.float32)
            for i in tl.static_range(PIECES):
                shifts += (shift_sums[i] + grad_outs[i],)
                scales += (scale_sums[i] + grad_outs[i] * normed[i],)
                inner = grad_outs[i] * factors[i]
                if CENTRED:
                    mean_grad += inner
                mean_grad_x += inner * normed[i]
            shift_sums, scale_sums = shifts, scales
            if CENTRED:
                mean_grad = (tl.sum(mean_grad, 1) * (1.0 / WIDTH))[:, None]  # the compiler's division is off by 2⁻²²
            mean_grad_x = (tl.sum(mean_grad_x, 1) * (1.0 / WIDTH))[:, None]
        sums = ()
        for i in tl.static_range(PIECES):
            column = i * COLUMNS + tl.arange(0, COLUMNS)
            grad = load_rows(grad_mixed_ptr, row, WIDTH, column, live, WIDTH) if GATE else 0.0
            if NORM:
                grad += rstd * (grad_outs[i] * factors[i] - mean_grad - normed[i] * mean_grad_x)
            store_rows(grad_x_ptr, row, column, grad, live, WIDTH)
            if GATE:
                sums += (gate_sums[i] + grad * ys[i],)
                store_rows(grad_y_ptr, row, column, grad * gates[i], live, WIDTH)
        if GATE:
            gate_sums = sums
    slab = sample * tl.num_programs(1) + tl.program_id(1)
    sums_ptr = partial_ptr + slab * (GATE + 2 * NORM) * WIDTH
    if GATE:
        store_sums(sums_ptr, gate_sums, WIDTH, COLUMNS)
    if NORM:
        store_sums(sums_ptr + GATE * WIDTH, shift_sums, WIDTH, COLUMNS)
        store_sums(sums_ptr + (GATE + 1) * WIDTH, scale_sums, WIDTH, COLUMNS)


@jit_kernel(do_not_specialize=["batch", "cells", "slabs"])
def modulator_sums(
    partial_ptr, cu_ptr, out_ptr, batch, cells, slabs, width,
    SLAB: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one sample, one kind and some columns the sum over the slabs; always in the same order, whatever the batch."""
    sample = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column[None, :] < width
    rows = cells if cu_ptr is None else tl.load(cu_ptr + sample + 1) - tl.load(cu_ptr + sample)
    own = tl.cdiv(rows, SLAB)
    total = tl.zeros([16, COLUMNS], tl.float32)
    for first in range(0, own, 16):
        slab = first + tl.arange(0, 16)
        place = ((sample * slabs + slab) * tl.num_programs(1) + kind)[:, None] * width + column[None, :]
        total += tl.load(partial_ptr + place, mask=(slab < own)[:, None] & inside, other=0.0)
    out_ptr += (kind * batch + sample) * width + column
    tl.store(out_ptr, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < width)


def _forward(x, y, gate, shift, scale, weight, plan, eps, norm):
    """(mixed, out), each None where gate or scale is None; contiguous, in x's dtype."""
    mixed = torch.empty_like(x, memory_format=torch.contiguous_format) if gate is not None else None
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if scale is not None else None
    x, x_stride = strided_rows(x)
    y, y_stride = strided_rows(y)
    gate, gate_stride = strided_rows(gate)
    shift, shift_stride = strided_rows(shift)
    scale, scale_stride = strided_rows(scale)
    total, width = x.shape
    if total and width:
        rows, kernel = _forward_kernel(width, gate is not None, norm, plan is not None)
        cells = total // (scale if gate is None else gate).shape[0] if plan is None else 0
        kernel[(cdiv(total, rows),)](
            x, y, gate, shift, scale, _vector(weight), mixed, out, None if plan is None else plan.sample_index,
            x_stride, y_stride, gate_stride, shift_stride, scale_stride, cells, total, eps,
        )  # fmt: skip
    return mixed, out


@functools.cache
def _forward_kernel(width, gate, norm, packed):
    """(rows of a program, its kernel)."""
    split = pieces(width, 6)  # of 128 columns a row is half a warp's, of 256 a warp's
    rows = max(FORWARD_ELEMENTS // split["COLUMNS"], 1)
    return rows, modulate_forward.bind(
        GATE=gate,
        NORM=norm is not None,
        CENTRED=norm == "layer",
        PACKED=packed,
        ROWS=rows,
        WIDTH=width,
        **split,
        num_warps=min(rows * split["COLUMNS"] // 256, 32),
    )


def _backward(grad_mixed, grad_out, x, y, gate, shift, scale, weight, plan, eps, norm):
    """Gradients of x and y in their shapes, of gate, shift, scale (B, D), of weight (D,); None where the input is None.
    Without a scale only shape and dtype of x are looked at."""
    shape, width, dtype = x.shape, x.shape[-1], x.dtype
    device = (grad_out if grad_mixed is None else grad_mixed).device
    batch = (scale if gate is None else gate).shape[0]
    dtypes = [None if t is None else t.dtype for t in (gate, shift, scale)]
    total = x.numel() // max(width, 1)
    x = None if scale is None else x
    x, y, gate, scale = (pointer_rows(t) for t in (x, y, gate, scale))
    grad_mixed, grad_out = (None if t is None else t.contiguous() for t in (grad_mixed, grad_out))
    cu_seqlens = None if plan is None else plan.cu_seqlens
    cells = total // max(batch, 1)
    slabs = max(cdiv(cells if plan is None else plan.max_seqlen, SLAB), 1)
    grad_x = torch.empty(shape, dtype=dtype, device=device)
    grad_y = None if y is None else torch.empty(shape, dtype=y.dtype, device=device)
    kinds = [t is not None for t in (gate, scale, scale)]
    partial = torch.empty(batch, slabs, sum(kinds), width, dtype=torch.float32, device=device)
    first, *others = {dtype for dtype in dtypes if dtype is not None}
    sums = torch.empty(
        sum(kinds), batch, width, dtype=first if not others and weight is None else torch.float32, device=device
    )
    if grad_x.numel():
        split = pieces(width, 3)  # sums of rows stay in registers, and there is room for three pieces
        tile = max(ELEMENTS // split["COLUMNS"], 1)
        # Left alone, the assembler takes too few registers for a gate without a norm, and spills.
        limit = {"maxnreg": 128} if scale is None and torch.version.hip is None else {}
        modulate_backward[(batch + (plan is not None), slabs)](
            grad_mixed, grad_out, x, y, gate, scale, _vector(weight), cu_seqlens, grad_x, grad_y, partial,
            *(0 if t is None else t.stride(0) for t in (x, y, gate, scale)), batch, cells, total, eps,
            GATE=gate is not None, NORM=scale is not None, CENTRED=norm == "layer", SLAB=SLAB,
            ROWS=tile, WIDTH=width, **split, **limit, num_warps=min(max(tile * split["COLUMNS"] // 256, 1), 32),
        )  # fmt: skip
    if sums.numel():
        modulator_sums[(batch, sum(kinds), cdiv(width, 64))](
            partial, cu_seqlens, sums, batch, cells, slabs, width, SLAB=SLAB, COLUMNS=64, num_warps=4
        )
    found = iter(sums.unbind())
    grads = [next(found) if kind else None for kind in kinds]
    grad_weight = None
    if weight is not None:
        grad_weight = ((1 + scale.float()) * grads[2]).sum(0).to(weight.dtype)
        grads[2] = grads[2] * weight
    return grad_x, grad_y, *(g if g is None else g.to(d) for g, d in zip(grads, dtypes, strict=True)), grad_weight


def _vector(weight):
    """The weight (D,) with its elements side by side."""
    return None if weight is None else weight.contiguous()


class AdalnModulate:
    """norm(x)·weight·(1 + scale) + shift."""

    @staticmethod
    def forward(x, shift, scale, norm_weight, plan, eps, norm):
        return _forward(x, None, None, shift, scale, norm_weight, plan, eps, norm)[1]

    @staticmethod
    def backward(grad, needs, x, shift, scale, norm_weight, plan, eps, norm):
        grad_x, _, _, *rest = _backward(None, grad, x, None, None, shift, scale, norm_weight, plan, eps, norm)
        return grad_x, *rest


class GateResidual:
    """x + gate·y."""

    @staticmethod
    def forward(x, y, gate, plan):
        return _forward(x, y, gate, None, None, None, plan, 0.0, None)[0]

    @staticmethod
    def backward(grad, needs, x, y, gate, plan):
        return _backward(grad, None, x, y, gate, None, None, None, plan, 0.0, None)[:3]


class GateResidualModulate:
    """Both, x and y read once."""

    @staticmethod
    def forward(x, y, gate, shift, scale, norm_weight, plan, eps, norm):
        return _forward(x, y, gate, shift, scale, norm_weight, plan, eps, norm)

    @staticmethod
    def backward(grad_mixed, grad_out, needs, x, y, gate, shift, scale, norm_weight, plan, eps, norm):
        return _backward(grad_mixed, grad_out, x, y, gate, shift, scale, norm_weight, plan, eps, norm)
