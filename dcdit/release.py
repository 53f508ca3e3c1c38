"""The public release's checkpoints: pickles read without running what they name, keys renamed, sizes inferred."""

from __future__ import annotations

import json
import math
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import torch

from .config import DCDiTConfig
from .errors import CheckpointError

# What the release's models were trained by: DDPM on latents of Stable Diffusion's autoencoder.
RELEASE_USE = {
    "objective": "ddpm",
    "codec": {"kind": "autoencoder_kl", "pretrained": "stabilityai/sd-vae-ft-ema", "scale": 0.18215},
}
# The release's prefixes and ours, in the order in which they are tried.
_PREFIXES = (
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
# Parts of a block's keys, between dots.
_PARTS = (
    ("cond_proj", "cond"),
    ("skip_proj", "skip"),
    ("adaLN_modulation", "adaln"),
    ("attn.qkv", "qkv"),
    ("attn.proj", "proj"),
    ("mlp.fc1", "fc1"),
    ("mlp.fc2", "fc2"),
)
_BLOCKS = ("encoder.blocks.", "decoder.blocks.", "main.blocks.", "final.")


def release_key(key: str) -> str:
    """Our name of a parameter of the public release. Raises CheckpointError for a foreign one."""
    for theirs, ours in _PREFIXES:
        if key.startswith(theirs):
            key = ours + key[len(theirs) :]
            break
    else:
        raise CheckpointError(f"unknown key {key!r}: this is not a DC-DiT release state dict")
    return _swap_parts(key, _PARTS) if key.startswith(_BLOCKS) else key


def from_release(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict from the release's: keys renamed, tensors untouched but for the position table's batch axis."""
    renamed = {release_key(key): tensor for key, tensor in state.items()}
    if "pos_embed" in renamed:
        renamed["pos_embed"] = renamed["pos_embed"].squeeze(0)
    return renamed


def to_release(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `from_release`. Raises CheckpointError for a part that the release does not have."""
    renamed = {}
    for key, tensor in state.items():
        name = _swap_parts(key, [(ours, theirs) for theirs, ours in _PARTS]) if key.startswith(_BLOCKS) else key
        for theirs, ours in _PREFIXES:
            if name.startswith(ours):
                renamed[theirs + name[len(ours) :]] = tensor[None] if key == "pos_embed" else tensor
                break
        if not name.startswith(tuple(ours for _, ours in _PREFIXES)):
            raise CheckpointError(f"the public release has no place for {key}")
    return renamed


def _swap_parts(key: str, parts) -> str:
    for old, new in parts:
        key = re.sub(rf"(?<=\.){re.escape(old)}(?=\.)", new, key)
    return key


class _InertType(type):
    """Classes that an unpickler may make instances of, but never call."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise CheckpointError(f"the file asks to call {cls.__name__}; refused, nothing of it was run")


class Record(metaclass=_InertType):
    """Stands in for an instance of a class that a checkpoint names: its fields, and nothing that runs."""

    def __new__(cls, *args: Any) -> Record:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise CheckpointError(f"the state of {type(self).__name__} is {type(state).__name__}, expected fields")
        self.__dict__.update(state)


# The classes that torch's unpickler lets through are those of the process, not of one reader.
_READING = threading.Lock()
# How a file of torch before 1.6 begins.
_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


def read_pickle(path: str | Path) -> Any:
    """What a `.pt` file holds: tensors, containers and numbers; instances of unknown classes become `Record`s.

    torch's weights-only unpickler reads it, so nothing that the file names is imported or run. Raises CheckpointError
    where it asks for that, or is truncated or no checkpoint, and OSError where it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {path}")
    with open(path, "rb") as file:
        if file.read(len(_LEGACY)) == _LEGACY:
            raise CheckpointError(f"{path} is in the format of torch before 1.6; load it and save it again with torch")
    try:
        with _READING:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            # One class for each name, so that an error can say which was asked for.
            records: list[Any] = [(_InertType(name, (Record,), {}), name) for name in unknown]
            with torch.serialization.safe_globals(records):
                return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a broken pickle can raise anything
        # torch puts the advice to load without its protection in place of why it refused, raised "from None".
        hidden = isinstance(error, pickle.UnpicklingError) and error.__suppress_context__
        text = str(error.__context__ if hidden else error)
        reason = text.splitlines()[0] if text else type(error).__name__
        raise CheckpointError(f"{path} is truncated, tampered with or not a checkpoint: {reason}") from error


def read_state(path: str | Path, which: str = "ema") -> tuple[dict[str, torch.Tensor], Any]:
    """(state dict, stored configuration or None) of a training checkpoint, or of a bare state dict.

    `which` is "ema" or "model"; prefixes of DistributedDataParallel and torch.compile are stripped. Every entry is a
    dense floating-point tensor with memory of its own for all its elements. Raises CheckpointError for anything else.
    """
    content = read_pickle(path)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected a dict of tensors or of model and ema")
    config = None
    if not all(isinstance(value, torch.Tensor) for value in content.values()):
        if which not in content:
            raise CheckpointError(f"{path} has no {which!r}; it holds {', '.join(map(str, content))}")
        content, config = content[which], content.get("config")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {which!r} is {type(content).__name__}, expected a dict of tensors")
    state: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: the key {key!r} is {type(key).__name__}, expected a name")
        _check_tensor(f"{path}: {key!r}", value)
        name = re.sub(r"^((module|_orig_mod)\.)+", "", key)
        if name in state:
            raise CheckpointError(f"{path}: {name!r} is there twice, with and without a prefix")
        state[name] = value
    return state, config


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{name} is {type(value).__name__}, expected a tensor")
    if value.layout != torch.strided or value.is_nested or value.is_meta or not value.is_floating_point():
        kind = f"{value.dtype}, {value.layout}, on {value.device}"
        raise CheckpointError(f"{name} is {kind}: expected a dense floating-point tensor with values")
    # An expanded tensor is small in the file, and as large as its shape says once it is copied.
    found, needed = value.untyped_storage().nbytes(), max(value.numel(), 1) * value.element_size()
    if found < needed:
        raise CheckpointError(f"{name}: expected {needed} bytes or more for {tuple(value.shape)}, found {found}")


def stored(config: Any, path: str, kind: type, default: Any = None) -> Any:
    """A positive number of a stored configuration by its dotted path; `default` where there is none.

    The path leads through records and dicts. The release keeps one value per level of its hierarchy; the last is that
    of the innermost, the main network. `kind` is int or float. Raises CheckpointError for anything else.
    """
    for name in path.split("."):
        config = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    if isinstance(config, (list, tuple)):
        config = config[-1] if config else None
    if config is None:
        return default
    if type(config) not in (int, kind) or not 0 < config <= torch.finfo(torch.float64).max:
        found = config if isinstance(config, (int, float)) else type(config).__name__
        raise CheckpointError(f"stored {path}: expected a positive {kind.__name__}, found {found}")
    return kind(config)


def stored_use(config: Any) -> dict[str, Any]:
    """Objective and codec: those that `release_content` stored, as JSON, or the release's own."""
    text = config.get("use", "{}") if isinstance(config, dict) else "{}"
    try:
        use = json.loads(text)
        return {key: use.get(key, own) for key, own in RELEASE_USE.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"stored use: expected a JSON object, found {text!r}") from error


def shape_of(state: dict[str, torch.Tensor], key: str, dims: int) -> tuple[int, ...]:
    """Shape of a tensor of a state dict. Raises CheckpointError where it is missing or has not `dims` axes."""
    if key not in state:
        raise CheckpointError(f"missing keys in checkpoint: {key}")
    if state[key].dim() != dims:
        raise CheckpointError(f"{key}: expected {dims} axes, found shape {tuple(state[key].shape)}")
    return tuple(state[key].shape)


def infer_config(state: dict[str, torch.Tensor], config: Any, num_heads: int | None, sigma: float | None):
    """DCDiTConfig of a state dict in our names, from its shapes; heads, σ and N from the stored configuration."""
    cells, width = shape_of(state, "pos_embed", 2)
    side = math.isqrt(cells)
    if side * side != cells:
        raise CheckpointError(f"pos_embed: expected a square grid, found {cells} cells")
    narrow, channels = shape_of(state, "stem.weight", 4)[:2]
    blocks = {match[1] for key in state if (match := re.match(r"main\.blocks\.(\d+)\.", key))}
    if num_heads is None:
        num_heads = stored(config, "model.hnet.num_heads", int)
    if sigma is None:
        sigma = stored(config, "model.hnet.dechunk_kernel_sigma", float, 1.0)
    return DCDiTConfig(
        input_size=(side, side),
        in_channels=channels,
        num_classes=shape_of(state, "class_embed.weight", 2)[0] - 1,
        hidden_size=width,
        depth=len(blocks),
        num_heads=infer_heads(width) if num_heads is None else num_heads,
        encoder_width=narrow,
        mlp_ratio=shape_of(state, "main.blocks.0.fc1.weight", 2)[0] / width,
        target_ratio=stored(config, "training.downsample_factor", float, 4.0),
        sigma=float(sigma),
        learn_sigma=shape_of(state, "final.linear.weight", 2)[0] == 2 * channels,
    )


def infer_heads(width: int) -> int:
    """Heads of a DiT of this width: 72 channels each where that divides (XL), else 64 (S, B, L)."""
    for head in (72, 64):
        if width % head == 0:
            return width // head
    raise CheckpointError(f"cannot tell the number of heads of width {width}: give num_heads")


def release_content(state: dict[str, torch.Tensor], config: DCDiTConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """What `torch.save` writes for the release to read: weights as model and ema, and what shapes do not tell.

    Of `extra` the objective and the codec, where they are not the release's own. Raises CheckpointError for a model
    that the release has no place for.
    """
    height, width = config.input_size
    if height != width:
        raise CheckpointError(f"the public release takes square grids only, this model's is {height}×{width}")
    renamed = to_release(state)
    use = {key: extra[key] for key, own in RELEASE_USE.items() if extra.get(key, own) != own}
    return {
        "model": renamed,
        "ema": renamed,
        "config": {
            "model": {"hnet": {"num_heads": [config.num_heads], "dechunk_kernel_sigma": config.sigma}},
            "training": {"downsample_factor": config.target_ratio},
            **({"use": json.dumps(use)} if use else {}),
        },
    }
