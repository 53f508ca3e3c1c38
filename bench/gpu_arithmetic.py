"""Triton's interpreter with a GPU's narrow arithmetic: bfloat16 rounded to nearest even, tensor cores in TF32.

The interpreter holds bfloat16 as integers: it cuts where it should round, and adds the integers where a kernel adds
without a cast to float32, which no comparison with float64 survives. Its tl.dot is always float32; tensor cores that
are asked for TF32 read the first 10 of the 23 bits, and for TF32x3 multiply what is rounded to them and what that left.
"""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from dcdit_kernels import _triton_support


@contextmanager
def gpu_arithmetic():
    """Within it kernels compute as a GPU would, and `backend="triton"` takes bfloat16 on the CPU."""
    builder = interpreter.interpreter_builder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounded_cast(source, to):
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(source, to)
        rounded = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    def parts(t):
        """t and what is left of it, each rounded to TF32."""
        high = tf32(t, rounded=True)
        return high, tf32(interpreter.TensorHandle(t.data - high.data, t.dtype), rounded=True)

    def tensor_core(a, b, total, precision, *rest):
        if precision == ir.INPUT_PRECISION.TF32:
            return dot(tf32(a), tf32(b), total, precision, *rest)
        if precision == ir.INPUT_PRECISION.TF32x3:
            (a, a_low), (b, b_low) = parts(a), parts(b)
            small = dot(a, b_low, dot(a_low, b, total, precision, *rest), precision, *rest)
            return dot(a, b, small, precision, *rest)
        return dot(a, b, total, precision, *rest)

    with (
        patch.object(builder, "cast_impl", rounded_cast),
        patch.object(builder, "create_dot", tensor_core),
        patch.object(_triton_support, "INTERPRETED_WRONGLY", ()),
    ):
        yield


def tf32(t, rounded=False):
    """The first 10 bits of the fraction: cut, as tensor cores do, or rounded, half away from zero."""
    bits = t.data.view(np.uint32) + (0x1000 if rounded else 0)
    return interpreter.TensorHandle((bits & 0xFFFFE000).astype(np.uint32).view(np.float32), t.dtype)
