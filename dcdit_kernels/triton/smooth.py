"""Triton kernels of the Gaussian smoothing: attention without a query and a key, over the window that matters.

s_i = Σ_j p̃_j k_ij x_j / (Z_i + 1e-8) with k_ij = exp(-|u_i - u_j|² / 2σ²), u the cell on the grid, Z_i = Σ_j p̃_j k_ij.
Packed rows lie in raster order, so the rows near a block of BLOCK_M rows are one contiguous range of their sample: the
rows whose cell is at most `reach` cells away. Weights are made on the fly; no (M, M) buffer exists.

Backward, with G the gradient of p̃ x + (1 - p̃) s, a_i = (1 - p̃_i) / (Z_i + 1e-8) and q_i = G_i·s_i:
    dx_j = p̃_j (G_j + v_j),   v_j = Σ_i k_ij a_i G_i
    dp̃_j = G_j·(x_j - s_j) + v_j·x_j - Σ_i k_ij a_i q_i
The window is symmetric, so both directions take the same sums, `window_sums`, with weights p̃ or a.

Bytes for T rows of D elements of e bytes: forward T·D·(e + 4), backward T·D·(2·e + 8); the window is read from L2.
Blocks of rows begin with their sample: a sample gets equal bits in every batch, and reads no other sample's rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..chunk_plan import ChunkPlan
from ._launch import jit_kernel
from ._rows import cdiv, next_power_of_2
from .confidence import clamp_confidence

BLOCK_M = 32  # rows that share a window


@triton.jit
def block_of_rows(cu_ptr, first_sample, blocks, BLOCK_M: tl.constexpr):
    """(sample, its first and its end row, first row of this program's block): `blocks` programs a sample."""
    sample = first_sample + tl.program_id(0) // blocks
    start = tl.load(cu_ptr + sample)
    return sample, start, tl.load(cu_ptr + sample + 1), start + tl.program_id(0) % blocks * BLOCK_M


@jit_kernel(do_not_specialize=["blocks", "capacity"])
def locate_rows(
    token_ptr, prob_ptr, cu_ptr, point_ptr, window_ptr, blocks, cells, height, columns, reach, capacity,
    AXES: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """p̃, column, row and with three AXES frame of each packed row, in float32; and the window [low, high) of rows whose
    cell is within `reach` of the block's."""
    _, start, end, first = block_of_rows(cu_ptr, 0, blocks, BLOCK_M)
    if first >= end:
        return
    last = tl.minimum(first + BLOCK_M, end) - 1
    first_token = tl.load(token_ptr + first)
    last_token = tl.load(token_ptr + last)
    before = 0
    after = 0
    # Cells are distinct, so no more than `reach` rows on each side qualify.
    for offset in range(0, reach, STEP):
        step = offset + 1 + tl.arange(0, STEP)
        token = tl.load(token_ptr + first - step, mask=first - step >= start, other=-1)
        before += tl.sum(((token >= 0) & (first_token - token <= reach)).to(tl.int32))
        token = tl.load(token_ptr + last + step, mask=last + step < end, other=-1)
        after += tl.sum(((token >= 0) & (token - last_token <= reach)).to(tl.int32))
    tl.store(window_ptr + 2 * tl.program_id(0), first - before)
    tl.store(window_ptr + 2 * tl.program_id(0) + 1, last + 1 + after)
    row = first + tl.arange(0, BLOCK_M)
    token = tl.load(token_ptr + row, mask=row < end, other=-1)
    confidence = clamp_confidence(tl.load(prob_ptr + token, mask=token >= 0, other=0.0))
    cell = token % cells
    point_ptr += row
    tl.store(point_ptr, confidence, mask=row < end)
    tl.store(point_ptr + capacity, (cell % columns).to(tl.float32), mask=row < end)
    if AXES == 3:
        tl.store(point_ptr + 2 * capacity, (cell // columns % height).to(tl.float32), mask=row < end)
        tl.store(point_ptr + 3 * capacity, (cell // (columns * height)).to(tl.float32), mask=row < end)
    else:
        tl.store(point_ptr + 2 * capacity, (cell // columns).to(tl.float32), mask=row < end)


@triton.jit
def gaussian(point_ptr, row, key, end, high, capacity, falloff, AXES: tl.constexpr):
    """k_ij (rows, keys) in float32, of keys before `high`; zero for a row itself.

    A row's own term is the largest, and the callers add it exactly: where nothing else is near, s is x.
    """
    distance = tl.zeros([row.shape[0], key.shape[0]], tl.float32)
    for axis in tl.static_range(1, AXES + 1):
        here = tl.load(point_ptr + axis * capacity + row, mask=row < end, other=0.0)
        there = tl.load(point_ptr + axis * capacity + key, mask=key < high, other=0.0)
        delta = here[:, None] - there[None, :]
        distance += delta * delta
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


@triton.jit
def window_sums(
    weight_ptr, dot_ptr, x_ptr, x_stride, point_ptr, low, high, row, end, column, base, capacity, falloff, width,
    AXES: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Over the window without the row itself: Σ_j k_ij w_j x_j (rows, columns), and Σ_j k_ij w_j, times dot_j where
    given, (rows,). Row j of x lies at j - base."""
    total = tl.zeros([row.shape[0], BLOCK_N], tl.float32)
    mixed = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(low, high, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        known = key < high
        weight = gaussian(point_ptr, row, key, end, high, capacity, falloff, AXES)
        weight *= tl.load(weight_ptr + key, mask=known, other=0.0)[None, :]
        if dot_ptr is None:
            total += weight
        else:
            total += weight * tl.load(dot_ptr + key, mask=known, other=0.0)[None, :]
        place = x_ptr + (key - base).to(tl.int64)[:, None] * x_stride + column[None, :]
        x = tl.load(place, mask=known[:, None] & (column[None, :] < width), other=0.0)
        mixed = add_product(mixed, weight, x, PARTS)
    return mixed, tl.sum(total, 1)


@jit_kernel(do_not_specialize=["first_sample", "blocks", "capacity"])
def smooth_forward(
    x_ptr, point_ptr, window_ptr, cu_ptr, out_ptr, a_ptr, x_stride, first_sample, blocks, falloff, capacity, width,
    BACKWARD: tl.constexpr, AXES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """p̃ x + (1 - p̃) s in float32, or s and a for a BACKWARD. `out` begins at the first row of `first_sample`."""
    sample, _, end, first = block_of_rows(cu_ptr, first_sample, blocks, BLOCK_M)
    if first >= end:
        return
    block = (sample * blocks + tl.program_id(0) % blocks).to(tl.int64)
    low, high = tl.load(window_ptr + 2 * block), tl.load(window_ptr + 2 * block + 1)
    row = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mixed, others = window_sums(
        point_ptr, None, x_ptr, x_stride, point_ptr, low, high, row, end, column, 0, capacity, falloff, width,
        AXES, PARTS, BLOCK_N,
    )  # fmt: skip
    confidence = tl.load(point_ptr + row, mask=row < end, other=0.0)
    own = (row < end)[:, None] & (column[None, :] < width)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=own, other=0.0).to(tl.float32)
    others += 1e-8
    z = others + confidence
    out = x + (mixed - others[:, None] * x) * tl.div_rn(1.0, z)[:, None]  # s, which is x itself where nothing is near
    if BACKWARD:
        if tl.program_id(1) == 0:
            tl.store(a_ptr + row, tl.div_rn(1 - confidence, z), mask=row < end)
    else:
        out = confidence[:, None] * x + (1 - confidence[:, None]) * out
    base = tl.load(cu_ptr + first_sample)
    tl.store(out_ptr + (row - base).to(tl.int64)[:, None] * width + column[None, :], out, mask=own)


@jit_kernel(do_not_specialize=["first_sample", "blocks", "batch", "q_parts", "capacity"])
def smooth_backward(
    grad_ptr, a_ptr, q_ptr, x_ptr, point_ptr, window_ptr, cu_ptr, grad_x_ptr, partial_ptr,
    x_stride, first_sample, blocks, batch, falloff, q_parts, capacity, width,
    AXES: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx, and this block of columns' part of dp̃, without (1 + a) G·(x - s), after the `q_parts` parts that have it. The
    first blocks of columns have the parts of q.

    The programs past the last sample write the zeros of the rows past the last live one.
    """
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column[None, :] < width
    if first_sample + tl.program_id(0) // blocks == batch:
        tail = tl.load(cu_ptr + batch) + tl.program_id(0) % blocks * BLOCK_M
        for start in range(tail, capacity, blocks * BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            place = grad_x_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
            zero = tl.zeros([BLOCK_M, BLOCK_D], grad_x_ptr.dtype.element_ty)
            tl.store(place, zero, mask=(row[:, None] < capacity) & inside)
        return
    sample, _, end, first = block_of_rows(cu_ptr, first_sample, blocks, BLOCK_M)
    if first >= end:
        return
    block = (sample * blocks + tl.program_id(0) % blocks).to(tl.int64)
    low, high = tl.load(window_ptr + 2 * block), tl.load(window_ptr + 2 * block + 1)
    row = first + tl.arange(0, BLOCK_M)
    base = tl.load(cu_ptr + first_sample)
    q_ptr += tl.minimum(tl.program_id(1), q_parts - 1).to(tl.int64) * capacity
    v, lost = window_sums(
        a_ptr, q_ptr, grad_ptr, width, point_ptr, low, high, row, end, column, base, capacity, falloff, width,
        AXES, PARTS, BLOCK_N,
    )  # fmt: skip
    own = (row < end)[:, None] & inside
    grad = tl.load(grad_ptr + (row - base).to(tl.int64)[:, None] * width + column[None, :], mask=own, other=0.0)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=own, other=0.0).to(tl.float32)
    confidence = tl.load(point_ptr + row, mask=row < end, other=0.0)
    a = tl.load(a_ptr + row, mask=row < end, other=0.0)
    grad_x = confidence[:, None] * ((1 + a[:, None]) * grad + v)
    place = grad_x_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=own)
    grad_p = tl.sum(v * x, 1)
    if tl.program_id(1) < q_parts:
        grad_p -= lost
    tl.store(partial_ptr + (q_parts + tl.program_id(1)).to(tl.int64) * capacity + row, grad_p, mask=row < end)


@dataclass(frozen=True)
class Smoothing:
    """The smoothing of one batch's rows: the plan, and the windows that `locate_rows` found once for all columns."""

    plan: ChunkPlan
    sigma: float
    blocks: int  # of BLOCK_M rows, of each sample
    points: torch.Tensor  # (1 + axes, capacity) float32: p̃ and coordinates
    windows: torch.Tensor  # (batch·blocks, 2) int32

    @classmethod
    def of(cls, prob, plan, sigma, dtype) -> Smoothing:
        """`prob` (B, L) in float32, contiguous; the windows suit rows of `dtype`."""
        axes, cells, height, columns, reach, kernel = _locate(plan.grid, sigma, dtype == torch.float32)
        blocks = max(cdiv(plan.max_seqlen, BLOCK_M), 1)
        points = prob.new_empty(1 + axes, plan.capacity)
        windows = plan.cu_seqlens.new_empty(plan.batch_size * blocks, 2)
        if plan.capacity:
            kernel[(plan.batch_size * blocks,)](
                plan.token_index, prob, plan.cu_seqlens, points, windows, blocks, cells, height, columns, reach,
                plan.capacity,
            )  # fmt: skip
        return cls(plan, sigma, blocks, points, windows)

    def forward(self, x, out, first_sample, samples, a=None):
        """Writes the smoothed rows of some samples to `out` (rows, D) in float32, beginning at its first row; with `a`
        (capacity,) s in their place, and a."""
        kernel = _forward_kernel(self.points.shape[0] - 1, x.shape[1], x.dtype, a is not None)
        kernel[(samples * self.blocks, self.parts(x.shape[1]))](
            x, self.points, self.windows, self.plan.cu_seqlens, out, a, x.stride(0), first_sample, self.blocks,
            self._falloff, *x.shape,
        )  # fmt: skip

    def backward(self, grad, a, q, x, grad_x, partial, first_sample, samples):
        """Writes dx (capacity, D) and parts of dp̃ of some samples, and with the last of them the zeros of the rows past
        the last live one. `grad` (rows, D) is G in float32, beginning at the first row of `first_sample`;
        `q` (parts, capacity) are parts of G·s; as many first parts of dp̃ hold (1 + a) G·(x - s) already."""
        launch = _launch(self.points.shape[0] - 1, x.shape[1], grad.dtype)
        tail = not self.plan.exact and first_sample + samples == self.plan.batch_size
        smooth_backward[((samples + tail) * self.blocks, len(partial) - len(q))](
            grad, a, q, x, self.points, self.windows, self.plan.cu_seqlens, grad_x, partial, x.stride(0), first_sample,
            self.blocks, self.plan.batch_size, self._falloff, len(q), *x.shape, PARTS=_parts(True), **launch,
        )  # fmt: skip

    def parts(self, width):
        """Blocks of columns, each with its own part of dp̃."""
        return cdiv(width, _block_d(width))

    @property
    def _falloff(self):
        """k = 2^(-falloff·|u|²)."""
        return math.log2(math.e) / (2 * self.sigma**2)


@functools.cache
def _locate(grid, sigma, full):
    """(axes, cells, height, columns, reach of the windows, kernel) of a grid, in float32 where `full`."""
    # The rest is below 2e-8 of the sum at 6σ, and below 5e-5, under half-precision rounding, at 4.5σ.
    radius = math.ceil((6 if full else 4.5) * sigma)
    axes, cells, (_, height, columns) = max(len(grid), 2), math.prod(grid), (1, 1, *grid)[-3:]
    reach = min(radius * (sum({columns * height, columns, 1}) if len(grid) == 3 else columns + 1), cells)
    step = min(next_power_of_2(reach), 512)
    return axes, cells, height, columns, reach, locate_rows.bind(AXES=axes, STEP=step, BLOCK_M=BLOCK_M, num_warps=1)


@functools.cache
def _forward_kernel(axes, width, operand, backward):
    return smooth_forward.bind(BACKWARD=backward, PARTS=_parts(backward), **_launch(axes, width, operand))


@functools.cache
def _launch(axes, width, operand):
    """The compile-time configuration for products with rows of the dtype `operand`."""
    return {
        "AXES": axes,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": 16 if operand == torch.float32 else 32,  # with 32, a product in three parts takes every register
        "BLOCK_D": _block_d(width),
        "num_warps": 4,
    }


def _block_d(width):
    """Half as many columns where rows do not start at 16 bytes: each element needs a separate address."""
    return min(max(next_power_of_2(width), 16), 128 if width % 16 == 0 else 64)


def _parts(backward):
    """An output in half precision is content with 16 bits of the weights. The gradient of boundary_prob is float32
    whatever the rows are, and a small difference of large sums. AMD's TF32 is not ours to rely on."""
    return 0 if torch.version.hip else 3 if backward else 2
