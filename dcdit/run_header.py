"""What `dcdit train` says before its first step."""

from __future__ import annotations

import torch


def describe_run(trainer) -> str:
    """Data, model, device and output of a `dcdit.training.Trainer`, a line each, and what was changed on the way."""
    config, model, device = trainer.config, trainer.config.model, trainer.device
    count = sum(p.numel() for p in trainer.net.parameters())
    (height, width), codec = model.input_size, " ".join(str(v) for v in config.codec.options().values() if v)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "bfloat16" if config.precision == "bf16" else "float32"
    batch = f"batch {config.batch_size}" + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")
    processes = f"{trainer.ranks} process{'es' * (trainer.ranks > 1)}"
    begin = f"resuming at step {trainer.step}" if trainer.step else f"from step 0, {trainer.started}"
    return "\n".join(
        [
            f"data    {trainer.source.describe()}",
            f"model   {count:,} parameters; {height}×{width} = {model.cells} cells, about 1 in {model.target_ratio:g} "
            f"kept; {config.objective}, codec {codec}",
            f"device  {device.type} ({name}), {precision}, {processes}, {batch}",
            f"output  {trainer.output}, {begin} of {config.steps}",
            *(f"changed {c['key']} from {c['from']} to {c['to']} at step {c['step']}" for c in trainer.changes),
        ]
    )
