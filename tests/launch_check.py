"""Checks what each launch of a Triton kernel reads and writes in the interpreter: no races, nothing out of bounds.

The interpreter runs programs one after another and would hide a race; but a launch that writes no address twice and
reads none that it writes has none to hide, between programs or inside one.
"""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter


@contextmanager
def checked_launches():
    """Within it a launch raises AssertionError for an address outside its tensors, written twice, or written and read;
    yields the list of (kernel, programs) that were launched."""
    seen, loads, stores = [], [], []
    builder, run = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(accesses, pointers, mask):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        accesses.append((pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64), size))

    def traced_load(pointers, mask, *rest):
        note(loads, pointers, mask)
        return load(pointers, mask, *rest)

    def traced_store(pointers, value, mask, *rest):
        note(stores, pointers, mask)
        return store(pointers, value, mask, *rest)

    def traced_run(self, *args, **kwargs):
        loads.clear()
        stores.clear()
        run(self, *args, **kwargs)
        check(self.fn.__name__, [a for a in args if isinstance(a, torch.Tensor)], loads, stores)
        seen.append((self.fn.__name__, int(np.prod(builder.grid_dim))))

    with (
        patch.object(builder, "create_masked_load", traced_load),
        patch.object(builder, "create_masked_store", traced_store),
        patch.object(interpreter.GridExecutor, "__call__", traced_run),
    ):
        yield seen


def check(name, tensors, loads, stores):
    """`loads` and `stores` are lists of (addresses, bytes of each)."""
    for kind, accesses in (("reads", loads), ("writes", stores)):
        for addresses, size in accesses:
            inside = np.zeros(addresses.shape, bool)
            for t in tensors:
                steps = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
                end = t.data_ptr() + (steps + 1) * t.element_size() * (t.numel() > 0)
                inside |= (addresses >= t.data_ptr()) & (addresses + size <= end)
            assert inside.all(), f"{name} {kind} outside its tensors"
    written, times = np.unique(flat(stores), return_counts=True)
    assert (times <= 1).all(), f"{name} writes an address twice"
    assert not np.isin(flat(loads), written).any(), f"{name} reads what it writes"


def flat(accesses):
    return np.concatenate([np.zeros(0, np.int64), *(addresses.ravel() for addresses, _ in accesses)])
