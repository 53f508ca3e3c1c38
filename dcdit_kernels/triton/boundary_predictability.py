"""Triton kernels of the predictability score: GroupNorm, SiLU, weighted sum over channels, sigmoid, forced ends.

Bytes for N = B·C·H·W features of e bytes: forward 2·N·e (statistics, then scores), backward 5·N·e (statistics, scores,
sums by channel, gradient: four readings and one writing). Scores, statistics and sums are small beside them. Every
second reading goes through the samples backwards, so that the last ones of the reading before come from the cache.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._launch import jit_kernel
from ._rows import cdiv, next_power_of_2
from .group_norm import sigmoid


@jit_kernel()
def group_statistics(
    x_ptr, mean_ptr, rstd_ptr, x_batch, x_channel, x_cell, channels, cells, eps,
    SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Mean and 1/deviation of one group of one sample, block after block (Chan's update), in one reading."""
    groups = channels // SIZE
    group = tl.program_id(0) % groups
    x_ptr += (tl.program_id(0) // groups).to(tl.int64) * x_batch
    mean = 0.0
    spread = 0.0
    seen = 0.0
    for first in range(0, SIZE, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        for start in range(0, cells, BLOCK_L):
            cell = start + tl.arange(0, BLOCK_L)
            inside = (channel[:, None] < SIZE) & (cell[None, :] < cells)
            place = (group * SIZE + channel).to(tl.int64)[:, None] * x_channel + cell.to(tl.int64)[None, :] * x_cell
            x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
            count = (tl.minimum(SIZE - first, BLOCK_C) * tl.minimum(cells - start, BLOCK_L)).to(tl.float32)
            own = tl.div_rn(tl.sum(x), count)
            centred = tl.where(inside, x - own, 0.0)
            delta = own - mean
            total = seen + count
            spread += tl.sum(centred * centred) + delta * delta * tl.div_rn(seen * count, total)
            mean += delta * tl.div_rn(count, total)
            seen = total
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(spread, seen) + eps)))


@triton.jit
def load_features(
    x_ptr, mean_ptr, rstd_ptr, image, channel, cell, x_batch, x_channel, x_cell, channels, SIZE: tl.constexpr, cells
):  # fmt: skip
    """(x̂, rstd by channel): normalised features of a block (channels, cells), zero outside."""
    known = channel < channels
    group = image * (channels // SIZE) + channel // SIZE
    mean = tl.load(mean_ptr + group, mask=known, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=known, other=0.0)
    inside = known[:, None] & (cell[None, :] < cells)
    place = image * x_batch + channel.to(tl.int64)[:, None] * x_channel + cell.to(tl.int64)[None, :] * x_cell
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0), rstd


@triton.jit
def last_first(blocks):
    """The sample of a program, `blocks` programs a sample, the last sample first."""
    return ((tl.num_programs(0) - 1 - tl.program_id(0)) // blocks).to(tl.int64)


@triton.jit
def channel_values(ptr, channel, channels):
    """A parameter (C,) at these channels in float32."""
    return tl.load(ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)


@jit_kernel()
def predictability_score(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, score_ptr, score_bias_ptr, grad_ptr, out_ptr,
    x_batch, x_channel, x_cell, channels, cells,
    SIZE: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """p of some cells of one sample; with BACKWARD the gradient of the logit instead."""
    blocks = tl.cdiv(cells, BLOCK_L)
    image = last_first(blocks)
    cell = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    parts = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        x, _ = load_features(
            x_ptr, mean_ptr, rstd_ptr, image, channel, cell, x_batch, x_channel, x_cell, channels, SIZE, cells
        )
        weight = channel_values(weight_ptr, channel, channels)[:, None]
        normed = x * weight + channel_values(bias_ptr, channel, channels)[:, None]
        parts += normed * sigmoid(normed) * channel_values(score_ptr, channel, channels)[:, None]
    prob = tl.sigmoid(tl.sum(parts, 0) + tl.load(score_bias_ptr).to(tl.float32))
    end = (cell == 0) | (cell == cells - 1)
    inside = cell < cells
    out = tl.where(end, 1.0, prob)
    if BACKWARD:
        grad = tl.load(grad_ptr + image * cells + cell, mask=inside, other=0.0)
        out = tl.where(end, 0.0, grad * prob * (1 - prob))
    tl.store(out_ptr + image * cells + cell, out, mask=inside)


@jit_kernel()
def channel_sums(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, score_ptr, logit_ptr, sums_ptr,
    x_batch, x_channel, x_cell, channels, cells,
    SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Sums over one sample's cells for some channels: gradients of norm_weight, norm_bias and score_weight."""
    blocks = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = channel_values(weight_ptr, channel, channels)[:, None]
    bias = channel_values(bias_ptr, channel, channels)[:, None]
    score = channel_values(score_ptr, channel, channels)[:, None]
    weight_sum = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    bias_sum = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    score_sum = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    for start in tl.range(0, cells, BLOCK_L, num_stages=3):
        cell = start + tl.arange(0, BLOCK_L)
        x, _ = load_features(
            x_ptr, mean_ptr, rstd_ptr, image, channel, cell, x_batch, x_channel, x_cell, channels, SIZE, cells
        )
        logit = tl.load(logit_ptr + image * cells + cell, mask=cell < cells, other=0.0)[None, :]
        normed = x * weight + bias
        gate = sigmoid(normed)
        score_sum += logit * normed * gate
        grad = logit * score * (gate * (1 + normed * (1 - gate)))
        bias_sum += grad
        weight_sum += grad * x
    place = sums_ptr + image * channels + channel
    step = tl.num_programs(0).to(tl.int64) // blocks * channels
    tl.store(place, tl.sum(weight_sum, 1), mask=channel < channels)
    tl.store(place + step, tl.sum(bias_sum, 1), mask=channel < channels)
    tl.store(place + 2 * step, tl.sum(score_sum, 1), mask=channel < channels)


@jit_kernel()
def predictability_backward(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, score_ptr, logit_ptr, projection_ptr, level_ptr, out_ptr,
    x_batch, x_channel, x_cell, channels, cells, out_batch, out_channel, out_cell,
    SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dx = rstd·(dx̂ - mean(dx̂) - x̂·mean(dx̂·x̂)), the means of each group given."""
    blocks = tl.cdiv(channels, BLOCK_C)
    steps = tl.cdiv(cells, BLOCK_L)
    image = last_first(blocks * steps)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    cell = tl.program_id(0) // blocks % steps * BLOCK_L + tl.arange(0, BLOCK_L)
    x, rstd = load_features(
        x_ptr, mean_ptr, rstd_ptr, image, channel, cell, x_batch, x_channel, x_cell, channels, SIZE, cells
    )
    weight = channel_values(weight_ptr, channel, channels)[:, None]
    normed = x * weight + channel_values(bias_ptr, channel, channels)[:, None]
    logit = tl.load(logit_ptr + image * cells + cell, mask=cell < cells, other=0.0)[None, :]
    gate = sigmoid(normed)
    grad = logit * channel_values(score_ptr, channel, channels)[:, None] * (gate * (1 + normed * (1 - gate))) * weight
    known = channel < channels
    group = image * (channels // SIZE) + channel // SIZE
    projection = tl.load(projection_ptr + group, mask=known, other=0.0)[:, None]
    level = tl.load(level_ptr + group, mask=known, other=0.0)[:, None]
    out = rstd[:, None] * (grad - level - x * projection)
    place = image * out_batch + channel.to(tl.int64)[:, None] * out_channel + cell.to(tl.int64)[None, :] * out_cell
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=known[:, None] & (cell[None, :] < cells))


def _flat(features, *parameters):
    """(features (B, C, L), copied only where H and W are not one axis; its strides; contiguous parameters)."""
    x = features.flatten(2)
    return x, x.stride(), [p.contiguous() for p in parameters]


def _statistics(x, groups, eps):
    """Mean and 1/deviation, each (B, groups)."""
    batch, channels, cells = x.shape
    size = channels // groups
    mean = torch.empty(batch, groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    _statistics_kernel(size)[(batch * groups,)](x, mean, rstd, *x.stride(), channels, cells, eps)
    return mean, rstd


@functools.cache
def _statistics_kernel(size):
    block = min(next_power_of_2(size), 64)
    return group_statistics.bind(SIZE=size, BLOCK_C=block, BLOCK_L=8192 // block, num_warps=8)


def _scores(x, statistics, parameters, grad, groups):
    """p (B, L), or with the gradient of p the logit's gradient."""
    batch, channels, cells = x.shape
    out = torch.empty(batch, cells, dtype=torch.float32, device=x.device)
    _score_kernel(channels // groups, grad is not None)[(batch * cdiv(cells, 32),)](
        x, *statistics, *parameters, grad, out, *x.stride(), channels, cells
    )
    return out


@functools.cache
def _score_kernel(size, backward):
    return predictability_score.bind(SIZE=size, BACKWARD=backward, BLOCK_C=64, BLOCK_L=32, num_warps=8)


class BoundaryPredictability:
    """p = sigmoid(w · SiLU(GroupNorm(x)) + b), ends forced to 1."""

    @staticmethod
    def forward(features, norm_weight, norm_bias, score_weight, score_bias, groups, eps):
        if features.numel() == 0:
            return features.new_empty(features.shape[0], features.shape[2] * features.shape[3], dtype=torch.float32)
        x, _, parameters = _flat(features, norm_weight, norm_bias, score_weight, score_bias)
        return _scores(x, _statistics(x, groups, eps), parameters, None, groups)

    @staticmethod
    def backward(grad, needs, features, norm_weight, norm_bias, score_weight, score_bias, groups, eps):
        inputs = (features, norm_weight, norm_bias, score_weight, score_bias)
        if features.numel() == 0:
            return tuple(torch.zeros_like(t) for t in inputs)
        x, strides, parameters = _flat(*inputs)
        batch, channels, cells = x.shape
        shape, size = (*strides, channels, cells), channels // groups
        statistics = _statistics(x, groups, eps)
        logit = _scores(x, statistics, parameters, grad.contiguous(), groups)
        sums = torch.empty(3, batch, channels, dtype=torch.float32, device=x.device)
        common = (x, *statistics, *parameters[:3], logit)
        channel_sums[(batch * cdiv(channels, 16),)](
            *common, sums, *shape, SIZE=size, BLOCK_C=16, BLOCK_L=64, num_warps=4
        )  # fmt: skip
        means = (sums[:2] * parameters[0].float()).view(2, batch, groups, -1).sum(-1) / (size * cells)
        last = features.is_contiguous(memory_format=torch.channels_last)  # as the convolution before takes it
        grad_x = torch.empty_like(features, memory_format=(torch.contiguous_format, torch.channels_last)[last])
        predictability_backward[(batch * cdiv(channels, 16) * cdiv(cells, 64),)](
            *common, *means, grad_x, *shape, *grad_x.flatten(2).stride(), SIZE=size, BLOCK_C=16, BLOCK_L=64, num_warps=4
        )  # fmt: skip
        shared = (*(part.sum(0) for part in sums), logit.sum().view(score_bias.shape))
        return grad_x, *(g.to(t.dtype) for g, t in zip(shared, inputs[1:], strict=True))
