"""τ of `patches` for a wished speed, by sampling a few images."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ..errors import ConfigError
from ..model.patch_dit import PatchDiT
from ..model.rival_macs import patch_dit_macs
from .patches import roughness
from .policy import Policy
from .sampler import sample
from .trace import Step

TRIES = 12
NEAR = 0.01


def calibrate(
    model: PatchDiT, classes: Any, speed: float, policy: Policy | str | None = None, **options: Any
) -> tuple[float, float]:
    """(τ, the speed it reached): FLOPs at scale 1 over those at τ, mean over an image for each of `classes`.

    All runs have the rest of `policy`, its `patches` left out; `options` are those of `sample`. A choice changes the
    rest of its trajectory, so that speed need not grow with τ everywhere: τ is bisected on whole runs, and the nearest
    τ of at most 12 is taken. Raises ConfigError for a speed that no τ reaches.
    """
    if not isinstance(model, PatchDiT):
        raise ConfigError(f"patches is of a PatchDiT, this model is a {type(model).__name__}")
    rest = dataclasses.replace(Policy.of(policy), patches=None)
    rough: list[torch.Tensor] = []
    history: list[torch.Tensor] = []

    def look(step: Step) -> None:
        history[:] = [*history[-3:], step.x] if step.number else [step.x]
        rough.extend(roughness(history, model.config).values())

    trace = sample(model, classes, policy=rest & Policy(patches=0), callback=look, **options).trace
    plain = trace.gflops(model.config)
    most = fastest(plain, model)
    if not 1 <= speed <= most:
        raise ConfigError(f"speed must be from 1 to {most:.4g} over {len(plain)} steps, got {speed:g}")
    if speed == 1:
        return 0.0, 1.0
    values = torch.stack(rough)
    tau, low, high = float(values.median()), 0.0, math.inf
    tries = [(0.0, 1.0)]
    for _ in range(TRIES):
        cost = sample(model, classes, policy=rest & Policy(patches=tau), **options).trace.gflops(model.config)
        tries.append((tau, float(plain.sum() / cost.sum())))
        if abs(tries[-1][1] / speed - 1) < NEAR:
            break
        low, high = (tau, high) if tries[-1][1] < speed else (low, tau)
        # Coarse steps are rougher than those at scale 1: the first bound is no bound.
        tau = 3 * tau if high == math.inf else math.sqrt(max(low, high / 16) * high)
    return min(tries, key=lambda pair: abs(math.log(pair[1] / speed)))


def fastest(plain: torch.Tensor, model: PatchDiT) -> float:
    """The speed with every step after the third at the coarsest scale; `plain` (S,) are the steps' FLOPs at scale 1."""
    share = patch_dit_macs(model.config, model.config.scales[-1]) / patch_dit_macs(model.config)
    return float(plain.sum() / (plain[:3].sum() + share * plain[3:].sum()))
