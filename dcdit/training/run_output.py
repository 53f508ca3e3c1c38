"""Output of a training run: its header, averaged models, snapshots and sheets of samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.folder import save_checkpoint
from ..model.dcdit import DCDiT
from .state import EMA
from .unused import unused


def describe_run(trainer) -> str:
    """Data, model, device and output of a `dcdit.training.Trainer`, unused keys and changes on the way, a line each."""
    config, model, device = trainer.config, trainer.config.model, trainer.device
    count = sum(p.numel() for p in trainer.net.parameters())
    (height, width), codec = model.input_size, " ".join(str(v) for v in config.codec.options().values() if v)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "bfloat16" if config.precision == "bf16" else "float32"
    size = f"{config.tokens_per_batch} cells" if config.tokens_per_batch else str(config.batch_size)
    batch = f"batch {size}" + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")
    processes = f"{trainer.ranks} process{'es' * (trainer.ranks > 1)}"
    begin = position(trainer.step, config.steps) + ("" if trainer.step else f", {trainer.started}")
    known, most = trainer.source.classes, model.num_classes
    classes = f"; the data has {known} of its {most} classes" if known and known < most else ""
    return "\n".join(
        [
            f"data    {trainer.source.describe()}",
            f"model   {count:,} parameters; {height}×{width} = {model.cells} cells, about 1 in {model.target_ratio:g} "
            f"kept; {config.objective}, codec {codec}{classes}",
            f"device  {device.type} ({name}), {precision}, {processes}, {batch}",
            f"output  {trainer.output}, {begin}",
            *(f"unused  {line}" for line in unused(config)),
            *(f"changed {c['key']} from {c['from']} to {c['to']} at step {c['step']}" for c in trainer.changes),
        ]
    )


def position(step: int, steps: int) -> str:
    """Where a run stands, in words."""
    if step > steps:
        return f"at step {step} already, past the {steps} that are asked for"
    return f"resuming at step {step} of {steps}" if step else f"from step 0 of {steps}"


def say_saved(accelerator, step: int, output: Path) -> None:
    """Say on stderr which step a run that ends early has saved; 0: none."""
    if step:
        accelerator.print(f"step {step} is saved in {output}, where the same command goes on", file=sys.stderr)


def look(trainer) -> None:
    """Snapshots and validation, where their step has come. On the first process, from the averaged weights."""
    config, step = trainer.config, trainer.step
    snapshot = config.snapshot_every and step % config.snapshot_every == 0
    validate = trainer.validation and step % config.validation.every == 0
    if not (snapshot or validate) or not trainer.accelerator.is_main_process:
        return
    model = average(trainer, trainer.emas[0]).to(trainer.device).eval()
    if snapshot:
        save_checkpoint(trainer.output / "snapshots" / f"step-{step:07d}", model, use(trainer))
    if validate:
        numbers = trainer.validation.loss(model, trainer.accelerator.autocast)
        if numbers:
            trainer.log({"step": step, **numbers})
        if config.validation.samples:
            trainer.validation.draw(model, trainer.output / "samples" / f"step-{step:07d}.png")


def average(trainer, ema: EMA) -> DCDiT:
    """A model with averaged weights."""
    model = trainer.blank()
    model.load_state_dict(ema.state_dict() | dict(trainer.net.named_buffers()))
    return model


def place(trainer, decay: float) -> Path:
    """The folder of an average: model, and model-DECAY for those after the first."""
    return trainer.output / ("model" if decay == trainer.config.optim.ema_decay[0] else f"model-{decay:g}")


def use(trainer) -> dict[str, Any]:
    """A checkpoint's notes about its use and its making."""
    config, names = trainer.config.to_dict(), trainer.source.class_names
    values = {"objective": config["objective"], "codec": trainer.config.codec.options(), "data": config["data"]}
    values |= {"class_names": names} if names else {}
    values |= {"policy": trainer.policy} if trainer.policy else {}
    values |= {"changes": trainer.changes} if trainer.changes else {}
    return {**values, "step": trainer.step, "training": config}
