"""A policy at work in a pipeline: the model is called once a step, by code that knows of no policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError
from .paced import Paced
from .policy import Policy
from .trace import Decided, Trace


class PolicyRun:
    """`model` under a policy, for calls at `timesteps` (S,) one after the other; the first one starts a run.

    Raises ConfigError for a part that the model lacks.
    """

    def __init__(self, model: Any, policy: Policy | str, timesteps: torch.Tensor | Sequence[float]) -> None:
        self.policy = Policy.of(policy)
        if self.policy.grid is not None:
            raise ConfigError(f"grid is of dcdit.sampling.sample, a pipeline has one size, got {self.policy}")
        self.model = self.policy.wrap(model)
        self.timesteps = torch.as_tensor(timesteps).float().cpu()
        if self.timesteps.dim() != 1 or not len(self.timesteps):
            raise ConfigError(f"a policy needs the timesteps of a run, got shape {tuple(self.timesteps.shape)}")
        self.times = self.timesteps.tolist()
        self.decided = Decided(len(self.times), 0)

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, drop_fraction: Any, **options: Any
    ) -> torch.Tensor:
        """As a DCDiT's forward, all rows at one time.

        Where the second half of the rows has no label and the first half has, they are the halves of guidance: outside
        of the policy's interval the first is computed and given for both. Raises ConfigError for another timestep.
        """
        time = float(t[0])
        step = self._step(time)
        free = 0.0 if not torch.as_tensor(drop_fraction).any() else drop_fraction
        rho, tokens, (low, high) = self.policy.spending(free, None, (0, 1000))
        rho = rho(time) if callable(rho) else rho
        null, half = self.model.config.num_classes, len(x) // 2
        guided = len(x) % 2 == 0 and bool((y[half:] == null).all() and (y[:half] != null).all())
        alone = guided and not low <= time <= high
        if alone:
            x, t, y = x[:half], t[:half], y[:half]
            rho = rho[:half] if isinstance(rho, torch.Tensor) else rho
            options |= {"guess": options["guess"][:half]} if "guess" in options else {}
        if tokens is not None:
            options["budget_per_sample"] = tokens(time)
        paced = isinstance(self.model, Paced)
        images = half if guided else len(x)
        if step == 0:
            self.decided = Decided(len(self.times), images)
            if paced:
                self.model.begin(self.timesteps)
        if paced:
            self.model.observe(x[:images])
        out, routing = self.model(x, t, y, rho, return_routing=True, **options)
        seen = {"both halves": not alone} if guided else {}
        seen |= {"rho": rho} if tokens is None else {"budget": tokens(time)}
        seen |= self.model.decided if paced else {}
        spent = self.model.spent if paced else routing.plan.lengths
        self.decided.add(step, slice(images), {**seen, "tokens": spent.cpu().float()})
        return torch.cat([out, out]) if alone else out

    def _step(self, time: float) -> int:
        if time not in self.times:
            raise ConfigError(
                f"the policy is for {len(self.times)} timesteps from {self.times[0]:g} to {self.times[-1]:g}, "
                f"got {time:g}: set it for the pipeline's"
            )
        return self.times.index(time)

    def table(self) -> str:
        """What was decided when in the last run: a line for each step, noise first."""
        decided = dict(self.decided.values)
        tokens = decided.pop("tokens", torch.full(self.decided.shape, torch.nan))
        return Trace(self.timesteps, torch.zeros(len(self.times)), tokens, None, decided).table()
