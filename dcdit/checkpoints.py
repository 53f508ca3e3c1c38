"""Checkpoints: a directory of model.safetensors and config.json, or a `.pt` of the public release.

Loading one never runs code.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from .config import DCDiTConfig
from .errors import CheckpointError, ConfigError
from .files import replacing, sync
from .model import DCDiT
from .release import from_release, infer_config, release_content, stored_use
from .release import release_key as release_key
from .state_dict import read_state

FILES = ("config.json", "model.safetensors")


def load_state(model: DCDiT, state: dict[str, torch.Tensor]) -> None:
    """Load a state dict strictly. Raises CheckpointError naming the keys or shapes that differ."""
    expected = model.state_dict()
    for what, keys in (
        ("missing", expected.keys() - state.keys()),
        ("unexpected", state.keys() - expected.keys()),
    ):
        if keys:
            raise CheckpointError(f"{what} keys in checkpoint: {_some(keys)}")
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            raise CheckpointError(f"{key}: expected shape {tuple(tensor.shape)}, found {tuple(state[key].shape)}")
    model.load_state_dict(state)


def check_place(directory: Path) -> None:
    """Raise CheckpointError where a directory holds anything but a checkpoint."""
    foreign = [entry.name for entry in directory.iterdir() if entry.name not in FILES] if directory.exists() else []
    if foreign:
        raise CheckpointError(
            f"{directory} holds more than a checkpoint ({_some(foreign)}); give a directory of its own"
        )


def save_checkpoint(directory: str | Path, model: DCDiT, extra: dict[str, Any] | None = None) -> None:
    """Write model.safetensors and config.json; the directory appears whole or not at all.

    `extra` holds JSON values about the model's use, such as {"objective": "flow"}. A checkpoint that is there already
    is replaced; raises CheckpointError where the directory holds anything else.
    """
    from safetensors.torch import save

    directory = Path(directory)
    check_place(directory)
    directory = directory.resolve() if directory.is_symlink() else directory  # a link stays, what it names is replaced
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        (temporary / "model.safetensors").write_bytes(save(_tensors(model)))
        config = {"model": model.config.to_dict(), **(extra or {})}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in FILES:
            sync(temporary / name)
        temporary.chmod(0o755)
        old = temporary.with_name(temporary.name + ".old")
        if directory.exists():
            os.rename(directory, old)
        os.rename(temporary, directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[DCDiT, dict[str, Any]]:
    """The model of a checkpoint directory, in eval mode, and the values that were saved with it.

    Raises CheckpointError for a missing, truncated, foreign or mismatched checkpoint.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.is_file():
        raise CheckpointError(f"{path} is a file, expected a folder of {' and '.join(FILES)}; dcdit convert makes one")
    config_file, weights = (path / name for name in FILES)
    for file in (config_file, weights):
        if not file.is_file():
            raise CheckpointError(f"no checkpoint at {path}: {file.name} is missing")
    try:
        extra = json.loads(config_file.read_text())
        config = DCDiTConfig.from_dict(extra.pop("model"))
    except ConfigError as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config_file} is not a dcdit config: {error!r}") from error
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights} is truncated or not a safetensors file: {error}") from error
    model = DCDiT(config).to(device)
    load_state(model, {key: tensor.to(torch.float32) for key, tensor in state.items()})
    return model.eval(), extra


def from_pretrained(name: str | Path, device: str | torch.device = "cpu", **hub: Any) -> DCDiT:
    """The model of a checkpoint directory, or of a repository id on the Hugging Face Hub, in eval mode.

    `hub` goes to `huggingface_hub.snapshot_download`, such as revision= or local_files_only=. Raises CheckpointError.
    """
    if not Path(name).exists():
        from huggingface_hub import snapshot_download

        try:
            name = snapshot_download(str(name), allow_patterns=list(FILES), **hub)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{name} is neither a directory nor a repository that can be read: {reason}"
            ) from error
    return load_checkpoint(name, device)[0]


def load_release(
    path: str | Path, *, num_heads: int | None = None, sigma: float | None = None, which: str = "ema"
) -> DCDiT:
    """The model of a checkpoint of the public release (AMD-AGI/DynamicChunkingDiT), in eval mode.

    Args:
        path: the `.pt` file: a dict of model, ema and config, or a bare state dict.
        num_heads, sigma: what the shapes do not tell. None: from the stored configuration where it can be read, else
            heads of 72 or 64 channels and σ = 1.
        which: "ema" or "model".

    Sizes come from the tensors. Nothing that the file names is imported or run. Raises CheckpointError naming the key,
    the expected and the found shape where they do not fit, and ConfigError for sizes that make no model.
    """
    return read_release(path, num_heads=num_heads, sigma=sigma, which=which)[0]


def read_release(
    path: str | Path, *, num_heads: int | None = None, sigma: float | None = None, which: str = "ema"
) -> tuple[DCDiT, dict[str, Any]]:
    """`load_release`, and the model's objective and codec: those that `save_release` stored, or the release's own."""
    state, config = read_state(path, which)
    state = from_release(state)
    model = DCDiT(infer_config(state, config, num_heads, sigma))
    load_state(model, {key: tensor.to(torch.float32) for key, tensor in state.items()})
    return model.eval(), stored_use(config)


def save_release(path: str | Path, model: DCDiT, extra: dict[str, Any] | None = None) -> None:
    """Write `model` as a `.pt` in the public release's layout; the file appears whole or not at all.

    Of `extra`, as of `save_checkpoint`, it keeps the objective and the codec. Raises CheckpointError for a model that
    the layout has no place for, such as one on a grid that is not square.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary:
            torch.save(release_content(_tensors(model), model.config, extra or {}), temporary)
    except RuntimeError as error:  # torch's writer, where the disk is full
        raise OSError(f"cannot write {path}, is the disk full? {str(error).splitlines()[0]}") from error


def _tensors(model: DCDiT) -> dict[str, torch.Tensor]:
    return {key: tensor.cpu().contiguous() for key, tensor in model.state_dict().items()}


def _some(keys) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
