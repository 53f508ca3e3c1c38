"""Triton's interpreter with a GPU's arithmetic: bfloat16 rounded to nearest even, TF32, approximate division and roots.

The interpreter holds bfloat16 as integers: it cuts where it should round, and adds the integers where a kernel adds
without a cast to float32, which no comparison with float64 survives. Its tl.dot is always float32; tensor cores that
are asked for TF32 read the first 10 of the 23 bits, and for TF32x3 multiply what is rounded to them and what that left.
PTX's div.full, sqrt.approx and ex2.approx are off by up to 2⁻²²: here by anything within that, always the same.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from dcdit_kernels import _triton_support

APPROXIMATE = ("create_fdiv", "create_sqrt", "create_exp", "create_exp2", "create_log", "create_log2")


@contextmanager
def gpu_arithmetic():
    """Within it kernels compute as a GPU would, and `backend="triton"` takes bfloat16 on the CPU. Nothing on a GPU."""
    if torch.cuda.is_available():
        yield
        return
    builder = interpreter.interpreter_builder
    cast, dot = builder.cast_impl, builder.create_dot
    random = np.random.default_rng(0)

    def approximate(exact):
        def rough(*args):
            out = exact(*args)
            off = random.uniform(-(2.0**-22), 2.0**-22, np.shape(out.data))
            return interpreter.TensorHandle((out.data * (1 + off)).astype(out.data.dtype), out.dtype)

        return rough

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
        if a.dtype != tl.float32:  # products of half-precision numbers are exact in float32
            return dot(cast(a, tl.float32), cast(b, tl.float32), total, precision, *rest)
        if precision == ir.INPUT_PRECISION.TF32:
            return dot(tf32(a), tf32(b), total, precision, *rest)
        if precision == ir.INPUT_PRECISION.TF32x3:
            (a, a_low), (b, b_low) = parts(a), parts(b)
            small = dot(a, b_low, dot(a_low, b, total, precision, *rest), precision, *rest)
            return dot(a, b, small, precision, *rest)
        return dot(a, b, total, precision, *rest)

    with ExitStack() as stack:
        stack.enter_context(patch.object(_triton_support, "INTERPRETED_WRONGLY", ()))
        stack.enter_context(patch.object(builder, "cast_impl", rounded_cast))
        stack.enter_context(patch.object(builder, "create_dot", tensor_core))
        for name in APPROXIMATE:
            stack.enter_context(patch.object(builder, name, approximate(getattr(builder, name))))
        yield


def tf32(t, rounded=False):
    """The first 10 bits of the fraction: cut, as tensor cores do, or rounded, half away from zero."""
    bits = t.data.view(np.uint32) + (0x1000 if rounded else 0)
    return interpreter.TensorHandle((bits & 0xFFFFE000).astype(np.uint32).view(np.float32), t.dtype)
