"""GroupNorm–SiLU on the CPU, in csrc/group_norm_cpu.cpp: the channels of some groups are read for the statistics and,
most of them from the cache, to write."""

from __future__ import annotations

import torch

from ..reference._packed import accumulate_dtype
from ._rows import address, kernel, threads


class GroupNormSiLU:
    """SiLU(GroupNorm(x + x_bias + cond))."""

    @staticmethod
    def forward(x, weight, bias, cond, x_bias, groups, eps):
        dtype = x.dtype if x.dtype is torch.bfloat16 else accumulate_dtype(x)  # bfloat16 is widened as it is read
        sizes, wide = _prepared(dtype, groups, eps, x, weight, bias, cond, x_bias)
        # Of one sample strides may be of either layout: the convolution after would copy.
        out = torch.empty_like(wide[0], memory_format=torch.channels_last)
        kernel("group_norm_silu", out.dtype)(*sizes, [*map(address, wide), out.data_ptr()], threads(out))
        return out.to(x.dtype)

    @staticmethod
    def backward(grad, needs, x, weight, bias, cond, x_bias, groups, eps):
        given = x, weight, bias, cond, x_bias
        sizes, wide = _prepared(accumulate_dtype(x), groups, eps, *given)
        grad = grad.to(wide[0].dtype).contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(wide[0])
        rest = grad_x.new_empty(x.shape[0], 3, x.shape[1])
        addresses = [grad.data_ptr(), *map(address, wide), grad_x.data_ptr(), rest.data_ptr()]
        kernel("group_norm_silu_backward", grad.dtype)(*sizes, addresses, threads(grad_x))
        total = rest.sum(0)
        grads = grad_x, total[0], total[1], rest[:, 2], total[2]
        return tuple(None if t is None else g.to(t.dtype) for g, t in zip(grads, given, strict=True))


def _prepared(dtype, groups, eps, x, weight, bias, cond, x_bias):
    """(sizes, x in `dtype` and the vectors in that of the sums); x is channels-last, a vector's numbers lie side by
    side."""
    x, total = x.to(dtype), accumulate_dtype(x)
    vectors = [v if v is None else v.to(total) for v in (weight, bias, cond, x_bias)]
    vectors = [v if v is None or v.stride(-1) == 1 else v.contiguous() for v in vectors]
    pitch = 0 if cond is None else vectors[2].stride(0)
    return (x.shape[0], x.shape[2] * x.shape[3], x.shape[1], groups, pitch, eps), (x, *vectors)
