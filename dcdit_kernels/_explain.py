"""`explain`: which back-end would run an operator, and why the others would not."""

from __future__ import annotations

from typing import Any

import torch

from ._dispatch import BACKENDS, BackendError, requested_backend
from ._ops import OPERATORS

# Public functions that are made of operators.
MADE_OF = {"unpad_input": ("plan_chunks", "pack_rows"), "pad_input": ("unpack_rows",)}


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """One line per back-end: chosen, able to run, or the reason against it.

    Any of the operator's arguments will do, as long as one is a tensor: devices and dtypes decide, for attention also
    lengths, the mask and gradients. A function that is made of operators gets the lines of each. Raises BackendError
    for an unknown operator, without a tensor, and where the back-end that is asked for cannot run.
    """
    if op not in OPERATORS and op not in MADE_OF:
        raise BackendError(f"unknown operator {op!r}; known: {', '.join(sorted((*OPERATORS, *MADE_OF)))}")
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if not tensors:
        raise BackendError(f"explain({op!r}, …) needs the operator's arguments, got no tensor")
    if op in MADE_OF:
        parts = [explain(part, tensors[0]) for part in MADE_OF[op]]
        return "\n".join([f"{op} is made of {' and '.join(MADE_OF[op])}", *parts])
    operator = OPERATORS[op]
    chosen = operator.choose(None, *tensors)
    lines = [f"{op}: {chosen} (asked for: {requested_backend()})"]
    for name in BACKENDS:
        if name != chosen:
            reason = operator.why_not(name, tensors[0].device, tuple([t.dtype for t in tensors]))
            lines.append(f"  {name}: {reason or 'can run'}")
    if operator.describe is not None:
        lines += operator.describe(*args, **kwargs)
    return "\n".join(lines)
