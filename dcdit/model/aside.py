"""Branches of CUDA graphs: a small batch's kernels leave most of a GPU idle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def captured(like: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured on the device of `like`, without gradients and torch.compile."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and capturing(like)


def capturing(like: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured on the device of `like`, outside of torch.compile."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def aside(compute: Callable[[], T], like: torch.Tensor) -> Callable[[], T]:
    """Begin `compute()`, on the device of `like`, as a branch of the graph that is being captured.

    What is returned must be called once: it joins the branch, which runs beside what is launched until then, and gives
    the result. Branches run one after another, so that one begun early must not stand before one that is needed soon.
    """
    side = _side(like.device.index)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = compute()
    done = side.record_event()

    def join() -> T:
        torch.cuda.current_stream().wait_event(done)
        return result

    join.inputs = compute  # type: ignore[attr-defined] # what it reads is not freed before the branch has ended
    return join


@functools.cache
def _side(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
