"""Seconds of a sampling step by tokens and rows on this machine, and the router's own tokens over t, as stored."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, DataError
from ..files import expanded, read_json, replacing
from ..model.config import DCDiTConfig


@dataclass(frozen=True)
class StepTimes:
    """`seconds[i][j]` of a step with `rows[i]` samples, both halves counted, of `tokens[j]` tokens each; for the model,
    machine and precision that `of` names."""

    of: str
    rows: list[int]
    tokens: list[int]
    seconds: list[list[float]]

    def at(self, rows: int, tokens: Any) -> np.ndarray:
        """Seconds of a step of `rows` samples with `tokens` each: linear between what was measured, in proportion to
        the rows past the most of them. More tokens never take less."""
        columns = np.maximum.accumulate(np.array(self.seconds), axis=1).T
        most = min(rows, self.rows[-1])
        row = np.array([np.interp(most, self.rows, column) for column in columns])
        return np.interp(tokens, self.tokens, row) * rows / most

    def save(self, file: Path) -> None:
        """Write the table as JSON. Raises DataError."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file, durable=False) as temporary:
                temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {file}: {error}") from error


def name_of(config: DCDiTConfig, device: torch.device, dtype: torch.dtype, training: bool = False) -> str:
    """What a table holds for: hash of the model's sizes, machine, threads and precision; sampling or `training`."""
    sizes = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
    machine = f"{platform.node()} {platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return f"model {sizes}, {machine}, {dtype}" + ", training" * training


def table_file(name: str) -> Path:
    """Where the table of this name is kept: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or expanded("~") / ".cache"
    return Path(cache) / "dcdit" / f"calibration-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"


def load_times(
    config: DCDiTConfig, device: torch.device, dtype: torch.dtype, file: Path | None = None, training: bool = False
) -> StepTimes:
    """The table of this model on this machine, from the user's cache or a file. Raises DataError where there is none,
    or one of another model, machine or precision."""
    name, given = name_of(config, device, dtype, training), file
    file = table_file(name) if given is None else Path(given)
    try:
        values = read_json(file)
        table = StepTimes(**{key.name: values[key.name] for key in fields(StepTimes)})
        measured = np.array(table.seconds, dtype=float)
        if not measured.size or measured.shape != (len(table.rows), len(table.tokens)) or not (measured > 0).all():
            raise ValueError("it must have positive seconds for each of rows and tokens")
    except FileNotFoundError as error:
        if given is not None:
            raise DataError(f"calibration must be a table of dcdit calibrate, there is no file {given}") from error
        command = "dcdit calibrate" + " --training" * training
        raise DataError(f"no step was measured for {name}: {command} measures") from error
    except KeyError as error:
        raise DataError(f"{file} is no table of dcdit calibrate: it has no {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} is no table of dcdit calibrate: {error}") from error
    if table.of != name:
        raise DataError(f"{file} must be for {name}, got one for {table.of}; dcdit calibrate measures")
    return table


def router_shape(use: dict[str, Any], timesteps: torch.Tensor) -> torch.Tensor:
    """Relative tokens of the steps (S,), float64, as a checkpoint's `router_tokens` say. Raises ConfigError."""
    shares = use.get("router_tokens")
    if shares is None:
        raise ConfigError("the checkpoint does not say its router's tokens over t: dcdit calibrate stores them")
    fits = isinstance(shares, list) and len(shares) > 1 and all(isinstance(s, float | int) and s > 0 for s in shares)
    if not fits:
        raise ConfigError(f"router_tokens must be positive numbers from t = 0 to 1000, got {shares!r}")
    at = np.interp(timesteps.numpy(), np.linspace(0, 1000, len(shares)), shares)
    return torch.from_numpy(at / at.mean())


def costs_of(config: DCDiTConfig, weight: torch.Tensor, batch: int, file: Path | None) -> dict[int, torch.Tensor]:
    """Seconds of a step for each image of a `batch`, with one half and with two: (cells + 1,) each, by tokens."""
    table, tokens = load_times(config, weight.device, weight.dtype, file), np.arange(config.cells + 1)
    return {halves: torch.from_numpy(table.at(batch * halves, tokens) / batch) for halves in (1, 2)}
