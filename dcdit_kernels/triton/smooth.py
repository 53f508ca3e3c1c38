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

BLOCK_M = 32  # rows that share a window


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


@triton.jit(do_not_specialize=["batch", "capacity"])
def place_rows(
    token_ptr, prob_ptr, cu_ptr, place_ptr, window_ptr, batch, cells, height, columns, apart, reach, capacity,
    AXES: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """p̃, column, row and with three AXES frame of each packed row, in float32; and the window of the block of rows.

    Along the last axis the next sample begins `apart` further: too far for any weight.
    """
    live = tl.load(cu_ptr + batch)
    first = tl.program_id(0) * BLOCK_M
    if first < live:
        low, high = window(token_ptr, live, first, tl.minimum(first + BLOCK_M, live) - 1, reach, STEP)
        tl.store(window_ptr + 2 * tl.program_id(0), low)
        tl.store(window_ptr + 2 * tl.program_id(0) + 1, high)
    row = first + tl.arange(0, BLOCK_M)
    token = tl.load(token_ptr + row, mask=row < live, other=-1)
    confidence = clamp_confidence(tl.load(prob_ptr + token, mask=token >= 0, other=0.0))
    cell = token % cells
    outer = token // cells * apart
    place_ptr += row
    tl.store(place_ptr, confidence, mask=row < live)
    tl.store(place_ptr + capacity, (cell % columns).to(tl.float32), mask=row < live)
    if AXES == 3:
        tl.store(place_ptr + 2 * capacity, (cell // columns % height).to(tl.float32), mask=row < live)
        tl.store(place_ptr + 3 * capacity, (cell // (columns * height) + outer).to(tl.float32), mask=row < live)
    else:
        tl.store(place_ptr + 2 * capacity, (cell // columns + outer).to(tl.float32), mask=row < live)


@triton.jit
def kernel_weight(place_ptr, row, key, live, high, capacity, falloff, AXES: tl.constexpr):
    """k_ij (rows, keys) in float32, of keys before `high`; zero across samples and for a row itself.

    A row's own term is the largest, and the callers add it exactly: where nothing else is near, s is x.
    """
    distance = tl.zeros([row.shape[0], key.shape[0]], tl.float32)
    for axis in tl.static_range(1, AXES + 1):
        here = tl.load(place_ptr + axis * capacity + row, mask=row < live, other=0.0)
        there = tl.load(place_ptr + axis * capacity + key, mask=key < high, other=0.0)
        apart = here[:, None] - there[None, :]
        distance += apart * apart
    return tl.where(row[:, None] != key[None, :], tl.exp2(-distance * falloff), 0.0)


@triton.jit
def split(x):
    """float32 as a number of TF32, rounded, and the rest."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def add_product(total, weight, x, PARTS: tl.constexpr):
    """total + weight @ x. On tensor cores a float32 x takes three TF32 products; a half-precision x is exact there, and
    the weights are a sum of PARTS numbers of its dtype. In float32 throughout where PARTS is 0."""
    if PARTS == 0:
        total = tl.dot(weight, x.to(tl.float32), total, input_precision="ieee")
    elif x.dtype == tl.float32:
        # Triton's own "tf32x3" looks for NaN in every sum, which costs as much as the products.
        weight, weight_rest = split(weight)
        x, x_rest = split(x)
        small = tl.dot(weight, x_rest, tl.dot(weight_rest, x, input_precision="tf32"), input_precision="tf32")
        total += tl.dot(weight, x, small, input_precision="tf32")
    else:
        for _ in tl.static_range(PARTS):
            part = weight.to(x.dtype)
            total = tl.dot(part, x, total)
            weight -= part.to(tl.float32)
    return total


@triton.jit(do_not_specialize=["batch", "capacity"])
def smooth_forward(
    x_ptr, place_ptr, window_ptr, cu_ptr, out_ptr, share_ptr, x_stride, batch, falloff, capacity, width,
    BACKWARD: tl.constexpr, AXES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """p̃ x + (1 - p̃) s in float32, zero in the tail; with BACKWARD s itself, and a in `share_ptr`."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column[None, :] < width
    live = tl.load(cu_ptr + batch)
    first = tl.program_id(0) * BLOCK_M
    totals = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if first < live:
        high = tl.load(window_ptr + 2 * tl.program_id(0) + 1)
        for start in range(tl.load(window_ptr + 2 * tl.program_id(0)), high, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            known = key < high
            confidence = tl.load(place_ptr + key, mask=known, other=0.0)
            weight = kernel_weight(place_ptr, row, key, live, high, capacity, falloff, AXES) * confidence[None, :]
            totals += weight
            x = tl.load(
                x_ptr + key.to(tl.int64)[:, None] * x_stride + column[None, :], mask=known[:, None] & inside, other=0.0
            )
            mixed = add_product(mixed, weight, x, PARTS)
    confidence = tl.load(place_ptr + row, mask=row < live, other=0.0)
    own = (row < live)[:, None] & inside
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=own, other=0.0).to(tl.float32)
    others = tl.sum(totals, 1) + 1e-8
    total = others + confidence
    smoothed = x + (mixed - others[:, None] * x) * tl.div_rn(1.0, total)[:, None]  # x itself where nothing is near
    out_ptr += row.to(tl.int64)[:, None] * width + column[None, :]
    if BACKWARD:
        tl.store(out_ptr, smoothed, mask=(row[:, None] < capacity) & inside)
        if tl.program_id(1) == 0:
            share = tl.div_rn(1 - confidence, total)
            tl.store(share_ptr + row, tl.where(row < live, share, 0.0), mask=row < capacity)
    else:
        out = confidence[:, None] * x + (1 - confidence[:, None]) * smoothed
        tl.store(out_ptr, tl.where(own, out, 0.0), mask=(row[:, None] < capacity) & inside)


@triton.jit(do_not_specialize=["batch", "capacity"])
def smooth_backward(
    grad_ptr, share_ptr, dot_ptr, direct_ptr, x_ptr, place_ptr, window_ptr, cu_ptr, grad_x_ptr, partial_ptr,
    x_stride, batch, falloff, capacity, width,
    AXES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx, and this block of columns' part of dp̃, (column blocks, capacity); the first has what needs no column.

    A row's own term, a G·(x - s), is taken from `direct` = G·(x - s), not as two products that nearly cancel.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column[None, :] < width
    live = tl.load(cu_ptr + batch)
    first = tl.program_id(0) * BLOCK_M
    spread = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lost = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if first < live:
        high = tl.load(window_ptr + 2 * tl.program_id(0) + 1)
        for start in range(tl.load(window_ptr + 2 * tl.program_id(0)), high, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            known = key < high
            share = tl.load(share_ptr + key, mask=known, other=0.0)
            weight = kernel_weight(place_ptr, row, key, live, high, capacity, falloff, AXES) * share[None, :]
            lost += weight * tl.load(dot_ptr + key, mask=known, other=0.0)[None, :]
            grad = tl.load(
                grad_ptr + key.to(tl.int64)[:, None] * width + column[None, :], mask=known[:, None] & inside, other=0.0
            )
            spread = add_product(spread, weight, grad, PARTS)
    confidence = tl.load(place_ptr + row, mask=row < live, other=0.0)
    own = (row < live)[:, None] & inside
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    grad = tl.load(grad_ptr + place, mask=own, other=0.0)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=own, other=0.0).to(tl.float32)
    once_more = 1 + tl.load(share_ptr + row, mask=row < capacity, other=0.0)
    grad_x = tl.where(own, confidence[:, None] * (once_more[:, None] * grad + spread), 0.0)
    tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=(row[:, None] < capacity) & inside)
    direct = tl.load(direct_ptr + row, mask=row < capacity, other=0.0)
    rest = tl.where(tl.program_id(1) == 0, once_more * direct - tl.sum(lost, 1), 0.0)
    tl.store(partial_ptr + tl.program_id(1) * capacity + row, tl.sum(spread * x, 1) + rest, mask=row < capacity)


def placed(prob, plan, sigma, dtype):
    """(p̃ and place of each row (1 + axes, capacity) in float32, window of each block of rows (blocks, 2)); the window
    is that of rows of `dtype`."""
    axes = max(len(plan.grid), 2)
    # What is left out is below 2e-8 of the sum at 6σ, and below 5e-5, under half-precision rounding, at 4.5σ.
    radius = math.ceil((6 if dtype == torch.float32 else 4.5) * sigma)
    _, height, columns = (1, 1, *plan.grid)[-3:]
    reach = min(radius * (sum({columns * height, columns, 1}) if len(plan.grid) == 3 else columns + 1), plan.cells)
    apart = (1, *plan.grid)[-axes] + math.ceil(15 * sigma)  # exp(-15²/2) is nothing in float32
    blocks = cdiv(plan.capacity, BLOCK_M)
    place = torch.empty(1 + axes, plan.capacity, dtype=torch.float32, device=prob.device)
    windows = torch.empty(blocks, 2, dtype=torch.int32, device=prob.device)
    if blocks:
        place_rows[(blocks,)](
            plan.token_index, prob, plan.cu_seqlens, place, windows, plan.batch_size, plan.cells, height, columns,
            apart, reach, plan.capacity, AXES=axes, STEP=min(next_power_of_2(reach), 512), BLOCK_M=BLOCK_M, num_warps=1,
        )  # fmt: skip
    return place, windows


def smoothed(x, places, plan, sigma, backward=False):
    """The smoothed rows (capacity, D) in float32; with `backward` (s, a). `places` from `placed`."""
    x = pointer_rows(x)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    share = torch.empty(plan.capacity if backward else 0, dtype=torch.float32, device=x.device)
    if out.numel():
        grid, launch = _launch(x, places, x.dtype)
        smooth_forward[grid](
            x, *places, plan.cu_seqlens, out, share, x.stride(0), plan.batch_size, _falloff(sigma), *x.shape,
            BACKWARD=backward, PARTS=_parts(backward), **launch,
        )  # fmt: skip
    return (out, share) if backward else out


def smoothed_backward(grad, share, dot, direct, x, places, plan, sigma):
    """grad_x in x's dtype, and dp̃ in parts, (parts, capacity). `grad` G (capacity, D) in float32, and its G·s and
    G·(x - s)."""
    x = pointer_rows(x)
    grid, launch = _launch(x, places, grad.dtype)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(grid[1], plan.capacity, dtype=torch.float32, device=x.device)
    if grad_x.numel():
        smooth_backward[grid](
            grad, share, dot, direct, x, *places, plan.cu_seqlens, grad_x, partial, x.stride(0), plan.batch_size,
            _falloff(sigma), *x.shape, PARTS=_parts(backward=True), **launch,
        )  # fmt: skip
    return grad_x, partial


def _falloff(sigma):
    """k = 2^(-falloff·|u|²)."""
    return math.log2(math.e) / (2 * sigma**2)


def _parts(backward):
    """An output in half precision is content with 16 bits of the weights. The gradient of boundary_prob is float32
    whatever the rows are, and a small difference of large sums. AMD's TF32 is not ours to rely on."""
    return 0 if torch.version.hip else 3 if backward else 2


def _launch(x, places, operand):
    """Grid, and the compile-time configuration for products with rows of the dtype `operand`."""
    launch = {
        "AXES": len(places[0]) - 1,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": 16 if operand == torch.float32 else 32,  # with 32, a product in three parts takes every register
        "BLOCK_D": min(max(next_power_of_2(x.shape[1]), 16), 128),
        "num_warps": 4,
    }
    return (cdiv(x.shape[0], BLOCK_M), cdiv(x.shape[1], launch["BLOCK_D"])), launch
