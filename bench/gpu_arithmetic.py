"""Triton's interpreter with a GPU's arithmetic: bfloat16 rounded to nearest even, tensor cores, approximate division.

The interpreter holds bfloat16 as integers: it cuts where it should round, and adds the integers where a kernel adds
without a cast to float32, which no comparison with float64 survives. Its tl.dot is always float32; tensor cores asked
for TF32 read the first 10 of 23 bits, and they add the products of one instruction to the sum at a time, cutting
bits beyond float32 (Fasi et al., PeerJ Computer Science 7:e330). PTX's div.full, sqrt.approx and ex2.approx are
off by up to 2⁻²²: here by anything within that, always the same.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from dcdit_kernels import _ops, _triton_support

APPROXIMATE = ("create_fdiv", "create_sqrt", "create_exp", "create_exp2", "create_log", "create_log2")


@contextmanager
def gpu_arithmetic():
    """Within it kernels compute as a GPU would, and `backend="triton"` takes bfloat16 on the CPU. Nothing on a GPU."""
    if torch.cuda.is_available():
        yield
        return
    builder = interpreter.interpreter_builder
    cast, exact_dot = builder.cast_impl, builder.create_dot
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

    def dot(a, b, total, precision, *rest):
        if a.dtype == tl.float32 and precision == ir.INPUT_PRECISION.IEEE:  # no tensor core
            return exact_dot(a, b, total, precision, *rest)
        assert a.dtype != tl.float32 or precision == ir.INPUT_PRECISION.TF32, precision
        read, deep = (tf32, 8) if a.dtype == tl.float32 else (lambda t: cast(t, tl.float32).data, 16)
        left, right, out = read(a), read(b), total.data
        for k in range(0, left.shape[1], deep):  # as many products as one mma.sync adds
            out = cut(out + left[:, k : k + deep].astype(np.float64) @ right[k : k + deep])
        return interpreter.TensorHandle(out, total.dtype)

    with ExitStack() as stack:
        stack.enter_context(patch.object(_triton_support, "INTERPRETED_WRONGLY", ()))
        stack.enter_context(patch.object(_ops, "_known", {}))  # which calls can run, as it is remembered
        stack.enter_context(patch.object(builder, "cast_impl", rounded_cast))
        stack.enter_context(patch.object(builder, "create_dot", dot))
        for name in APPROXIMATE:
            stack.enter_context(patch.object(builder, name, approximate(getattr(builder, name))))
        yield


def tf32(t):
    """The first 10 bits of the fraction."""
    return (t.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def cut(x):
    """float64 as float32, towards zero."""
    near = x.astype(np.float32)
    return np.where(abs(near) > abs(x), np.nextafter(near, np.float32(0)), near)
