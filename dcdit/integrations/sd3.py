"""Dynamic chunking of SD3Transformer2DModel (SD3 and SD3.5), on packed rows."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models import attention as theirs
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from torch import nn

from dcdit_kernels import adaln_modulate, gate_residual, gate_residual_modulate, qk_norm_rope

from ..errors import ConfigError
from .joint import JointBlocks, Rows, attend, heads
from .joint_text import PackedText, kept_by


def norm_of(attn: Attention) -> dict[str, Any]:
    """Norm and eps of q and k, as `qk_norm_rope` takes them."""
    if type(attn.processor) is not JointAttnProcessor2_0:
        raise ConfigError(f"chunked blocks need JointAttnProcessor2_0, got {type(attn.processor).__name__}")
    if attn.norm_q is None:
        return {"norm": "none"}
    if not isinstance(attn.norm_q, RMSNorm):
        raise ConfigError(f"chunked blocks know qk_norm None and rms_norm, got {type(attn.norm_q).__name__}")
    return {"norm": "rms", "eps": attn.norm_q.eps}


def weights_of(*norms: nn.Module | None) -> list[torch.Tensor | None]:
    return [None if norm is None else norm() for norm in norms]


# Named as diffusers' own: device maps go by names.
class JointTransformerBlock(theirs.JointTransformerBlock):
    """A block on packed rows."""

    def forward(self, image: torch.Tensor, text: torch.Tensor, rows: Rows) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Image rows (T1, D), text rows (T2, D) → (text, image); the model's last block has no text."""
        attn, plan, eps = self.attn, rows.plan, self.norm1.norm.eps
        modulators = self.norm1.linear(self.norm1.silu(rows.c)).chunk(9 if self.use_dual_attention else 6, 1)
        shift, scale, gate, *rest = modulators
        x = adaln_modulate(image, shift, scale, plan, eps)
        c = self.norm1_context.linear(self.norm1_context.silu(rows.c).to(text.dtype))
        if self.context_pre_only:
            text_scale, text_shift = c.chunk(2, 1)
        else:
            text_shift, text_scale, text_gate, *text_rest = c.chunk(6, 1)
        y = adaln_modulate(text, text_shift, text_scale, rows.text, self.norm1_context.norm.eps)
        q, k, v = heads((attn.to_q, attn.to_k, attn.to_v), x, attn)
        text_q, text_k, text_v = heads((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), y, attn)
        text_weights, weights = weights_of(attn.norm_added_q, attn.norm_added_k), weights_of(attn.norm_q, attn.norm_k)
        q, k = qk_norm_rope(
            text_q, text_k, None, None, None, *text_weights, rows.joined, (q, k, *weights), **norm_of(attn)
        )
        y, out = rows.joined.split(attend(q, k, rows.joined.cat(text_v, v), rows.joined))
        out = attn.to_out[1](attn.to_out[0](out))
        if self.use_dual_attention:
            second = self.attn2
            x = adaln_modulate(image, *rest[3:5], plan, eps)
            image, gate = gate_residual(image, out, gate, plan), rest[5]
            q, k, v = heads((second.to_q, second.to_k, second.to_v), x, second)
            weights = weights_of(second.norm_q, second.norm_k)
            q, k = qk_norm_rope(q, k, None, None, None, *weights, plan, **norm_of(second))
            out = second.to_out[1](second.to_out[0](attend(q, k, v, plan)))
        image, x = gate_residual_modulate(image, out, gate, *rest[:2], plan, self.norm2.eps)
        image = gate_residual(image, self.ff(x), rest[2], plan)
        if self.context_pre_only:
            return None, image
        y = attn.to_add_out(y)
        text, y = gate_residual_modulate(text, y, text_gate, *text_rest[:2], rows.text, self.norm2_context.eps)
        return gate_residual(text, self.ff_context(y), text_rest[2], rows.text), image


class SD3Blocks(JointBlocks):
    """The blocks of SD3."""

    LISTS: ClassVar = ("transformer_blocks",)
    CLASSES: ClassVar = {theirs.JointTransformerBlock: JointTransformerBlock}
    OPTIONS: ClassVar = ("attention_mask",)
    REFUSED: ClassVar = ("block_controlnet_hidden_states", "skip_layers")

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, model.inner_dim, run=self.run_rows, **options)

    def grid_of(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[int, ...]:
        """(H, W) in patches of the latents (B, C, height, width)."""
        shape = tuple(inputs["hidden_states"].shape)
        if len(shape) != 4:
            raise ConfigError(f"hidden_states must be latents (B, C, height, width), got {shape}")
        return tuple(n // model.config.patch_size for n in shape[2:])

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """As one of SD3's blocks: (B, L, D) and text (B, S, D) → (text, image).

        SD3's own attention reads no mask. Where all blocks are chunked a bool `attention_mask` (B, 1, 1, S + L) among
        joint_attention_kwargs says which text is no padding.
        """
        mask = (joint_attention_kwargs or {}).get("attention_mask")
        if mask is not None and len(self.stack) < len(self):
            raise ConfigError("attention_mask needs all blocks chunked: SD3's own attention reads none")
        keep = kept_by(mask, encoder_hidden_states, hidden_states.shape[1])
        text = PackedText(encoder_hidden_states, keep, self.fixed)
        image, rows = super().forward(hidden_states, text=text, c=temb)
        return None if rows is None else text.back(rows), image

    def run_rows(
        self, blocks: list[nn.Module], image: torch.Tensor, plan, text: PackedText, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Image rows → (image rows, text rows)."""
        rows, words = Rows(c, plan, text.packing, text.packing.join(plan)), text.rows
        for block in blocks:
            words, image = self.call(block, image, words, rows)
        return image, words
