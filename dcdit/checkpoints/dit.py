"""Weights of a plain DiT: from the original's `.pt` files and from diffusers, and back."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from ..errors import CheckpointError, check_kind
from ..files import expanded
from ..model.config import DCDiTConfig
from ..model.plain_dit import PlainDiT
from .folder import SHIPPED, load_state
from .hub import hub_options, why_not
from .looks import PLAIN, foreign_class, looks_like, own_folder
from .release_keys import PARTS
from .safe_pickle import inverse, read_state, shape_of, swap_parts, swap_prefix

# Prefixes of the original DiT and ours; the blocks are the release's.
OUTER = (
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
    """PlainDiT's state dict from the original DiT's, such as DiT-XL-2-256x256.pt. Raises CheckpointError."""
    ours = {swap_prefix(key, OUTER) or swap_parts(key, PARTS): tensor for key, tensor in state.items()}
    if "pos_embed" in ours:
        ours["pos_embed"] = ours["pos_embed"].squeeze(0)
    return reorder_head(ours, to_ours=True)


def to_dit(model: PlainDiT) -> dict[str, torch.Tensor]:
    """The inverse of `from_dit`: `model` in the names and shapes of the original DiT.

    Raises ConfigError for anything else than a PlainDiT.
    """
    check_kind(model, PlainDiT, "model")
    outer, parts = inverse(OUTER), inverse(PARTS)
    state = reorder_head(model.state_dict(), to_ours=False)
    state["pos_embed"] = state["pos_embed"][None]
    return {swap_prefix(key, outer) or swap_parts(key, parts): tensor for key, tensor in state.items()}


def from_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PlainDiT's state dict, without the position table, from diffusers' DiTTransformer2DModel's.

    There each block has its own embedder of time and class, all equal in DiT as published; ours is block 0's.
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
    return reorder_head(ours, to_ours=True)


def reorder_head(state: dict[str, torch.Tensor], to_ours: bool) -> dict[str, torch.Tensor]:
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


def from_sit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PlainDiT's state dict, in our convention, from SiT's (arXiv 2401.08740), such as SiT-XL-2-256.pt.

    SiT has DiT's names and shapes, times s in [0, 1] with the data at 1, and predicts data − noise, next to channels
    that its loss does not use. The output changes its sign. Our embedding of t = 1000·(1 − s) holds SiT's of s up to a
    linear map, which the first layer takes in: its frequencies ω/1000 are ours from the 96th on, and below the lowest
    of ours a turn of 0.1 at most is left. The map is solved for in float64; its error is below 1e-6.
    """
    ours = from_dit(state)
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    t = torch.linspace(0, 1000, 4001, dtype=torch.float64)[:, None]
    have, want = (torch.cat([a.cos(), a.sin()], 1) for a in (t * frequency, (1 - t / 1000) * frequency))
    mix = torch.linalg.lstsq(have, want, rcond=1e-8, driver="gelsd").solution
    weight = ours["time_embed.mlp.0.weight"]
    ours["time_embed.mlp.0.weight"] = (weight.double() @ mix.T).to(weight.dtype)
    used = ours["stem.weight"].shape[1] * ours["stem.weight"].shape[-1] ** 2
    for key in ("head.weight", "head.bias"):
        ours[key] = -ours[key][:used]
    return ours


def check_source(source: str | Path) -> None:
    """Raise CheckpointError for the name of a DiT that is neither a file or folder nor a repository's."""
    path = expanded(source)
    if not path.exists() and (path.suffix or path.parent.exists() or str(source).count("/") != 1):
        named = ", which names a DC-DiT" if str(source) in SHIPPED else ""
        raise CheckpointError(
            f"there is no DiT at {source}{named}: expected a .pt, or a folder or repository of diffusers"
        )


def load_dit(source: str | Path, config: DCDiTConfig, convention: str = "dit") -> PlainDiT:
    """The pretrained DiT that a DC-DiT of `config` can start from, in eval mode, with the classes that it has.

    `source` is a `.pt` in the original DiT's layout, or an argument of diffusers' `from_pretrained`: a directory or
    Hub repository of DiTTransformer2DModel or of a whole DiTPipeline. `convention` is "dit", or "sit" for a `.pt` of
    SiT. Raises CheckpointError naming the key and the shapes that do not fit, or the system that it is of.
    """
    check_source(source)
    path = expanded(source)
    if path.is_file():
        state = read_state(path)[0]
        if (system := looks_like(state)) != PLAIN:
            raise CheckpointError(f"{source}: expected {PLAIN}, these weights look like {system}")
        state = (from_sit if convention == "sit" else from_dit)(state)
    elif convention == "sit":
        raise CheckpointError(f"{source}: a teacher in SiT's convention is a .pt file")
    elif (system := own_folder(path)) is not None:
        raise CheckpointError(f"{source}: expected a plain DiT, a .pt or a folder of diffusers, found a {system}")
    else:
        state = from_diffusers(_read_diffusers(str(path) if path.exists() else source, config))
    patch, head = state["stem.weight"].shape[-1], state["head.weight"].shape[0]
    if any(n % patch for n in config.input_size):
        raise CheckpointError(f"{source} has patches of {patch}×{patch} cells, which do not fill {config.input_size}")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if depth != config.depth:
        raise CheckpointError(f"{source} has {depth} blocks, expected the configuration's depth {config.depth}")
    # Only the blocks are used: the teacher may have learned a variance that the student does not, or not.
    sizes = {"learn_sigma": head == 2 * config.in_channels * patch**2}
    sizes["num_classes"] = max(1, shape_of(state, "class_embed.weight", 2)[0] - 1)
    model = PlainDiT(dataclasses.replace(config, **sizes), patch)
    state.setdefault("pos_embed", model.pos_embed)
    load_state(model, {key: tensor.to(torch.float32) for key, tensor in state.items()})
    return model.eval()


def _check_class(folder: Path) -> None:
    """Raise CheckpointError where config.json names another class; what else is wrong with it diffusers says."""
    name = foreign_class(folder)
    if name not in (None, "DiTTransformer2DModel", "Transformer2DModel"):  # the second as older versions wrote it
        raise CheckpointError(f"{folder} must have a DiTTransformer2DModel, got {name}")


def _read_diffusers(source: str | Path, config: DCDiTConfig) -> dict[str, torch.Tensor]:
    from diffusers import DiTTransformer2DModel

    remote = not Path(source).exists()
    pipeline = remote or (Path(source) / "model_index.json").is_file()
    options = hub_options(str(source)) if remote else {}
    if not remote:
        _check_class(Path(source, "transformer" if pipeline else ""))
    try:
        model, loaded = DiTTransformer2DModel.from_pretrained(
            source, subfolder="transformer" if pipeline else None, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = why_not(error, options)
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
