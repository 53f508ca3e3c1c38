"""Triton kernels of the dechunk scatter: each cell takes its row and the residual; gradients come back by CSR.

Bytes for T rows and B·L cells of D elements of e bytes, with a residual of r bytes: plug-back T·D·4 + B·L·D·(e + r),
its backward B·L·D·(e + r) + T·D·(e + 8), without r where r = e; the smoothing between is in `smooth.py` and `ema.py`.
Nothing is saved for the backward but the inputs.

Gaussian smoothing and plug-back share float32 rows, of which SCRATCH_BYTES bounds the memory: `images_at_once`. Few
images at a time, whose rows would stay in the L2 cache, were slower on an H200: XL, B = 64 took 246 µs in five passes
and 215 in one.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ._launch import jit_kernel
from ._rows import cdiv, load_columns, load_rows, next_power_of_2, pointer_rows, store_rows, tiled
from .confidence import clamp_confidence, prob_gradient
from .ema import scan, scan_backward
from .smooth import Smoothing

SCRATCH_BYTES = 256 << 20


def images_at_once(batch: int, capacity: int, width: int) -> int:
    """Images whose smoothed rows, float32, fill SCRATCH_BYTES if all are alike; all images where they suffice."""
    passes = max(cdiv(capacity * width * 4, SCRATCH_BYTES), 1)
    return max(cdiv(batch, passes), 1)


@jit_kernel(do_not_specialize=["first_sample", "cells", "stop"])
def plug_forward(
    rows_ptr, residual_ptr, nearest_ptr, cu_ptr, out_ptr, rows_stride, residual_stride, first_sample, cells, stop,
    width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[c] = rows[nearest[c]] + residual[c] for the cells of `first_sample` up to the cell `stop`; the residual alone
    where no row refills the cell. With `cu`, rows begin at that sample's first."""
    cell = first_sample.to(tl.int64) * cells + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(nearest_ptr + cell, mask=cell < stop, other=-1).to(tl.int64)
    base = 0 if cu_ptr is None else tl.load(cu_ptr + first_sample)
    out = load_rows(rows_ptr, row - base, rows_stride, column, row >= 0, width)
    if residual_ptr is not None:
        out += load_rows(residual_ptr, cell, residual_stride, column, cell < stop, width)
    store_rows(out_ptr, cell, column, out, cell < stop, width)


@jit_kernel(do_not_specialize=["first_sample", "stop_sample", "total", "capacity"])
def plug_backward(
    grad_ptr, x_ptr, s_ptr, a_ptr, prob_ptr, token_ptr, cu_ptr, offsets_ptr, member_ptr,
    grad_row_ptr, grad_residual_ptr, through_ptr, q_ptr, partial_ptr, grad_stride, x_stride,
    first_sample, stop_sample, total, capacity, width, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of some columns of each row: G = Σ ∂y over the cells it refills; of each of them ∂y·plugged, and ∂y in the
    residual's dtype if asked. With s also q = G·s and (1 + a) G·(x - s), for the rows of some samples, with which s and
    G begin. Sums over columns are parts, (column blocks, …)."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    if s_ptr is None:
        base = tl.zeros([], tl.int32)
        stop = capacity
    else:
        base = tl.load(cu_ptr + first_sample)
        stop = tl.load(cu_ptr + stop_sample)
    for row in range(base.to(tl.int64) + tl.program_id(0), stop, tl.num_programs(0)):
        token = tl.load(token_ptr + row)
        own = tl.where(token >= 0, width, 0)
        x = load_columns(x_ptr + row * x_stride, column, own)
        plugged = x
        if s_ptr is not None:
            s = load_columns(s_ptr + (row - base) * width, column, own)
            confidence = clamp_confidence(tl.load(prob_ptr + token, mask=token >= 0, other=0.5))
            plugged = confidence * x + (1 - confidence) * s
        grad_row = tl.zeros([COLUMNS], tl.float32)
        for place in tl.range(tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1), num_stages=3):
            cell = tl.load(member_ptr + place).to(tl.int64)
            grad = load_columns(grad_ptr + cell * grad_stride, column, width)
            grad_row += grad
            if grad_residual_ptr is not None:
                tl.store(grad_residual_ptr + cell * width + column, grad, mask=column < width)
            tl.store(through_ptr + part * total + cell, tl.sum(grad * plugged))
        out = grad_row_ptr + (row - base) * width + column
        tl.store(out, grad_row.to(grad_row_ptr.dtype.element_ty), mask=column < width)
        if s_ptr is not None:
            tl.store(q_ptr + part * capacity + row, tl.sum(grad_row * s))
            once_more = 1 + tl.load(a_ptr + row)
            tl.store(partial_ptr + part * capacity + row, once_more * tl.sum(grad_row * (x - s)))


@jit_kernel(do_not_specialize=["total"])
def unplugged_backward(
    grad_ptr, nearest_ptr, grad_residual_ptr, grad_stride, total, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The residual's gradient in the cells that no row refills, which `plug_backward` does not visit."""
    cell = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alone = tl.load(nearest_ptr + cell, mask=cell < total, other=0) < 0
    if tl.max(alone.to(tl.int32), 0) > 0:
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            grad = load_rows(grad_ptr, cell, grad_stride, column, alone, width)
            store_rows(grad_residual_ptr, cell, column, grad, alone, width)


class Dechunk:
    """y = plugged · STE(s) + residual."""

    @staticmethod
    def forward(x, boundary_prob, residual, plan, sigma, smoothing):
        out = x.new_empty(plan.batch_size, plan.cells, x.shape[1])
        if out.numel() == 0:
            return out
        x, residual, prob = pointer_rows(x), pointer_rows(residual), boundary_prob.float().contiguous()
        if smoothing != "gaussian" or plan.capacity == 0:
            rows = scan(x, prob, plan) if smoothing == "ema" else x
            _plug(rows, residual, plan, out, 0, plan.batch_size, None)
            return out
        smooth = Smoothing.of(prob, plan, sigma, x.dtype)
        images, (rows,) = _scratch(x, plan, 1)
        for first in range(0, plan.batch_size, images):
            samples = min(images, plan.batch_size - first)
            smooth.forward(x, rows, first, samples)
            _plug(rows, residual, plan, out, first, samples, plan.cu_seqlens)
        return out

    @staticmethod
    def backward(grad, needs, x, boundary_prob, residual, plan, sigma, smoothing):
        prob = boundary_prob.float().contiguous()
        grad_residual, converted = grad if needs[2] else None, None
        if needs[2] and residual.dtype != grad.dtype:
            grad_residual = converted = torch.empty(grad.shape, dtype=residual.dtype, device=x.device)
        if not plan.batch_size:  # no program would write the rows past the last live one
            return torch.zeros_like(x), torch.zeros_like(boundary_prob), grad_residual
        grad, x = pointer_rows(grad), pointer_rows(x)
        total, width = grad.shape
        if converted is not None and converted.numel():
            unplugged_backward[(cdiv(total, 32),)](
                grad, plan.nearest, converted, grad.stride(0), total, width, ROWS=32, COLUMNS=64
            )
        through = torch.empty(_column_blocks(width), total, dtype=torch.float32, device=x.device)
        grad_x, partial = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
        if smoothing == "gaussian":
            partial = _gaussian_backward(grad, x, prob, plan, sigma, grad_x, converted, through)
        elif smoothing == "ema":
            rows = scan(x, prob, plan)
            grad_rows = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            _plug_backward(grad, rows, prob, plan, grad_rows, converted, through)
            grad_x, partial = scan_backward(grad_rows, x, rows, prob, plan)
        else:
            _plug_backward(grad, x, prob, plan, grad_x, converted, through)
        return grad_x, prob_gradient(boundary_prob, prob, plan, partial, through), grad_residual


def _gaussian_backward(grad, x, prob, plan, sigma, grad_x, converted, through):
    """Writes grad_x, the residual's gradient `converted` and Σ ∂y·plugged, `through`; returns the parts of dp̃."""
    smooth = Smoothing.of(prob, plan, sigma, x.dtype)
    plugs, new = len(through), {"dtype": torch.float32, "device": x.device}
    a, q = torch.empty(plan.capacity, **new), torch.empty(plugs, plan.capacity, **new)
    partial = torch.empty(plugs + smooth.parts(x.shape[1]), plan.capacity, **new)
    if x.numel():
        images, (s, grad_rows) = _scratch(x, plan, 2)
        for first in range(0, plan.batch_size, images):
            samples = min(images, plan.batch_size - first)
            smooth.forward(x, s, first, samples, a)
            _plug_backward(grad, x, prob, plan, grad_rows, converted, through, s, a, q, partial, first, samples)
            smooth.backward(grad_rows, a, q, x, grad_x, partial, first, samples)
    return partial


def _scratch(x, plan, buffers):
    """(images at once, `buffers` of float32 rows that any so many images have room in)."""
    images = images_at_once(plan.batch_size, *x.shape)
    rows = min(images * plan.max_seqlen, plan.capacity)
    return images, [x.new_empty(rows, x.shape[1], dtype=torch.float32) for _ in range(buffers)]


def _plug(rows, residual, plan, out, first, samples, cu_seqlens):
    """Cells of some samples; with `cu_seqlens` their rows begin at the first of `rows`."""
    tile, kernel = tiled(plug_forward, out.shape[2])
    cells = out.shape[1]
    kernel[tile.grid(samples * cells)](
        rows, residual, plan.nearest, cu_seqlens, out, rows.stride(0), 0 if residual is None else residual.stride(0),
        first, cells, (first + samples) * cells, out.shape[2],
    )  # fmt: skip


def _plug_backward(
    grad, x, prob, plan, grad_rows, converted, through, s=None, a=None, q=None, partial=None, first=0, samples=0
):
    """All rows, or with s the rows of some samples, as many programs as they have on average."""
    width = x.shape[1]
    if plan.capacity and width:
        rows = plan.capacity if s is None else cdiv(plan.capacity * samples, plan.batch_size)
        plug_backward[(rows, len(through))](
            grad, x, s, a, prob, plan.token_index, plan.cu_seqlens, plan.member_offsets, plan.member_index,
            grad_rows, converted, through, q, partial, grad.stride(0), x.stride(0),
            first, first + samples, grad.shape[0], plan.capacity, width, COLUMNS=_columns(width), num_warps=1,
        )  # fmt: skip


def _columns(width):
    """Columns of a program of one warp, which sums over a row's cells: a flat image gives one row hundreds."""
    return min(next_power_of_2(width), 512)


def _column_blocks(width):
    return cdiv(width, _columns(width))
