"""Dynamic chunking of WanTransformer3DModel (Wan 2.1, and 2.2 with one time for all tokens), on packed rows.

The grid is (frames, rows, columns), and a cell may be refilled from another frame: a still background is kept once.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.transformers import transformer_wan as theirs
from torch import nn

from dcdit_kernels import ChunkPlan, adaln_modulate, gate_residual, qk_norm_rope

from ..errors import ConfigError
from .joint import JointBlocks, attend, attend_to_text, check_processor, heads, project
from .joint_text import PackedText


# Named as diffusers' own: compile_repeated_blocks and device maps go by names.
class WanTransformerBlock(theirs.WanTransformerBlock):
    """A block on packed rows: self-attention among them, then attention to the text."""

    def forward(
        self,
        x: torch.Tensor,
        text: PackedText,
        modulators: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        plan: ChunkPlan,
    ) -> torch.Tensor:
        """(T, D) → (T, D); modulators (B, 6, D) of the timestep."""
        for attn in (self.attn1, self.attn2):
            check_processor(attn, theirs.WanAttnProcessor)
        wide = torch.promote_types(modulators.dtype, torch.float32)
        shift, scale, gate, *rest = (self.scale_shift_table + modulators.to(wide)).unbind(1)
        attn = self.attn1
        y = adaln_modulate(x, shift, scale, plan, self.norm1.eps)
        q, k = (norm(layer(y)) for norm, layer in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k)))
        q, k = (part.unflatten(1, (attn.heads, -1)) for part in (q, k))  # Wan's norm is over all heads together
        q, k = qk_norm_rope(q, k, cos, sin, plan.cell_index, plan=plan, norm="none")
        (v,) = heads((attn.to_v,), y, attn)
        x = gate_residual(x, project(attn, attend(q, k, v, plan)), gate, plan)
        x = x + attend_to_text(self.attn2, self.norm2(x.to(wide)).type_as(x), text, plan)
        y = adaln_modulate(x, *rest[:2], plan, self.norm3.eps)
        return gate_residual(x, self.ffn(y), rest[2], plan)


class WanBlocks(JointBlocks):
    """The blocks of Wan; its text is what the text encoder made, padding included."""

    LISTS: ClassVar = ("blocks",)
    CLASSES: ClassVar = {theirs.WanTransformerBlock: WanTransformerBlock}
    WEIGHTS: ClassVar = ()  # norms over all heads are its own
    REFUSED: ClassVar = ("encoder_hidden_states_image",)

    def __init__(self, model: theirs.WanTransformer3DModel, **options: Any) -> None:
        width = model.config.num_attention_heads * model.config.attention_head_dim
        super().__init__(model, width, run=self.run_rows, **options)

    def grid_of(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[int, ...]:
        """(F, H, W) in patches of the latents (B, C, frames, height, width)."""
        sides = inputs["hidden_states"].shape[2:]
        if len(sides) != 3:
            got = tuple(inputs["hidden_states"].shape)
            raise ConfigError(f"hidden_states must be latents (B, C, frames, height, width), got {got}")
        return tuple(n // side for n, side in zip(sides, model.config.patch_size, strict=True))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """As one of Wan's blocks: (B, L, D) → (B, L, D); a router may name `c`, the modulators (B, 6, D)."""
        if temb.dim() != 3:
            raise ConfigError("chunked blocks need one timestep a sample, got one for each token")
        text = PackedText(encoder_hidden_states, None)
        return super().forward(hidden_states, text=text, c=temb, rotary=rotary_emb)

    def run_rows(
        self, blocks: list[nn.Module], x: torch.Tensor, plan: ChunkPlan, text: PackedText, c: torch.Tensor, rotary
    ) -> torch.Tensor:
        """Rows → rows."""
        wide = torch.promote_types(rotary[0].dtype, torch.float32)  # a model cast whole has them in half precision
        cos, sin = (table[0, :, 0, i::2].to(wide).contiguous() for i, table in enumerate(rotary))
        for block in blocks:
            x = self.call(block, x, text, c, cos, sin, plan)
        return x
