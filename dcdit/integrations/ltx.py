"""Dynamic chunking of LTXVideoTransformer3DModel (LTX-Video), on packed rows.

The grid is (frames, rows, columns), and a cell may be refilled from another frame, as in Wan.
"""

from __future__ import annotations

import math
from collections import deque
from numbers import Integral
from typing import Any, ClassVar

import torch
from diffusers.models.transformers import transformer_ltx as theirs
from torch import nn

from dcdit_kernels import ChunkPlan, adaln_modulate, gate_residual, qk_norm_rope

from ..errors import ConfigError
from .joint import JointBlocks, attend, attend_to_text, check_processor, heads, project
from .joint_text import PackedText, kept_text
from .seen_grids import Seen, changes_of, found_in


# Named as diffusers' own: compile_repeated_blocks and device maps go by names.
class LTXVideoTransformerBlock(theirs.LTXVideoTransformerBlock):
    """A block on packed rows: self-attention among them, then attention to the text."""

    def forward(
        self,
        x: torch.Tensor,
        text: PackedText,
        modulators: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position: torch.Tensor,
        plan: ChunkPlan,
    ) -> torch.Tensor:
        """(T, D) → (T, D); modulators (B, 6, D) of the timestep, cos and sin (P, D / 2)."""
        for attn in (self.attn1, self.attn2):
            check_processor(attn, theirs.LTXVideoAttnProcessor)
        shift, scale, gate, *rest = (self.scale_shift_table + modulators).unbind(1)
        attn, norm = self.attn1, self.norm1
        y = adaln_modulate(x, shift, scale, plan, norm.eps, "rms", norm())
        # Norm and rotation go over all heads together, each head with angles of its own: to the kernel one wide head.
        q, k = attn.to_q(y)[:, None], attn.to_k(y)[:, None]
        q, k = qk_norm_rope(q, k, cos, sin, position, attn.norm_q(), attn.norm_k(), plan, eps=attn.norm_q.eps)
        q, k = (part.view(len(x), attn.heads, -1) for part in (q, k))
        (v,) = heads((attn.to_v,), y, attn)
        x = gate_residual(x, project(attn, attend(q, k, v, plan)), gate, plan)
        x = x + attend_to_text(self.attn2, x, text, plan)
        y = adaln_modulate(x, *rest[:2], plan, self.norm2.eps, "rms", self.norm2())
        return gate_residual(x, self.ff(y), rest[2], plan)


class LTXBlocks(JointBlocks):
    """The blocks of LTX-Video; text is masked as the model is told."""

    LISTS: ClassVar = ("transformer_blocks",)
    GRID: ClassVar = "num_frames, height and width"
    CLASSES: ClassVar = {theirs.LTXVideoTransformerBlock: LTXVideoTransformerBlock}

    def __init__(self, model: theirs.LTXVideoTransformer3DModel, **options: Any) -> None:
        width = model.config.num_attention_heads * model.config.attention_head_dim
        super().__init__(model, width, run=self.run_rows, **options)
        self.seen: Seen = deque(maxlen=1)

    def norms_of(self, block: nn.Module) -> list[nn.Module]:
        """The norms whose weights kernels apply; the attention to the text computes its norms itself."""
        return [block.norm1, block.norm2, block.attn1.norm_q, block.attn1.norm_k]

    def grid_of(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[int, ...]:
        """(num_frames, height, width) of the latents' patches.

        `video_coords` (B, 3, L) must change along these axes; the host waits for a GPU where such a tensor is new.
        """
        given = tuple(inputs.get(name) for name in ("num_frames", "height", "width"))
        if not all(isinstance(side, Integral) and side > 0 for side in given):
            raise ConfigError(f"chunked blocks need num_frames, height and width, positive integers; got {list(given)}")
        coords = inputs.get("video_coords")
        if coords is not None and found_in(self.seen, coords) != given:
            wanted = (len(inputs["hidden_states"]), 3, math.prod(given))
            if tuple(coords.shape) != wanted:
                raise ConfigError(f"video_coords must be {wanted}, as {self.GRID} say, got {tuple(coords.shape)}")
            for axis, places in enumerate(coords.unflatten(2, given).unbind(1), start=1):
                line = places
                for other in {1, 2, 3} - {axis}:
                    line = line.narrow(other, 0, 1)
                if not torch.equal(places, line.expand_as(places)):
                    sides = "×".join(map(str, given))
                    raise ConfigError(f"{self.GRID} must be the grid of video_coords, row by row, got {sides}")
            self.seen.append((coords, changes_of(coords), given))
        return given

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As one of LTX's blocks: (B, L, D) → (B, L, D); a router may name `c`, the modulators (B, 6, D)."""
        if temb.shape[1] != 1:
            raise ConfigError("chunked blocks need one timestep a sample, got one for each token")
        keep = None if encoder_attention_mask is None else kept_text(encoder_hidden_states, encoder_attention_mask)
        text = PackedText(encoder_hidden_states, keep, self.fixed)
        c = temb.unflatten(2, (6, -1))[:, 0]
        return super().forward(hidden_states, text=text, c=c, rotary=image_rotary_emb)

    def run_rows(
        self, blocks: list[nn.Module], x: torch.Tensor, plan: ChunkPlan, text: PackedText, c: torch.Tensor, rotary
    ) -> torch.Tensor:
        """Rows → rows."""
        cos, sin = (table[..., ::2].flatten(0, 1).contiguous() for table in rotary)  # of each sample, each number twice
        position = plan.sample_index.clamp(min=0) * plan.cells + plan.cell_index
        for block in blocks:
            x = self.call(block, x, text, c, cos, sin, position, plan)
        return x
