"""Mean and deviation of groups of channels, for kernels that take whole groups of a sample, channels-last."""

from __future__ import annotations

import triton
import triton.language as tl


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
        delta = tl.where((first + lane < stop)[:, None], x - mean, 0.0)
        mean += delta * tl.div_rn(1.0, tl.zeros([1, 1], tl.float32) + ((first - start) // ROWS + 1))
        spread += delta * (x - mean)
    seen = tl.maximum((stop - start - lane + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    level = tl.div_rn(tl.sum(mean * seen, 0), (stop - start).to(tl.float32))
    delta = mean - level[None, :]
    return level, tl.sum(spread + seen * delta * delta, 0)


@triton.jit
def merge(mean, spread, seen, own_mean, own_spread, count):
    """Moments of the cells so far and of `count` more, by Chan's update."""
    delta = own_mean - mean
    share = tl.div_rn(count.to(tl.float32), (seen + count).to(tl.float32))
    return mean + delta * share, spread + own_spread + delta * delta * (seen * share)


@triton.jit
def all_moments(
    x_ptr, moments_ptr, cells, slab_cells, channel, known, WHOLE: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Moments of each channel over all cells, slab by slab; the slabs' moments are given unless WHOLE."""
    mean = tl.zeros([channel.shape[0]], tl.float32)
    spread = tl.zeros([channel.shape[0]], tl.float32)
    if WHOLE:
        for start in range(0, cells, slab_cells):
            stop = tl.minimum(start + slab_cells, cells)
            own_mean, own_spread = channel_moments(x_ptr, start, stop, channel, known, CHANNELS, ROWS)
            mean, spread = merge(mean, spread, start, own_mean, own_spread, stop - start)
    else:
        for start in range(0, cells, slab_cells):
            own_mean, own_spread = load_pair(moments_ptr, start // slab_cells, channel, known, CHANNELS)
            mean, spread = merge(mean, spread, start, own_mean, own_spread, tl.minimum(slab_cells, cells - start))
    return mean, spread


@triton.jit
def load_pair(ptr, slab, channel, known, CHANNELS: tl.constexpr):
    """Two numbers of each channel that belong to a slab."""
    ptr += slab * 2 * CHANNELS
    first = tl.load(ptr + channel, mask=known, other=0.0)
    return first, tl.load(ptr + CHANNELS + channel, mask=known, other=0.0)


@triton.jit
def store_pair(ptr, slab, channel, known, first, second, CHANNELS: tl.constexpr):
    """The inverse of `load_pair`."""
    ptr += slab * 2 * CHANNELS
    tl.store(ptr + channel, first, mask=known)
    tl.store(ptr + CHANNELS + channel, second, mask=known)


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
    delta = mean + added - level
    variance = tl.div_rn(group_sum(spread + count * delta * delta, SIZE, GROUPS), count * SIZE)
    return level - added, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), delta
