"""Triton kernels of GroupNorm–SiLU on channels-last features, bias and conditioning added in front.

A program takes whole groups of one sample, some 32 to 128 neighbouring channels, and goes over the cells twice: for the
statistics, then to write. Bytes for N elements of e bytes: forward 2·N·e, backward 3·N·e, as long as the cells of a
program come back from the cache; 3·N·e and 6·N·e where they do not. Grids of more than 2048 cells are cut into slabs,
so that one sample fills a GPU; statistics and sums of the slabs are then made by launches of their own.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from ._launch import Kernel, jit_kernel
from ._rows import FILL, cdiv, next_power_of_2

# Cells up to which one program goes over all cells of its channels.
WHOLE = 2048


@triton.jit
def load_tile(ptr, row, stop, channel, known, CHANNELS: tl.constexpr):
    """Cells × channels of one sample in float32, zero outside."""
    place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    return tl.load(ptr + place, mask=(row < stop)[:, None] & known[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, row, stop, channel, known, values, CHANNELS: tl.constexpr):
    """The same cells × channels of another tensor, in its dtype."""
    place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(ptr + place, values.to(ptr.dtype.element_ty), mask=(row < stop)[:, None] & known[None, :])


@triton.jit
def channel_moments(x_ptr, start, stop, channel, known, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """(mean, sum of squared deviations) of each channel over the cells [start, stop): Welford's update in each lane,
    Chan's between them."""
    mean = tl.zeros([ROWS, channel.shape[0]], tl.float32)
    spread = tl.zeros([ROWS, channel.shape[0]], tl.float32)
    lane = tl.arange(0, ROWS)
    for first in tl.range(start, stop, ROWS, num_stages=3):
        x = load_tile(x_ptr, first + lane, stop, channel, known, CHANNELS)
        apart = tl.where((first + lane < stop)[:, None], x - mean, 0.0)
        mean += apart * tl.div_rn(1.0, ((first - start) // ROWS + 1).to(tl.float32))
        spread += apart * (x - mean)
    seen = tl.maximum((stop - start - lane + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    level = tl.div_rn(tl.sum(mean * seen, 0), (stop - start).to(tl.float32))
    apart = mean - level[None, :]
    return level, tl.sum(spread + seen * apart * apart, 0)


@triton.jit
def merged_moments(moments_ptr, slab_cells, cells, channel, known, CHANNELS: tl.constexpr):
    """`channel_moments` of all cells from those of the slabs."""
    mean = tl.zeros([channel.shape[0]], tl.float32)
    spread = tl.zeros([channel.shape[0]], tl.float32)
    for start in range(0, cells, slab_cells):
        place = start // slab_cells * 2 * CHANNELS + channel
        apart = tl.load(moments_ptr + place, mask=known, other=0.0) - mean
        count = tl.minimum(slab_cells, cells - start).to(tl.float32)
        share = tl.div_rn(count, start + count)
        spread += tl.load(moments_ptr + place + CHANNELS, mask=known, other=0.0) + apart * apart * start * share
        mean += apart * share
    return mean, spread


@triton.jit
def merged_sums(sums_ptr, slab_cells, cells, channel, known, CHANNELS: tl.constexpr):
    """Sums of the slabs' two sums by channel."""
    first = tl.zeros([channel.shape[0]], tl.float32)
    second = tl.zeros([channel.shape[0]], tl.float32)
    for start in range(0, cells, slab_cells):
        place = start // slab_cells * 2 * CHANNELS + channel
        first += tl.load(sums_ptr + place, mask=known, other=0.0)
        second += tl.load(sums_ptr + place + CHANNELS, mask=known, other=0.0)
    return first, second


@triton.jit
def group_sum(values, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """For each channel the sum over the channels of its group."""
    member = (tl.arange(0, values.shape[0]) // SIZE)[:, None] == tl.arange(0, GROUPS)[None, :]
    total = tl.sum(tl.where(member, values[:, None], 0.0), 0)
    return tl.sum(tl.where(member, total[None, :], 0.0), 1)


@triton.jit
def group_statistics(mean, spread, added, cells, eps, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """From the moments of x by channel, for x + added: (centre, 1/deviation, distance of the channel's mean), so that
    x - centre is x + added less the mean of its group."""
    count = cells.to(tl.float32)
    level = group_sum(mean + added, SIZE, GROUPS) * (1.0 / SIZE)
    apart = mean + added - level
    variance = tl.div_rn(group_sum(spread + count * apart * apart, SIZE, GROUPS), count * SIZE)
    return level - added, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), apart


@triton.jit
def channel_values(ptr, channel, known):
    """Numbers of these channels in float32."""
    return tl.load(ptr + channel, mask=known, other=0.0).to(tl.float32)


@triton.jit
def added_values(cond_ptr, x_bias_ptr, channel, known):
    """What is added to x in these channels, of the conditioning and the bias that there are."""
    total = tl.zeros([channel.shape[0]], tl.float32)
    if cond_ptr is not None:
        total += channel_values(cond_ptr, channel, known)
    if x_bias_ptr is not None:
        total += channel_values(x_bias_ptr, channel, known)
    return total


@triton.jit
def piece(CHANNELS: tl.constexpr, SHARE: tl.constexpr, COLUMNS: tl.constexpr):
    """(sample, its channels, which of them are there) of a program."""
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
    moments_ptr += (sample * tl.num_programs(1) + tl.program_id(1)) * 2 * CHANNELS
    tl.store(moments_ptr + channel, mean, mask=known)
    tl.store(moments_ptr + CHANNELS + channel, spread, mask=known)


@jit_kernel(do_not_specialize=["cells", "slab_cells"])
def group_norm_silu_forward(
    x_ptr, weight_ptr, bias_ptr, cond_ptr, x_bias_ptr, moments_ptr, out_ptr, cond_stride, cells, slab_cells, eps,
    SPLIT: tl.constexpr,
    CHANNELS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some groups of one sample, over all cells or, where SPLIT, over one slab with the moments of all given."""
    sample, channel, known = piece(CHANNELS, SHARE, COLUMNS)
    start = tl.program_id(1) * slab_cells
    stop = tl.minimum(start + slab_cells, cells)
    x_ptr += sample * cells * CHANNELS
    out_ptr += sample * cells * CHANNELS
    if SPLIT:
        moments_ptr += sample * tl.num_programs(1) * 2 * CHANNELS
        mean, spread = merged_moments(moments_ptr, slab_cells, cells, channel, known, CHANNELS)
    else:
        mean, spread = channel_moments(x_ptr, start, stop, channel, known, CHANNELS, ROWS)
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


@jit_kernel(do_not_specialize=["cells", "slab_cells"])
def group_norm_silu_backward(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, cond_ptr, x_bias_ptr, moments_ptr, sums_ptr, grad_x_ptr, grad_rest_ptr,
    cond_stride, cells, slab_cells, eps, SPLIT: tl.constexpr, LAST: tl.constexpr,
    CHANNELS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of some groups of one sample, over all cells; where SPLIT, over one slab: at first its sums by channel,
    and in the LAST launch, with those of all slabs given, the gradients."""
    sample, channel, known = piece(CHANNELS, SHARE, COLUMNS)
    start = tl.program_id(1) * slab_cells
    stop = tl.minimum(start + slab_cells, cells)
    x_ptr += sample * cells * CHANNELS
    grad_ptr += sample * cells * CHANNELS
    slab = sample * tl.num_programs(1) * 2 * CHANNELS
    if SPLIT:
        mean, spread = merged_moments(moments_ptr + slab, slab_cells, cells, channel, known, CHANNELS)
    else:
        mean, spread = channel_moments(x_ptr, start, stop, channel, known, CHANNELS, ROWS)
    if cond_ptr is not None:
        cond_ptr += sample * cond_stride
    added = added_values(cond_ptr, x_bias_ptr, channel, known)
    centre, rstd, apart = group_statistics(mean, spread, added, cells, eps, SIZE, GROUPS)
    weight = channel_values(weight_ptr, channel, known)
    bias = channel_values(bias_ptr, channel, known)
    if SPLIT and LAST:
        along_sum, level_sum = merged_sums(sums_ptr + slab, slab_cells, cells, channel, known, CHANNELS)
    else:
        alongs = tl.zeros([ROWS, COLUMNS], tl.float32)
        levels = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in tl.range(start, stop, ROWS, num_stages=2):
            row = first + tl.arange(0, ROWS)
            normed = (load_tile(x_ptr, row, stop, channel, known, CHANNELS) - centre[None, :]) * rstd[None, :]
            grad = load_tile(grad_ptr, row, stop, channel, known, CHANNELS)
            grad = silu_backward(grad, normed * weight[None, :] + bias[None, :])
            alongs += grad * normed
            levels += grad
        along_sum, level_sum = tl.sum(alongs, 0), tl.sum(levels, 0)
    if not LAST:
        sums_ptr += slab + tl.program_id(1) * 2 * CHANNELS
        tl.store(sums_ptr + channel, along_sum, mask=known)
        tl.store(sums_ptr + CHANNELS + channel, level_sum, mask=known)
    else:
        count = cells.to(tl.float32)
        along = tl.div_rn(group_sum(along_sum * weight, SIZE, GROUPS), count * SIZE)
        level = tl.div_rn(group_sum(level_sum * weight, SIZE, GROUPS), count * SIZE)
        if tl.program_id(1) == 0:
            grad_rest_ptr += sample * 3 * CHANNELS
            added_sum = rstd * (level_sum * weight - count * (level + along * apart * rstd))
            tl.store(grad_rest_ptr + channel, along_sum, mask=known)
            tl.store(grad_rest_ptr + CHANNELS + channel, level_sum, mask=known)
            tl.store(grad_rest_ptr + 2 * CHANNELS + channel, added_sum, mask=known)
        for first in tl.range(start, stop, ROWS, num_stages=2):
            row = first + tl.arange(0, ROWS)
            normed = (load_tile(x_ptr, row, stop, channel, known, CHANNELS) - centre[None, :]) * rstd[None, :]
            grad = load_tile(grad_ptr, row, stop, channel, known, CHANNELS)
            grad = silu_backward(grad, normed * weight[None, :] + bias[None, :]) * weight[None, :]
            grad = rstd[None, :] * (grad - level[None, :] - normed * along[None, :])
            store_tile(grad_x_ptr + sample * cells * CHANNELS, row, stop, channel, known, grad, CHANNELS)


@functools.cache
def _tile(channels: int, groups: int, elements: int) -> tuple[int, dict[str, int]]:
    """(programs a sample, their constants): as few whole groups as start at 16 bytes and are at least 32 channels."""
    size = channels // groups
    step = 8 // math.gcd(size, 8)
    if step * size > 128:
        step = 1
    share = min(step * cdiv(32, step * size), groups) * size
    columns = next_power_of_2(share)
    rows = max(elements // columns, 1)
    sizes = {"CHANNELS": channels, "SHARE": share, "SIZE": size, "GROUPS": next_power_of_2(share // size)}
    return cdiv(channels, share), sizes | {"ROWS": rows, "COLUMNS": columns}


@functools.cache
def _forward_kernel(channels: int, groups: int, split: bool) -> Kernel:
    return group_norm_silu_forward.bind(SPLIT=split, **_tile(channels, groups, 4096)[1], num_warps=8)


def _slabs(batch: int, pieces: int, cells: int) -> tuple[int, int]:
    """(cells of a slab, slabs of a sample): as many as fill the GPU, with at least 256 cells each."""
    if cells <= WHOLE:
        return cells, 1
    slab_cells = min(max(cdiv(cells * batch * pieces, FILL), 256), cells)
    return slab_cells, cdiv(cells, slab_cells)


def _moments(x, slab_cells, slabs, pieces, tile):
    """(B, slabs, 2, C) where the cells are cut into slabs, else None."""
    batch, channels, height, width = x.shape
    if height * width <= WHOLE:
        return None
    moments = torch.empty(batch, slabs, 2, channels, dtype=torch.float32, device=x.device)
    slab_moments[(batch * pieces, slabs)](x, moments, height * width, slab_cells, **tile, num_warps=8)
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
        pieces, tile = _tile(channels, groups, 4096)
        slab_cells, slabs = _slabs(batch, pieces, height * width)
        moments = _moments(x, slab_cells, slabs, pieces, tile)
        kernel = _forward_kernel(channels, groups, moments is not None)
        kernel[(batch * pieces, slabs)](
            x, weight, bias, cond, x_bias, moments, out, 0 if cond is None else cond.stride(0),
            height * width, slab_cells, eps,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(grad, needs, x, weight, bias, cond, x_bias, groups, eps):
        batch, channels, height, width = x.shape
        rest = weight, bias, cond, x_bias
        if x.numel() == 0:
            return tuple(None if t is None else torch.zeros_like(t) for t in (x, *rest))
        grad = grad.contiguous(memory_format=torch.channels_last)
        pieces, tile = _tile(channels, groups, 2048)
        slab_cells, slabs = _slabs(batch, pieces, height * width)
        moments = _moments(x, slab_cells, slabs, pieces, tile)
        grad_x = torch.empty_like(x, memory_format=torch.channels_last)
        grad_rest = torch.empty(batch, 3, channels, dtype=torch.float32, device=x.device)
        sums = None if moments is None else torch.empty_like(moments)
        for last in (True,) if moments is None else (False, True):
            group_norm_silu_backward[(batch * pieces, slabs)](
                grad, x, *(_unit_stride(t) for t in rest), moments, sums, grad_x, grad_rest,
                0 if cond is None else _unit_stride(cond).stride(0), height * width, slab_cells, eps,
                SPLIT=moments is not None, LAST=last, **tile, num_warps=8,
            )  # fmt: skip
        total = grad_rest.sum(0)
        grads = total[0], total[1], grad_rest[:, 2], total[2]
        return grad_x, *(None if t is None else g.to(t.dtype) for g, t in zip(grads, rest, strict=True))


def _unit_stride(values):
    """A vector, or rows, with unit stride inside; None stays None."""
    return values if values is None or values.stride(-1) == 1 else values.contiguous()
