"""Whether Triton's kernels can take a call, without importing Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

INTERPRETED_WRONGLY = (torch.bfloat16,)


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Reason why the Triton back-end cannot take tensors like these, or None."""
    if torch.float64 in dtypes:
        return "float64 is computed by the reference only"
    if device.type == "cuda":
        return _no_triton() or _old_gpu(device.index)
    if not _interpreted():
        return f"Triton's kernels need a GPU, got {device} (TRITON_INTERPRET=1 interprets them for tests)"
    if any(dtype in INTERPRETED_WRONGLY for dtype in dtypes):
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


def elsewhere(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a GPU that is not the current one."""
    return tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()


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
