"""Triton kernels of segment gathering: retained rows out of the grid, and their gradients back into it.

Bytes for T packed rows and B·L cells of D elements of e bytes: forward 2·T·D·e, backward (T + B·L)·D·e.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ._launch import jit_kernel
from ._rows import pointer_rows, row_tile, strided_rows


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


class Chunk:
    """packed[r] = h[token_index[r]] + pos_embed[cell of r]."""

    @staticmethod
    def forward(h, pos_embed, plan):
        width = h.shape[2]
        out = h.new_empty(plan.capacity, width)
        if plan.capacity and width:
            h, h_stride = strided_rows(h)
            pos_embed, pos_stride = strided_rows(pos_embed)
            tile = row_tile(width)
            chunk_forward[tile.grid(plan.capacity)](
                h, pos_embed, plan.token_index, out, h_stride, pos_stride, plan.cells, plan.capacity, width,
                **tile.launch,
            )  # fmt: skip
        return out

    @staticmethod
    def backward(grad, needs, h, pos_embed, plan):
        total, width = plan.batch_size * plan.cells, h.shape[2]
        out = torch.empty(total, width, dtype=grad.dtype, device=grad.device)
        tile = row_tile(width)
        if out.numel():
            grad = pointer_rows(grad)
            chunk_backward[tile.grid(total)](
                grad, plan.token_index, plan.nearest, out, grad.stride(0), total, width, **tile.launch
            )
        grad_h = out.view(plan.batch_size, plan.cells, width)
        grad_pos = grad_h.sum(0, dtype=torch.float32).to(pos_embed.dtype) if needs[1] else None
        return grad_h, grad_pos
