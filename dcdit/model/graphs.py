"""graphed: a model's forward replayed as CUDA graphs, because a small batch waits for its host.

A graph has a fixed number of rows for the retained tokens; the router decides how many a batch needs. `Graphed`
captures a graph with room for the last batch of its shape and some more. The result comes with the true counts. A
batch that had too little room is computed again by the eager model.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch

from ..errors import ConfigError
from .dcdit import DCDiT
from .replay import Capture, CudaCapture, Graph, Replaying, kind_of
from .routing import Routing, rows_known

# The prediction, its routing, and `report` of it.
Outputs = tuple[torch.Tensor, Routing, torch.Tensor]
SHARES = 16  # a graph has rows for so many sixteenths of all cells


class Graphed(Replaying):
    """A model, called as before, that is replayed as a CUDA graph where shapes repeat. It has the model's attributes.

    A call copies its inputs into a graph's, starts the graph, and copies the outputs. The first call of a shape
    captures it. The results have the bits of the eager model with equal `capacity` and `max_seqlen`. The eager model
    itself runs on a CPU, under autocast, with forward hooks, and where a gradient is needed; `eager` counts the
    reasons.

    - With `capacity` nothing waits. Tokens without room are dropped and counted in `routing.plan.overflow`.
    - With a number for `budget` or `budget_per_sample` nothing waits and no token is lost: each has a graph of its own.
    - Without `capacity` the graph has rows for the last batch of this shape and some more (`room`). One copy to the
      host tells the true number. If there are too few rows, the eager model computes the batch again: no token is lost.

    Weights may change in place or move, and modules may be exchanged. One object serves one thread.
    """

    def __init__(self, model: DCDiT, max_graphs: int = 8, capture: Capture | None = None) -> None:
        """Keep `max_graphs` graphs; the least recently used one goes first. `capture` is for tests."""
        super().__init__(model, max_graphs, capture)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # while a copy is being made there is none
            raise AttributeError(name)
        return getattr(self.model, name)

    def reset(self) -> None:
        """Forget the graphs and the counts of earlier batches."""
        super().reset()
        self._lengths: dict[tuple[Any, ...], list[int]] = {}

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        drop_fraction: float | torch.Tensor = 0.0,
        return_routing: bool = False,
        capacity: int | None = None,
        *,
        max_seqlen: int | None = None,
        budget: int | None = None,
        budget_per_sample: int | torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, Routing]:
        """See `DCDiT.forward`."""
        limits: dict[str, Any] = {"capacity": capacity, "max_seqlen": max_seqlen, "budget": budget}
        limits["budget_per_sample"] = budget_per_sample
        self._reset_if_changed()
        reason = self._why_not(x, drop_fraction, limits, others)
        if reason is not None:
            self.eager[reason] += 1
            return self.model(x, t, y, drop_fraction, return_routing, **limits, **others)
        inputs: tuple[torch.Tensor, ...] = (x, t, y)
        if isinstance(budget_per_sample, torch.Tensor):
            inputs = (*inputs, limits.pop("budget_per_sample").to(x.device, torch.int32).expand(len(x)))
        elif budget is None and budget_per_sample is None:
            if not isinstance(drop_fraction, torch.Tensor):  # a number would be captured as it is
                drop_fraction = torch.full((len(x),), drop_fraction, device=x.device)
            inputs = (*inputs, drop_fraction.to(x.device, torch.float32).expand(len(x)))
        inputs = (*inputs, *others.values())  # a guess or nothing
        out, routing = self._of_length(inputs, limits) if rows_known(limits) else self._of_any_length(inputs)
        if not return_routing:
            return out.clone()
        return out.clone(), Routing(routing.boundary_prob.clone(), routing.plan.clone())

    def _of_length(
        self, inputs: tuple[torch.Tensor, ...], limits: dict[str, int | None]
    ) -> tuple[torch.Tensor, Routing]:
        graph = self.cache.get(inputs, limits, self._run)
        if isinstance(graph, Graph):
            return self._replay(graph, inputs)[:2]
        return self._eagerly(graph, inputs, limits)

    def _of_any_length(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Routing]:
        kind = kind_of(inputs)
        graph: Graph | str = "first batch of its shape"
        if kind in self._lengths:
            lengths, cells = self._lengths[kind], math.prod(inputs[0].shape[2:])
            graph = self.cache.get(inputs, room(sum(lengths), max(lengths, default=0), len(lengths), cells), self._run)
        if isinstance(graph, Graph):
            out, routing, report = self._replay(graph, inputs)
            *lengths, overflow, improper = report.tolist()
            if not overflow and not improper:
                self._lengths[kind] = lengths
                return out, routing
            graph = "more tokens than there was room for"  # improper probabilities make the eager model raise
        out, routing = self._eagerly(graph, inputs, {})
        self._lengths[kind] = routing.plan.lengths.tolist()
        return out, routing

    def _eagerly(
        self, reason: str, inputs: tuple[torch.Tensor, ...], limits: dict[str, Any]
    ) -> tuple[torch.Tensor, Routing]:
        self.eager[reason] += 1
        return self._predict(inputs, limits)

    def _predict(self, inputs: tuple[torch.Tensor, ...], limits: dict[str, Any]) -> tuple[torch.Tensor, Routing]:
        """The eager model; after x, t and y comes a tensor of ρ or of budgets, or none, and a guess or none."""
        form = {_keyword(tensor): tensor for tensor in inputs[3:]}
        return self.model(*inputs[:3], return_routing=True, **form, **limits)

    def _run(self, inputs: tuple[torch.Tensor, ...], limits: dict[str, int | None]) -> Outputs:
        out, routing = self._predict(inputs, limits)
        return out, routing, report(routing)

    def _replay(self, graph: Graph, inputs: tuple[torch.Tensor, ...]) -> Outputs:
        self.replays += 1
        return graph.replay(inputs)

    def _why_not(self, x, drop_fraction, limits: dict[str, int | None], others: dict[str, Any]) -> str | None:
        """Reason why this call is the eager model's, or None."""
        if not isinstance(x, torch.Tensor):
            return "samples of several sizes"
        if isinstance(self.cache.capture, CudaCapture) and not x.is_cuda:
            return f"needs a GPU, got {x.device}"
        unknown = [name for name, value in others.items() if name != "guess" or not isinstance(value, torch.Tensor)]
        if unknown:
            return f"a graph does not know {', '.join(unknown)}"
        for name, limit in limits.items():
            if limit is not None and not isinstance(limit, Integral):
                if name != "budget_per_sample" or not isinstance(limit, torch.Tensor):
                    return f"{name} is no integer"
        budgeted = limits["budget"] is not None or limits["budget_per_sample"] is not None
        if budgeted and (isinstance(drop_fraction, torch.Tensor) or drop_fraction != 0):
            return "drop_fraction beside a budget"
        if limits["max_seqlen"] is not None and not rows_known(limits):
            return "max_seqlen without a capacity"
        if not isinstance(drop_fraction, torch.Tensor) and not 0 <= drop_fraction < 1:
            return "drop_fraction outside [0, 1)"
        return self._why_not_here(x.device, x.requires_grad)


def _keyword(tensor: torch.Tensor) -> str:
    """What a tensor is to the model's forward."""
    if tensor.dim() > 1:
        return "guess"
    return "drop_fraction" if tensor.is_floating_point() else "budget_per_sample"


def graphed(model: DCDiT, max_graphs: int = 8) -> Graphed:
    """The model, replayed as a CUDA graph wherever it can be; see `Graphed`. `max_graphs` are kept.

    Raises ConfigError for what is no DCDiT.
    """
    if not isinstance(model, DCDiT):
        raise ConfigError(f"graphed takes a DCDiT, got a {type(model).__name__}; enable_cuda_graph takes transformers")
    return Graphed(model, max_graphs)


def report(routing: Routing) -> torch.Tensor:
    """A replay's report to the host, int32 (B + 2,): tokens of each sample, overflow, whether a probability is
    improper."""
    prob, plan = routing.boundary_prob, routing.plan
    improper = ~((prob >= 0) & (prob <= 1)).all()
    return torch.cat([plan.lengths, torch.stack([plan.overflow, improper.int()])])


def room(
    tokens: int, longest: int, batch: int, cells: int, shares: int = SHARES, spare: int = 16
) -> dict[str, int | None]:
    """`capacity` and `max_seqlen` for about so many tokens of a batch and of its longest sample, with 1/spare more.

    Rounded up to a whole share of all cells, and to quarters of one sample's: few graphs then serve many batches.
    """
    return {
        "capacity": _rounded(tokens + tokens // spare + 1, batch * cells, shares),
        "max_seqlen": _rounded(longest + longest // spare + 1, cells, 4),
    }


def _rounded(rows: int, most: int, shares: int) -> int:
    step = -(-most // shares)
    return min(most, -(-rows // step) * step) if step else 0
