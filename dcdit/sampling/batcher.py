"""Batcher: requests that join and leave between the steps of one batch, each with its own trajectory."""

from __future__ import annotations

import collections
import inspect
from typing import Any

import torch

from dcdit_kernels._plan_input import NaNError

from ..errors import ConfigError, DCDiTError
from ..model.config import check_keys
from ..model.dcdit import DCDiT
from ..model.precision import float32_products
from .denoising import Denoising, budget_of
from .sampler import class_ids
from .trajectory import Trajectory, plan_trajectory

# Of one request; `plan_trajectory` has them from `sample`.
OPTIONS = [
    name
    for name in inspect.signature(plan_trajectory).parameters
    if name not in ("model", "count", "batch_size", "grid")
]


class Request:
    """One picture on its way.

    - `latent` (C, H, W), float32 on the CPU, once it is there; `error` in its place where its numbers ran away.
    - `tokens`: the retained tokens of each step so far, of the conditional half and, with guidance, of both.
    - `progress`: the steps that are done, of `steps`.
    """

    def __init__(self, label: int, index: int, trajectory: Trajectory) -> None:
        self.label, self.index, self.trajectory = label, index, trajectory
        self.steps, self.tokens = len(trajectory.timesteps), list[tuple[int, ...]]()
        self.latent: torch.Tensor | None = None
        self.error: DCDiTError | None = None
        self.cancelled = False

    @property
    def progress(self) -> int:
        """The steps that are done."""
        return len(self.tokens)

    def cancel(self) -> None:
        """Leave before the next step, with neither latent nor error."""
        self.cancelled = True


class Batcher:
    """Continuous batching over timesteps: a forward takes samples at different t, so no request waits for others.

    Each `step` runs one forward for all requests under way, the packed tokens of both halves together, and gives each
    its own scheduler's update. A request has its own class, seed, size, steps, scheduler, guidance and ρ or tokens, and
    its picture is that of `sample` alone with these options: kernels are batch invariant, so nothing depends on what
    else runs but the rounding of the host library's matrix products. Requests by ρ and requests by tokens are a forward
    each, and so are those with an edit.

        batcher = Batcher(model, objective="flow", steps=20)
        seven = batcher.submit(7, seed=1, guidance=2.0)
        while batcher.step():
            ...  # submit more; seven.latent is there after 20 steps

    Args:
        model: a DCDiT, of any grid where its requests have sizes of their own.
        max_requests: under way at once; further ones wait in the order of arrival.
        options: of `dcdit.sampling.sample`, for each request that does not say otherwise.

    `submit` and `cancel` may be called from other threads than the one that steps.
    """

    def __init__(self, model: DCDiT, *, max_requests: int = 64, **options: Any) -> None:
        if not isinstance(model, DCDiT):
            raise ConfigError(f"a Batcher is for a DCDiT, got a {type(model).__name__}")
        if type(max_requests) is not int or max_requests < 1:
            raise ConfigError(f"max_requests must be an integer of at least 1, got {max_requests!r}")
        check_keys(options, OPTIONS, "request")
        self.model, self.max_requests, self.options = model, max_requests, options
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[tuple[Request, Denoising]] = []

    def __len__(self) -> int:
        """The requests that wait or are under way."""
        return len(self.waiting) + len(self.running)

    def submit(self, label: int, *, index: int = 0, **options: Any) -> Request:
        """A picture of class `label`, its noise from (seed, index). Raises ConfigError as `sample` does."""
        if not isinstance(index, int):
            raise ConfigError(f"index must be an integer, got {index!r}")
        class_ids([label], self.model.config.num_classes)
        options = {**self.options, **options}
        check_keys(options, OPTIONS, "request")
        if "objective" not in options:
            raise ConfigError("a request needs objective, flow or ddpm: give it to the Batcher")
        request = Request(label, index, plan_trajectory(self.model, 1, **options))
        self.waiting.append(request)
        return request

    @torch.no_grad()
    def step(self) -> bool:
        """One step of each request under way, the first `max_requests` that came; False where there was none."""
        self.running = [(request, run) for request, run in self.running if not request.cancelled]
        while self.waiting and len(self.running) < self.max_requests:
            request = self.waiting.popleft()
            if not request.cancelled:
                classes = torch.tensor([request.label])
                self.running.append((request, Denoising(request.trajectory, self.model, classes, [request.index])))
        forms: dict[Any, list[tuple[Request, Denoising]]] = {}
        for request, run in self.running:
            form = request.trajectory.budgets[0].dtype, request.trajectory.edit is None, run.guess is None
            forms.setdefault(form, []).append((request, run))
        with float32_products("high" if next(self.model.parameters()).dtype.itemsize < 4 else None):
            for members in forms.values():
                self._advance(members)
        for request, run in self.running:
            if run.done:
                if run.x.isfinite().all():
                    request.latent = run.x[0].float().cpu()
                else:
                    request.error = run.diverged("latents that are not finite")
        ran = bool(self.running)
        self.running = [(request, run) for request, run in self.running if not run.done and request.error is None]
        return ran

    def _advance(self, members: list[tuple[Request, Denoising]]) -> None:
        """One forward and one update for each; what has diverged is found alone, and the others go on."""
        try:
            outs, lengths = self._forward([run for _, run in members])
        except NaNError as error:
            if len(members) == 1:
                request, run = members[0]
                request.error = run.diverged(error)
            else:
                for member in members:
                    self._advance([member])
            return
        for (request, run), out, length in zip(members, outs, lengths, strict=True):
            run.update(out)
            request.tokens.append(tuple(length))

    def _forward(self, runs: list[Denoising]) -> tuple[list[torch.Tensor], list[list[int]]]:
        """The output (R, C or 2C, H, W) of each, and the retained tokens of its rows."""
        xs, ts, ys, amounts = zip(*(run.inputs() for run in runs), strict=True)
        t, y, amount = map(torch.cat, (ts, ys, amounts))
        counts = [len(x) for x in xs]
        alike = len({x.shape[1:] for x in xs}) == 1
        x = torch.cat(xs) if alike else [row for x in xs for row in x]
        budget = budget_of(amount, t.device, alike)
        masks = [run.limits(own) for run, own in zip(runs, amounts, strict=True)]
        for name in masks[0]:
            rows = [mask[name] for mask in masks]
            budget[name] = torch.cat(rows) if alike else [row for part in rows for row in part]
        outs, routing = self.model(x, t, y, return_routing=True, **budget)
        packing = routing.plan if alike else routing.packing
        parts = iter(packing.lengths.tolist())
        lengths = [[next(parts) for _ in range(count)] for count in counts]
        if alike:
            return list(outs.split(counts)), lengths
        each = iter(outs)
        return [torch.stack([next(each) for _ in range(count)]) for count in counts], lengths
