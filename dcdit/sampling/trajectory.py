"""The way of images from noise to data: what each forward gets, checked before the first."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from ..model.dcdit import DCDiT
from ..model.dit_shell import DiTShell
from ..model.graphs import Graphed
from ..model.guess_router import takes_guess
from ..model.routing import least_tokens
from .drop_fraction import DropFraction, drop_table
from .edits import Edit
from .paced import Paced, innermost
from .progressive import CoarseStart
from .schedulers import TRAIN_STEPS, make_scheduler
from .step_times import costs_of, router_shape
from .token_budget import Tokens, token_table, tokens_for, tokens_for_gflops


@dataclass(frozen=True)
class Trajectory:
    """S forwards of N images.

    - `timesteps` (S,), and the `guidances` of the steps: 1 runs no unconditional half.
    - `budgets`: of the conditional half and, with guidance, the other, (S, N): ρ in float32 or tokens in int64.
    - `size` (H, W) of the latents, in cells; `channels` that guidance moves.
    - `make`: a scheduler and its timesteps. Each batch has its own, for multistep ones keep state.
    - `coarse`: the forwards on a coarse grid in front, where a policy wants them.
    """

    timesteps: torch.Tensor
    guidances: list[float]
    budgets: list[torch.Tensor]
    size: tuple[int, int]
    channels: int
    make: Callable[[], Any]
    step_options: dict[str, float]
    seed: int
    edit: Edit | None
    coarse: CoarseStart | None = None

    @property
    def sizes(self) -> list[tuple[int, int]] | None:
        """The grid of each forward, where they differ."""
        if self.coarse is None:
            return None
        return [self.coarse.size if i < self.coarse.steps else self.size for i in range(len(self.timesteps))]


def plan_trajectory(
    model: Any,
    count: int,
    *,
    objective: str,
    scheduler: str = "auto",
    steps: int = 50,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1000.0),
    eta: float = 0.0,
    shift: float = 1.0,
    drop_fraction: DropFraction = 0.0,
    uncond_drop_fraction: DropFraction | None = None,
    tokens: Tokens | None = None,
    gflops_per_image: float | None = None,
    seconds_per_image: float | None = None,
    calibration: Path | None = None,
    batch_size: int = 1,
    budget_schedule: str = "constant",
    seed: int = 0,
    size: tuple[int, int] | None = None,
    clip: bool = False,
    edit: Edit | None = None,
    grid: tuple[float, float] | None = None,
) -> Trajectory:
    """The trajectory of N = `count` images, `batch_size` at a time; the options are those of `dcdit.sampling.sample`,
    `grid` a policy's.

    Raises ConfigError, and DataError where steps were not measured for `seconds_per_image`.
    """
    config = model.config
    for name, value in (("steps", steps), ("seed", seed)):
        if not isinstance(value, int | np.integer):
            raise ConfigError(f"{name} must be an integer, got {value!r}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be in [0, 2**32), got {seed}")
    if not isinstance(guidance, int | float) or not 0 <= guidance < float("inf"):
        raise ConfigError(f"guidance must be a number of at least 0, got {guidance!r}")
    whole = isinstance(guidance_channels, int | np.integer)
    if guidance_channels is not None and not (whole and 1 <= guidance_channels <= config.in_channels):
        raise ConfigError(f"guidance_channels must be in [1, {config.in_channels}], got {guidance_channels!r}")
    interval = tuple(guidance_interval) if isinstance(guidance_interval, tuple | list) else ()
    if len(interval) != 2 or not all(isinstance(t, Real) for t in interval) or not interval[0] <= interval[1]:
        raise ConfigError(f"guidance_interval must be timesteps (low, high), low <= high, got {guidance_interval!r}")
    amounts = {"gflops_per_image": gflops_per_image, "seconds_per_image": seconds_per_image}
    for name, amount in {"eta": eta, "shift": shift, **amounts}.items():
        if amount is not None and not isinstance(amount, Real):
            raise ConfigError(f"{name} must be a number, got {amount!r}")
    if guidance == 1 and (uncond_drop_fraction is not None or interval != (0, TRAIN_STEPS)):
        idle = "guidance_interval, or a policy's guidance," if uncond_drop_fraction is None else "uncond_drop_fraction"
        raise ConfigError(f"{idle} is of guidance, and guidance 1 is none: leave one of them out")
    if seconds_per_image is not None and not 0 < seconds_per_image < float("inf"):
        raise ConfigError(f"seconds_per_image must be positive and finite, got {seconds_per_image}")
    if budget_schedule != "constant" and all(amount is None for amount in amounts.values()):
        raise ConfigError(f"budget_schedule {budget_schedule} is of {' or '.join(amounts)}: give one of them")
    if calibration is not None and seconds_per_image is None:
        raise ConfigError("calibration is of seconds_per_image: give it as well")
    if not 0 <= eta <= 1 or (eta and scheduler != "ddim"):
        raise ConfigError(f"eta must be in [0, 1] and is of the scheduler ddim, got {eta!r} and {scheduler}")
    if uncond_drop_fraction is None:
        uncond_drop_fraction = drop_fraction
    if edit is not None:
        _check_chunking(model, "an edit")
        if not isinstance(edit, Edit):
            raise ConfigError(f"edit must be an Edit, got a {type(edit).__name__}")
        edit.check(config)
        if size is not None and (not isinstance(size, tuple | list) or tuple(size) != tuple(edit.mask.shape)):
            raise ConfigError(f"size must be {tuple(edit.mask.shape)}, that of the edit's mask, got {size}")
        size = tuple(edit.mask.shape)
    size = checked_size(config.input_size if size is None else size, getattr(config, "encoder_stride", 1))
    inner = innermost(model)
    own = getattr(inner, "use", {}).get("objective")
    if own not in (None, objective):
        raise ConfigError(f"objective must be {own}, in which the model was trained, got {objective}")
    for name, asked in (
        ("router guess", takes_guess(inner)),
        ("predict_clean", getattr(config, "predict_clean", False)),
    ):
        if asked and objective != "flow":
            raise ConfigError(f"a model with {name} has objective flow, got {objective}")
    if isinstance(inner, DiTShell) and size != config.input_size:
        raise ConfigError(f"size must be {config.input_size}, that of the {type(inner).__name__}, got {size}")
    make = functools.partial(make_scheduler, scheduler, objective, steps, config.learn_sigma, clip, shift)
    _, timesteps = make()
    low, high = interval
    guidances = [guidance if low <= t <= high else 1.0 for t in timesteps.tolist()]
    guided = any(value != 1 for value in guidances)
    if guidance != 1 and not guided:
        span = f"{float(timesteps[0]):g} to {float(timesteps[-1]):g}"
        raise ConfigError(f"guidance_interval must hold one of the steps, at timesteps {span}, got {interval}")
    drops = (drop_fraction, uncond_drop_fraction) if guided else (drop_fraction,)
    forms = {"tokens": tokens, **amounts}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other: leave one of them out")
    if not given:
        budgets = [drop_table(drop, timesteps, count) for drop in drops]
    else:
        if not isinstance(inner, DCDiT | Graphed):
            raise ConfigError(f"a budget of tokens is for a model with a router, got a {type(inner).__name__}")
        if not all(isinstance(drop, float | int) and drop == 0 for drop in drops):
            raise ConfigError("a budget of tokens and a drop fraction exclude each other: leave one of them out")
        resized = dataclasses.replace(config, input_size=size)
        halves_of = [1 if value == 1 else 2 for value in guidances]
        own = budget_schedule == "router"
        schedule = router_shape(getattr(model, "use", {}), timesteps) if own else budget_schedule
        if tokens is None:
            _check_chunking(model, given[0])
            if grid is not None:
                raise ConfigError(f"{given[0]} and a policy's grid exclude each other: leave one of them out")
        if gflops_per_image is not None:
            tokens = tokens_for_gflops(resized, gflops_per_image, halves_of, schedule, model.router)
        if seconds_per_image is not None:
            costs = costs_of(resized, next(model.parameters()), batch_size, calibration)
            tokens = tokens_for(resized, seconds_per_image, "s", costs, halves_of, schedule)
        budgets = [token_table(tokens, timesteps, count, resized)] * len(drops)
    coarse = None
    if grid is not None:
        if edit is not None or not isinstance(inner, DCDiT | Graphed):
            name = "an edit" if edit is not None else f"a {type(inner).__name__}"
            raise ConfigError(f"grid is of a DC-DiT, which takes any size, and of whole pictures, got {name}")
        coarse = CoarseStart.plan(*grid, size, config.encoder_stride, make()[0])
    if coarse is not None:
        timesteps = torch.cat([coarse.timesteps, timesteps[coarse.steps :]])
        budgets = [_coarser(budget, coarse, config.keep_grid) for budget in budgets]
    step_options = {"eta": eta} if eta else {}
    channels = guidance_channels or config.in_channels
    return Trajectory(timesteps, guidances, budgets, size, channels, make, step_options, int(seed), edit, coarse)


def _coarser(budget: torch.Tensor, coarse: CoarseStart, keep_grid: int) -> torch.Tensor:
    """A budget (S, N) whose tokens are an equal share of the cells on the coarse grid."""
    if budget.is_floating_point():
        return budget
    budget, cells = budget.clone(), coarse.size[0] * coarse.size[1]
    share = cells / (coarse.full[0] * coarse.full[1])
    early = (budget[: coarse.steps] * share).round().long()
    budget[: coarse.steps] = early.clamp(least_tokens(coarse.size, keep_grid), cells)
    return budget


def _check_chunking(model: Any, what: str) -> None:
    if isinstance(model, Paced) or not isinstance(model, DCDiT | Graphed):
        inner = innermost(model)  # a policy's name says less where it is around another system
        got = type(model if isinstance(inner, DCDiT) else inner).__name__
        raise ConfigError(f"{what} is for a DC-DiT without a policy, got a {got}")


def checked_size(size: Sequence[int], stride: int) -> tuple[int, int]:
    """(H, W) in cells. Raises ConfigError unless they are two positive multiples of the model's encoder_stride."""
    sides = tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(n, int) and n >= 1 and n % stride == 0 for n in sides):
        unit = f" that encoder_stride {stride} divides" if stride > 1 else ""
        raise ConfigError(f"size must be two positive integers (H, W){unit}, got {size!r}")
    return sides
