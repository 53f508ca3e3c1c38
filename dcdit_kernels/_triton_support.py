"""Whether Triton's kernels can take a call, without importing Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

INTERPRETED_WRONGLY = (torch.bfloat16,)


def why_not(*args: Any, **kwargs: Any) -> str | None:
    """Reason why the Triton back-end cannot take these arguments, or None."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    if any(t.dtype == torch.float64 for t in tensors):
        return "float64 is computed by the reference only"
    if tensors[0].is_cuda:
        return _no_triton() or _old_gpu(tensors[0].device.index)
    if not _interpreted():
        return f"Triton's kernels need a GPU, got {tensors[0].device} (TRITON_INTERPRET=1 interprets them for tests)"
    if any(t.dtype in INTERPRETED_WRONGLY for t in tensors):
        return "Triton's interpreter computes bfloat16 wrongly"
    return _no_triton()


def assume_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, which would import torch._dynamo: more than a second of every start."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a GPU; asking PyTorch each time would take a tenth of a small operator's time."""
    return torch.cuda.get_device_capability(index)


@assume_constant
def _no_triton() -> str | None:
    found = importlib.util.find_spec("triton") is not None
    return None if found else "triton is not installed (pip install triton; Linux only)"


@assume_constant
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@assume_constant
def _old_gpu(index: int) -> str | None:
    major, minor = capability(index)
    return None if torch.version.hip or major >= 8 else f"needs compute capability 8.0, got {major}.{minor}"
