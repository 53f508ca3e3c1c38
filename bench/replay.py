"""A forward pass as a CUDA graph: what a server of small batches runs, for which an eager pass waits on its host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dcdit import DCDiT
from dcdit.graphs import Graphed

from .timing import captured


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


class Replay:
    """A plain DiT's predictor, captured at its first call; from then on inputs are copied into those of the graph.

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
