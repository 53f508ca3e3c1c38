"""Triton's interpreter with a GPU's narrow arithmetic: bfloat16 rounded to nearest even, tensor cores in TF32.

The interpreter holds bfloat16 as integers: it cuts where it should round, and adds the integers where a kernel adds
without a cast to float32, which no comparison with float64 survives. Its tl.dot is always float32; tensor cores that
are asked for TF32 read the first 10 of the 23 bits.
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

    def tf32(t):
        return interpreter.TensorHandle((t.data.view(np.uint32) & 0xFFFFE000).view(np.float32), t.dtype)

    def rest_of(t):
        return tf32(interpreter.TensorHandle(t.data - tf32(t).data, t.dtype))

    def tensor_core(a, b, total, precision, *rest):
        if precision == ir.INPUT_PRECISION.TF32:
            return dot(tf32(a), tf32(b), total, precision, *rest)
        if precision == ir.INPUT_PRECISION.TF32x3:
            small = dot(tf32(a), rest_of(b), dot(rest_of(a), tf32(b), total, precision, *rest), precision, *rest)
            return dot(tf32(a), tf32(b), small, precision, *rest)
        return dot(a, b, total, precision, *rest)

    with (
        patch.object(builder, "cast_impl", rounded_cast),
        patch.object(builder, "create_dot", tensor_core),
        patch.object(_triton_support, "INTERPRETED_WRONGLY", ()),
    ):
        yield
