"""Triton kernels of the Gaussian smoothing: attention without a query and a key, over the window that matters.

s_i = Σ_j w_ij x_j / (Z_i + 1e-8) with w_ij = p̃_j k_ij, k_ij = exp(-|u_i - u_j|² / 2σ²), Z_i = Σ_j w_ij. Packed rows lie
in raster order, so the rows near a block of BLOCK_M rows are one contiguous range: those whose cell is at most `reach`
cells away. Weights are made on the fly; no (M, M) buffer exists.

Backward, with G the gradient of p̃ x + (1 - p̃) s, a_i = (1 - p̃_i) / (Z_i + 1e-8) and q_i = G_i·s_i:
    dx_j = p̃_j (G_j + u_j),   u_j = Σ_i k_ij a_i G_i
    dp̃_j = G_j·(x_j - s_j) + u_j·x_j - Σ_i k_ij a_i q_i

Bytes for T rows of D elements of e bytes: forward T·D·(e + 4), backward T·D·(2·e + 8); the window is read from L2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._rows import cdiv, next_power_of_2, pointer_rows
from .confidence import clamp_confidence


@triton.jit
def window(token_ptr, live, first, last, reach, STEP: tl.constexpr):
    """Rows [low, high) whose cell is within `reach` of the cells of rows first to last."""
    first_token = tl.load(token_ptr + first)
    last_token = tl.load(token_ptr + last)
    before = 0
    after = 0
    # Cells are distinct, so no more than `reach` rows on each side qualify.
    for offset in range(0, reach, STEP):
        step = offset + 1 + tl.arange(0, STEP)
        token = tl.load(token_ptr + first - step, mask=first - step >= 0, other=-1)
        before += tl.sum(((token >= 0) & (first_token - token <= reach)).to(tl.int32))
        token = tl.load(token_ptr + last + step, mask=last + step < live, other=-1)
        after += tl.sum(((token >= 0) & (token - last_token <= reach)).to(tl.int32))
    return first - before, last + 1 + after


@triton.jit
def kernel_weight(row, key, row_token, key_token, cells, height, columns, falloff):
    """k_ij (rows, keys) in float32; zero across samples, for tokens of -1, and for a row itself.

    A row's own term is the largest, and the callers add it exactly: where nothing else is near, s is x.
    """
    row_cell = row_token % cells
    key_cell = key_token % cells
    dx = row_cell[:, None] % columns - key_cell[None, :] % columns
    dy = (row_cell // columns)[:, None] % height - (key_cell // columns)[None, :] % height
    df = (row_cell // (columns * height))[:, None] - (key_cell // (columns * height))[None, :]
    distance = (dx * dx + dy * dy + df * df).to(tl.float32)
    same = (row_token // cells)[:, None] == (key_token // cells)[None, :]
    same = same & (row_token[:, None] >= 0) & (key_token[None, :] >= 0)
    return tl.where(same & (row[:, None] != key[None, :]), tl.exp2(-distance * falloff), 0.0)


@triton.jit(do_not_specialize=["batch", "capacity"])
def smooth_forward(
    x_ptr, prob_ptr, token_ptr, cu_ptr, out_ptr, share_ptr,
    x_stride, batch, cells, height, columns, reach, falloff, capacity, width,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """p̃ x + (1 - p̃) s in float32, zero in the tail; with BACKWARD s itself, and a in `share_ptr`."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column[None, :] < width
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    live = tl.load(cu_ptr + batch)
    first = tl.program_id(0) * BLOCK_M
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    token = tl.load(token_ptr + row, mask=row < live, other=-1)
    if first < live:
        low, high = window(token_ptr, live, first, tl.minimum(first + BLOCK_M, live) - 1, reach, STEP)
        for start in range(low, high, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            key_token = tl.load(token_ptr + key, mask=key < high, other=-1)
            confidence = clamp_confidence(tl.load(prob_ptr + key_token, mask=key_token >= 0, other=0.0))
            weight = kernel_weight(row, key, token, key_token, cells, height, columns, falloff) * confidence[None, :]
            total += tl.sum(weight, 1)
            x = tl.load(
                x_ptr + key.to(tl.int64)[:, None] * x_stride + column[None, :],
                mask=(key_token[:, None] >= 0) & inside, other=0.0,
            )  # fmt: skip
            mixed = tl.dot(weight, x.to(tl.float32), mixed, input_precision=PRECISION)
    confidence = clamp_confidence(tl.load(prob_ptr + token, mask=token >= 0, other=0.0))
    own = (token[:, None] >= 0) & inside
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=own, other=0.0).to(tl.float32)
    total += confidence + 1e-8
    smoothed = tl.div_rn(mixed + confidence[:, None] * x, total[:, None])
    if BACKWARD:
        tl.store(out_ptr + place, smoothed, mask=(row[:, None] < capacity) & inside)
        if tl.program_id(1) == 0:
            share = tl.div_rn(1 - confidence, total)
            tl.store(share_ptr + row, tl.where(token >= 0, share, 0.0), mask=row < capacity)
    else:
        out = confidence[:, None] * x + (1 - confidence[:, None]) * smoothed
        tl.store(out_ptr + place, tl.where(own, out, 0.0), mask=(row[:, None] < capacity) & inside)


@triton.jit(do_not_specialize=["batch", "capacity"])
def smooth_backward(
    grad_ptr, share_ptr, dot_ptr, direct_ptr, x_ptr, prob_ptr, token_ptr, cu_ptr, grad_x_ptr, partial_ptr,
    x_stride, batch, cells, height, columns, reach, falloff, capacity, width,
    PRECISION: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx, and this block of columns' part of dp̃, (column blocks, capacity); the first has what needs no column.

    A row's own term, a G·(x - s), is taken from `direct` = G·(x - s), not as two products that nearly cancel.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column[None, :] < width
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    live = tl.load(cu_ptr + batch)
    first = tl.program_id(0) * BLOCK_M
    token = tl.load(token_ptr + row, mask=row < live, other=-1)
    own = (token[:, None] >= 0) & inside
    spread = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lost = tl.zeros([BLOCK_M], tl.float32)
    if first < live:
        low, high = window(token_ptr, live, first, tl.minimum(first + BLOCK_M, live) - 1, reach, STEP)
        for start in range(low, high, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            key_token = tl.load(token_ptr + key, mask=key < high, other=-1)
            share = tl.load(share_ptr + key, mask=key < high, other=0.0)
            dot = tl.load(dot_ptr + key, mask=key < high, other=0.0)
            weight = kernel_weight(row, key, token, key_token, cells, height, columns, falloff) * share[None, :]
            lost += tl.sum(weight * dot[None, :], 1)
            grad = tl.load(
                grad_ptr + key.to(tl.int64)[:, None] * width + column[None, :],
                mask=(key_token[:, None] >= 0) & inside, other=0.0,
            )  # fmt: skip
            spread = tl.dot(weight, grad, spread, input_precision=PRECISION)
    confidence = clamp_confidence(tl.load(prob_ptr + token, mask=token >= 0, other=0.0))
    grad = tl.load(grad_ptr + place, mask=own, other=0.0)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=own, other=0.0).to(tl.float32)
    once_more = 1 + tl.load(share_ptr + row, mask=row < capacity, other=0.0)
    grad_x = tl.where(own, confidence[:, None] * (once_more[:, None] * grad + spread), 0.0)
    tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=(row[:, None] < capacity) & inside)
    direct = tl.load(direct_ptr + row, mask=row < capacity, other=0.0)
    part = tl.sum(spread * x, 1) + tl.where(tl.program_id(1) == 0, once_more * direct - lost, 0.0)
    tl.store(partial_ptr + tl.program_id(1) * capacity + row, part, mask=row < capacity)


def smoothed(x, prob, plan, sigma, backward=False):
    """The smoothed rows (capacity, D) in float32; with `backward` (s, a)."""
    x = pointer_rows(x)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    share = torch.empty(plan.capacity if backward else 0, dtype=torch.float32, device=x.device)
    if out.numel():
        grid, place, launch = _launch(x, plan, sigma, backward)
        smooth_forward[grid](
            x, prob, plan.token_index, plan.cu_seqlens, out, share, x.stride(0), *place, *x.shape,
            BACKWARD=backward, **launch,
        )  # fmt: skip
    return (out, share) if backward else out


def smoothed_backward(grad, share, dot, direct, x, prob, plan, sigma):
    """grad_x in x's dtype, and dp̃ in parts, (parts, capacity). `grad` G (capacity, D) in float32, and its G·s and
    G·(x - s)."""
    x = pointer_rows(x)
    grid, place, launch = _launch(x, plan, sigma, backward=True)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(grid[1], plan.capacity, dtype=torch.float32, device=x.device)
    if grad_x.numel():
        smooth_backward[grid](
            grad, share, dot, direct, x, prob, plan.token_index, plan.cu_seqlens, grad_x, partial, x.stride(0), *place,
            *x.shape, **launch,
        )  # fmt: skip
    return grad_x, partial


def _launch(x, plan, sigma, backward):
    """Grid, the grid's shape with the window's reach and fall-off, and the compile-time configuration."""
    exact = x.dtype == torch.float32
    # What is left out is below 2e-8 of the sum at 6σ, and below 5e-5, under half-precision rounding, at 4.5σ.
    radius = math.ceil((6 if exact else 4.5) * sigma)
    _, height, columns = (1, 1, *plan.grid)[-3:]
    reach = min(radius * (sum({columns * height, columns, 1}) if len(plan.grid) == 3 else columns + 1), plan.cells)
    block_d = min(max(next_power_of_2(x.shape[1]), 16), 128)
    launch = {
        # TF32 cuts the weights to 10 bits, enough for an output in half precision. The gradient of boundary_prob is
        # float32 whatever the rows are, and a small difference of large sums: three products for one.
        "PRECISION": "ieee" if torch.version.hip else "tf32x3" if exact or backward else "tf32",
        "STEP": min(next_power_of_2(reach), 512),
        "BLOCK_M": 32,
        "BLOCK_N": 32,
        "BLOCK_D": block_d,
        "num_warps": 8 if block_d == 128 else 4,  # with 4, 128 columns take every register there is
    }
    grid = (cdiv(plan.capacity, 32), cdiv(x.shape[1], block_d))
    falloff = math.log2(math.e) / (2 * sigma**2)
    return grid, (plan.batch_size, plan.cells, height, columns, reach, falloff), launch
