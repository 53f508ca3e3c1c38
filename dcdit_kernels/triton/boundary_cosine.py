"""Triton kernels of the cosine boundary score: norms, products with the neighbours and the score in one pass.

Bytes for T rows of D elements of e bytes: forward 2·T·D·e and 4·T of scores; backward 6·T·D·e (both inputs read for
their norms and again for the gradients, both gradients written).

A program takes a tile of cells, so that of the nine neighbours of each most come from the cache. The taps, one in 1D or
nine in 2D, are unrolled: their loads are under way together, and each has its own sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import jit_kernel
from ._rows import FILL, cdiv, load_columns, load_rows, next_power_of_2


@triton.jit
def tile_cells(tile, height, columns, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """(y, x) of the cells of a tile, some outside the grid."""
    across = tl.cdiv(columns, TILE_W)
    cell = tl.arange(0, TILE_H * TILE_W)
    return tile // across * TILE_H + cell // TILE_W, tile % across * TILE_W + cell % TILE_W


@triton.jit
def neighbour(y, x, height, columns, SIGN: tl.constexpr, TAP: tl.constexpr, TAPS: tl.constexpr):
    """(cell, inside) of a tap's neighbours, each (cells,); SIGN -1 for the cells that have these as neighbours."""
    dy: tl.constexpr = 0 if TAPS == 1 else TAP // 3 - 1
    dx: tl.constexpr = -1 if TAPS == 1 else TAP % 3 - 1
    near_y = y + SIGN * dy
    near_x = x + SIGN * dx
    inside = (near_y >= 0) & (near_y < height) & (near_x >= 0) & (near_x < columns)
    return near_y.to(tl.int64) * columns + near_x, inside & (y < height) & (x < columns)


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
    q_ptr += image * q_batch
    k_ptr += image * k_batch
    zero = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    q_square = zero
    k_squares, products = (), ()
    for _ in tl.static_range(TAPS):
        k_squares += (zero,)
        products += (zero,)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        q = load_rows(q_ptr, cell, q_stride, column, scored, width)
        q_square += q * q
        squares, dots = (), ()
        for tap in tl.static_range(TAPS):
            near, exists = neighbour(y, x, height, columns, 1, tap, TAPS)
            k = load_rows(k_ptr, near, k_stride, column, exists & scored, width)
            weighted = q
            if kernel_ptr is not None:
                weighted = q * load_columns(kernel_ptr + tap * width, column, width)[None, :]
            squares += (k_squares[tap] + k * k,)
            dots += (products[tap] + weighted * k,)
        k_squares, products = squares, dots
    q_norm = tl.sqrt_rn(tl.sum(q_square, 1))
    q_inverse = tl.div_rn(1.0, tl.maximum(q_norm, 1e-12))
    k_norms, k_inverses, cosines = (), (), ()
    total = tl.zeros([TILE_H * TILE_W], tl.float32)
    for tap in tl.static_range(TAPS):
        k_norms += (tl.sqrt_rn(tl.sum(k_squares[tap], 1)),)
        k_inverses += (tl.div_rn(1.0, tl.maximum(k_norms[tap], 1e-12)),)
        cosines += (tl.sum(products[tap], 1) * (q_inverse * k_inverses[tap]),)
        total += cosines[tap]
    raw = (1 - total) / 2
    place = image * cells + cell
    if BACKWARD:
        passes = scored & (raw >= 0) & (raw <= 1)
        grad = -0.5 * tl.load(grad_ptr + place, mask=passes, other=0.0)
        own_q = tl.where(scored & (q_norm >= 1e-12), grad * total * q_inverse * q_inverse, 0.0)
        tl.store(own_q_ptr + place, own_q, mask=inside)
        for tap in tl.static_range(TAPS):
            _, exists = neighbour(y, x, height, columns, 1, tap, TAPS)
            exists = exists & scored
            inverse = k_inverses[tap]
            pull = tl.where(exists, grad * q_inverse * inverse, 0.0)
            own_k = tl.where(exists & (k_norms[tap] >= 1e-12), grad * cosines[tap] * inverse * inverse, 0.0)
            tl.store(pull_ptr + place * TAPS + tap, pull, mask=inside)
            tl.store(own_k_ptr + place * TAPS + tap, own_k, mask=inside)
    else:
        prob = tl.where(raw < 0, 0.0, tl.where(raw > 1, 1.0, raw))  # NaN stays NaN
        prob = tl.where(live, tl.where(end, 1.0, prob), 0.0)
        tl.store(prob_ptr + place, prob, mask=inside)


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
    zero = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    kernel_sums = ()
    for _ in tl.static_range(TAPS):
        kernel_sums += (zero,)
    first = tl.program_id(0) * share
    for tile in range(first, tl.minimum(first + share, total)):
        y, x = tile_cells(tile % tiles, height, columns, TILE_H, TILE_W)
        inside = (y < height) & (x < columns)
        image = tl.zeros([1], tl.int64) + tile // tiles  # 64-bit
        q_base, k_base = q_ptr + image * q_batch, k_ptr + image * k_batch
        cell = y.to(tl.int64) * columns + x
        base = image * cells
        own_q = tl.load(own_q_ptr + base + cell, mask=inside, other=0.0)
        taken = tl.abs(own_q)
        for tap in tl.static_range(TAPS):
            taken += tl.abs(tl.load(pull_ptr + (base + cell) * TAPS + tap, mask=inside, other=0.0))
        q = load_rows(q_base, cell, q_stride, column, taken != 0, width)
        grad_q = -own_q[:, None] * q
        own_k = tl.zeros([TILE_H * TILE_W], tl.float32)
        grad_k = zero
        sums = ()
        for tap in tl.static_range(TAPS):
            weight = 1.0
            if kernel_ptr is not None:
                weight = load_columns(kernel_ptr + tap * width, column, width)[None, :]
            near, exists = neighbour(y, x, height, columns, 1, tap, TAPS)
            pull = tl.load(pull_ptr + (base + cell) * TAPS + tap, mask=inside, other=0.0)
            k = pull[:, None] * load_rows(k_base, near, k_stride, column, pull != 0, width)
            sums += (kernel_sums[tap] + k * q,)
            grad_q += k * weight
            near, exists = neighbour(y, x, height, columns, -1, tap, TAPS)
            factor = (base + near) * TAPS + tap
            own_k += tl.load(own_k_ptr + factor, mask=exists, other=0.0)
            pull = tl.load(pull_ptr + factor, mask=exists, other=0.0)
            near_q = load_rows(q_base, near, q_stride, column, pull != 0, width)
            grad_k += pull[:, None] * near_q * weight
        kernel_sums = sums
        grad_k -= own_k[:, None] * load_rows(k_base, cell, k_stride, column, own_k != 0, width)
        place = (base + cell)[:, None] * width + column[None, :]
        stored = inside[:, None] & within[None, :]
        tl.store(grad_q_ptr + place, grad_q.to(grad_q_ptr.dtype.element_ty), mask=stored)
        tl.store(grad_k_ptr + place, grad_k.to(grad_k_ptr.dtype.element_ty), mask=stored)
    if kernel_ptr is not None:
        part = partial_ptr + tl.program_id(0).to(tl.int64) * TAPS * width + column
        for tap in tl.static_range(TAPS):
            tl.store(part + tap * width, tl.sum(kernel_sums[tap], 0), mask=within)


def _tiles(q, kernel, grid):
    """(height, columns, tiles, launch) of q (B, L, D)."""
    height, columns = grid if kernel is not None else (1, q.shape[1])
    # On large grids more cells a program, for the neighbours that they share. The batch has no say: sums over a row
    # depend on the tile, and a sample has equal bits in every batch.
    size = 16 if kernel is not None and height * columns >= FILL else 4
    tile_h = min(next_power_of_2(height), 4 if size == 16 else 2)
    elements, taps = (512, 9) if kernel is not None else (2048, 1)
    # Rows that do not start at 16 bytes need an address for every element.
    if q.shape[2] % 16:
        elements //= 4
    launch = {"TAPS": taps, "TILE_H": tile_h, "TILE_W": size // tile_h, "num_warps": 4}
    launch["BLOCK_D"] = min(elements // size, next_power_of_2(q.shape[2]))
    total = q.shape[0] * cdiv(height, tile_h) * cdiv(columns, size // tile_h)
    return height, columns, total, launch


def _inputs(q, k, kernel, cu_seqlens):
    """q and k as (B, L, D) with unit stride inside a row, and kernel as (9, D); a packed batch is one long sample."""
    q, k = (x if cu_seqlens is None else x[None] for x in (q, k))
    q, k = (x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in (q, k))
    return q, k, None if kernel is None else kernel.flatten(1).t().contiguous()


def _score(q, k, kernel, grid, cu_seqlens, prob, grad=None, factors=(None, None, None)):
    height, columns, total, launch = _tiles(q, kernel, grid)
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
        weights = kernel
        q, k, kernel = _inputs(q, k, kernel, cu_seqlens)
        height, columns, total, launch = _tiles(q, kernel, grid)
        new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=q.device)  # noqa: E731
        factors = (*(new(*q.shape[:2], launch["TAPS"]) for _ in range(2)), new(*q.shape[:2]))
        _score(q, k, kernel, grid, cu_seqlens, None, grad.contiguous(), factors)
        blocks = cdiv(q.shape[2], launch["BLOCK_D"])
        share = min(max(total * blocks // FILL, 1), 32)
        slabs = cdiv(total, share)
        partial = None if kernel is None else new(slabs, *kernel.shape)
        # Left alone, the assembler takes fewer registers, and spills.
        limit = {"maxnreg": 240} if kernel is not None and torch.version.hip is None else {}
        cosine_backward[(slabs, blocks)](
            q, k, kernel, *factors, grad_q, grad_k, partial, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            height, columns, q.shape[2], total, share, **launch, **limit,
        )  # fmt: skip
        if kernel is None:
            return grad_q, grad_k, None, None
        return grad_q, grad_k, partial.sum(0).t().reshape(weights.shape).to(weights.dtype), None
