"""Triton kernel of GroupNorm–SiLU where a program holds whole groups of a sample: one launch.

A program takes as many groups as fit 16 channels, or one of up to 32, over all cells of one sample. It reads whole 16
bytes, some channels of its neighbours among them, three times: for the mean, the deviation and the result, from the L1
cache after the first. Bytes for N elements of e bytes:
2·N·e. At a batch of one the launch that it saves counts more, and narrow tiles, because they busy more of the GPU.
"""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl

from ._group_moments import added_values, channel_values, group_statistics, of_channels, sigmoid
from ._launch import Kernel, jit_kernel
from ._rows import cdiv, next_power_of_2

# Channels that a program reads, with a large group; cells of a program, of a step; channels of a load of 16 bytes.
COLUMNS, WIDEST, CELLS, ROWS, ALIGNED = 16, 32, 1024, 512, 8


@jit_kernel(do_not_specialize=["cells"])
def group_norm_silu_whole(
    x_ptr, weight_ptr, bias_ptr, cond_ptr, x_bias_ptr, out_ptr, cond_stride, cells, eps,
    CHANNELS: tl.constexpr, OWN: tl.constexpr, SIZE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """The result of OWN channels, whole groups of SIZE, of one sample."""
    pieces: tl.constexpr = (CHANNELS + OWN - 1) // OWN
    sample, start = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces * OWN
    channel = start // ALIGNED * ALIGNED + tl.arange(0, COLUMNS)
    known = channel < CHANNELS
    own = known & (channel >= start) & (channel < start + OWN)
    row = tl.arange(0, ROWS)[:, None]
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

    if cond_ptr is not None:
        cond_ptr += sample * cond_stride
    added = added_values(cond_ptr, x_bias_ptr, channel, CHANNELS)
    group = start // SIZE + tl.arange(0, GROUPS)
    level, rstd = group_statistics(mean + added, tl.sum(spread, 0), channel, group, cells, eps, SIZE)
    centre = of_channels(level, group, channel, SIZE) - added
    factor = of_channels(rstd, group, channel, SIZE) * channel_values(weight_ptr, channel, CHANNELS)
    bias = channel_values(bias_ptr, channel, CHANNELS)
    out_ptr += sample * cells * CHANNELS
    for first in tl.range(0, cells, ROWS, loop_unroll_factor=UNROLLED):
        inside = row < cells - first
        x = tl.load(x_ptr + first * CHANNELS + place, mask=inside & known[None, :], other=0.0).to(tl.float32)
        normed = (x - centre[None, :]) * factor[None, :] + bias[None, :]
        out = (normed * sigmoid(normed)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + first * CHANNELS + place, out, mask=inside & own[None, :])


@functools.cache
def whole_kernel(channels: int, groups: int, cells: int) -> tuple[Kernel, int] | None:
    """The kernel and its programs for a sample, or None where a program cannot hold a group."""
    size = channels // groups
    # A program reads from a multiple of ALIGNED on, up to so many channels before its own.
    wide = {own: own + ALIGNED - math.gcd(own, ALIGNED) for own in range(size, channels + 1, size)}
    own = max((own for own in wide if wide[own] <= COLUMNS), default=size)
    if cells > CELLS or wide[own] > WIDEST:
        return None
    columns, rows = next_power_of_2(wide[own]), min(next_power_of_2(cells), ROWS)
    # Below this bound the assembler aims at 64 registers, and spills.
    limit = {"maxnreg": 128} if columns < WIDEST and torch.version.hip is None else {}
    kernel = group_norm_silu_whole.bind(
        CHANNELS=channels, OWN=own, SIZE=size, ALIGNED=ALIGNED, ROWS=rows, COLUMNS=columns,
        GROUPS=next_power_of_2(own // size), UNROLLED=cdiv(cells, rows),
        num_warps=16 if rows * columns > 4096 else 8, **limit,
    )  # fmt: skip
    return kernel, cdiv(channels, own)
