"""Weights of a plain DiT: from the original's `.pt` files and from diffusers, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from .checkpoints import load_state
from .config import DCDiTConfig
from .errors import CheckpointError
from .plain_dit import PlainDiT
from .release import PARTS
from .state_dict import inverse, read_state, shape_of, swap_parts, swap_prefix

# Prefixes of the original DiT and ours; the blocks are the release's.
_OUTER = (
    ("x_embedder.proj.", "stem."),
    ("t_embedder.", "time_embed."),
    ("y_embedder.embedding_table.", "class_embed."),
    ("final_layer.linear.", "head."),
    ("final_layer.adaLN_modulation.", "adaln."),
)
# Layers of a diffusers block and ours; its q, k and v are three.
_DIFFUSERS = (
    ("attn1.to_out.0", "proj"),
    ("ff.net.0.proj", "fc1"),
    ("ff.net.2", "fc2"),
    ("norm1.linear", "adaln.1"),
)


def from_dit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PlainDiT's state dict from that of the original DiT, such as DiT-XL-2-256x256.pt. Raises CheckpointError."""
    ours = {swap_prefix(key, _OUTER) or swap_parts(key, PARTS): tensor for key, tensor in state.items()}
    if "pos_embed" in ours:
        ours["pos_embed"] = ours["pos_embed"].squeeze(0)
    return _reorder_head(ours, to_ours=True)


def to_dit(model: PlainDiT) -> dict[str, torch.Tensor]:
    """The inverse of `from_dit`: `model` in the names and shapes of the original DiT."""
    outer, parts = inverse(_OUTER), inverse(PARTS)
    state = _reorder_head(model.state_dict(), to_ours=False)
    state["pos_embed"] = state["pos_embed"][None]
    return {swap_prefix(key, outer) or swap_parts(key, parts): tensor for key, tensor in state.items()}


def from_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PlainDiT's state dict, without the position table, from that of diffusers' DiTTransformer2DModel.

    There each block has an embedder of time and class of its own, all equal in DiT as published; ours is block 0's.
    """
    top = "transformer_blocks.0.norm1.emb."
    layers = [
        ("pos_embed.proj", "stem"),
        (f"{top}timestep_embedder.linear_1", "time_embed.mlp.0"),
        (f"{top}timestep_embedder.linear_2", "time_embed.mlp.2"),
        ("proj_out_1", "adaln.1"),
        ("proj_out_2", "head"),
    ]
    blocks = {key.split(".")[1] for key in state if key.startswith("transformer_blocks.")}
    layers += [(f"transformer_blocks.{i}.{a}", f"blocks.{i}.{b}") for i in blocks for a, b in _DIFFUSERS]
    ours = {"class_embed.weight": state[f"{top}class_embedder.embedding_table.weight"]}
    for part in ("weight", "bias"):
        ours |= {f"{mine}.{part}": state[f"{theirs}.{part}"] for theirs, mine in layers}
        for i in blocks:
            qkv = [state[f"transformer_blocks.{i}.attn1.to_{x}.{part}"] for x in "qkv"]
            ours[f"blocks.{i}.qkv.{part}"] = torch.cat(qkv)
    return _reorder_head(ours, to_ours=True)


def _reorder_head(state: dict[str, torch.Tensor], to_ours: bool) -> dict[str, torch.Tensor]:
    """DiT's output is (cell of the patch, channel), ours (channel, cell)."""
    if "head.weight" not in state or "stem.weight" not in state:
        raise CheckpointError("this is no DiT: expected final_layer.linear.weight and x_embedder.proj.weight")
    cells = shape_of(state, "stem.weight", 4)[-1] ** 2
    shape = (cells, -1) if to_ours else (-1, cells)
    heads = {}
    for key, dims in (("head.weight", 2), ("head.bias", 1)):
        found = shape_of(state, key, dims)
        if found[0] % cells:
            raise CheckpointError(f"{key}: expected rows for each of the patch's {cells} cells, found shape {found}")
        heads[key] = state[key].unflatten(0, shape).transpose(0, 1).reshape(found)
    return {**state, **heads}


def load_dit(source: str | Path, config: DCDiTConfig) -> PlainDiT:
    """The pretrained DiT that a DC-DiT of `config` can start from, in eval mode.

    `source` is a `.pt` in the original DiT's layout, or what diffusers' `from_pretrained` takes: a directory or
    Hub repository of DiTTransformer2DModel or of a whole DiTPipeline. Raises CheckpointError naming the key and the
    shapes that do not fit.
    """
    if Path(source).is_file():
        state = from_dit(read_state(source)[0])
    else:
        state = from_diffusers(_read_diffusers(source, config))
    patch, head = state["stem.weight"].shape[-1], state["head.weight"].shape[0]
    if any(n % patch for n in config.input_size):
        raise CheckpointError(f"{source} has patches of {patch}×{patch} cells, which do not fill {config.input_size}")
    # Only the blocks are used: the teacher may have learned a variance that the student does not, or not.
    model = PlainDiT(dataclasses.replace(config, learn_sigma=head == 2 * config.in_channels * patch**2), patch)
    state.setdefault("pos_embed", model.pos_embed)
    load_state(model, {key: tensor.to(torch.float32) for key, tensor in state.items()})
    return model.eval()


def _read_diffusers(source: str | Path, config: DCDiTConfig) -> dict[str, torch.Tensor]:
    from diffusers import DiTTransformer2DModel

    pipeline = (Path(source) / "model_index.json").is_file() or not Path(source).exists()
    try:
        model, loaded = DiTTransformer2DModel.from_pretrained(
            source, subfolder="transformer" if pipeline else None, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source} is neither a .pt nor a DiT that diffusers can read: {reason}") from error
    if loaded["missing_keys"]:
        raise CheckpointError(f"missing keys in checkpoint: {', '.join(sorted(loaded['missing_keys'])[:4])}")
    if model.config.num_attention_heads != config.num_heads:
        raise CheckpointError(
            f"num_heads: expected {config.num_heads} as in the configuration, found {model.config.num_attention_heads}"
        )
    for name, known in (
        ("activation_fn", ("gelu-approximate",)),
        ("attention_bias", (True,)),
        ("norm_elementwise_affine", (False,)),
        ("norm_eps", (1e-6, 1e-5)),  # DiT's own, and diffusers' default, which conversions of DiT's weights have
    ):
        if model.config[name] not in known:
            raise CheckpointError(f"{name}: expected {' or '.join(map(str, known))}, found {model.config[name]}")
    return model.state_dict()
