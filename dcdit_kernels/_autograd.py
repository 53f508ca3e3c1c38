"""Nodes of PyTorch's graph that a kernel computes: first derivatives in reverse mode, and an error for all others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ._dispatch import BackendError

SECOND = 'a kernel\'s gradient has no gradient of its own; gradients of gradients need use_backend("reference")'
TRANSFORMS = 'torch.func sees no kernel; its transforms need use_backend("reference")'
FORWARD_MODE = 'kernels have no forward-mode derivative; it needs use_backend("reference")'


class KernelFunction(torch.autograd.Function):
    """An autograd.Function with kernels as forward and backward. `first_order` decorates its `backward`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Forward mode."""
        raise BackendError(FORWARD_MODE)


class _FirstOrder(torch.autograd.Function):
    """Returns the first `count` tensors as functions of all the tensors; a derivative through it raises."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple([t.view_as(t) for t in tensors[:count]])

    @staticmethod
    def backward(ctx, *grads):
        raise BackendError(SECOND)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a `backward` that launches kernels, on a node that saved every input its gradients depend on.

    once_differentiable would cut the graph in silence: torch.autograd.grad then takes the gradients for constants.
    """

    @functools.wraps(backward)
    def connected(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            got = backward(ctx, *grads)
        return connect(got, (*grads, *ctx.saved_tensors))

    return connected


def connect(grads: Iterable[torch.Tensor | None], depends: Iterable[torch.Tensor | None]) -> tuple[Any, ...]:
    """The gradients as functions of the saved tensors: a derivative of a gradient raises BackendError."""
    grads = tuple(grads)
    given = [grad for grad in grads if grad is not None]
    if not given:
        return grads
    tied = iter(_FirstOrder.apply(len(given), *given, *(t for t in depends if t is not None)))
    return tuple(None if grad is None else next(tied) for grad in grads)


def refuse_second(ctx: Any, *grads: Any) -> Any:
    """The backward of a `dcdit::NAME_backward`."""
    raise BackendError(SECOND)
