"""What a training run keeps on disk: one checkpoint file to resume from, and the metrics as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError, ConfigError
from .files import replacing

# Keys of a configuration that may differ between a run and its resumption: they change no number of it.
FREE_KEYS = (
    *("output", "log_every", "save_every", "max_minutes", "tensorboard", "data.workers"),
    *("accumulate", "checkpointing"),  # the same numbers, up to the order of sums
)
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, next to its step


class EMA:
    """Moving average of the parameters, decay min(decay, (1 + step)/(10 + step)): young averages forget quickly."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self.values = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in model.parameters()], 1 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.values, strict=True))


def save_state(
    file: Path, step: int, config: dict[str, Any], model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer
) -> None:
    """Write weights, EMA and AdamW moments as one safetensors file; step and configuration are JSON in its header."""
    from safetensors.torch import save

    tensors = {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        tensors |= {f"optim.{name}.{key}": value for key, value in optimizer.state[p].items()}
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    header = {"step": step, "config": config}
    with replacing(file) as temporary:
        temporary.write_bytes(save(tensors, metadata={"dcdit_training": json.dumps(header)}))


def load_state(file: Path, config: dict[str, Any], model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Read what `save_state` wrote and return its step. Raises CheckpointError, or ConfigError naming what changed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            header = json.loads((stream.metadata() or {})["dcdit_training"])
            step, trained = int(header["step"]), dict(header["config"])
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or not a training checkpoint: {error}") from error
    for key, old, new in _differences(trained, config):
        raise ConfigError(
            f"{file} was trained with {key}={old}, this run asks for {new}; give another output or remove it"
        )
    for name, p in model.named_parameters():
        shapes = {f"model.{name}": p.shape, f"ema.{name}": p.shape}
        if p.requires_grad:
            shapes |= {f"optim.{name}.{key}": p.shape for key in MOMENTS} | {f"optim.{name}.step": torch.Size()}
        for key, shape in shapes.items():
            if key not in tensors:
                raise CheckpointError(f"{file} has no tensor {key}")
            found = tensors[key].shape
            if found != shape:
                raise CheckpointError(f"{file}: {key}: expected shape {tuple(shape)}, found {tuple(found)}")
    with torch.no_grad():
        for (name, p), average in zip(model.named_parameters(), ema.values, strict=True):
            p.copy_(tensors[f"model.{name}"])
            average.copy_(tensors[f"ema.{name}"])
            if p.requires_grad:
                # Moments take their parameter's strides: fused AdamW walks through the memory of all of them alike.
                moments = {key: torch.empty_like(p).copy_(tensors[f"optim.{name}.{key}"]) for key in MOMENTS}
                optimizer.state[p] = moments | {"step": tensors[f"optim.{name}.step"].to(p.device)}
    return step


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = ""):
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if prefix + key in FREE_KEYS or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        else:
            yield prefix + key, a, b


class Metrics:
    """metrics.jsonl, and TensorBoard on request. Resuming at a step removes the lines past it."""

    def __init__(self, directory: Path, step: int, tensorboard: bool) -> None:
        self.file = directory / "metrics.jsonl"
        if self.file.exists():
            kept = [line for line in self.file.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
            with replacing(self.file) as temporary:
                temporary.write_bytes(b"".join(kept))
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError("tensorboard=true needs the package tensorboard: pip install tensorboard") from error
            self.board = SummaryWriter(directory / "tensorboard", purge_step=step + 1)

    def write(self, values: dict[str, float]) -> None:
        with open(self.file, "a") as stream:
            stream.write(json.dumps(values) + "\n")
        if self.board:
            for key, value in values.items():
                self.board.add_scalar(key, value, values["step"])

    def close(self) -> None:
        if self.board:
            self.board.close()


def _step_of(line: bytes) -> float:
    # A line that a killed run left unfinished, or that is none of ours, counts as past every step.
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
