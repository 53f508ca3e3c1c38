"""Images on their way from noise to data, along a `Trajectory`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import DCDiTError
from ..model.clean_latents import clean_guess
from ..model.guess_router import takes_guess
from .schedulers import TRAIN_STEPS
from .trajectory import Trajectory


class Denoising:
    """B images on their way along a trajectory, the images `part` of its N; `number` counts the steps that are done.

    The sampler asks for the `inputs` of a forward, and hands its output to `update`.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        model: Any,
        classes: torch.Tensor,
        indices: Sequence[int],
        part: slice = slice(None),
    ) -> None:
        self.trajectory, self.part, self.number = trajectory, part, 0
        coarse = trajectory.coarse
        self.scheduler = trajectory.make()[0] if coarse is None else coarse.scheduler()
        self.generators = [image_generator(trajectory.seed, index) for index in indices]
        weight, self.keep_grid = next(model.parameters()), getattr(model.config, "keep_grid", 0)
        self.device, self.dtype = weight.device, weight.dtype
        self.channels = model.config.in_channels
        self.x = self.noise = self._draw(trajectory.size if coarse is None else coarse.size)
        self.y = torch.cat([classes, torch.full_like(classes, model.config.num_classes)]).to(self.device)
        self.guessing, self.guess = takes_guess(model), None
        self._keep_known()

    def _draw(self, size: tuple[int, int]) -> torch.Tensor:
        """Normal noise (B, C, H, W), each image's from its own generator."""
        shape = (1, self.channels, *size)
        return torch.cat([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.number == len(self.trajectory.timesteps)

    @property
    def timestep(self) -> float:
        """Of the next forward."""
        return float(self.trajectory.timesteps[self.number])

    @property
    def guidance(self) -> float:
        """Of the next forward."""
        return self.trajectory.guidances[self.number]

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (R, C, H, W), t (R,), y (R,) and, on the CPU, ρ or tokens (R,) of the next forward, where R is B, or with
        guidance 2B, the half without a class last."""
        halves = 1 if self.guidance == 1 else 2
        amount = torch.cat([budget[self.number, self.part] for budget in self.trajectory.budgets[:halves]])
        x = torch.cat([self.x] * halves).to(self.dtype)
        t = torch.full((len(x),), self.timestep, device=self.device)
        return x, t, self.y[: len(x)], amount

    def limits(self, amount: torch.Tensor) -> dict[str, torch.Tensor]:
        """The masks of an edit (R, L), for `inputs`' ρ or tokens (R,), and the guess (R, C, H, W) of the step before
        for a model that routes by it; a half that was not computed then has the other's."""
        edit, rows = self.trajectory.edit, len(amount)
        found = {} if edit is None else edit.limits(amount, self.keep_grid, self.device)
        if self.guess is not None:
            found["guess"] = torch.cat([self.guess, self.guess])[:rows].to(self.dtype)
        return found

    def decided(self) -> dict[str, float | torch.Tensor]:
        """Guidance, and ρ or tokens (B,), of the next forward, where the trajectory has any."""
        way = self.trajectory
        found: dict[str, float | torch.Tensor] = {} if way.coarse is None else {"rows": self.x.shape[2]}
        found |= {"guidance": self.guidance} if len(way.budgets) == 2 else {}
        if way.budgets[0].any():
            name = "rho" if way.budgets[0].is_floating_point() else "budget"
            found[name] = way.budgets[0][self.number, self.part]
        return found

    def update(self, out: torch.Tensor) -> None:
        """Let the scheduler take a step by the forward's output (R, C or 2C, H, W)."""
        if self.guessing:
            x, t, *_ = self.inputs()
            self.guess = clean_guess(x.float(), out.float(), t)
        out = out.float() if self.guidance == 1 else guide(out.float(), self.guidance, self.trajectory.channels)
        if self.scheduler.config.get("variance_type") != "learned_range":
            out = out[:, : self.x.shape[1]]
        # diffusers draws a list of generators one image at a time, on the CPU.
        options = {"generator": self.generators, **self.trajectory.step_options}
        self.x = self.scheduler.step(out, self.scheduler.timesteps[self.number], self.x, **options).prev_sample
        self.number += 1
        coarse = self.trajectory.coarse
        if coarse is not None and self.number == coarse.steps:
            self.x, self.scheduler = coarse.expand(self.x, self._draw(coarse.full)), self.trajectory.make()[0]
            self.guess = None  # of another size
        self._keep_known()

    def _keep_known(self) -> None:
        """Replace the known cells of an edit by the noised original; at the end by the original."""
        if self.trajectory.edit is None:
            return
        signal, sigma = 1.0, 0.0
        if not self.done and hasattr(self.scheduler, "alphas_cumprod"):
            power = float(self.scheduler.alphas_cumprod[int(self.scheduler.timesteps[self.number])])
            signal, sigma = power**0.5, (1 - power) ** 0.5
        elif not self.done:
            signal, sigma = 1 - self.timestep / TRAIN_STEPS, self.timestep / TRAIN_STEPS
        self.x = self.trajectory.edit.blend(self.x, self.noise, signal, sigma)

    def diverged(self, error: Exception | str) -> DCDiTError:
        """The error for numbers that are not finite."""
        hint = f"are the weights finite, is guidance {self.trajectory.guidances[-1]:g} too large?"
        where = "" if self.done else f" at t = {self.timestep:g}"
        return DCDiTError(f"sampling diverged{where}: {error}; {hint}")


def budget_of(amount: torch.Tensor, device: torch.device, batch: bool = True) -> dict[str, Any]:
    """ρ or tokens (R,) as keywords of a forward; in a `batch` of one size nothing waits for a number of tokens."""
    if amount.is_floating_point():
        return {"drop_fraction": amount.to(device)}
    if (amount == amount[0]).all():
        return {"budget_per_sample": int(amount[0])}
    return {"budget_per_sample": amount.to(device), **({"capacity": int(amount.sum())} if batch else {})}


def image_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of one image.

    The CPU generator reads 32 bits of its seed. Within a run the indices keep them apart; the odd multiplier
    (2³² divided by the golden ratio) puts the runs of nearby seeds far from each other.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + index) % 2**32)


def guide(out: torch.Tensor, guidance: float, channels: int) -> torch.Tensor:
    """Classifier-free guidance of `out` (2B, C or 2C, H, W), the conditional half first, on the first `channels`.

    The channels after them, such as a learned variance, are the conditional ones.
    """
    cond, uncond = out.chunk(2)
    mean = uncond[:, :channels] + guidance * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([mean, cond[:, channels:]], dim=1)
