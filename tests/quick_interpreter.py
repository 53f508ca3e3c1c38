"""Triton's interpreter with the same results in a third of the time: three of its functions without repetition.

Triton's own scan takes one number at a time, each conversion builds a table of dtypes, and each call of a device
function patches triton.language, although the kernel around that call has done so.
"""

from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

generic_scan, patch_language, dtype_in_numpy = (
    interpreter.ScanOps.generic_scan,
    interpreter._patch_lang,
    interpreter._get_np_dtype,
)
ADDRESS = np.dtype(np.uint64)
known_dtype = cache(dtype_in_numpy)


def scan_by_slices(self, tensors):
    """`ScanOps.generic_scan`: combinations in Triton's order, a slice across the axis at a time."""
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
    """`_patch_lang`: nothing is left to patch where the builtins that `function` sees are replaced."""
    seen = (module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values()))
    if any(tl.core.is_builtin(module.load) for module in seen):
        return patch_language(function)
    return interpreter._LangPatchScope()


def dtype_looked_up(dtype):
    """`_get_np_dtype`."""
    return ADDRESS if dtype.scalar.is_ptr() else known_dtype(dtype.scalar)


def install():
    interpreter.ScanOps.generic_scan = scan_by_slices
    interpreter._patch_lang = patch_language_once
    interpreter._get_np_dtype = dtype_looked_up
