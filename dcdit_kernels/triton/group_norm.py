"""Triton kernels of GroupNorm–SiLU on channels-last features, bias and conditioning added in front.

A program takes whole groups of one sample, some 32 to 128 neighbouring channels, and goes over the cells twice: for the
statistics, then to write. Bytes for N elements of e bytes: forward 2·N·e, backward 3·N·e, as long as the cells of a
program come back from the cache; 3·N·e and 6·N·e where they do not.

Statistics are made slab by slab of the cells and merged in an order that the grid alone decides, so that a sample has
equal bits in any batch. A small batch has too few programs for a GPU. Its slabs then have programs of their own, in
one launch for the statistics and one to write; the backward has three.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from ._group_moments import (
    all_moments,
    channel_moments,
    group_statistics,
    group_sum,
    load_pair,
    load_tile,
    store_pair,
    store_tile,
)  # fmt: skip
from ._launch import Kernel, jit_kernel
from ._rows import cdiv, next_power_of_2

# From so many programs on, each goes over all cells of its channels: an SM has one, which keeps it busy.
ENOUGH = 128


@triton.jit
def channel_values(ptr, channel, known):
    """Numbers of these channels in float32."""
    return tl.load(ptr + channel, mask=known, other=0.0).to(tl.float32)


@triton.jit
def added_values(cond_ptr, x_bias_ptr, channel, known):
    """The sum added to x in these channels: conditioning and bias, where given."""
    total = tl.zeros([channel.shape[0]], tl.float32)
    if cond_ptr is not None:
        total += channel_values(cond_ptr, channel, known)
    if x_bias_ptr is not None:
        total += channel_values(x_bias_ptr, channel, known)
    return total


@triton.jit
def piece(CHANNELS: tl.constexpr, SHARE: tl.constexpr, COLUMNS: tl.constexpr):
    """(sample, its channels, which channels exist) of a program."""
    pieces: tl.constexpr = (CHANNELS + SHARE - 1) // SHARE
    column = tl.arange(0, COLUMNS)
    channel = tl.program_id(0) % pieces * SHARE + column
    return (tl.program_id(0) // pieces).to(tl.int64), channel, (column < SHARE) & (channel < CHANNELS)


@jit_kernel(do_not_specialize=["cells", "slab_cells"])
def slab_moments(
    x_ptr, moments_ptr, cells, slab_cells,
    CHANNELS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Moments by channel of one slab of cells."""
    sample, channel, known = piece(CHANNELS, SHARE, COLUMNS)
    start = tl.program_id(1) * slab_cells
    stop = tl.minimum(start + slab_cells, cells)
    mean, spread = channel_moments(x_ptr + sample * cells * CHANNELS, start, stop, channel, known, CHANNELS, ROWS)
    slab = sample * tl.num_programs(1) + tl.program_id(1)
    store_pair(moments_ptr, slab, channel, known, mean, spread, CHANNELS)


@jit_kernel(do_not_specialize=["cells", "slab_cells"])
def group_norm_silu_forward(
    x_ptr, weight_ptr, bias_ptr, cond_ptr, x_bias_ptr, moments_ptr, out_ptr, cond_stride, cells, slab_cells, eps,
    WHOLE: tl.constexpr, CHANNELS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some groups of one sample, over all cells where a program is WHOLE, else over one slab."""
    sample, channel, known = piece(CHANNELS, SHARE, COLUMNS)
    start = tl.program_id(1) * slab_cells
    stop = cells if WHOLE else tl.minimum(start + slab_cells, cells)
    x_ptr += sample * cells * CHANNELS
    out_ptr += sample * cells * CHANNELS
    moments_ptr += sample * tl.num_programs(1) * 2 * CHANNELS
    mean, spread = all_moments(x_ptr, moments_ptr, cells, slab_cells, channel, known, WHOLE, CHANNELS, ROWS)
    if cond_ptr is not None:
        cond_ptr += sample * cond_stride
    added = added_values(cond_ptr, x_bias_ptr, channel, known)
    centre, rstd, _ = group_statistics(mean, spread, added, cells, eps, SIZE, GROUPS)
    factor = (rstd * channel_values(weight_ptr, channel, known))[None, :]
    bias = channel_values(bias_ptr, channel, known)[None, :]
    for first in tl.range(start, stop, ROWS, num_stages=3):
        row = first + tl.arange(0, ROWS)
        normed = (load_tile(x_ptr, row, stop, channel, known, CHANNELS) - centre[None, :]) * factor + bias
        store_tile(out_ptr, row, stop, channel, known, normed * sigmoid(normed), CHANNELS)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) within 2⁻²¹; a division would take more instructions than all the rest."""
    root = tl.rsqrt(1 + tl.exp(-x))
    return root * root


@triton.jit
def silu_backward(grad, normed):
    """Gradient in front of a SiLU."""
    gate = sigmoid(normed)
    return grad * (gate * (1 + normed * (1 - gate)))


@triton.jit
def slab_sums(
    grad_ptr, x_ptr, start, stop, channel, known, centre, rstd, weight, bias,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums over the cells [start, stop) of grad · normalised x and of grad, the gradient in front of the SiLU."""
    projections = tl.zeros([ROWS, channel.shape[0]], tl.float32)
    levels = tl.zeros([ROWS, channel.shape[0]], tl.float32)
    for first in tl.range(start, stop, ROWS, num_stages=2):
        row = first + tl.arange(0, ROWS)
        normed = (load_tile(x_ptr, row, stop, channel, known, CHANNELS) - centre[None, :]) * rstd[None, :]
        grad = load_tile(grad_ptr, row, stop, channel, known, CHANNELS)
        grad = silu_backward(grad, normed * weight[None, :] + bias[None, :])
        projections += grad * normed
        levels += grad
    return tl.sum(projections, 0), tl.sum(levels, 0)


@jit_kernel(do_not_specialize=["cells", "slab_cells"])
def group_norm_silu_backward(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, cond_ptr, x_bias_ptr, moments_ptr, sums_ptr, grad_x_ptr, grad_rest_ptr,
    cond_stride, cells, slab_cells, eps, LAST: tl.constexpr, WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of some groups of one sample, over all cells where a program is WHOLE, else over one slab. A launch
    that is not the LAST stores the sums of each slab, which the last one takes."""
    sample, channel, known = piece(CHANNELS, SHARE, COLUMNS)
    start = tl.program_id(1) * slab_cells
    stop = cells if WHOLE else tl.minimum(start + slab_cells, cells)
    x_ptr += sample * cells * CHANNELS
    grad_ptr += sample * cells * CHANNELS
    moments_ptr += sample * tl.num_programs(1) * 2 * CHANNELS
    sums_ptr += sample * tl.num_programs(1) * 2 * CHANNELS
    mean, spread = all_moments(x_ptr, moments_ptr, cells, slab_cells, channel, known, WHOLE, CHANNELS, ROWS)
    if cond_ptr is not None:
        cond_ptr += sample * cond_stride
    added = added_values(cond_ptr, x_bias_ptr, channel, known)
    centre, rstd, delta = group_statistics(mean, spread, added, cells, eps, SIZE, GROUPS)
    weight = channel_values(weight_ptr, channel, known)
    bias = channel_values(bias_ptr, channel, known)
    if not LAST:
        projection_sum, level_sum = slab_sums(
            grad_ptr, x_ptr, start, stop, channel, known, centre, rstd, weight, bias, CHANNELS, ROWS
        )
        store_pair(sums_ptr, tl.program_id(1), channel, known, projection_sum, level_sum, CHANNELS)
    else:
        projection_sum = tl.zeros([COLUMNS], tl.float32)
        level_sum = tl.zeros([COLUMNS], tl.float32)
        if WHOLE:
            for first in range(0, cells, slab_cells):
                end = tl.minimum(first + slab_cells, cells)
                own_along, own_level = slab_sums(
                    grad_ptr, x_ptr, first, end, channel, known, centre, rstd, weight, bias, CHANNELS, ROWS
                )
                projection_sum += own_along
                level_sum += own_level
        else:
            for slab in range(tl.num_programs(1)):
                own_along, own_level = load_pair(sums_ptr, slab, channel, known, CHANNELS)
                projection_sum += own_along
                level_sum += own_level
        count = cells.to(tl.float32)
        projection = tl.div_rn(group_sum(projection_sum * weight, SIZE, GROUPS), count * SIZE)
        level = tl.div_rn(group_sum(level_sum * weight, SIZE, GROUPS), count * SIZE)
        if tl.program_id(1) == 0:
            added_sum = rstd * (level_sum * weight - count * (level + projection * delta * rstd))
            store_pair(grad_rest_ptr + sample * 3 * CHANNELS, 0, channel, known, projection_sum, level_sum, CHANNELS)
            tl.store(grad_rest_ptr + (sample * 3 + 2) * CHANNELS + channel, added_sum, mask=known)
        for first in tl.range(start, stop, ROWS, num_stages=2):
            row = first + tl.arange(0, ROWS)
            normed = (load_tile(x_ptr, row, stop, channel, known, CHANNELS) - centre[None, :]) * rstd[None, :]
            grad = load_tile(grad_ptr, row, stop, channel, known, CHANNELS)
            grad = silu_backward(grad, normed * weight[None, :] + bias[None, :]) * weight[None, :]
            grad = rstd[None, :] * (grad - level[None, :] - normed * projection[None, :])
            store_tile(grad_x_ptr + sample * cells * CHANNELS, row, stop, channel, known, grad, CHANNELS)


@functools.cache
def _tile(channels: int, groups: int, elements: int) -> dict[str, int]:
    """Constants of a launch: as few whole groups as start at 16 bytes and are at least 32 channels."""
    size = channels // groups
    step = 8 // math.gcd(size, 8)
    if step * size > 128:
        step = 1
    share = min(step * cdiv(32, step * size), groups) * size
    columns = next_power_of_2(share)
    sizes = {"CHANNELS": channels, "SHARE": share, "SIZE": size, "GROUPS": next_power_of_2(share // size)}
    return {**sizes, "ROWS": max(elements // columns, 1), "COLUMNS": columns, "num_warps": min(elements // 256, 8)}


@functools.cache
def _forward_kernels(channels: int, groups: int) -> tuple[int, Kernel, Kernel, Kernel]:
    """(programs a sample, `slab_moments`, `group_norm_silu_forward` of a slab and of all cells)."""
    tile = _tile(channels, groups, 4096)
    forward = (group_norm_silu_forward.bind(WHOLE=whole, **tile) for whole in (False, True))
    return cdiv(channels, tile["SHARE"]), slab_moments.bind(**tile), *forward


@functools.cache
def _backward_kernels(channels: int, groups: int) -> tuple[int, Kernel, Kernel, Kernel, Kernel]:
    """(programs a sample, `slab_moments`, `group_norm_silu_backward` of a slab before the last and the last, and of all
    cells)."""
    tile = {**_tile(channels, groups, 1024)}
    moments = slab_moments.bind(**tile)
    if torch.version.hip is None:
        tile["maxnreg"] = 128  # left alone, the assembler takes fewer and spills
    passes = (False, False), (True, False), (True, True)
    backward = (group_norm_silu_backward.bind(LAST=last, WHOLE=whole, **tile) for last, whole in passes)
    return cdiv(channels, tile["SHARE"]), moments, *backward


def _slabs(programs: int, cells: int) -> tuple[int, int]:
    """(cells of a slab, programs that share a sample's slabs)."""
    slab_cells = max(256, cdiv(cells, 8))
    return slab_cells, 1 if programs >= ENOUGH else cdiv(cells, slab_cells)


def _moments(x, kernel, programs, cells, slab_cells, slabs):
    """(B, slabs, 2, C) where programs share the slabs, else nothing."""
    if slabs == 1:
        return torch.empty(0, dtype=torch.float32, device=x.device)
    moments = torch.empty(x.shape[0], slabs, 2, x.shape[1], dtype=torch.float32, device=x.device)
    kernel[(programs, slabs)](x, moments, cells, slab_cells)
    return moments


class GroupNormSiLU:
    """SiLU(GroupNorm(x + x_bias + cond))."""

    @staticmethod
    def forward(x, weight, bias, cond, x_bias, groups, eps):
        batch, channels, height, width = x.shape
        out = torch.empty_like(x, memory_format=torch.channels_last)
        if x.numel() == 0:
            return out
        weight, bias, cond, x_bias = (_unit_stride(t) for t in (weight, bias, cond, x_bias))
        pieces, make_moments, shared, whole = _forward_kernels(channels, groups)
        cells, programs = height * width, batch * pieces
        slab_cells, slabs = _slabs(programs, cells)
        moments = _moments(x, make_moments, programs, cells, slab_cells, slabs)
        stride = 0 if cond is None else cond.stride(0)
        kernel = whole if slabs == 1 else shared
        kernel[(programs, slabs)](x, weight, bias, cond, x_bias, moments, out, stride, cells, slab_cells, eps)
        return out

    @staticmethod
    def backward(grad, needs, x, weight, bias, cond, x_bias, groups, eps):
        batch, channels, height, width = x.shape
        rest = weight, bias, cond, x_bias
        if x.numel() == 0:
            return tuple(None if t is None else torch.zeros_like(t) for t in (x, *rest))
        grad = grad.contiguous(memory_format=torch.channels_last)
        weight, bias, cond, x_bias = (_unit_stride(t) for t in rest)
        pieces, make_moments, before, last, whole = _backward_kernels(channels, groups)
        cells, programs = height * width, batch * pieces
        slab_cells, slabs = _slabs(programs, cells)
        moments = _moments(x, make_moments, programs, cells, slab_cells, slabs)
        grad_x = torch.empty_like(x, memory_format=torch.channels_last)
        grad_rest = torch.empty(batch, 3, channels, dtype=torch.float32, device=x.device)
        stride = 0 if cond is None else cond.stride(0)
        tensors = grad, x, weight, bias, cond, x_bias, moments, torch.empty_like(moments), grad_x, grad_rest
        for kernel in (whole,) if slabs == 1 else (before, last):
            kernel[(programs, slabs)](*tensors, stride, cells, slab_cells, eps)
        total = grad_rest.sum(0)
        grads = total[0], total[1], grad_rest[:, 2], total[2]
        return grad_x, *(None if t is None else g.to(t.dtype) for g, t in zip(grads, rest, strict=True))


def _unit_stride(values):
    """A vector, or rows, with unit stride inside; None stays None."""
    return values if values is None or values.stride(-1) == 1 else values.contiguous()
