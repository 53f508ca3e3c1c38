"""Triton's interpreter with equal results in a fraction of the time: a few of its functions without repetition.

Triton's own scan takes one number at a time. Each conversion builds a table of dtypes, each tensor computes its sizes,
each call of a device function patches triton.language, although the kernel around that call has done so, and each sum
of integers computes whether it overflows, although nothing is asserted without `debug`.
"""

from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

ADDRESS = np.dtype(np.uint64)
block_types, sizes = {}, {}


def generic_scan(self, tensors):
    """Combinations in Triton's order, of a slice across the axis at a time."""
    outs = [np.zeros_like(t.handle.data) for t in tensors]
    last = None
    for i in range(outs[0].shape[self.axis]):
        here = (slice(None),) * self.axis + (slice(i, i + 1),)
        step = tuple(self.to_tensor(t.handle.data[here], t.dtype) for t in tensors)
        if last:
            step = self.combine_fn.fn(*last, *step)
            step = step if isinstance(step, tuple) else (step,)
        for out, part in zip(outs, step, strict=True):
            out[here] = part.handle.data
        last = [self.to_tensor(out[here], t.dtype) for out, t in zip(outs, tensors, strict=True)]
    return [self.to_tensor(out, t.dtype) for out, t in zip(outs, tensors, strict=True)]


def patch_language_once(function):
    """Nothing is left to patch where the builtins that `function` sees are replaced."""
    seen = (module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values()))
    if any(tl.core.is_builtin(module.load) for module in seen):
        return SLOW[interpreter, "_patch_lang"](function)
    return interpreter._LangPatchScope()


@cache
def known_dtype(dtype):
    return SLOW[interpreter, "_get_np_dtype"](dtype)


def dtype_looked_up(dtype):
    return ADDRESS if dtype.scalar.is_ptr() else known_dtype(dtype.scalar)


def block_type_looked_up(self, element_ty, shape):
    key = element_ty.name, *(getattr(size, "value", size) for size in shape)
    if key not in block_types:
        SLOW[tl.block_type, "__init__"](self, element_ty, shape)
        block_types[key] = dict(self.__dict__)
    self.__dict__.update(block_types[key], element_ty=element_ty)


def tensor_with_known_sizes(self, handle, type):
    key = tuple(type.shape) if type.is_block() else ()
    if key not in sizes:
        SLOW[tl.tensor, "__init__"](self, handle, type)
        sizes[key] = {"numel": self.numel, "shape": self.shape}
    self.__dict__.update(sizes[key], handle=handle, type=type, dtype=type.scalar)


def no_unread_overflow(self, *operands):
    assert not self.builder.options.debug


QUICK = {
    (interpreter.ScanOps, "generic_scan"): generic_scan,
    (interpreter, "_patch_lang"): patch_language_once,
    (interpreter, "_get_np_dtype"): dtype_looked_up,
    (tl.block_type, "__init__"): block_type_looked_up,
    (tl.tensor, "__init__"): tensor_with_known_sizes,
    (interpreter.TritonSemantic, "binary_op_sanitize_overflow_impl"): no_unread_overflow,
}
SLOW = {(owner, name): getattr(owner, name, None) for owner, name in QUICK}
KNOWN = all(SLOW.values()) and hasattr(interpreter, "_LangPatchScope")


def install():
    """Where Triton's interpreter has other functions than here, it stays as it is."""
    for (owner, name), function in QUICK.items() if KNOWN else ():
        setattr(owner, name, function)
