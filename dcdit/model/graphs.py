"""graphed: a model's forward replayed as CUDA graphs, because a small batch waits for its host.

A graph has a fixed number of rows for the retained tokens; the router decides how many a batch needs. `Graphed`
captures a graph with room for the last batch of its shape and some more. The result comes with the true counts. A
batch that had too little room is computed again by the eager model.
"""

from __future__ import annotations

import collections
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from dcdit_kernels._dispatch import requested_backend

from .dcdit import DCDiT
from .routing import Routing

# The prediction, its routing, and `report` of it.
Outputs = tuple[torch.Tensor, Routing, torch.Tensor]
# capture(function) returns (start, outputs): each start() runs the function again and overwrites the outputs.
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]
SHARES = 16  # a graph has rows for so many sixteenths of all cells


@dataclass(frozen=True)
class Graph:
    """A captured function: start() reads `inputs` and overwrites `outputs`."""

    inputs: tuple[torch.Tensor, ...]
    outputs: Any
    start: Callable[[], Any]

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        """The outputs on these inputs. The next replay overwrites them."""
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.start()
        return self.outputs


class GraphCache:
    """The `max_graphs` graphs that were used last, and why others could not be captured."""

    def __init__(self, max_graphs: int, capture: Capture) -> None:
        self.max_graphs, self.capture, self.captures = max_graphs, capture, 0
        self.graphs: collections.OrderedDict[tuple[Any, ...], Graph | str] = collections.OrderedDict()

    def get(
        self,
        inputs: tuple[torch.Tensor, ...],
        limits: dict[str, int | None],
        run: Callable[[tuple[torch.Tensor, ...], dict[str, int | None]], Any],
    ) -> Graph | str:
        """The graph of run(inputs, limits) for such inputs, captured where there is none; or why there can be none."""
        key = (*_kind(inputs), *limits.values())
        if key not in self.graphs:
            while len(self.graphs) >= self.max_graphs:
                self.graphs.popitem(last=False)
            own = tuple(tensor.clone() for tensor in inputs)
            try:
                start, outputs = self.capture(lambda: run(own, limits))
            except RuntimeError as error:
                self.graphs[key] = f"cannot be captured: {str(error).splitlines()[0]}"
            else:
                self.graphs[key] = Graph(own, outputs, start)
                self.captures += 1
        self.graphs.move_to_end(key)
        return self.graphs[key]


class Graphed:
    """A model, called as before, that is replayed as a CUDA graph where shapes repeat. It has the model's attributes.

    A call copies its inputs into a graph's, starts the graph, and copies the outputs. The first call of a shape
    captures it. The results have the bits of the eager model with equal `capacity` and `max_seqlen`. The eager model
    itself runs on a CPU, under autocast, with forward hooks, and where a gradient is needed; `eager` counts the
    reasons.

    - With `capacity` nothing waits. Tokens without room are dropped and counted in `routing.plan.overflow`.
    - With a number for `budget` or `budget_per_sample` nothing waits and no token is lost: each has a graph of its own.
    - Without `capacity` the graph has rows for the last batch of this shape and some more (`room`). One copy to the
      host tells the true number. If there are too few rows, the eager model computes the batch again: no token is lost.

    Weights may change in place or move. Call `reset()` after an exchange of modules. One object serves one thread.
    """

    def __init__(self, model: DCDiT, max_graphs: int = 8, capture: Capture | None = None) -> None:
        """Keep `max_graphs` graphs; the least recently used one goes first. `capture` is for tests."""
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, got {max_graphs}")
        self.model, self.replays = model, 0
        self.cache = GraphCache(max_graphs, CudaCapture() if capture is None else capture)
        self.eager: collections.Counter[str] = collections.Counter()
        self.reset()

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # while a copy is being made there is none
            raise AttributeError(name)
        return getattr(self.model, name)

    def reset(self) -> None:
        """Forget the graphs and the counts of earlier batches."""
        self.cache.graphs.clear()
        self._lengths: dict[tuple[Any, ...], list[int]] = {}
        modules = list(self.model.modules())
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [module.__dict__ for module in modules]
        self._weights = [*self.model.parameters(), *self.model.buffers()]
        self._addresses = list(map(torch.Tensor.data_ptr, self._weights))

    @property
    def captures(self) -> int:
        """How many graphs were captured so far."""
        return self.cache.captures

    def summary(self) -> str:
        """Such as "46 of 48 forwards replayed from 3 CUDA graphs, 2 eager: first batch of its shape (2)"."""
        eager = sum(self.eager.values())
        text = f"{self.replays} of {self.replays + eager} forwards replayed from {self.captures} CUDA graphs"
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.eager.items())
        return f"{text}, {eager} eager: {reasons}" if eager else text

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
        reason = self._why_not(x, drop_fraction, limits, others)
        if reason is not None:
            self.eager[reason] += 1
            return self.model(x, t, y, drop_fraction, return_routing, **limits, **others)
        if self._addresses != list(map(torch.Tensor.data_ptr, self._weights)):
            self.reset()
        inputs: tuple[torch.Tensor, ...] = (x, t, y)
        if isinstance(budget_per_sample, torch.Tensor):
            inputs = (*inputs, limits.pop("budget_per_sample").to(x.device, torch.int32).expand(len(x)))
        elif budget is None and budget_per_sample is None:
            if not isinstance(drop_fraction, torch.Tensor):  # a number would be captured as it is
                drop_fraction = torch.full((len(x),), drop_fraction, device=x.device)
            inputs = (*inputs, drop_fraction.to(x.device, torch.float32).expand(len(x)))
        out, routing = self._of_length(inputs, limits) if _known(limits) else self._of_any_length(inputs)
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
        kind = _kind(inputs)
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
        """The eager model; after x, t and y comes a tensor of ρ or of budgets, or none."""
        form = {"drop_fraction" if tensor.is_floating_point() else "budget_per_sample": tensor for tensor in inputs[3:]}
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
        if others:
            return f"a graph does not know {', '.join(others)}"
        for name, limit in limits.items():
            if limit is not None and not isinstance(limit, Integral):
                if name != "budget_per_sample" or not isinstance(limit, torch.Tensor):
                    return f"{name} is no integer"
        budgeted = limits["budget"] is not None or limits["budget_per_sample"] is not None
        if budgeted and (isinstance(drop_fraction, torch.Tensor) or drop_fraction != 0):
            return "drop_fraction beside a budget"
        if limits["max_seqlen"] is not None and not _known(limits):
            return "max_seqlen without a capacity"
        if not isinstance(drop_fraction, torch.Tensor) and not 0 <= drop_fraction < 1:
            return "drop_fraction outside [0, 1)"
        if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in self._weights)):
            return "a gradient is needed"
        if torch.is_autocast_enabled(x.device.type):
            return "under autocast, which casts weights outside of the graph"
        # Each call looks, so without a loop in Python. `_hf_hook` is accelerate's.
        if any(self._hooks) or any(map(operator.contains, self._attributes, itertools.repeat("_hf_hook"))):
            return f"{self._hooked()} has forward hooks"
        return None

    def _hooked(self) -> str:
        """The first module with forward hooks."""
        for name, module in self.model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__:
                return name or "the model"
        raise AssertionError("no module has hooks")


def graphed(model: DCDiT, max_graphs: int = 8) -> Graphed:
    """The model, replayed as a CUDA graph wherever it can be; see `Graphed`. `max_graphs` are kept."""
    return Graphed(model, max_graphs)


class CudaCapture:
    """Captures a function as a CUDA graph, after two runs on the side stream that capture demands.

    All graphs share one pool of memory: they never run at once.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.side: Any = None  # one for all: cuBLAS keeps a workspace for each stream

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Callable[[], Any], Outputs]:
        if self.pool is None:
            self.pool, self.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        side, graph = self.side, torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # around the capture too: one that fails does not restore the stream
            for _ in range(2):
                function()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                outputs = function()
        torch.cuda.current_stream().wait_stream(side)
        return graph.replay, outputs


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


def _known(limits: dict[str, Any]) -> bool:
    """Whether these limits say how many rows there will be."""
    rows = (limits["capacity"], limits["budget"], limits.get("budget_per_sample"))
    return any(isinstance(number, Integral) for number in rows)


def _rounded(rows: int, most: int, shares: int) -> int:
    step = -(-most // shares)
    return min(most, -(-rows // step) * step) if step else 0


def _kind(inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """Shapes, dtypes and devices of the inputs, and the settings that decide which kernels run."""
    settings = (
        requested_backend(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )
    return (*((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs), settings)
