"""Triton kernels of segment gathering: retained rows out of the grid, and their gradients back into it.

Bytes for T packed rows and B·L cells of D elements of e bytes: forward 2·T·D·e, backward (T + B·L)·D·e. Means of
segments read all cells: (T + B·L)·D·e in both directions, and no sum is left to atomics.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ._launch import jit_kernel
from ._rows import (
    cdiv,
    load_columns,
    load_rows,
    next_power_of_2,
    pointer_rows,
    row_tile,
    store_rows,
    strided_rows,
    tiled,
)


@jit_kernel(do_not_specialize=["capacity"])
def chunk_forward(
    h_ptr, pos_ptr, token_ptr, out_ptr, h_stride, pos_stride, cells, capacity, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[r] = h[token_index[r]] + pos_embed[its cell]; zero where token_index is -1."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column[None, :] < width
    token = tl.load(token_ptr + row, mask=row < capacity, other=-1).to(tl.int64)
    live = (token[:, None] >= 0) & inside
    out = tl.load(h_ptr + token[:, None] * h_stride + column[None, :], mask=live, other=0.0)
    if pos_ptr is not None:
        cell = token % cells
        pos = tl.load(pos_ptr + cell[:, None] * pos_stride + column[None, :], mask=live, other=0.0)
        out = (out.to(tl.float32) + pos.to(out.dtype).to(tl.float32)).to(out.dtype)
    tl.store(out_ptr + row[:, None] * width + column[None, :], out, mask=(row[:, None] < capacity) & inside)


@jit_kernel(do_not_specialize=["total"])
def chunk_backward(
    grad_ptr, token_ptr, nearest_ptr, out_ptr, grad_stride, total, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each cell takes its own row's gradient, or zero: a retained cell is always refilled by its own row."""
    cell = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column[None, :] < width
    row = tl.load(nearest_ptr + cell, mask=cell < total, other=-1).to(tl.int64)
    own = tl.load(token_ptr + row, mask=row >= 0, other=-1).to(tl.int64) == cell
    grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=own[:, None] & inside, other=0.0)
    tl.store(out_ptr + cell[:, None] * width + column[None, :], grad, mask=(cell[:, None] < total) & inside)


@jit_kernel()
def mean_forward(
    h_ptr, pos_ptr, token_ptr, offsets_ptr, member_ptr, out_ptr, h_stride, pos_stride, cells, width,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[r] = the mean of h over the cells that row r refills + pos_embed[its cell]; zero where there are none."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, stop = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    out = tl.zeros([COLUMNS], tl.float32)
    for place in tl.range(first, stop, num_stages=3):
        cell = tl.load(member_ptr + place).to(tl.int64)
        out += load_columns(h_ptr + cell * h_stride, column, width)
    out = out / tl.maximum(stop - first, 1).to(tl.float32)
    if pos_ptr is not None:
        token = tl.load(token_ptr + row).to(tl.int64)
        own = tl.where(token >= 0, width, 0)
        pos = tl.load(pos_ptr + token % cells * pos_stride + column, mask=column < own, other=0.0)
        out += pos.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=column < width)


@jit_kernel(do_not_specialize=["total"])
def mean_backward(
    grad_ptr, nearest_ptr, offsets_ptr, out_ptr, grad_stride, total, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Each cell takes its share of the gradient of the row that refills it, or zero where none does."""
    cell = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(nearest_ptr + cell, mask=cell < total, other=-1).to(tl.int64)
    first = tl.load(offsets_ptr + row, mask=row >= 0, other=0)
    stop = tl.load(offsets_ptr + row + 1, mask=row >= 0, other=1)
    grad = load_rows(grad_ptr, row, grad_stride, column, row >= 0, width)
    store_rows(out_ptr, cell, column, grad / (stop - first).to(tl.float32)[:, None], cell < total, width)


class Chunk:
    """packed[r] = h[token_index[r]], or the mean over the segment of row r, + pos_embed[cell of r]."""

    @staticmethod
    def forward(h, pos_embed, plan, reduce):
        width = h.shape[2]
        out = h.new_empty(plan.capacity, width)
        if plan.capacity and width:
            h, h_stride = strided_rows(h)
            pos_embed, pos_stride = strided_rows(pos_embed)
            if reduce == "mean":
                columns = min(next_power_of_2(width), 512)  # one warp: a flat image gives one row hundreds of cells
                mean_forward[(plan.capacity, cdiv(width, columns))](
                    h, pos_embed, plan.token_index, plan.member_offsets, plan.member_index, out, h_stride, pos_stride,
                    plan.cells, width, COLUMNS=columns, num_warps=1,
                )  # fmt: skip
                return out
            tile, kernel = tiled(chunk_forward, width)
            kernel[tile.grid(plan.capacity)](
                h, pos_embed, plan.token_index, out, h_stride, pos_stride, plan.cells, plan.capacity, width
            )
        return out

    @staticmethod
    def backward(grad, needs, h, pos_embed, plan, reduce):
        grad, (total, width) = pointer_rows(grad), (plan.batch_size * plan.cells, h.shape[2])
        own = grad_h = None
        if reduce == "own" or needs[1]:
            own = grad_h = _cells(chunk_backward, grad, plan.token_index, plan.nearest, total, width)
        if reduce == "mean" and needs[0]:
            grad_h = _cells(mean_backward, grad, plan.nearest, plan.member_offsets, total, width)
        shape = (plan.batch_size, plan.cells, width)
        grad_pos = own.view(shape).sum(0, dtype=torch.float32).to(pos_embed.dtype) if needs[1] else None
        return grad_h.view(shape), grad_pos


def _cells(kernel, grad, first, second, total, width):
    """The gradient (total, width) of all cells by one of the two backward kernels."""
    out = torch.empty(total, width, dtype=grad.dtype, device=grad.device)
    if out.numel():
        tile = row_tile(width)
        kernel[tile.grid(total)](grad, first, second, out, grad.stride(0), total, width, **tile.launch)
    return out
