"""Triton kernels of GroupNorm–SiLU on channels-last features, bias and conditioning added in front.

A program takes a tile: 32 neighbouring channels of some cells of one sample, whatever the groups. A first launch keeps
the moments of each slab of cells by channel. Forward, a second one merges those that the groups of its channels need,
and writes. Backward, a second one sums by slab what the gradient needs, and a third one writes. Bytes for N elements of
e bytes: forward 3·N·e, backward 6·N·e, less what the cache still has of the launch before. Every other launch therefore
goes backwards through the tensors.

The cells of a slab follow from the sample's alone, so that a sample has equal bits in any batch.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from ._group_moments import (
    channel_moments,
    group_statistics,
    group_sum,
    group_window,
    load_tile,
    merged_mean,
    of_channels,
    slab_pairs,
    store_pair,
    store_tile,
)  # fmt: skip
from ._launch import Kernel, jit_kernel
from ._rows import FILL, cdiv, next_power_of_2

# Channels and cells of a tile, cells of a step of the backward, slabs of a sample at most.
COLUMNS, CELLS, STEP, SLABS = 32, 256, 64, 8


@triton.jit
def channel_values(ptr, channel, CHANNELS: tl.constexpr):
    """Numbers of these channels in float32."""
    return tl.load(ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)


@triton.jit
def added_values(cond_ptr, x_bias_ptr, channel, CHANNELS: tl.constexpr):
    """The sum added to x in these channels: conditioning and bias, where given."""
    total = tl.zeros([channel.shape[0]], tl.float32)
    if cond_ptr is not None:
        total += channel_values(cond_ptr, channel, CHANNELS)
    if x_bias_ptr is not None:
        total += channel_values(x_bias_ptr, channel, CHANNELS)
    return total


@triton.jit
def piece(program, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """(sample, first channel) of a program."""
    pieces: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    return (program // pieces).to(tl.int64), program % pieces * COLUMNS


@triton.jit
def backwards(axis: tl.constexpr):
    """The program's place, from the last one on."""
    return tl.num_programs(axis) - 1 - tl.program_id(axis)


@triton.jit
def statistics(
    moments_ptr, cond_ptr, x_bias_ptr, start, channel, cells, slab_cells, eps,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, WINDOW: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """(centre, 1/deviation) of these channels of a sample: x - centre is x + added less the mean of its group."""
    group, near = group_window(start, SIZE, GROUPS, WINDOW)
    means, spreads, count = slab_pairs(moments_ptr, cells, slab_cells, near, CHANNELS, SLABS)
    mean = merged_mean(means, count, cells)
    delta = means - mean[:, None]
    spread = tl.sum(spreads + count * delta * delta, 1)
    mean += added_values(cond_ptr, x_bias_ptr, near, CHANNELS)
    level, rstd = group_statistics(mean, spread, near, group, cells, eps, SIZE)
    added = added_values(cond_ptr, x_bias_ptr, channel, CHANNELS)
    return of_channels(level, group, channel, SIZE) - added, of_channels(rstd, group, channel, SIZE)


@jit_kernel(do_not_specialize=["cells", "slab_cells"])
def group_norm_moments(
    x_ptr, moments_ptr, cells, slab_cells,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Moments by channel of one slab of cells."""
    sample, start = piece(tl.program_id(0), CHANNELS, COLUMNS)
    channel = start + tl.arange(0, COLUMNS)
    slab = tl.program_id(1)
    stop = tl.minimum((slab + 1) * slab_cells, cells)
    x_ptr += sample * cells * CHANNELS
    mean, spread = channel_moments(x_ptr, slab * slab_cells, stop, channel, CHANNELS, ROWS)
    store_pair(moments_ptr + sample * 2 * CHANNELS * SLABS, slab, channel, mean, spread, CHANNELS, SLABS)


@jit_kernel(do_not_specialize=["cells", "slab_cells"])
def group_norm_silu_forward(
    x_ptr, weight_ptr, bias_ptr, cond_ptr, x_bias_ptr, moments_ptr, out_ptr, cond_stride, cells, slab_cells, eps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, WINDOW: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """A tile of the result."""
    sample, start = piece(backwards(0), CHANNELS, COLUMNS)
    channel = start + tl.arange(0, COLUMNS)
    first = backwards(1) * ROWS
    x = load_tile(x_ptr + sample * cells * CHANNELS, first, cells, channel, CHANNELS, ROWS)
    if cond_ptr is not None:
        cond_ptr += sample * cond_stride
    centre, rstd = statistics(
        moments_ptr + sample * 2 * CHANNELS * SLABS, cond_ptr, x_bias_ptr, start, channel, cells, slab_cells, eps,
        CHANNELS, SIZE, GROUPS, WINDOW, SLABS,
    )  # fmt: skip
    factor = rstd * channel_values(weight_ptr, channel, CHANNELS)
    bias = channel_values(bias_ptr, channel, CHANNELS)
    normed = (x.to(tl.float32) - centre[None, :]) * factor[None, :] + bias[None, :]
    out_ptr += sample * cells * CHANNELS
    store_tile(out_ptr, first, cells, channel, normed * sigmoid(normed), CHANNELS, ROWS)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) within 2⁻²¹; a division would take more instructions than all the rest."""
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def silu_backward(grad, normed):
    """Gradient in front of a SiLU."""
    gate = sigmoid(normed)
    return grad * (gate * (1 + normed * (1 - gate)))


@jit_kernel(do_not_specialize=["cells", "slab_cells", "part_cells"])
def group_norm_sums(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, cond_ptr, x_bias_ptr, moments_ptr, statistics_ptr, sums_ptr,
    cond_stride, cells, slab_cells, part_cells, eps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, WINDOW: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Sums by channel over each slab of a part of the cells: of grad · normalised x and of grad, the gradient in front
    of the SiLU. The last part's programs keep the statistics as well."""
    sample, start = piece(backwards(0), CHANNELS, COLUMNS)
    channel = start + tl.arange(0, COLUMNS)
    begin = backwards(1) * part_cells
    x_ptr += sample * cells * CHANNELS
    grad_ptr += sample * cells * CHANNELS
    if cond_ptr is not None:
        cond_ptr += sample * cond_stride
    centre, rstd = statistics(
        moments_ptr + sample * 2 * CHANNELS * SLABS, cond_ptr, x_bias_ptr, start, channel,
        cells, slab_cells, eps, CHANNELS, SIZE, GROUPS, WINDOW, SLABS,
    )  # fmt: skip
    factor = (rstd * channel_values(weight_ptr, channel, CHANNELS))[None, :]
    bias = channel_values(bias_ptr, channel, CHANNELS)[None, :]
    sums_ptr += sample * 2 * CHANNELS * SLABS
    for done in range(0, tl.minimum(part_cells, cells - begin), slab_cells):
        start = begin + done
        stop = tl.minimum(start + slab_cells, cells)
        projections = tl.zeros([ROWS, COLUMNS], tl.float32)
        levels = tl.zeros([ROWS, COLUMNS], tl.float32)
        for seen in range(0, stop - start, ROWS):
            x = load_tile(x_ptr, start + seen, stop, channel, CHANNELS, ROWS).to(tl.float32) - centre[None, :]
            grad = load_tile(grad_ptr, start + seen, stop, channel, CHANNELS, ROWS).to(tl.float32)  # zero outside
            grad = silu_backward(grad, x * factor + bias)
            projections += grad * x
            levels += grad
        projection, level = tl.sum(projections, 0) * rstd, tl.sum(levels, 0)
        store_pair(sums_ptr, start // slab_cells, channel, projection, level, CHANNELS, SLABS)
    if tl.program_id(1) == 0:
        store_pair(statistics_ptr + sample * 2 * CHANNELS, 0, channel, centre, rstd, CHANNELS, 1)


@jit_kernel(do_not_specialize=["cells", "slab_cells", "part_cells"])
def group_norm_silu_backward(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, moments_ptr, statistics_ptr, sums_ptr, grad_x_ptr, grad_rest_ptr,
    cells, slab_cells, part_cells, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, WINDOW: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """x's gradient in a part of the cells; the first part's programs also make the other gradients of the sample."""
    sample, start = piece(tl.program_id(0), CHANNELS, COLUMNS)
    channel = start + tl.arange(0, COLUMNS)
    begin = tl.program_id(1) * part_cells
    stop = tl.minimum(begin + part_cells, cells)
    sums_ptr += sample * 2 * CHANNELS * SLABS
    statistics_ptr += sample * 2 * CHANNELS
    group, near = group_window(start, SIZE, GROUPS, WINDOW)
    projections, levels, _ = slab_pairs(sums_ptr, cells, slab_cells, near, CHANNELS, SLABS)
    near_weight = channel_values(weight_ptr, near, CHANNELS)
    count = cells.to(tl.float32)
    share = tl.div_rn(1.0, count * SIZE)
    projection = group_sum(tl.sum(projections, 1) * near_weight, near, group, SIZE) * share
    level = group_sum(tl.sum(levels, 1) * near_weight, near, group, SIZE) * share
    centre = channel_values(statistics_ptr, channel, CHANNELS)
    rstd = channel_values(statistics_ptr + CHANNELS, channel, CHANNELS)
    slope = rstd * rstd * of_channels(projection, group, channel, SIZE)
    offset = rstd * of_channels(level, group, channel, SIZE)
    factor = rstd * channel_values(weight_ptr, channel, CHANNELS)
    bias = channel_values(bias_ptr, channel, CHANNELS)
    if tl.program_id(1) == 0:
        moments_ptr += sample * 2 * CHANNELS * SLABS
        means, _, slab_count = slab_pairs(moments_ptr, cells, slab_cells, channel, CHANNELS, SLABS)
        own_projections, own_levels, _ = slab_pairs(sums_ptr, cells, slab_cells, channel, CHANNELS, SLABS)
        own_projection, own_level = tl.sum(own_projections, 1), tl.sum(own_levels, 1)
        distance = merged_mean(means, slab_count, cells) - centre
        total = factor * own_level - count * (offset + slope * distance)
        grad_rest_ptr += sample * 3 * CHANNELS
        store_pair(grad_rest_ptr, 0, channel, own_projection, own_level, CHANNELS, 1)
        tl.store(grad_rest_ptr + 2 * CHANNELS + channel, total, mask=channel < CHANNELS)
    x_ptr += sample * cells * CHANNELS
    grad_ptr += sample * cells * CHANNELS
    grad_x_ptr += sample * cells * CHANNELS
    for seen in range(0, stop - begin, ROWS):
        x = load_tile(x_ptr, begin + seen, stop, channel, CHANNELS, ROWS).to(tl.float32) - centre[None, :]
        grad = load_tile(grad_ptr, begin + seen, stop, channel, CHANNELS, ROWS).to(tl.float32)
        grad = silu_backward(grad, x * factor[None, :] + bias[None, :])
        grad = grad * factor[None, :] - offset[None, :] - x * slope[None, :]
        store_tile(grad_x_ptr, begin + seen, stop, channel, grad, CHANNELS, ROWS)


@functools.cache
def _kernels(channels: int, groups: int, rows: int, step: int) -> tuple[Kernel, Kernel, Kernel, Kernel]:
    """The four kernels, in the order in which they run."""
    size, columns = channels // groups, min(next_power_of_2(channels), COLUMNS)
    tile = {"CHANNELS": channels, "COLUMNS": columns, "SLABS": SLABS, "num_warps": 4}
    # A tile begins up to so many channels after its first group does.
    touched = cdiv(size - math.gcd(size, columns) + columns, size)
    tiles = {**tile, "SIZE": size, "GROUPS": next_power_of_2(touched), "WINDOW": next_power_of_2(touched * size)}
    return (
        group_norm_moments.bind(ROWS=rows, **tile),
        group_norm_silu_forward.bind(ROWS=rows, **tiles),
        group_norm_sums.bind(ROWS=step, **tiles),
        group_norm_silu_backward.bind(ROWS=step, **tiles),
    )


def _moments(x, kernel):
    """Moments by slab (B, 2, C, SLABS); cells of a sample and of a slab; tiles beside each other in the batch."""
    batch, channels, height, width = x.shape
    cells, beside = height * width, batch * cdiv(channels, COLUMNS)
    slab_cells = CELLS * cdiv(cells, CELLS * SLABS)
    moments = torch.empty(batch, 2, channels, SLABS, dtype=torch.float32, device=x.device)
    kernel[(beside, cdiv(cells, slab_cells))](x, moments, cells, slab_cells)
    return moments, cells, slab_cells, beside


class GroupNormSiLU:
    """SiLU(GroupNorm(x + x_bias + cond))."""

    @staticmethod
    def forward(x, weight, bias, cond, x_bias, groups, eps):
        out = torch.empty_like(x, memory_format=torch.channels_last)
        if x.numel() == 0:
            return out
        weight, bias, cond, x_bias = _unit_strides(weight, bias, cond, x_bias)
        make_moments, kernel, _, _ = _kernels(x.shape[1], groups, CELLS, STEP)
        moments, cells, slab_cells, beside = _moments(x, make_moments)
        stride = 0 if cond is None else cond.stride(0)
        kernel[(beside, cdiv(cells, CELLS))](
            x, weight, bias, cond, x_bias, moments, out, stride, cells, slab_cells, eps
        )
        return out

    @staticmethod
    def backward(grad, needs, x, weight, bias, cond, x_bias, groups, eps):
        rest = weight, bias, cond, x_bias
        if x.numel() == 0:
            return tuple(None if t is None else torch.zeros_like(t) for t in (x, *rest))
        grad = grad.contiguous(memory_format=torch.channels_last)
        weight, bias, cond, x_bias = _unit_strides(*rest)
        make_moments, _, make_sums, kernel = _kernels(x.shape[1], groups, CELLS, STEP)
        moments, cells, slab_cells, beside = _moments(x, make_moments)
        statistics, sums = torch.empty_like(moments[..., 0]), torch.empty_like(moments)
        grad_x = torch.empty_like(x, memory_format=torch.channels_last)
        grad_rest = torch.empty(x.shape[0], 3, x.shape[1], dtype=torch.float32, device=x.device)
        # Programs that merge the moments for as many slabs as leave enough of them; it changes no bit.
        part_cells = slab_cells * cdiv(cdiv(cells, slab_cells), cdiv(FILL, beside))
        grid, stride = (beside, cdiv(cells, part_cells)), 0 if cond is None else cond.stride(0)
        tensors = grad, x, weight, bias, cond, x_bias, moments, statistics, sums
        make_sums[grid](*tensors, stride, cells, slab_cells, part_cells, eps)
        tensors = grad, x, weight, bias, moments, statistics, sums, grad_x, grad_rest
        kernel[grid](*tensors, cells, slab_cells, part_cells)
        total = grad_rest.sum(0)
        grads = total[0], total[1], grad_rest[:, 2], total[2]
        return grad_x, *(None if t is None else g.to(t.dtype) for g, t in zip(grads, rest, strict=True))


def _unit_strides(*tensors):
    """Vectors, or rows, with unit stride inside; None stays None."""
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]
