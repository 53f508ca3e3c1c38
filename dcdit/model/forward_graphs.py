"""enable_cuda_graph: a module's forward replayed as CUDA graphs, such as that of diffusers' transformers."""

from __future__ import annotations

import collections
import contextlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as tree

from ..errors import ConfigError
from .dynamic_chunking import DynamicChunking
from .replay import Capture, CudaCapture, GraphCache, Replaying
from .routing import Routing


class GraphedForward(Replaying):
    """A module's forward, replayed as a CUDA graph where a call is of a kind that came before.

    A call copies its tensors into those of a graph, starts the graph, and copies the outputs: they are the caller's.
    The first call of a kind captures it. Shapes make a kind, and so does every argument that is no tensor. Each
    `DynamicChunking` inside needs a number for `budget_per_sample`, `budget` or `capacity`. Its settings and its
    router's count as arguments, and `routing` is set by each replay. Hooks on the module itself run in every call.

    The module's own forward runs on a CPU, with inputs apart from the weights, without such a budget, under autocast,
    with hooks on modules inside, where a gradient is needed, and where the capture failed; `eager` counts the reasons.

    Weights may change in place or move; modules may be exchanged, wrapped and adapted, also LoRA's scales. Call
    `reset()` where another value changes that a module keeps and the forward reads on the host. One object serves one
    thread.
    """

    def __init__(self, model: nn.Module, max_graphs: int = 8, capture: Capture | None = None) -> None:
        """Keep `max_graphs` graphs; the least recently used one goes first. `capture` is for tests."""
        self.own = model.forward
        self.__signature__ = inspect.signature(self.own)
        super().__init__(model, max_graphs, capture)

    def reset(self) -> None:
        """Forget the graphs."""
        super().reset()
        self._chunkings = {name: m for name, m in self.model.named_modules() if isinstance(m, DynamicChunking)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward."""
        self._reset_if_changed()
        values, form = tree.tree_flatten((args, kwargs, self._settings()))
        tensors = tuple(value for value in values if isinstance(value, torch.Tensor))
        plain = tuple(None if isinstance(value, torch.Tensor) else (type(value), value) for value in values)
        graph = self._why_not(args, kwargs, tensors, plain)
        if graph is None:
            limits = {"form": form, "plain": plain, "training": self.model.training}
            graph = self.cache.get(tensors, limits, self._run)
        if isinstance(graph, str):
            self.eager[graph] += 1
            return self.own(*args, **kwargs)
        self.replays += 1
        out, routings = graph.replay(tensors)
        for chunking, routing in zip(self._chunkings.values(), routings, strict=True):
            if routing is not None:  # a stack that this forward does not run has none
                chunking.routing = Routing(routing.boundary_prob.clone(), routing.plan.clone())
        return tree.tree_map_only(torch.Tensor, torch.clone, out)

    def _owners(self) -> list[nn.Module]:
        return [part for chunking in self._chunkings.values() for part in (chunking, chunking.router)]

    def _settings(self) -> list[dict[str, Any]]:
        """What each of the owners has beside weights."""
        settings = []
        for chunking in self._chunkings.values():
            settings.append({name: getattr(chunking, name) for name in chunking.SETTINGS})
            settings.append({name: x for name, x in vars(chunking.router).items() if not name.startswith("_")})
        return settings

    def _run(self, tensors: tuple[torch.Tensor, ...], limits: dict[str, Any]) -> tuple[Any, list[Routing | None]]:
        rest = iter(tensors)
        values = [next(rest) if entry is None else entry[1] for entry in limits["plain"]]
        args, kwargs, settings = tree.tree_unflatten(values, limits["form"])
        before = self._settings()
        compiled = any(module._compiled_call_impl is not None for module in self._watched.values())
        try:
            self._set(settings)
            with contextlib.nullcontext() if compiled else Filled():  # torch.compile would compile anew for a mode
                out = self.own(*args, **kwargs)
            return out, [chunking.routing for chunking in self._chunkings.values()]
        finally:
            self._set(before)

    def _set(self, settings: list[dict[str, Any]]) -> None:
        for owner, own in zip(self._owners(), settings, strict=True):
            vars(owner).update(own)

    def _named_modules(self) -> Iterable[tuple[str, nn.Module]]:
        return ((name, module) for name, module in self.model.named_modules() if module is not self.model)

    def _why_not(self, args: tuple, kwargs: dict, tensors: tuple[torch.Tensor, ...], plain: tuple) -> str | None:
        """Reason why this call is not replayed, or None."""
        device = next((tensor.device for tensor in (*self._weights, *tensors)), torch.device("cpu"))
        if isinstance(self.cache.capture, CudaCapture) and device.type != "cuda":
            return f"needs a GPU, got {device}"
        for name, chunking in self._chunkings.items():
            if not chunking.fixed:
                return f"{name} has no number for budget_per_sample, budget or capacity"
        if any(tensor.device != device for tensor in tensors):
            leaves, _ = tree.tree_flatten_with_path((args, kwargs, self._settings()))
            path, other = next((p, v) for p, v in leaves if isinstance(v, torch.Tensor) and v.device != device)
            return f"{path[-1]} is on {other.device}, the weights are on {device}"
        for entry in plain:
            try:
                hash(entry)
            except TypeError:
                return f"a {entry[0].__name__} is no argument of a graph"
        return self._why_not_here(device, any(tensor.requires_grad for tensor in tensors))

    # A copy of the module has no graphs yet.
    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "own": self.own, "max_graphs": self.cache.max_graphs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model, self.own, self.replays = state["model"], state["own"], 0
        self.cache, self.eager = GraphCache(state["max_graphs"], CudaCapture()), collections.Counter()


class Filled(TorchFunctionMode):
    """Makes tensors of numbers by a fill: a copy from the host, as in Qwen-Image under a mask, cannot be captured."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.tensor, torch.as_tensor) and len(args) == 1 and isinstance(args[0], int | float):
            return torch.full((), args[0], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def enable_cuda_graph(model: nn.Module, max_graphs: int = 8) -> GraphedForward:
    """Replay the module's forward as CUDA graphs from now on, in place; see `GraphedForward`, which counts.

    `max_graphs` are kept. Raises ConfigError for what is no module, and where the module's forward has been replaced
    already, by this or as hooks of accelerate and diffusers do: those come afterwards.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a module, such as pipe.transformer, got a {type(model).__name__}")
    if isinstance(vars(model).get("forward"), GraphedForward):
        raise ConfigError("model has graphs already: disable_cuda_graph takes them away")
    if "forward" in vars(model):
        raise ConfigError("hooks that replace a forward must come after enable_cuda_graph, got a model that has one")
    graph = GraphedForward(model, max_graphs)
    model.forward = graph
    return graph


def disable_cuda_graph(model: nn.Module) -> None:
    """Undo `enable_cuda_graph`. Raises ConfigError where there is nothing to undo."""
    if not isinstance(model, nn.Module) or not isinstance(vars(model).get("forward"), GraphedForward):
        raise ConfigError(f"model must be one that enable_cuda_graph was called on, got a {type(model).__name__}")
    del model.forward
