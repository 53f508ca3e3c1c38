"""A training run on disk: one checkpoint file to resume from, and the metrics as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..files import naming, replacing

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, next to its step


class EMA:
    """Moving average of the parameters, decay min(decay, (1 + step)/(10 + step)): young averages forget quickly."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names, self.parameters = map(list, zip(*model.named_parameters(), strict=True))
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.values, strict=True))


def save_state(
    file: Path,
    header: dict[str, Any],
    model: nn.Module,
    emas: Sequence[EMA],
    optimizer: torch.optim.Optimizer,
    write: bool = True,
) -> None:
    """Write weights, EMAs and AdamW moments as one safetensors file; `header`, with a "step", is JSON in its header.

    Of a model that FSDP2 has split all processes call, and one of them writes.
    """
    from safetensors.torch import save

    tensors = {f"{_ema_key(i)}.{name}": v for i, ema in enumerate(emas) for name, v in ema.state_dict().items()}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        tensors |= {f"optim.{name}.{key}": value for key, value in optimizer.state[p].items()}
    gathered = {}
    for key, tensor in tensors.items():
        tensor = whole(tensor)
        if write:
            gathered[key] = tensor.cpu().contiguous()
    if not write:
        return
    with replacing(file) as temporary:
        temporary.write_bytes(save(gathered, metadata={"dcdit_training": json.dumps(header)}))


def read_header(file: Path) -> dict[str, Any]:
    """The header that `save_state` wrote: "step", "config" and more. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            header = json.loads((stream.metadata() or {})["dcdit_training"])
        header |= {"step": int(header["step"]), "config": dict(header["config"])}
        kinds = {"data": dict | None, "changes": list | None}
        if header["step"] < 0 or not all(isinstance(header.get(key), kind) for key, kind in kinds.items()):
            raise ValueError("its header is none of a run")
        return header
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is truncated or not a training checkpoint: {error}") from error


def load_state(file: Path, model: nn.Module, emas: Sequence[EMA], optimizer: torch.optim.Optimizer) -> None:
    """Read the tensors that `save_state` wrote. Raises CheckpointError before anything is changed.

    An average that the file does not have starts from the weights.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or not a training checkpoint: {error}") from error
    for i in range(len(emas)):
        if not any(key.startswith(f"{_ema_key(i)}.") for key in tensors):
            tensors |= {f"{_ema_key(i)}.{name}": tensors.get(f"model.{name}") for name in emas[i].names}
    for name, p in model.named_parameters():
        shapes = {f"model.{name}": p.shape, **{f"{_ema_key(i)}.{name}": p.shape for i in range(len(emas))}}
        if p.requires_grad:
            shapes |= {f"optim.{name}.{key}": p.shape for key in MOMENTS} | {f"optim.{name}.step": torch.Size()}
        for key, shape in shapes.items():
            if tensors.get(key) is None:
                raise CheckpointError(f"{file} has no tensor {key}")
            found = tensors[key].shape
            if found != shape:
                raise CheckpointError(f"{file}: {key}: expected shape {tuple(shape)}, found {tuple(found)}")
    with torch.no_grad():
        for name, p in model.named_parameters():
            fill(p, tensors[f"model.{name}"])
            if p.requires_grad:
                # Moments take their parameter's strides: fused AdamW walks through the memory of all tensors alike.
                moments = {key: fill(torch.empty_like(p), tensors[f"optim.{name}.{key}"]) for key in MOMENTS}
                optimizer.state[p] = moments | {"step": tensors[f"optim.{name}.step"].to(p.device)}
        for i, ema in enumerate(emas):
            for name, average in zip(ema.names, ema.values, strict=True):
                fill(average, tensors[f"{_ema_key(i)}.{name}"])


def _ema_key(number: int) -> str:
    return f"ema{number}" if number else "ema"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 has split, gathered from all processes, which must all call; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fill(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Copy whole `values` into a tensor, split or not, and return it."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    return tensor.copy_(values)


class Metrics:
    """metrics.jsonl. Resuming at a step removes the lines past it."""

    def __init__(self, directory: Path, step: int) -> None:
        self.file = directory / "metrics.jsonl"
        if self.file.exists():
            kept = [line for line in self.file.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
            with replacing(self.file) as temporary:
                temporary.write_bytes(b"".join(kept))

    def write(self, values: dict[str, float]) -> None:
        """Append one line."""
        with naming(self.file), open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")


def _step_of(line: bytes) -> float:
    # A line that a killed run left unfinished, or that is none of ours, counts as past every step.
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return float("inf")
