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
from .graphs import report, room
from .replay import Capture, CudaCapture, Graph, GraphCache, Replaying, kind_of
from .routing import Routing


class GraphedForward(Replaying):
    """A module's forward, replayed as a CUDA graph where a call is of a kind that came before.

    A call copies its tensors into those of a graph, starts the graph, and copies the outputs: they are the caller's.
    The first call of a kind captures it. Shapes make a kind, and so does every argument that is no tensor. The settings
    of each `DynamicChunking` inside and of its router count as arguments, and `routing` is set by each replay. Hooks on
    the module itself run in every call.

    A chunking without a number for `budget_per_sample`, `budget` or `capacity` has rows for the tokens of the last call
    of its kind and some more (`graphs.room`). One copy to the host tells the true number. If there are too few rows,
    the module's own forward computes the call again: no token is lost.

    That forward also runs in the first call of such a kind, on a CPU, with inputs apart from the weights, under
    autocast, with hooks on modules inside, where a gradient is needed, and where the capture failed; `eager` counts the
    reasons.

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
        self._rooms: dict[tuple, dict[int, dict[str, int | None]]] = {}
        self._chunkings = {name: m for name, m in self.model.named_modules() if isinstance(m, DynamicChunking)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward."""
        self._reset_if_changed()
        settings = self._settings()
        tensors, form, plain = _flat((args, kwargs, settings))
        graph = self._why_not(args, kwargs, tensors, plain)
        loose = [place for place, chunking in enumerate(self._chunkings.values()) if not chunking.fixed]
        kind = (form, plain, self.model.training, *kind_of(tensors)) if loose and graph is None else None
        if kind in self._rooms:
            for place, rows in self._rooms[kind].items():
                settings[2 * place] |= rows
            tensors, form, plain = _flat((args, kwargs, settings))
        elif kind is not None:
            graph = "first call of its kind"
        if graph is None:
            limits = {"form": form, "plain": plain, "training": self.model.training}
            graph = self.cache.get(tensors, limits, self._run)
        if isinstance(graph, Graph):
            out, routings = graph.replay(tensors)
            if kind is None or self._fit(kind, {place: routings[place] for place in loose}):
                self.replays += 1
                for chunking, routing in zip(self._chunkings.values(), routings, strict=True):
                    if routing is not None:  # a stack that this forward does not run has none
                        chunking.routing = Routing(routing.boundary_prob.clone(), routing.plan.clone())
                return tree.tree_map_only(torch.Tensor, torch.clone, out)
            graph = "more tokens than there was room for"
        self.eager[graph] += 1
        if kind is None:
            return self.own(*args, **kwargs)
        chunkings = list(self._chunkings.values())
        for place in loose:
            chunkings[place].routing = None
        out = self.own(*args, **kwargs)
        self._fit(kind, {place: chunkings[place].routing for place in loose})
        return out

    def _fit(self, kind: tuple, routings: dict[int, Routing | None]) -> bool:
        """Whether there was room for the tokens of these stacks. If so the next call of this kind has some more."""
        rooms = {}
        for place, routing in routings.items():
            if routing is None:
                rooms[place] = {"capacity": 0}  # any number: the stack does not run
                continue
            *lengths, overflow, improper = report(routing).tolist()
            if overflow or improper:  # improper probabilities make the own forward raise
                return False
            rooms[place] = room(sum(lengths), max(lengths), len(lengths), routing.plan.cells)
        self._rooms[kind] = rooms
        return True

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
        if any(tensor.device != device for tensor in tensors):
            leaves, _ = tree.tree_flatten_with_path((args, kwargs, self._settings()))
            path, other = next((p, v) for p, v in leaves if isinstance(v, torch.Tensor) and v.device != device)
            return f"{path[-1]} is on {other.device}, the weights are on {device}"
        if any(len(chunking.running) < len(chunking.blocks) for chunking in self._chunkings.values()):
            return "tokens are chosen anew by groups"  # of which a replay would know the last one's alone
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


def _flat(values: Any) -> tuple[tuple[torch.Tensor, ...], tree.TreeSpec, tuple]:
    """The tensors of nested values, their form, and what else is in them by type and value, None for a tensor."""
    leaves, form = tree.tree_flatten(values)
    plain = tuple(None if isinstance(leaf, torch.Tensor) else (type(leaf), leaf) for leaf in leaves)
    return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), form, plain


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
