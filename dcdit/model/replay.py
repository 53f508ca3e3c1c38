"""CUDA graphs by the kind of their inputs, and what keeps a model from being replayed."""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcdit_kernels._dispatch import requested_backend

from ..errors import ConfigError

# capture(function) returns (start, outputs): each start() runs the function again and overwrites the outputs.
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]


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
        key = (*kind_of(inputs), *limits.values())
        graph = self.graphs.pop(key, None)
        if graph is None:
            while len(self.graphs) >= self.max_graphs:
                self.graphs.popitem(last=False)
            own = tuple(tensor.clone() for tensor in inputs)
            try:
                start, outputs = self.capture(lambda: run(own, limits))
            except RuntimeError as error:
                graph = f"cannot be captured: {str(error).splitlines()[0]}"
            else:
                graph = Graph(own, outputs, start)
                self.captures += 1
        self.graphs[key] = graph  # as the one used last
        return graph


class Replaying:
    """A model with its graphs, and the counts of what was replayed and what not, and why."""

    _known: list[Any] | None = None

    def __init__(self, model: nn.Module, max_graphs: int, capture: Capture | None) -> None:
        if not isinstance(max_graphs, int) or max_graphs < 1:
            raise ConfigError(f"max_graphs must be an integer of at least 1, got {max_graphs!r}")
        self.model, self.replays = model, 0
        self.cache = GraphCache(max_graphs, CudaCapture() if capture is None else capture)
        self.eager: collections.Counter[str] = collections.Counter()
        self.reset()

    def reset(self) -> None:
        """Forget the graphs."""
        self.cache.graphs.clear()
        self._watched = dict(self._named_modules())
        modules = self._watched.values()
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [module.__dict__ for module in modules]
        self._weights = [*self.model.parameters(), *self.model.buffers()]
        everything = list(self.model.modules())
        self._children = [module._modules for module in everything if module._modules]
        self._owned = [own for module in everything for own in (module._parameters, module._buffers) if own]
        self._adapted = [m for m in everything if "lora_A" in m._modules and hasattr(m, "merged_adapters")]
        self._known = self._state()

    def _named_modules(self) -> Iterable[tuple[str, nn.Module]]:
        """Those whose hooks a graph would leave out."""
        return self.model.named_modules()

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

    def _state(self) -> list[Any]:
        """What graphs go by: the modules, where their weights lie, and how PEFT's layers count."""
        modules = itertools.chain.from_iterable(map(dict.values, self._children))
        weights = itertools.chain.from_iterable(map(dict.values, self._owned))
        adapters = [
            (m.disable_adapters, [*m.active_adapters], [*m.merged_adapters], {**m.scaling}) for m in self._adapted
        ]
        return [*modules, *[weight.data_ptr() for weight in weights if weight is not None], *adapters]

    def _reset_if_changed(self) -> None:
        """Graphs of what the model was are of no use."""
        if self._known is None or self._known != self._state():
            self.reset()

    def _why_not_here(self, device: torch.device, needs_gradient: bool) -> str | None:
        """Reason why no call on this device is replayed now, or None."""
        if torch.is_grad_enabled() and (needs_gradient or any(weight.requires_grad for weight in self._weights)):
            return "a gradient is needed"
        if torch.is_autocast_enabled(device.type):
            return "under autocast, which casts weights outside of the graph"
        # Each call looks, so without a loop in Python. Hooks of accelerate and diffusers take the forward's place.
        if any(self._hooks) or any(map(operator.contains, self._attributes, itertools.repeat("forward"))):
            return f"{self._hooked()} has forward hooks"
        return None

    def _hooked(self) -> str:
        """The first module with forward hooks."""
        for name, module in self._watched.items():
            if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                return name or "the model"
        raise AssertionError("no module has hooks")


class CudaCapture:
    """Captures a function as a CUDA graph, after two runs on the side stream that capture demands.

    All graphs share one pool of memory: they never run at once.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.side: Any = None  # one for all: cuBLAS keeps a workspace for each stream

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
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


def kind_of(inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """Shapes, dtypes and devices of the inputs, and the settings that decide which kernels run."""
    settings = (
        requested_backend(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )
    return (*((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs), settings)
