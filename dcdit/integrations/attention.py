"""Dynamic chunking for diffusers' transformers: their own blocks, on packed tokens.

A packed batch of T tokens is shown to a block as T sequences of one token, (T, 1, D): everything in a block but
attention works on each token alone, and attention is left to a processor that knows the plan. Blocks of the kinds
`ada_norm_zero` (DiT), `ada_norm_single` (PixArt) and `layer_norm` are understood.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero
from safetensors import safe_open
from torch import nn
from torch.utils.hooks import RemovableHandle

from dcdit_kernels import ChunkPlan, Packing, adaln_modulate, varlen_attention

from ..errors import CheckpointError, ConfigError
from ..model.config import check_keys
from ..model.dynamic_chunking import DynamicChunking
from ..model.untrained_routers import UNTRAINED, DifferenceRouter
from .joint import JointBlocks, PackedText, kept_text
from .reading import read_config, read_untouched

BLOCK_KINDS = ("ada_norm_zero", "ada_norm_single", "layer_norm")


class PackedAttnProcessor:
    """diffusers attention processor on packed tokens (T, 1, D): each token attends within its own sample.

    Self-attention, or cross-attention to packed text (Tk, D) of a different length for each sample. `plan` and `text`,
    the text's packing, come through cross_attention_kwargs. The layer's own projections, q/k norms and dropout are
    used.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        plan: ChunkPlan | None = None,
        text: Packing | None = None,
    ) -> torch.Tensor:
        if plan is None:
            raise ValueError("PackedAttnProcessor needs cross_attention_kwargs={'plan': …}; DynamicChunking passes it")
        tokens = hidden_states.squeeze(1)
        if encoder_hidden_states is None:
            source, cu_seqlens, max_seqlen = tokens, plan.cu_seqlens, plan.max_seqlen
        else:
            source, cu_seqlens, max_seqlen = encoder_hidden_states, text.cu_seqlens, text.max_seqlen
            if attn.norm_cross:
                source = attn.norm_encoder_hidden_states(source)
        q, k, v = (layer(x) for layer, x in ((attn.to_q, tokens), (attn.to_k, source), (attn.to_v, source)))
        q, k, v = (part.unflatten(1, (attn.heads, -1)) for part in (q, k, v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        out = varlen_attention(q, k, v, plan.cu_seqlens, cu_seqlens, plan.max_seqlen, max_seqlen, packing=plan)
        out = attn.to_out[1](attn.to_out[0](out.flatten(1)))[:, None]
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class PackedAdaLayerNormZero(nn.Module):
    """A block's AdaLayerNormZero on packed tokens, with its parameters under their own names.

    Embedding and modulators are computed for each sample, not for each token: T·D² multiplications fewer, and in
    training one label drop for each sample. `conditioning` is the pair of timestep (B,) and plan, which a block hands
    through unread.
    """

    def __init__(self, norm: AdaLayerNormZero) -> None:
        super().__init__()
        self.emb, self.silu, self.linear, self.norm = norm.emb, norm.silu, norm.linear, norm.norm
        self.unpacked = (norm,)  # in a tuple, or it would be a child

    def forward(
        self, x: torch.Tensor, conditioning: tuple[torch.Tensor, ChunkPlan], class_labels: torch.Tensor, hidden_dtype
    ) -> tuple[torch.Tensor, ...]:
        """(T, 1, D) → modulated x, and gate, shift, scale, gate of each token (T, D)."""
        timestep, plan = conditioning
        c = self.linear(self.silu(self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)))
        shift, scale, *rest = c.chunk(6, dim=1)
        x = adaln_modulate(x.squeeze(1), shift, scale, plan, eps=self.norm.eps)
        rows = plan.sample_index.clamp(min=0)
        return x[:, None], *(part[rows] for part in rest)


def run_blocks(
    blocks: Iterable[BasicTransformerBlock],
    tokens: torch.Tensor,
    plan: ChunkPlan,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    cross_attention_kwargs: dict | None = None,
    class_labels: torch.Tensor | None = None,
    fixed: bool = False,
) -> torch.Tensor:
    """Run BasicTransformerBlocks on packed tokens (capacity, D); the other arguments are those of their forward.

    `encoder_hidden_states` (B, S, D') with `encoder_attention_mask` (B, S), 1 for text and 0 for padding, or the bias
    (B, 1, S) that diffusers makes of it: padding is cut away before the keys are made. `fixed` as in `PackedText`.
    """
    if attention_mask is not None:
        raise ConfigError("a self-attention mask cannot be used with dynamic chunking: got attention_mask")
    kwargs = {**(cross_attention_kwargs or {}), "plan": plan}
    if encoder_hidden_states is not None:
        keep = None if encoder_attention_mask is None else kept_text(encoder_hidden_states, encoder_attention_mask)
        text = PackedText(encoder_hidden_states, keep, fixed)
        encoder_hidden_states, kwargs["text"] = text.rows, text.packing
    per_token = None if timestep is None else timestep[plan.sample_index.clamp(min=0)]
    tokens = tokens[:, None]
    for block in blocks:
        if not isinstance(block.attn1.processor, PackedAttnProcessor):
            raise ConfigError(
                f"attention processors must stay PackedAttnProcessor, got {type(block.attn1.processor).__name__}"
            )
        per_sample = block.norm_type == "ada_norm_zero"
        tokens = block(
            tokens,
            encoder_hidden_states=encoder_hidden_states,
            timestep=(timestep, plan) if per_sample else per_token,
            cross_attention_kwargs=kwargs,
            class_labels=class_labels,
        )
    return tokens.squeeze(1)


class ChunkedBlocks(DynamicChunking):
    """DynamicChunking of BasicTransformerBlocks; to the model that holds it, a list of one block.

    `see` is a hook on that model: each call has the grid of its own input.
    """

    def __init__(
        self, blocks: Iterable[BasicTransformerBlock], grid: tuple[int, ...], *, patch: int = 1, **options
    ) -> None:
        blocks = list(blocks)
        if not blocks:
            raise ConfigError("blocks must be one BasicTransformerBlock or more, got none")
        for block in blocks:
            kind = getattr(block, "norm_type", type(block).__name__)
            if kind not in BLOCK_KINDS:
                raise ConfigError(f"blocks must be of the kinds {', '.join(BLOCK_KINDS)}, got {kind}")
            # These look at a sample's tokens as a sequence, which a packed batch does not show them.
            parts = {
                "positional embeddings": block.pos_embed,
                "gated attention": getattr(block, "fuser", None),
                "chunked feed-forward": block._chunk_size,
            }
            got = [name for name, part in parts.items() if part is not None]
            if got:
                raise ConfigError(f"blocks must be without {', '.join(parts)}, got {', '.join(got)}")
        super().__init__(blocks, blocks[0].dim, grid, run=self.run_rows, **options)
        self.patch, self.batch = patch, None
        self.hook: RemovableHandle | None = None
        self.unpacked: list[tuple[Attention, object]] = []
        for block in blocks:
            if block.norm_type == "ada_norm_zero":
                block.norm1 = PackedAdaLayerNormZero(block.norm1)
            for module in block.modules():
                if isinstance(module, Attention):
                    self.unpacked.append((module, module.processor))
                    module.set_processor(PackedAttnProcessor())

    def __iter__(self) -> Iterator[ChunkedBlocks]:
        return iter((self,))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> ChunkedBlocks:
        return (self,)[index]

    def run_rows(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`run_blocks`, with fixed rows of text where the budget fixes those of the picture."""
        return run_blocks(*args, **kwargs, fixed=self.fixed)

    @property
    def norm1(self) -> nn.Module:
        """The first block's: DiTTransformer2DModel looks for its embedder there."""
        return self.blocks[0].norm1

    def see(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the batch and the grid of the model's input (B, C, H, W)."""
        x = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(x, torch.Tensor) and x.dim() == 4:
            self.batch, self.grid = x.shape[0], tuple(n // self.patch for n in x.shape[2:])

    def forward(self, h: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """h (B, L, D) → (B, L, D); the rest is that of `run_blocks`."""
        if self.batch is not None and h.shape[0] != self.batch:
            raise ConfigError(
                f"the model must hand its blocks one sequence per sample, got {h.shape[0]} sequences of {self.batch}"
            )
        return super().forward(h, *args, **kwargs)

    def unwrap(self) -> nn.ModuleList:
        """The blocks as they were, with their own norms and attention processors."""
        for module, processor in self.unpacked:
            module.set_processor(processor)
        for block in self.blocks:
            if isinstance(block.norm1, PackedAdaLayerNormZero):
                (block.norm1,) = block.norm1.unpacked
        if self.hook:
            self.hook.remove()
        return super().unwrap()


def _chunk_basic_blocks(model: nn.Module, **options) -> ChunkedBlocks:
    """For models whose `transformer_blocks` are BasicTransformerBlocks, with pictures of any size that they take."""
    try:
        blocks, patch = model.transformer_blocks, model.config.patch_size
        side = model.config.sample_size // patch
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"model must be one of {', '.join(FAMILIES)}, or have transformer_blocks, and numbers for sample_size and "
            f"patch_size in its config: {error}"
        ) from error
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
    those of FAMILIES also `blocks`, a slice of all blocks in turn. The weights keep their names, and the model's config
    keeps the options, by which `load_dynamic_chunking` reads what save_pretrained has written. Raises ConfigError for a
    model, blocks or a router of another kind. `remove_dynamic_chunking` undoes it.
    """
    asked = options.get("router")
    if isinstance(asked, str):
        if asked not in UNTRAINED:
            raise ConfigError(f"router must be a module or one of {', '.join(UNTRAINED)}, got {asked!r}")
        options["router"] = UNTRAINED[asked]()
    elif asked is not None and not isinstance(asked, nn.Module):
        raise ConfigError(f"router must be a module or one of {', '.join(UNTRAINED)}, got {asked!r}")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a transformer of diffusers, got a {type(model).__name__}")
    if hasattr(model, "patches"):
        raise ConfigError(
            "model has patch scales: its coarse tokens are not those that dynamic chunking would plan for"
        )
    if chunking_of(model) is not None:
        raise ConfigError("model has dynamic chunking already; remove_dynamic_chunking takes it away")
    kind = next((FAMILIES[c.__name__] for c in type(model).__mro__ if c.__name__ in FAMILIES), None)
    check_keys(options, ("router", "sigma", *(["blocks"] if kind else [])), "add_dynamic_chunking")
    if kind is None:
        chunking = _chunk_basic_blocks(model, **options)
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
    return next((child for child in model.children() if isinstance(child, ChunkedBlocks | JointBlocks)), None)


def remove_dynamic_chunking(model: nn.Module) -> None:
    """Undo `add_dynamic_chunking`: the model's own blocks, norms and attention processors, in place."""
    chunking = chunking_of(model)
    if chunking is None:
        raise ConfigError("model must be one that add_dynamic_chunking was called on")
    for hook in getattr(chunking.router, "hooks", ()):
        hook.remove()
    if isinstance(chunking, JointBlocks):
        chunking.restore(model)
    else:
        model.transformer_blocks = chunking.unwrap()
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
    for file in Path(folder).expanduser().glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            own = (key for key in tensors.keys() if key.startswith(prefix))
            weights |= {key.removeprefix(prefix): tensors.get_tensor(key) for key in own}
    try:
        chunking.router.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} must have the router's weights in safetensors: {error}") from error
    return model
