"""The public release's checkpoints: keys renamed, sizes inferred."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import torch

from ..errors import CheckpointError
from ..model.config import DCDiTConfig
from .looks import RELEASE, looks_like
from .safe_pickle import inverse, shape_of, swap_parts, swap_prefix

# The release's models were trained by DDPM on latents of Stable Diffusion's autoencoder, of which DiT's guidance
# moves three channels.
RELEASE_USE = {
    "objective": "ddpm",
    "guidance_channels": 3,
    "codec": {"kind": "autoencoder_kl", "pretrained": "stabilityai/sd-vae-ft-ema", "scale": 0.18215},
}
# The part of a model's use that a `.pt` keeps.
_USE_KEYS = ("objective", "codec", "guidance_channels", "class_names")
# The release's prefixes and ours, in the order of trial.
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
# Parts of a block's keys, between dots; with the parts of DiT's own blocks.
PARTS = (
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
    name = swap_prefix(key, _PREFIXES)
    if name is None:
        raise CheckpointError(f"unknown key {key!r}: this is not a DC-DiT release state dict")
    return swap_parts(name, PARTS) if name.startswith(_BLOCKS) else name


def from_release(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict from the release's: keys renamed, tensors untouched but for the position table's batch axis.

    Raises CheckpointError for the weights of another system, which it names.
    """
    if (system := looks_like(state)) != RELEASE:
        raise CheckpointError(f"expected {RELEASE}, these weights look like {system}")
    renamed = {release_key(key): tensor for key, tensor in state.items()}
    if "pos_embed" in renamed:
        renamed["pos_embed"] = renamed["pos_embed"].squeeze(0)
    return renamed


def to_release(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `from_release`. Raises CheckpointError for a part that the release does not have."""
    renamed = {}
    for key, tensor in state.items():
        name = swap_parts(key, inverse(PARTS)) if key.startswith(_BLOCKS) else key
        name = swap_prefix(name, inverse(_PREFIXES))
        if name is None:
            raise CheckpointError(f"the public release has no place for {key}")
        renamed[name] = tensor[None] if key == "pos_embed" else tensor
    return renamed


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
    """A model's use as `release_content` stored it, as JSON; the release's own for a file that it did not write."""
    text = config.get("use") if isinstance(config, dict) else None
    if text is None:
        return dict(RELEASE_USE)
    try:
        return {key: value for key, value in json.loads(text).items() if key in _USE_KEYS}
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"stored use: expected a JSON object, found {text!r}") from error


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
    """Content for `torch.save` that the release reads: weights as model and ema, and the values unknown from shapes.

    Of `extra` the model's use, where it is not the release's own. Raises CheckpointError for a model
    that the release has no place for.
    """
    height, width = config.input_size
    if height != width:
        raise CheckpointError(f"the public release takes square grids only, this model's is {height}×{width}")
    for name in ("router", "encoder_stride", "norm_groups", "segment_mean", "keep_grid", "predict_clean"):
        only, ours = getattr(DCDiTConfig, name), getattr(config, name)
        if ours != only:
            raise CheckpointError(f"the public release has {name} {only} only, this model's is {ours}")
    renamed = to_release(state)
    use = {key: extra[key] for key in _USE_KEYS if key in extra}
    return {
        "model": renamed,
        "ema": renamed,
        "config": {
            "model": {"hnet": {"num_heads": [config.num_heads], "dechunk_kernel_sigma": config.sigma}},
            "training": {"downsample_factor": config.target_ratio},
            **({"use": json.dumps(use)} if use != RELEASE_USE else {}),
        },
    }
