"""diffusers' schedulers, over the steps that DC-DiT takes from noise to image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from ..model.config import check_keys

if TYPE_CHECKING:  # the command line names the schedulers before torch is imported
    import torch

# The objective that each scheduler integrates; "auto" takes the first of an objective.
SCHEDULERS = {"flow-euler": "flow", "flow-heun": "flow", "ddpm": "ddpm", "ddim": "ddpm", "dpm-solver++": "ddpm"}
TRAIN_STEPS = 1000


def make_scheduler(
    name: str, objective: str, steps: int, learn_sigma: bool = False, clip: bool = False, shift: float = 1.0
):
    """A diffusers scheduler set to `steps`, and the model's timestep of each of its calls (float32, S).

    "auto" is flow-euler or ddpm. S is `steps`, but flow-heun (arXiv 2206.00364 algorithm 1 without noise) calls the
    model twice in each step but the last: S = 2·steps − 1. `shift` moves the times of flow matching towards the noise,
    σ' = shift·σ / (1 + (shift − 1)·σ) (arXiv 2403.03206 eq. 23). Raises ConfigError for an unknown name, or one that
    integrates another objective.

    For noise prediction the linear 1000-step schedule is respaced as in DiT (steps evenly spread from 0 to 999;
    arXiv 2102.09672 section 4): the scheduler gets the betas of the steps that are left, and counts them 0 to S − 1.
    All three then step between exactly the S times, also where S does not divide 1000.
    """
    import diffusers

    check_keys([objective], set(SCHEDULERS.values()), "objective")
    check_keys([name], ["auto", *SCHEDULERS], "scheduler")
    fitting = [key for key, value in SCHEDULERS.items() if value == objective]
    name = fitting[0] if name == "auto" else name
    if name not in fitting:
        raise ConfigError(
            f"scheduler {name} integrates {SCHEDULERS[name]}, this model was trained by {objective}: "
            f"use {' or '.join(fitting)}"
        )
    if not isinstance(steps, int) or not 1 <= steps <= TRAIN_STEPS:
        raise ConfigError(f"steps must be in [1, {TRAIN_STEPS}], got {steps!r}")
    if not 0 < shift < float("inf"):
        raise ConfigError(f"shift must be positive and finite, got {shift!r}")
    if objective == "flow":
        heun = name == "flow-heun"
        kind = diffusers.FlowMatchHeunDiscreteScheduler if heun else diffusers.FlowMatchEulerDiscreteScheduler
        scheduler = kind(shift=shift)
        set_timesteps(scheduler, steps)
        return scheduler, scheduler.timesteps
    if shift != 1:
        raise ConfigError(f"shift is of flow matching, this model was trained by {objective}")
    import torch

    kept = np.unique(np.linspace(TRAIN_STEPS - 1, 0, steps).round().astype(int))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, TRAIN_STEPS))[kept]
    betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    shared = {"num_train_timesteps": steps, "trained_betas": betas, "timestep_spacing": "trailing"}
    if name == "ddpm":
        variance = "learned_range" if learn_sigma else "fixed_small"
        scheduler = diffusers.DDPMScheduler(**shared, variance_type=variance, clip_sample=clip)
    elif name == "ddim":
        scheduler = diffusers.DDIMScheduler(**shared, clip_sample=clip)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**shared)
    scheduler.set_timesteps(steps)
    return scheduler, torch.from_numpy(kept[::-1].copy()).float()


def set_timesteps(scheduler, steps: int, device: torch.device | None = None) -> None:
    """Set a scheduler to `steps`; of flow matching all are equal."""
    import diffusers

    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        # Its own grid ends at σ = 0.001 and spends a whole step on the rest.
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=device)
    elif isinstance(scheduler, diffusers.FlowMatchHeunDiscreteScheduler):
        scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / steps  # likewise, before the shift
        scheduler.set_timesteps(steps, device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
