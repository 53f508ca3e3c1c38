"""Checkpoints: a directory of model.safetensors and config.json. Loading one never runs code."""

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
from .model import DCDiT

# The public release's prefixes and ours, in the order in which they are tried.
_RELEASE_PREFIXES = (
    ("x_embedder.proj.", "stem."),
    ("t_embedder.", "time_embed."),
    ("y_embedder.embedding_table.", "class_embed."),
    ("hnet.encoder.layers.", "encoder.blocks."),
    ("hnet.encoder.rmsnorm.", "encoder.norm."),
    ("hnet.residual_proj.", "residual_proj."),
    ("hnet.routing_module.proj.", "router.proj."),
    ("hnet.routing_module.context_predictor.", "router.context."),
    ("hnet.routing_module.residual_scorer.0.", "router.scorer."),
    ("hnet.routing_module.residual_scorer.1.", "router.norm."),
    ("hnet.routing_module.residual_scorer.3.", "router.score."),
    ("hnet.main_network.main_network.layers.", "main.blocks."),
    ("hnet.main_network.main_network.rmsnorm.", "main.norm."),
    ("hnet.decoder.layers.", "decoder.blocks."),
    ("hnet.decoder.rmsnorm.", "decoder.norm."),
    ("final_layer.", "final."),
    ("pos_embed", "pos_embed"),
)
_RELEASE_PARTS = (
    ("cond_proj.", "cond."),
    ("skip_proj.", "skip."),
    ("adaLN_modulation.", "adaln."),
    ("attn.qkv.", "qkv."),
    ("attn.proj.", "proj."),
    ("mlp.fc", "fc"),
)


def release_key(key: str) -> str:
    """Our name of a parameter of the public release. Raises CheckpointError for a foreign one."""
    for theirs, ours in _RELEASE_PREFIXES:
        if key.startswith(theirs):
            key = ours + key[len(theirs) :]
            break
    else:
        raise CheckpointError(f"unknown key {key!r}: this is not a DC-DiT release state dict")
    if key.startswith(("encoder.blocks", "decoder.blocks", "main.blocks", "final.")):
        for theirs, ours in _RELEASE_PARTS:
            key = key.replace(theirs, ours)
    return key


def from_release(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict from the release's: keys renamed, tensors untouched but for the position table's batch axis."""
    renamed = {release_key(key): tensor for key, tensor in state.items()}
    if "pos_embed" in renamed:
        renamed["pos_embed"] = renamed["pos_embed"].reshape(renamed["pos_embed"].shape[-2:])
    return renamed


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


def save_checkpoint(directory: str | Path, model: DCDiT, extra: dict[str, Any] | None = None) -> None:
    """Write model.safetensors and config.json; the directory appears whole or not at all.

    `extra` holds JSON values about the model's use, such as {"objective": "flow"}.
    """
    from safetensors.torch import save

    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
        _write(temporary / "model.safetensors", save(tensors))
        config = {"model": model.config.to_dict(), **(extra or {})}
        _write(temporary / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        temporary.chmod(0o755)
        old = None
        if directory.exists():
            old = temporary.with_name(temporary.name + ".old")
            os.rename(directory, old)
        os.rename(temporary, directory)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[DCDiT, dict[str, Any]]:
    """The model of a checkpoint directory, in eval mode, and the values that were saved with it.

    Raises CheckpointError for a missing, truncated, foreign or mismatched checkpoint.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    config_file, weights = path / "config.json", path / "model.safetensors"
    for file in (config_file, weights):
        if not file.is_file():
            raise CheckpointError(f"no checkpoint at {path}: {file.name} is missing")
    try:
        extra = json.loads(config_file.read_text())
        config = DCDiTConfig.from_dict(extra.pop("model"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise CheckpointError(f"{config_file}: {error}") from error
        raise CheckpointError(f"{config_file} is not a dcdit config: {error!r}") from error
    try:
        state = load_file(weights, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights} is truncated or not a safetensors file: {error}") from error
    model = DCDiT(config).to(device)
    load_state(model, {key: tensor.to(torch.float32) for key, tensor in state.items()})
    return model.eval(), extra


def _write(file: Path, data: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _some(keys, most: int = 4) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
