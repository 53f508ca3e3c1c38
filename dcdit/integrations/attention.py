"""Dynamic chunking put around the blocks of diffusers' transformers, taken away, and read from a folder."""

from __future__ import annotations

import importlib
import os

from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.attention import BasicTransformerBlock
from safetensors import safe_open
from torch import nn

from ..errors import CheckpointError, ConfigError, check_kind
from ..files import expanded
from ..model.config import check_keys
from ..model.dynamic_chunking import DynamicChunking
from ..model.untrained_routers import UNTRAINED, DifferenceRouter
from .basic_blocks import ChunkedBlocks
from .joint import JointBlocks
from .reading import read_config, read_untouched


def _basic_blocks(model: nn.Module) -> nn.ModuleList:
    """Its transformer_blocks. Raises ConfigError where they are no BasicTransformerBlocks."""
    blocks = getattr(model, "transformer_blocks", None)
    kinds = {type(block).__name__ for block in blocks if not hasattr(block, "norm_type")} if blocks is not None else ()
    if blocks is None or kinds:
        of = f"whose blocks are {', '.join(sorted(kinds))}" if kinds else "which has none"
        raise ConfigError(
            f"model must be one of {', '.join(FAMILIES)}, or have transformer_blocks that are BasicTransformerBlocks, "
            f"got {type(model).__name__}, {of}; docs/transformers.md says what another family needs"
        )
    return blocks


def _chunk_basic_blocks(model: nn.Module, blocks: nn.ModuleList, **options) -> ChunkedBlocks:
    """For models of these BasicTransformerBlocks, with pictures of any size that they take."""
    try:
        patch = model.config.patch_size
        side = model.config.sample_size // patch
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"model must have numbers for sample_size and patch_size in its config: {error}") from error
    inside = set(blocks.modules())
    for name, module in model.named_modules():
        if isinstance(module, BasicTransformerBlock) and module not in inside:
            raise ConfigError(f"model must have no blocks outside of transformer_blocks, got {name}")
    chunking = ChunkedBlocks(blocks, (side, side), patch=patch, **options)
    chunking.hook = model.register_forward_pre_hook(chunking.see, with_kwargs=True)
    model.transformer_blocks = chunking
    return chunking


# Of models whose blocks take image tokens and text: the file here and its class.
FAMILIES = {
    "FluxTransformer2DModel": ("flux", "FluxBlocks"),
    "SD3Transformer2DModel": ("sd3", "SD3Blocks"),
    "ZImageTransformer2DModel": ("z_image", "ZImageBlocks"),
    "QwenImageTransformer2DModel": ("qwen_image", "QwenImageBlocks"),
    "WanTransformer3DModel": ("wan", "WanBlocks"),
    "LTXVideoTransformer3DModel": ("ltx", "LTXBlocks"),
}


def add_dynamic_chunking(model: nn.Module, **options) -> DynamicChunking:
    """Put dynamic chunking around a model's blocks, in place, and return it.

    For the models of `FAMILIES`, and for DiTTransformer2DModel, PixArtTransformer2DModel and others that are made of
    BasicTransformerBlocks. `options` are DynamicChunking's router, or the name of one of `UNTRAINED`, and sigma; for
    those of FAMILIES also `blocks`, a slice of all blocks in turn, and `group`, the number of blocks after which the
    router chooses anew. The weights keep their names, and the model's config keeps the options, by which
    `load_dynamic_chunking` reads what save_pretrained has written. Raises ConfigError for a model, blocks or a router
    of another kind. `remove_dynamic_chunking` undoes it.
    """
    asked = options.get("router")
    if isinstance(asked, str):
        if asked not in UNTRAINED:
            raise ConfigError(f"router must be a module or one of {', '.join(UNTRAINED)}, got {asked!r}")
        options["router"] = UNTRAINED[asked]()
    elif asked is not None and not isinstance(asked, nn.Module):
        raise ConfigError(f"router must be a module or one of {', '.join(UNTRAINED)}, got {asked!r}")
    if not isinstance(model, nn.Module):
        of = "its transformer" if hasattr(model, "transformer") else "a transformer of diffusers"
        raise ConfigError(f"model must be {of}, got a {type(model).__name__}")
    if hasattr(model, "patches"):
        raise ConfigError(
            "model has patch scales: its coarse tokens are not those that dynamic chunking would plan for"
        )
    if chunking_of(model) is not None:
        raise ConfigError("model has dynamic chunking already; remove_dynamic_chunking takes it away")
    kind = next((FAMILIES[c.__name__] for c in type(model).__mro__ if c.__name__ in FAMILIES), None)
    basic = None if kind else _basic_blocks(model)
    check_keys(options, ("router", "sigma", *(["blocks", "group"] if kind else [])), "add_dynamic_chunking")
    if kind is None:
        chunking = _chunk_basic_blocks(model, basic, **options)
    else:
        module = importlib.import_module(f".{kind[0]}", __package__)
        chunking = getattr(module, kind[1])(model, **options)
    chunking.to(next(model.parameters()).device)
    if isinstance(chunking.router, DifferenceRouter):
        chunking.router.watch(model)
    written = {
        name: [v.start, v.stop] if isinstance(v, slice) else v for name, v in options.items() if name != "router"
    }
    if "router" in options:
        written["router"] = asked if isinstance(asked, str) else type(asked).__name__
    if isinstance(model, ConfigMixin):
        model.register_to_config(dynamic_chunking=written)
    return chunking


def chunking_of(model: nn.Module) -> ChunkedBlocks | JointBlocks | None:
    """What `add_dynamic_chunking` made of the model, or None."""
    check_kind(model, nn.Module, "model", "such as pipe.transformer")
    return next((child for child in model.children() if isinstance(child, ChunkedBlocks | JointBlocks)), None)


def remove_dynamic_chunking(model: nn.Module) -> None:
    """Undo `add_dynamic_chunking`: the model's own blocks, norms and attention processors, in place.

    Raises ConfigError for a model without it, and for one whose blocks have hooks.
    """
    chunking = chunking_of(model)
    if chunking is None:
        raise ConfigError("model must be one that add_dynamic_chunking was called on")
    if isinstance(chunking, JointBlocks):
        chunking.restore(model)
    else:
        model.transformer_blocks = chunking.unwrap()
    for hook in getattr(chunking.router, "hooks", ()):
        hook.remove()
    if isinstance(model, ConfigMixin):
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "dynamic_chunking"})


def load_dynamic_chunking(folder: str | os.PathLike, router: nn.Module | None = None, **options) -> nn.Module:
    """The wrapped model that save_pretrained wrote into a folder, its router included.

    Args:
        folder: with config.json and the weights in safetensors.
        router: where the model was wrapped with a router of its own, one of that kind.
        options: those of from_pretrained of the model's class, such as torch_dtype.

    Raises ConfigError where the config says nothing of dynamic chunking, or names another router than is given, and
    CheckpointError for a folder that cannot be read.
    """
    config = read_config(folder)
    written = config.get("dynamic_chunking")
    if not isinstance(written, dict):
        raise ConfigError(f"config.json of {folder} must have dynamic_chunking, as of a wrapped model; got {written}")
    given = None if router is None else type(router).__name__
    wanted = written.pop("router", None)
    if wanted in UNTRAINED:
        router = wanted
    elif wanted != given:
        kind = f"a {wanted}" if wanted else "None, because the model was wrapped without one of its own"
        raise ConfigError(f"router must be {kind}, got {given}")
    model = read_untouched(folder, config["_class_name"], **options)
    if "blocks" in written:
        written["blocks"] = slice(*written["blocks"])
    chunking = add_dynamic_chunking(model, **written, **({} if router is None else {"router": router}))
    name = next(name for name, child in model.named_children() if child is chunking)
    prefix, weights = f"{name}.router.", {}
    for file in expanded(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            own = (key for key in tensors.keys() if key.startswith(prefix))
            weights |= {key.removeprefix(prefix): tensors.get_tensor(key) for key in own}
    try:
        chunking.router.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} must have the router's weights in safetensors: {error}") from error
    return model
