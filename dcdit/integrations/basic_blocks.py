"""BasicTransformerBlocks of diffusers (DiT, PixArt) on packed tokens.

A packed batch of T tokens is shown to a block as T sequences of one token, (T, 1, D): everything in a block but
attention works on each token alone, and attention is left to a processor that knows the plan. Blocks of the kinds
`ada_norm_zero` (DiT), `ada_norm_single` (PixArt) and `layer_norm` are understood.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero
from torch import nn
from torch.utils.hooks import RemovableHandle

from dcdit_kernels import ChunkPlan, Packing, adaln_modulate, varlen_attention

from ..errors import ConfigError
from ..model.dynamic_chunking import DynamicChunking
from .joint_text import PackedText, kept_text

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
