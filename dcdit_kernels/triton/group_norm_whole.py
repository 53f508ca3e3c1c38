"""Triton kernel of GroupNorm–SiLU where a program holds whole groups of a sample: one launch.

A program takes as many groups as fit 16 channels, or one of up to 32, over all cells of one sample. It reads them three
times, for the mean, the deviation and the result, from the L1 cache after the first. Bytes for N elements of e bytes:
2·N·e. At a batch of one the launch that it saves counts more, and narrow tiles, because they busy more of the GPU.
"""

from __future__ import annotations

import functools
import math

import triton.language as tl

from ._group_moments import group_statistics, of_channels, sigmoid
from ._launch import Kernel, jit_kernel
from ._rows import cdiv, next_power_of_2

# Channels of a program, of a group at most; cells of a program at most, of a step.
COLUMNS, WIDEST, CELLS, ROWS = 16, 32, 1024, 512


@jit_kernel(do_not_specialize=["cells"])
def group_norm_silu_whole(
    x_ptr, weight_ptr, bias_ptr, cond_ptr, x_bias_ptr, out_ptr, cond_stride, cells, eps,
    CHANNELS: tl.constexpr, OWN: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """The result of OWN channels, whole groups of SIZE, of one sample."""
    pieces: tl.constexpr = (CHANNELS + OWN - 1) // OWN
    sample, start = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces * OWN
    own, row = tl.arange(0, COLUMNS), tl.arange(0, ROWS)[:, None]
    channel = start + own
    known = (own < OWN) & (channel < CHANNELS)
    place = row * CHANNELS + channel[None, :]
    x_ptr += sample * cells * CHANNELS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, cells, ROWS, loop_unroll_factor=UNROLLED):
        inside = (row < cells - first) & known[None, :]
        total += tl.load(x_ptr + first * CHANNELS + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) * tl.div_rn(1.0, cells.to(tl.float32))
    spread = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, cells, ROWS, loop_unroll_factor=UNROLLED):
        inside = (row < cells - first) & known[None, :]
        x = tl.load(x_ptr + first * CHANNELS + place, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - mean[None, :], 0.0)
        spread += centred * centred

    added = tl.zeros([COLUMNS], tl.float32)
    if cond_ptr is not None:
        added += tl.load(cond_ptr + sample * cond_stride + channel, mask=known, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        added += tl.load(x_bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    group = tl.arange(0, GROUPS)
    level, rstd = group_statistics(mean + added, tl.sum(spread, 0), own, group, cells, eps, SIZE)
    centre = of_channels(level, group, own, SIZE) - added
    factor = of_channels(rstd, group, own, SIZE) * weight
    out_ptr += sample * cells * CHANNELS
    for first in tl.range(0, cells, ROWS, loop_unroll_factor=UNROLLED):
        inside = (row < cells - first) & known[None, :]
        x = tl.load(x_ptr + first * CHANNELS + place, mask=inside, other=0.0).to(tl.float32)
        normed = (x - centre[None, :]) * factor[None, :] + bias[None, :]
        out = (normed * sigmoid(normed)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + first * CHANNELS + place, out, mask=inside)


@functools.cache
def whole_kernel(channels: int, groups: int, cells: int) -> tuple[Kernel, int] | None:
    """The kernel and its programs for a sample, or None where a program cannot hold a group."""
    size = channels // groups
    if cells > CELLS or size > WIDEST:
        return None
    # Wide loads before many groups: a program's channels begin at a multiple of their number.
    most = max(COLUMNS // size, 1)
    own = size * max(range(1, most + 1), key=lambda count: (math.gcd(count * size, 8), count))
    columns, rows = next_power_of_2(own), min(next_power_of_2(cells), ROWS)
    kernel = group_norm_silu_whole.bind(
        CHANNELS=channels, OWN=own, SIZE=size, ROWS=rows, COLUMNS=columns, GROUPS=next_power_of_2(cdiv(columns, size)),
        UNROLLED=cdiv(cells, rows), num_warps=16 if rows * columns > 4096 else 8,
    )  # fmt: skip
    return kernel, cdiv(channels, own)
