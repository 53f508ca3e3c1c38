"""Sampling with diffusers' schedulers, classifier-free guidance and a budget of tokens for each half.

Every image has its own random numbers, made on the CPU from (seed, image index): the same image comes out
whatever the batch size, the order or the number of devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dcdit_kernels._plan_input import NaNError

from ..checkpoints.folder import load_checkpoint, locate
from ..codecs import make_codec
from ..errors import CheckpointError, ConfigError
from ..model.config import DCDiTConfig, check_keys
from ..model.dcdit import DCDiT
from ..model.dit_shell import DiTShell
from ..model.graphs import Graphed
from ..model.precision import float32_products
from ..model.routing import Routing
from ..pictures.images import to_uint8
from .denoising import Denoising, budget_of
from .drop_fraction import DropFraction
from .edits import Edit
from .paced import Paced
from .policy import Policy
from .schedulers import SCHEDULERS
from .token_budget import Tokens
from .trace import Decided, Samples, Step, Trace
from .trajectory import plan_trajectory


@torch.no_grad()
def sample(
    model: DCDiT | Graphed | DiTShell,
    classes: Sequence[int] | torch.Tensor,
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
    budget_schedule: str = "constant",
    seed: int = 0,
    indices: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 64,
    clip: bool = False,
    edit: Edit | None = None,
    policy: Policy | str | None = None,
    callback: Callable[[Step], Any] | None = None,
) -> Samples:
    """Sample one latent (C, H, W) for each class id in `classes` (N,).

    Args:
        model: in half precision (`dcdit.model.cast_weights`) its float32 products are in TF32; a graphed one
            (`dcdit.graphed`) is replayed as CUDA graphs. A PlainDiT, SparseDiT or DyDiT is sampled likewise.
        objective: the model's training objective, "flow" or "ddpm".
        scheduler: "auto", "flow-euler", "flow-heun", "ddpm" (variance learned where the model has it), "ddim",
            "dpm-solver++".
        guidance: classifier-free guidance, uncond + guidance·(cond − uncond), of the noise or velocity; a learned
            variance is the conditional one. 1 runs no unconditional half; less than 1 mixes it in, where
            DCDiTPipeline, as diffusers does, runs without guidance. Both halves are one packed batch.
        guidance_channels: how many of the latent's channels it moves (DiT: 3); None: all.
        guidance_interval: the timesteps from 0 (data) to 1000 (noise) between which it is applied (arXiv 2404.07724).
        eta: noise of "ddim", 0 (none) to 1 (as much as DDPM's; arXiv 2010.02502 eq. 16).
        shift: of the times of flow matching, see `make_scheduler`.
        drop_fraction: ρ in [0, 1), see `drop_table`: a number, a tensor (N,), a list over the steps, a function of t.
        uncond_drop_fraction: ρ of the unconditional half (Lite-CFG, arXiv 2603.06351); None: drop_fraction.
        tokens: in place of ρ, how many tokens an image has in each half of a step, given as ρ is: exactly so many.
        gflops_per_image: in place of ρ, what an image costs over the whole trajectory, as `Trace.gflops` counts it. The
            tokens of each step follow (`tokens_for_gflops`), with "constant", "linear" or "router" for
            `budget_schedule`; the last is the router's own average over t, which `dcdit calibrate` stores.
        seconds_per_image: in place of ρ, the time of an image's steps by `dcdit calibrate`'s table: that of this
            machine, or of the file `calibration`.
        seed, indices: image i draws from (seed, indices[i]); the indices are 0 to N − 1 by default.
        size: (H, W) of the latents, in cells; None: the model's input_size. `latent_size` gives it from pixels.
        clip: clamp the predicted x_0 of "ddpm" and "ddim" to [−1, 1], for codecs with pixels as latents.
        edit: a picture's cells to sample, the others stay; see `Edit`, and `dcdit.sampling.read_edit` for files.
        policy: what each step may spend, see `Policy`; such as "budget=64:32 & teacache=0.15". `Trace.table()` says
            what it decided when.
        callback: called with a Step before each update.

    Raises ConfigError for a class id outside [0, num_classes), ρ outside [0, 1), a size that the model cannot
    take, or a scheduler that does not fit; DCDiTError where the router's probabilities are NaN.
    """
    policy = Policy.of(policy)
    if not hasattr(model, "config"):
        raise ConfigError(f"model must be a DCDiT or one of its rivals, got {type(model).__name__}")
    model = policy.wrap(model)
    drop_fraction, tokens, guidance_interval = policy.spending(drop_fraction, tokens, guidance_interval)
    classes = class_ids(classes, model.config.num_classes)
    count = len(classes)
    try:
        indices = torch.arange(count) if indices is None else torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"indices must be integers, got {indices!r}") from error
    if indices.shape != (count,) or indices.dtype is torch.bool or indices.is_floating_point():
        have = f"{indices.dtype} of shape {tuple(indices.shape)}"
        raise ConfigError(f"indices must be integers, one entry for each of the {count} classes, got {have}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if callback is not None and not callable(callback):
        raise ConfigError(f"callback must be a function of a Step, got {callback!r}")
    way = plan_trajectory(
        model,
        count,
        objective=objective,
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        guidance_channels=guidance_channels,
        guidance_interval=guidance_interval,
        eta=eta,
        shift=shift,
        drop_fraction=drop_fraction,
        uncond_drop_fraction=uncond_drop_fraction,
        tokens=tokens,
        gflops_per_image=gflops_per_image,
        seconds_per_image=seconds_per_image,
        calibration=calibration,
        batch_size=min(batch_size, count),
        budget_schedule=budget_schedule,
        seed=seed,
        size=size,
        clip=clip,
        edit=edit,
        grid=policy.grid,
    )
    timesteps = way.timesteps
    latents = torch.empty(count, model.config.in_channels, *way.size)
    kept = torch.full((len(way.budgets), len(timesteps), count), torch.nan)
    seconds = torch.zeros(len(timesteps))
    decided = Decided(len(timesteps), count)
    with float32_products("high" if next(model.parameters()).dtype.itemsize < 4 else None):
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            run = Denoising(way, model, classes[part], indices[part].tolist(), part)
            if isinstance(model, Paced):
                model.begin(timesteps)
            while not run.done:
                begin, i = time.perf_counter(), run.number
                if isinstance(model, Paced):
                    model.observe(run.x)
                out, routing = predict(model, run)
                if callback is not None:
                    paused, batch = time.perf_counter(), len(run.x)
                    conditional = Routing(routing.boundary_prob[:batch], routing.plan)
                    callback(Step(i, len(timesteps), run.timestep, run.x, indices[part], conditional))
                    begin += time.perf_counter() - paused
                spent = (model.spent if isinstance(model, Paced) else routing.plan.lengths).view(-1, len(run.x))
                kept[: len(spent), i, part] = spent.cpu().float()
                decided.add(i, part, {**run.decided(), **(model.decided if isinstance(model, Paced) else {})})
                run.update(out)
                if run.device.type == "cuda":
                    torch.cuda.synchronize(run.device)
                seconds[i] += time.perf_counter() - begin
            latents[part] = run.x.cpu()
            if not latents[part].isfinite().all():
                raise run.diverged("latents that are not finite")
    trace = Trace(timesteps, seconds, kept[0], kept[1] if len(way.budgets) == 2 else None, decided.values, way.sizes)
    return Samples(latents, trace)


def predict(model: Any, run: Denoising) -> tuple[torch.Tensor, Routing]:
    """The next forward of a batch. Raises DCDiTError where its numbers are not finite."""
    x, t, y, amount = run.inputs()
    try:
        return model(x, t, y, return_routing=True, **budget_of(amount, x.device), **run.limits(amount))
    except NaNError as error:
        raise run.diverged(error) from error


def class_ids(classes: Sequence[int] | torch.Tensor, num_classes: int) -> torch.Tensor:
    """Ids (N,), int64, of classes in [0, num_classes). Raises ConfigError."""
    try:
        classes = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"classes must be a list of class ids, got {classes!r}") from error
    real = classes.is_floating_point() or classes.dtype is torch.bool
    if classes.dim() != 1 or real or len(classes) == 0:
        came = f"{classes.dtype} of shape {tuple(classes.shape)}" if classes.numel() else "none"
        raise ConfigError(f"classes must be a list of class ids, got {came}")
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ConfigError(f"class id {wrong} is outside [0, {num_classes - 1}], the classes of this model")
    return classes.long()


def pixel_size(config: DCDiTConfig, codec) -> tuple[int, int]:
    """(H, W) in pixels of the model's own pictures."""
    height, width = codec.decode(torch.zeros(1, config.in_channels, *config.input_size)).shape[-2:]
    return height, width


def latent_size(pixels: tuple[int, int], config: DCDiTConfig, codec) -> tuple[int, int]:
    """(H, W) in cells of pictures of `pixels` (H, W). Raises ConfigError where codec or model cannot take them."""
    cells = torch.zeros(1, config.in_channels, *config.input_size)
    unit = codec.decode(cells).shape[-1] // cells.shape[-1]
    step = unit * getattr(config, "encoder_stride", 1)
    if any(side < 1 or side % step for side in pixels):
        size = "×".join(map(str, pixels))
        raise ConfigError(f"pictures must have sides of a multiple of {step} pixels, got {size}")
    return pixels[0] // unit, pixels[1] // unit


def open_checkpoint(path: str | Path, device: str | torch.device = "cpu"):
    """(model, objective, codec) of a checkpoint: enough to make images. `path` as in `dcdit.checkpoints.folder.locate`.

    Raises CheckpointError or ConfigError, also for a codec that cannot decode the model's latents.
    """
    path = locate(path)
    model, extra = load_checkpoint(path, device)
    for key, kind in (("objective", str), ("codec", dict)):
        if extra.get(key) is not None and not isinstance(extra[key], kind):
            form = '{"kind": …}' if kind is dict else '"flow" or "ddpm"'
            raise CheckpointError(f"{path / 'config.json'}: {key} must be {form}, got {extra[key]!r}")
        if extra.get(key) is None:
            raise CheckpointError(
                f"{path / 'config.json'} does not say the model's {key}; "
                'save it with extra={"objective": "flow" or "ddpm", "codec": {"kind": …}}'
            )
    try:
        Policy.of(extra.get("policy")).wrap(model)
    except ConfigError as error:
        raise CheckpointError(f"{path / 'config.json'}: policy {extra['policy']!r}: {error}") from error
    names, channels = extra.get("class_names"), extra.get("guidance_channels")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{path / 'config.json'}: class_names must be a list of text, got {names!r}")
    if names and (len(names) > model.config.num_classes or len(set(names)) < len(names)):
        most = model.config.num_classes
        raise CheckpointError(
            f"{path / 'config.json'}: class_names must be {most} different names at most, got {names}"
        )
    most = model.config.in_channels
    if channels is not None and (type(channels) is not int or not 1 <= channels <= most):
        raise CheckpointError(
            f"{path / 'config.json'}: guidance_channels must be an integer from 1 to {most}, got {channels!r}"
        )
    try:
        check_keys([extra["objective"]], set(SCHEDULERS.values()), "objective")
        codec = make_codec(**extra["codec"])
    except ConfigError as error:
        raise ConfigError(f"{path / 'config.json'}: {error}") from error
    try:
        to_uint8(codec.decode(torch.zeros(1, model.config.in_channels, *model.config.input_size, device=device)))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the codec {extra['codec']} does not fit the model: {str(error).splitlines()[0]}") from error
    return model, extra["objective"], codec
