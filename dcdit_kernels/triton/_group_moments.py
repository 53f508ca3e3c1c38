"""Mean and deviation of groups of channels, channels-last, from moments that are kept by slab of cells and channel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_places(first, stop, channel, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """(offsets from cell `first` of a sample, which exist) of ROWS cells × channels."""
    row = tl.arange(0, ROWS)
    inside = (row < stop - first)[:, None] & (channel < CHANNELS)[None, :]
    return row[:, None] * CHANNELS + channel[None, :], inside


@triton.jit
def load_tile(ptr, first, stop, channel, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Cells × channels of one sample, zero outside."""
    place, inside = tile_places(first, stop, channel, CHANNELS, ROWS)
    return tl.load(ptr + first.to(tl.int64) * CHANNELS + place, mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, first, stop, channel, values, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """The same cells × channels of another tensor, in its dtype."""
    place, inside = tile_places(first, stop, channel, CHANNELS, ROWS)
    tl.store(ptr + first.to(tl.int64) * CHANNELS + place, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def channel_moments(x_ptr, start, stop, channel, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """(mean, sum of squared deviations) of each channel over the cells [start, stop): of a tile in registers, and tile
    after tile by Chan's update."""
    mean = tl.zeros([channel.shape[0]], tl.float32)
    spread = tl.zeros([channel.shape[0]], tl.float32)
    for seen in range(0, stop - start, ROWS):
        first = start + seen
        count = tl.minimum(stop - first, ROWS)
        x = load_tile(x_ptr, first, stop, channel, CHANNELS, ROWS).to(tl.float32)
        own = tl.sum(x, 0) * tl.div_rn(1.0, count.to(tl.float32))
        centred = tl.where((tl.arange(0, ROWS) < count)[:, None], x - own[None, :], 0.0)
        delta = own - mean
        share = tl.div_rn(count.to(tl.float32), (seen + count).to(tl.float32))
        mean += delta * share
        spread += tl.sum(centred * centred, 0) + delta * delta * (share * seen)
    return mean, spread


@triton.jit
def slab_pairs(ptr, cells, slab_cells, channel, CHANNELS: tl.constexpr, SLABS: tl.constexpr):
    """(channels, SLABS) twice, what each slab of a sample holds of these channels; cells of each slab; zero outside.
    Slabs that a small sample lacks are read for the sake of wide loads."""
    slab = tl.arange(0, SLABS)[None, :]
    place = channel[:, None] * SLABS + slab
    known = (channel < CHANNELS)[:, None]
    first = tl.load(ptr + place, mask=known, other=0.0)
    second = tl.load(ptr + CHANNELS * SLABS + place, mask=known, other=0.0)
    count = tl.maximum(tl.minimum(cells - slab * slab_cells, slab_cells), 0)
    return tl.where(count > 0, first, 0.0), tl.where(count > 0, second, 0.0), count.to(tl.float32)


@triton.jit
def store_pair(ptr, slab, channel, first, second, CHANNELS: tl.constexpr, SLABS: tl.constexpr):
    """Two numbers of each channel that belong to a slab."""
    ptr += channel * SLABS + slab
    tl.store(ptr, first, mask=channel < CHANNELS)
    tl.store(ptr + CHANNELS * SLABS, second, mask=channel < CHANNELS)


@triton.jit
def merged_mean(means, count, cells):
    """Mean over all cells from the slabs' means."""
    return tl.sum(means * count, 1) * tl.div_rn(1.0, cells.to(tl.float32))


@triton.jit
def group_window(start, SIZE: tl.constexpr, GROUPS: tl.constexpr, WINDOW: tl.constexpr):
    """(groups from the one of channel `start` on, channels from the first of it on)."""
    group = start // SIZE
    return group + tl.arange(0, GROUPS), group * SIZE + tl.arange(0, WINDOW)


@triton.jit
def group_sum(values, near, group, SIZE: tl.constexpr):
    """Sums over the channels `near` by group."""
    member = (near // SIZE)[:, None] == group[None, :]
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def of_channels(values, group, channel, SIZE: tl.constexpr):
    """The number of each channel's group."""
    member = (channel // SIZE)[:, None] == group[None, :]
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)


@triton.jit
def group_statistics(mean, spread, near, group, cells, eps, SIZE: tl.constexpr):
    """(mean, 1/deviation) of each group from the moments of its channels."""
    count = cells.to(tl.float32)
    level = group_sum(mean, near, group, SIZE) * (1.0 / SIZE)
    member = (near // SIZE)[:, None] == group[None, :]
    delta = mean[:, None] - level[None, :]
    parts = tl.where(member, spread[:, None] + count * delta * delta, 0.0)
    variance = tl.sum(parts, 0) * tl.div_rn(1.0, count * SIZE)
    return level, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
