"""Triton kernels of the cosine boundary score: norms, products with the neighbours and the score in one pass.

Bytes for T rows of D elements of e bytes: forward 2·T·D·e and 4·T of scores; backward 6·T·D·e (both inputs read for
their norms and again for the gradients, both gradients written).

A program takes a tile of cells, so that of the nine neighbours of each most come from the cache. Neighbours lie along
the first axis of its blocks: one in 1D, nine (of 16, a power of two) in 2D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import jit_kernel
from ._rows import FILL, cdiv, next_power_of_2


@triton.jit
def tile_cells(tile, height, columns, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """(y, x) of the cells of a tile, some outside the grid."""
    across = tl.cdiv(columns, TILE_W)
    cell = tl.arange(0, TILE_H * TILE_W)
    return tile // across * TILE_H + cell // TILE_W, tile % across * TILE_W + cell % TILE_W


@triton.jit
def neighbours(y, x, height, columns, SIGN: tl.constexpr, TAPS: tl.constexpr):
    """(cell, inside) of each tap's neighbour, (taps, cells); SIGN -1 for the cells that have this one as neighbour."""
    tap = tl.arange(0, TAPS)[:, None]
    dy = tap * 0 if TAPS == 1 else tap // 3 - 1
    dx = tap - 1 if TAPS == 1 else tap % 3 - 1
    near_y = y[None, :] + SIGN * dy
    near_x = x[None, :] + SIGN * dx
    inside = (tap < 9) & (near_y >= 0) & (near_y < height) & (near_x >= 0) & (near_x < columns)
    own = (y < height) & (x < columns)
    return near_y.to(tl.int64) * columns + near_x, inside & own[None, :]


@triton.jit
def kernel_columns(kernel_ptr, column, width, TAPS: tl.constexpr):
    """Weights (taps, columns) in float32, from (D, 9)."""
    tap = tl.arange(0, TAPS)[:, None]
    inside = (tap < 9) & (column[None, :] < width)
    return tl.load(kernel_ptr + column[None, :] * 9 + tap, mask=inside, other=0.0).to(tl.float32)


@jit_kernel(do_not_specialize=["columns", "samples"])
def cosine_score(
    q_ptr, k_ptr, kernel_ptr, cu_ptr, prob_ptr, grad_ptr, pull_ptr, own_k_ptr, own_q_ptr,
    q_batch, q_stride, k_batch, k_stride, height, columns, samples, width,
    BACKWARD: tl.constexpr, TAPS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """p of a tile of cells. With BACKWARD instead the factors of the gradients, all zero where p passes none:

    dq = Σ pull·w·k' - own_q·q and dk' = Σ pull·w·q - Σ own_k·k' over the taps.
    """
    tiles = tl.cdiv(height, TILE_H) * tl.cdiv(columns, TILE_W)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    y, x = tile_cells(tl.program_id(0) % tiles, height, columns, TILE_H, TILE_W)
    cells = height * columns
    cell = y.to(tl.int64) * columns + x
    inside = (y < height) & (x < columns)
    if cu_ptr is None:
        live = inside
        end = (cell == 0) | (cell == cells - 1)
    else:
        live = cell < tl.load(cu_ptr + samples)
        end = cell < 0
        for start in range(0, samples + 1, 64):
            sample = start + tl.arange(0, 64)
            edge = tl.load(cu_ptr + sample, mask=sample <= samples, other=-1)[None, :]
            end = end | (tl.max(((cell[:, None] == edge) | (cell[:, None] + 1 == edge)).to(tl.int32), 1) > 0)
    scored = live & (end == 0)
    near, exists = neighbours(y, x, height, columns, 1, TAPS)
    exists = exists & scored[None, :]
    near_row = k_ptr + image * k_batch + near * k_stride
    row = q_ptr + image * q_batch + cell * q_stride
    q_square = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    k_square = tl.zeros([TAPS, TILE_H * TILE_W, BLOCK_D], tl.float32)
    product = tl.zeros([TAPS, TILE_H * TILE_W, BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        q = tl.load(row[:, None] + column[None, :], mask=scored[:, None] & (column[None, :] < width), other=0.0)
        k = tl.load(
            near_row[:, :, None] + column[None, None, :],
            mask=exists[:, :, None] & (column[None, None, :] < width), other=0.0,
        ).to(tl.float32)  # fmt: skip
        q = q.to(tl.float32)
        weighted = q[None, :, :]
        if kernel_ptr is not None:
            weighted = weighted * kernel_columns(kernel_ptr, column, width, TAPS)[:, None, :]
        q_square += q * q
        k_square += k * k
        product += weighted * k
    q_norm = tl.sqrt_rn(tl.sum(q_square, 1))
    k_norm = tl.sqrt_rn(tl.sum(k_square, 2))
    q_inverse = tl.div_rn(1.0, tl.maximum(q_norm, 1e-12))
    k_inverse = tl.div_rn(1.0, tl.maximum(k_norm, 1e-12))
    cosine = tl.sum(product, 2) * (q_inverse[None, :] * k_inverse)
    raw = (1 - tl.sum(cosine, 0)) / 2
    if BACKWARD:
        passes = scored & (raw >= 0) & (raw <= 1)
        grad = -0.5 * tl.load(grad_ptr + image * cells + cell, mask=passes, other=0.0)
        pull = tl.where(exists, (grad * q_inverse)[None, :] * k_inverse, 0.0)
        own_k = tl.where(exists & (k_norm >= 1e-12), grad[None, :] * cosine * k_inverse * k_inverse, 0.0)
        own_q = tl.where(scored & (q_norm >= 1e-12), grad * tl.sum(cosine, 0) * q_inverse * q_inverse, 0.0)
        tap = tl.arange(0, TAPS)[:, None]
        count: tl.constexpr = min(TAPS, 9)
        place = (image * cells + cell)[None, :] * count + tap
        stored = inside[None, :] & (tap < count)
        tl.store(pull_ptr + place, pull, mask=stored)
        tl.store(own_k_ptr + place, own_k, mask=stored)
        tl.store(own_q_ptr + image * cells + cell, own_q, mask=inside)
    else:
        prob = tl.where(raw < 0, 0.0, tl.where(raw > 1, 1.0, raw))  # NaN stays NaN
        prob = tl.where(live, tl.where(end, 1.0, prob), 0.0)
        tl.store(prob_ptr + image * cells + cell, prob, mask=inside)


@jit_kernel(do_not_specialize=["columns", "total", "share"])
def cosine_backward(
    q_ptr, k_ptr, kernel_ptr, pull_ptr, own_k_ptr, own_q_ptr, grad_q_ptr, grad_k_ptr, partial_ptr,
    q_batch, q_stride, k_batch, k_stride, height, columns, width, total, share,
    TAPS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq and dk of `share` tiles and some columns, and those tiles' part of the kernel's gradient.

    A row is read only where a factor says that it takes part, so rows past the last live one never are.
    """
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = column < width
    tiles = tl.cdiv(height, TILE_H) * tl.cdiv(columns, TILE_W)
    cells = height * columns
    tap = tl.arange(0, TAPS)[:, None]
    count: tl.constexpr = min(TAPS, 9)
    kernel_sum = tl.zeros([TAPS, BLOCK_D], tl.float32)
    first = tl.program_id(0) * share
    for tile in range(first, tl.minimum(first + share, total)):
        y, x = tile_cells(tile % tiles, height, columns, TILE_H, TILE_W)
        inside = (y < height) & (x < columns)
        base = (tl.zeros([1], tl.int64) + tile // tiles) * cells  # 64-bit
        q_base = q_ptr + (base // cells) * q_batch
        k_base = k_ptr + (base // cells) * k_batch
        cell = y.to(tl.int64) * columns + x
        near, exists = neighbours(y, x, height, columns, 1, TAPS)
        pull = tl.load(pull_ptr + (base + cell)[None, :] * count + tap, mask=exists, other=0.0)
        k = tl.load(
            (k_base + near * k_stride)[:, :, None] + column[None, None, :],
            mask=(pull != 0)[:, :, None] & within[None, None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        k *= pull[:, :, None]
        own_q = tl.load(own_q_ptr + base + cell, mask=inside, other=0.0)
        takes = (own_q != 0) | (tl.max((pull != 0).to(tl.int32), 0) > 0)
        q = tl.load(
            (q_base + cell * q_stride)[:, None] + column[None, :], mask=takes[:, None] & within[None, :], other=0.0
        ).to(tl.float32)
        if kernel_ptr is not None:
            weight = kernel_columns(kernel_ptr, column, width, TAPS)[:, None, :]
            kernel_sum += tl.sum(k * q[None, :, :], 1)
            k *= weight
        grad_q = tl.sum(k, 0) - own_q[:, None] * q
        place = (base + cell)[:, None] * width + column[None, :]
        tl.store(grad_q_ptr + place, grad_q.to(grad_q_ptr.dtype.element_ty), mask=inside[:, None] & within[None, :])
        near, exists = neighbours(y, x, height, columns, -1, TAPS)
        pull = tl.load(pull_ptr + (base + near) * count + tap, mask=exists, other=0.0)
        near_q = tl.load(
            (q_base + near * q_stride)[:, :, None] + column[None, None, :],
            mask=(pull != 0)[:, :, None] & within[None, None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        near_q *= pull[:, :, None]
        if kernel_ptr is not None:
            near_q *= weight
        own_k = tl.sum(tl.load(own_k_ptr + (base + near) * count + tap, mask=exists, other=0.0), 0)
        own = tl.load(
            (k_base + cell * k_stride)[:, None] + column[None, :],
            mask=(own_k != 0)[:, None] & within[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        grad_k = tl.sum(near_q, 0) - own_k[:, None] * own
        tl.store(grad_k_ptr + place, grad_k.to(grad_k_ptr.dtype.element_ty), mask=inside[:, None] & within[None, :])
    if kernel_ptr is not None:
        part = partial_ptr + tl.program_id(0).to(tl.int64) * width * 9 + column[None, :] * 9 + tap
        tl.store(part, kernel_sum, mask=(tap < 9) & within[None, :])


def _tiles(q, kernel, grid, backward):
    """(height, columns, tiles, launch) of q (B, L, D)."""
    height, columns = grid if kernel is not None else (1, q.shape[1])
    # On large grids more cells a program, for the neighbours that they share. The batch has no say: sums over a row
    # depend on the tile, and a sample has equal bits in every batch.
    size = 16 if kernel is not None and height * columns >= FILL else 4
    tile_h = min(next_power_of_2(height), 4 if size == 16 else 2)
    elements, taps, warps = (512, 16, 16) if kernel is not None else (2048, 1, 4)
    if backward and kernel is not None:  # twice as much is held, and may not spill
        elements, warps = 256, 8
    # Rows that do not start at 16 bytes need an address for every element.
    if q.shape[2] % 16:
        elements, warps = elements // 4, 4
    launch = {"TAPS": taps, "TILE_H": tile_h, "TILE_W": size // tile_h, "num_warps": warps}
    launch["BLOCK_D"] = min(elements // size, next_power_of_2(q.shape[2]))
    total = q.shape[0] * cdiv(height, tile_h) * cdiv(columns, size // tile_h)
    return height, columns, total, launch


def _inputs(q, k, kernel, cu_seqlens):
    """q and k as (B, L, D) with unit stride inside a row, and kernel contiguous; a packed batch is one long sample."""
    q, k = (x if cu_seqlens is None else x[None] for x in (q, k))
    q, k = (x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in (q, k))
    return q, k, None if kernel is None else kernel.contiguous()


def _score(q, k, kernel, grid, cu_seqlens, prob, grad=None, factors=(None, None, None)):
    height, columns, total, launch = _tiles(q, kernel, grid, grad is not None)
    cosine_score[(total,)](
        q, k, kernel, cu_seqlens, prob, grad, *factors, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        height, columns, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, q.shape[2],
        BACKWARD=grad is not None, **launch,
    )  # fmt: skip


class BoundaryCosine:
    """p = (1 - q·k') / 2, ends forced to 1."""

    @staticmethod
    def forward(q, k, kernel, grid, cu_seqlens):
        prob = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        if prob.numel():
            q, k, kernel = _inputs(q, k, kernel, cu_seqlens)
            _score(q, k, kernel, grid, cu_seqlens, prob)
        return prob

    @staticmethod
    def backward(grad, needs, q, k, kernel, grid, cu_seqlens):
        grad_q, grad_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        if grad_q.numel() == 0:
            return grad_q, grad_k, None if kernel is None else torch.zeros_like(kernel), None
        dtype = None if kernel is None else kernel.dtype
        q, k, kernel = _inputs(q, k, kernel, cu_seqlens)
        height, columns, total, launch = _tiles(q, kernel, grid, True)
        taps = 1 if kernel is None else 9
        new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=q.device)  # noqa: E731
        factors = (new(*q.shape[:2], taps), new(*q.shape[:2], taps), new(*q.shape[:2]))
        _score(q, k, kernel, grid, cu_seqlens, None, grad.contiguous(), factors)
        blocks = cdiv(q.shape[2], launch["BLOCK_D"])
        share = min(max(total * blocks // FILL, 1), 32)
        slabs = cdiv(total, share)
        partial = None if kernel is None else new(slabs, *kernel.shape)
        cosine_backward[(slabs, blocks)](
            q, k, kernel, *factors, grad_q, grad_k, partial, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            height, columns, q.shape[2], total, share, **launch,
        )  # fmt: skip
        return grad_q, grad_k, None if kernel is None else partial.sum(0).to(dtype), None
