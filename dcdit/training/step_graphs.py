"""Training steps as CUDA graphs: forward, losses and backward of a batch, replayed where launches hold up the GPU."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable

import torch

from ..errors import ConfigError
from ..model.graphs import report, room
from ..model.replay import Capture, CudaCapture, GraphCache
from ..model.routing import Routing

Losses = dict[str, torch.Tensor]  # "loss" is minimised
SHARES = 128  # a graph has rows for so many 128ths of all cells: spare rows cost a training step three products each
SPARE = 32  # one row more for so many: those are the most that were needed so far
FORGET = 1024  # of the largest number of tokens so far, one part in so many is forgotten with each step


class StepGraphs:
    """Gradients of a batch by a replayed CUDA graph: one for each shape of the inputs and number of rows.

    A graph has a fixed number of rows for the retained tokens, `capacity` of a batch and `max_seqlen` of a sample. They
    follow the largest numbers that a drop fraction ρ has needed so far, with room to spare. The host reads the numbers
    of each step once. A batch that needs more rows is computed again eagerly, so that no token is lost; so is the first
    batch of each ρ.

    `rows`, {ρ as text: [tokens, longest sample]}, belongs into a checkpoint: a run that resumes with it takes the same
    capacities. `shares` may be set: with fewer of them fewer graphs serve more batches.

    Args:
        losses: losses(*inputs, drop_fraction, **limits) → (losses by name, Routing), with tensors for inputs and ρ and
            with `capacity` and `max_seqlen` as limits, or no limits.
        parameters: trained where they require a gradient. Each must have a part in the loss.
        cells: L of a sample.
        parts: of a batch, with gradients added up; each counts for 1/parts.
        max_graphs: how many are kept; the least recently used goes first. They share their memory.
        capture: for tests, in place of CUDA's.

    Raises ConfigError on a device without CUDA graphs.
    """

    def __init__(
        self,
        losses: Callable[..., tuple[Losses, Routing]],
        parameters: Iterable[torch.nn.Parameter],
        cells: int,
        parts: int = 1,
        max_graphs: int = 16,
        capture: Capture | None = None,
    ) -> None:
        self.losses, self.cells, self.parts, self.shares = losses, cells, parts, SHARES
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        device = self.parameters[0].device
        if capture is None and device.type != "cuda":
            raise ConfigError(f"cuda_graph needs a GPU, the model is on {device}; leave it out")
        self.cache = GraphCache(max_graphs, capture or CudaCapture())
        self.rows: dict[str, list[int]] = {}
        self.grads: list[torch.Tensor] = []  # of the last replay
        self.replays, self.eager = 0, collections.Counter[str]()
        self.launched: tuple[Losses, torch.Tensor] | str = ""

    def launch(self, inputs: tuple[torch.Tensor, ...], drop_fraction: float) -> None:
        """Start the replay for the next `backward`, which must have the same arguments, and do not wait for it.

        A call of `backward` without it starts its own. In between other streams can be given work.
        """
        rows = self.rows.get(str(drop_fraction))
        if not rows:
            self.launched = "first step of its ρ"
            return
        if not self.grads:
            self.grads = [torch.zeros_like(parameter) for parameter in self.parameters]
        limits = room(*rows, len(inputs[0]), self.cells, self.shares, SPARE)
        inputs = (*inputs, torch.full((), drop_fraction, device=inputs[0].device))
        graph = self.cache.get(inputs, limits, self._run)
        self.launched = graph if isinstance(graph, str) else graph.replay(inputs)

    def backward(self, inputs: tuple[torch.Tensor, ...], drop_fraction: float) -> Losses:
        """Add the gradients of losses(*inputs, ρ)["loss"] / parts to the parameters' `grad`; return the losses.

        Before the first part `grad` must be None, as `zero_grad` leaves it. Losses, and with parts = 1 gradients,
        last until the next call.
        """
        if not self.launched:
            self.launch(inputs, drop_fraction)
        launched, self.launched = self.launched, ""
        if isinstance(launched, tuple):
            values, told = launched
            *lengths, overflow, improper = told.tolist()
            if not overflow and not improper:
                self.replays += 1
                self._add()
                self._saw(drop_fraction, lengths)
                return values
            launched = "more tokens than there was room for"  # or no probability, for which the eager model raises
        self.eager[launched] += 1
        values, routing = self.losses(*inputs, torch.full((), drop_fraction, device=inputs[0].device))
        (values["loss"] / self.parts).backward()
        self._saw(drop_fraction, routing.plan.lengths.tolist())
        return {name: value.detach() for name, value in values.items()}

    def summary(self) -> str:
        """Such as "90 of 97 backward passes replayed from 7 CUDA graphs, 7 eager: first step of its ρ (7)"."""
        eager = sum(self.eager.values())
        text = (
            f"{self.replays} of {self.replays + eager} backward passes replayed from {self.cache.captures} CUDA graphs"
        )
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.eager.items())
        return f"{text}, {eager} eager: {reasons}" if eager else text

    def _run(self, inputs: tuple[torch.Tensor, ...], limits: dict[str, int | None]) -> tuple[Losses, torch.Tensor]:
        # Gradients go to tensors that all graphs share, whatever else their common memory holds by then.
        values, routing = self.losses(*inputs, **limits)
        torch._foreach_copy_(self.grads, torch.autograd.grad(values["loss"] / self.parts, self.parameters))
        return {name: value.detach() for name, value in values.items()}, report(routing)

    def _add(self) -> None:
        if self.parameters[0].grad is not None:
            torch._foreach_add_([parameter.grad for parameter in self.parameters], self.grads)
            return
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad if self.parts == 1 else grad.clone()

    def _saw(self, drop_fraction: float, lengths: list[int]) -> None:
        before = self.rows.get(str(drop_fraction), [0, 0])
        now = sum(lengths), max(lengths)
        self.rows[str(drop_fraction)] = [max(new, old - old // FORGET) for new, old in zip(now, before, strict=True)]
