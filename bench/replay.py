"""Forward passes and training steps as CUDA graphs: where batches are small an eager pass waits on its host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from dcdit import DCDiT
from dcdit.model.graphs import Graphed
from dcdit.training.step_graphs import StepGraphs

from .timing import captured

CHAIN = "dcdit graph in a chain"


class Shipped:
    """A DC-DiT's predictions by `dcdit.graphed`, one for each network, as a user has them: copies in and out included.

    Raises RuntimeError where a graph could not be replayed.
    """

    def __init__(self, **limits: int) -> None:
        self.limits = limits
        self.graphs: dict[int, Graphed] = {}

    @torch.no_grad()
    def __call__(self, net: DCDiT, x, t, y, drop_fraction: float | torch.Tensor) -> torch.Tensor:
        graph = self.graphs.get(id(net)) or self.graphs.setdefault(id(net), Graphed(net))
        out = graph(x, t, y, drop_fraction, **self.limits)
        if graph.eager:
            raise RuntimeError(graph.summary())
        return out


class Chain(Shipped):
    """`Shipped` without branches: one kernel after another."""

    def __call__(self, *args: Any) -> torch.Tensor:
        with patch("dcdit.model.blocks.captured", lambda like: False):
            return super().__call__(*args)


class Replay:
    """A plain DiT's predictor, captured at its first call; later inputs are copied into the graph's.

    It returns the graph's own output, which the next call overwrites.
    """

    def __init__(self, predict: Callable[..., torch.Tensor]) -> None:
        self.predict = predict
        self.inputs: tuple[torch.Tensor, ...] = ()

    @torch.no_grad()
    def __call__(self, net: torch.nn.Module, x, t, y, drop_fraction: float) -> torch.Tensor:
        if not self.inputs:
            self.inputs = x.clone(), t.clone(), y.clone()
            self.replay = captured([lambda: self._run(net, drop_fraction)])
        for own, new in zip(self.inputs, (x, t, y), strict=True):
            own.copy_(new)
        self.replay()
        return self.out

    def _run(self, net: torch.nn.Module, drop_fraction: float) -> None:
        self.out = self.predict(net, *self.inputs, drop_fraction)


class ShippedStep:
    """Gradients of a DC-DiT by `dcdit.training.step_graphs`, as in `dcdit train`; `losses` likewise. An eager step
    comes first, and tells how many rows are needed.

    Raises RuntimeError where a graph could not be replayed.
    """

    def __init__(self, losses: Callable, net: DCDiT, inputs: tuple[torch.Tensor, ...], drop_fraction: float) -> None:
        self.graphs = StepGraphs(losses, net.parameters(), net.config.cells)
        self.inputs, self.drop_fraction = inputs, drop_fraction
        with torch.enable_grad():
            self.graphs.backward(inputs, drop_fraction)
        net.zero_grad()

    @torch.enable_grad()
    def __call__(self) -> torch.Tensor:
        """The loss; gradients are left in `grad`, which must be None."""
        loss = self.graphs.backward(self.inputs, self.drop_fraction)["loss"]
        if self.graphs.eager.total() > 1:
            raise RuntimeError(self.graphs.summary())
        return loss


class ReplayedStep:
    """Gradients of a plain DiT's loss(*inputs), captured at the first call."""

    def __init__(
        self, loss: Callable[..., torch.Tensor], net: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> None:
        self.loss, self.parameters, self.inputs = loss, list(net.parameters()), inputs
        self.own: tuple[torch.Tensor, ...] = ()

    @torch.enable_grad()
    def __call__(self) -> torch.Tensor:
        """The loss; gradients are left in `grad`, which must be None."""
        if not self.own:
            self.own = tuple(tensor.clone() for tensor in self.inputs)
            self.grads = [torch.zeros_like(parameter) for parameter in self.parameters]
            self.replay = captured([self._run])
        for own, new in zip(self.own, self.inputs, strict=True):
            own.copy_(new)
        self.replay()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        return self.out

    def _run(self) -> None:
        loss = self.loss(*self.own)
        torch._foreach_copy_(self.grads, torch.autograd.grad(loss, self.parameters))
        self.out = loss.detach()
