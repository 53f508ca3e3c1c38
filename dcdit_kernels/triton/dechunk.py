"""Triton kernels of the dechunk scatter: each cell takes its row and the residual; gradients come back by CSR.

Bytes for T rows and B·L cells of D elements of e bytes, with a residual of r bytes: plug-back T·D·4 + B·L·D·(e + r),
its backward B·L·D·(e + r) + T·D·(e + 8), without r where r = e; the smoothing between is in `smooth.py` and `ema.py`.
Nothing is saved for the backward but the inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._rows import cdiv, load_columns, load_rows, pieces, pointer_rows, row_tile, store_rows
from .confidence import clamp_confidence, prob_gradient
from .ema import scan, scan_backward
from .smooth import placed, smoothed, smoothed_backward


@triton.jit(do_not_specialize=["total"])
def plug_forward(
    rows_ptr, residual_ptr, nearest_ptr, out_ptr, rows_stride, residual_stride, total, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[c] = rows[nearest[c]] + residual[c]; the residual alone where no row refills the cell."""
    cell = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(nearest_ptr + cell, mask=cell < total, other=-1).to(tl.int64)
    out = load_rows(rows_ptr, row, rows_stride, column, row >= 0, width)
    if residual_ptr is not None:
        out += load_rows(residual_ptr, cell, residual_stride, column, cell < total, width)
    store_rows(out_ptr, cell, column, out, cell < total, width)


@triton.jit
def plug_backward(
    grad_ptr, x_ptr, smoothed_ptr, prob_ptr, token_ptr, offsets_ptr, member_ptr,
    grad_row_ptr, grad_residual_ptr, through_ptr, dot_ptr, direct_ptr, grad_stride, x_stride,
    SMOOTH: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One row: G = Σ ∂y over the cells it refills; of each of them ∂y·plugged, and ∂y in the residual's dtype if asked.

    With SMOOTH also G·s and G·(x - s).
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    token = tl.load(token_ptr + row)
    own = tl.where(token >= 0, WIDTH, 0)
    if SMOOTH:
        confidence = clamp_confidence(tl.load(prob_ptr + token, mask=token >= 0, other=0.5))
    plugged, totals = (), ()
    for i in tl.static_range(PIECES):
        column = i * COLUMNS + tl.arange(0, COLUMNS)
        x = load_columns(x_ptr + row * x_stride, column, own)
        if SMOOTH:
            x = confidence * x + (1 - confidence) * load_columns(smoothed_ptr + row * WIDTH, column, own)
        plugged += (x,)
        totals += (tl.zeros([COLUMNS], tl.float32),)
    for place in tl.range(start, end, num_stages=3):
        cell = tl.load(member_ptr + place).to(tl.int64)
        through = tl.zeros([COLUMNS], tl.float32)
        sums = ()
        for i in tl.static_range(PIECES):
            column = i * COLUMNS + tl.arange(0, COLUMNS)
            grad = load_columns(grad_ptr + cell * grad_stride, column, WIDTH)
            through += grad * plugged[i]
            sums += (totals[i] + grad,)
            if grad_residual_ptr is not None:
                tl.store(grad_residual_ptr + cell * WIDTH + column, grad, mask=column < WIDTH)
        totals = sums
        tl.store(through_ptr + cell, tl.sum(through))
    dot = tl.zeros([COLUMNS], tl.float32)
    direct = tl.zeros([COLUMNS], tl.float32)
    for i in tl.static_range(PIECES):
        column = i * COLUMNS + tl.arange(0, COLUMNS)
        out = totals[i].to(grad_row_ptr.dtype.element_ty)
        tl.store(grad_row_ptr + row * WIDTH + column, out, mask=column < WIDTH)
        if SMOOTH:
            s = load_columns(smoothed_ptr + row * WIDTH, column, own)
            dot += totals[i] * s
            direct += totals[i] * (load_columns(x_ptr + row * x_stride, column, own) - s)
    if SMOOTH:
        tl.store(dot_ptr + row, tl.sum(dot))
        tl.store(direct_ptr + row, tl.sum(direct))


@triton.jit(do_not_specialize=["total"])
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
        total, width = plan.batch_size * plan.cells, x.shape[1]
        out = torch.empty(plan.batch_size, plan.cells, width, dtype=x.dtype, device=x.device)
        if out.numel():
            prob = boundary_prob.float().contiguous()
            if smoothing == "gaussian":
                rows = smoothed(x, placed(prob, plan, sigma, x.dtype), plan, sigma)
            else:
                rows = scan(x, prob, plan) if smoothing == "ema" else pointer_rows(x)
            residual = pointer_rows(residual)
            tile = row_tile(width)
            plug_forward[tile.grid(total)](
                rows, residual, plan.nearest, out, rows.stride(0), 0 if residual is None else residual.stride(0),
                total, width, **tile.launch,
            )  # fmt: skip
        return out

    @staticmethod
    def backward(grad, needs, x, boundary_prob, residual, plan, sigma, smoothing):
        total, width = plan.batch_size * plan.cells, x.shape[1]
        prob = boundary_prob.float().contiguous()
        grad_residual, converted = grad if needs[2] else None, None
        if needs[2] and residual.dtype != grad.dtype:
            grad_residual = converted = torch.empty(grad.shape, dtype=residual.dtype, device=x.device)
        grad = pointer_rows(grad)
        smooth = smoothing == "gaussian"
        places = placed(prob, plan, sigma, x.dtype) if smooth else None
        s, share = smoothed(x, places, plan, sigma, backward=True) if smooth else (None, None)
        rows = scan(x, prob, plan) if smoothing == "ema" else pointer_rows(x)
        new = {"dtype": torch.float32, "device": x.device}
        grad_rows = torch.empty(x.shape, dtype=torch.float32 if smoothing else x.dtype, device=x.device)
        through = torch.empty(total, **new)
        dot, direct = (torch.empty(plan.capacity, **new) if smooth else None for _ in range(2))
        if plan.capacity and width:
            split = pieces(width, 8, 256)
            plug_backward[(plan.capacity,)](
                grad, rows, s, prob, plan.token_index, plan.member_offsets, plan.member_index,
                grad_rows, converted, through, dot, direct, grad.stride(0), rows.stride(0),
                SMOOTH=smooth, WIDTH=width, **split, num_warps=split["COLUMNS"] // 256,
            )  # fmt: skip
        if converted is not None and converted.numel():
            unplugged_backward[(cdiv(total, 32),)](
                grad, plan.nearest, converted, grad.stride(0), total, width, ROWS=32, COLUMNS=64
            )
        partial = None
        if smooth:
            grad_rows, partial = smoothed_backward(grad_rows, share, dot, direct, x, places, plan, sigma)
        elif smoothing == "ema":
            grad_rows, partial = scan_backward(grad_rows, x, rows, prob, plan)
        return grad_rows, prob_gradient(boundary_prob, prob, plan, partial, through), grad_residual
