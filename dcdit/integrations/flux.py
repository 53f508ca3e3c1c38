"""Dynamic chunking of FluxTransformer2DModel: its double and single blocks, on packed rows."""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar

import torch
from diffusers.models.transformers import transformer_flux as theirs
from torch import nn

from dcdit_kernels import adaln_modulate, gate_residual, gate_residual_modulate, qk_norm_rope

from ..errors import ConfigError
from .joint import JointBlocks, Rows, attend, attend_jointly, check_processor, finite, heads
from .joint_text import PackedText, kept_by
from .seen_grids import Seen, changes_of, found_in


# The classes are named as diffusers' own: compile_repeated_blocks and device maps go by names.
class FluxTransformerBlock(theirs.FluxTransformerBlock):
    """A double block on packed rows."""

    def forward(self, image: torch.Tensor, text: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Image rows (T1, D), text rows (T2, D) → (text, image)."""
        attn = self.attn
        check_processor(attn, theirs.FluxAttnProcessor)
        shift, scale, gate, *rest = self.norm1.linear(self.norm1.silu(rows.c)).chunk(6, 1)
        text_shift, text_scale, text_gate, *text_rest = self.norm1_context.linear(
            self.norm1_context.silu(rows.c)
        ).chunk(6, 1)
        x = adaln_modulate(image, shift, scale, rows.plan, self.norm1.norm.eps)
        y = adaln_modulate(text, text_shift, text_scale, rows.text, self.norm1_context.norm.eps)
        y, x = attend_jointly(attn, x, y, rows)
        x, y = attn.to_out[1](attn.to_out[0](x)), attn.to_add_out(y)
        image, x = gate_residual_modulate(image, x, gate, *rest[:2], rows.plan, self.norm2.eps)
        image = gate_residual(image, self.ff(x), rest[2], rows.plan)
        text, y = gate_residual_modulate(text, y, text_gate, *text_rest[:2], rows.text, self.norm2_context.eps)
        return finite(gate_residual(text, self.ff_context(y), text_rest[2], rows.text)), image


class FluxSingleTransformerBlock(theirs.FluxSingleTransformerBlock):
    """A single block on joined rows."""

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) → (T, D)."""
        attn = self.attn
        check_processor(attn, theirs.FluxAttnProcessor)
        shift, scale, gate = self.norm.linear(self.norm.silu(rows.c)).chunk(3, 1)
        normed = adaln_modulate(x, shift, scale, rows.joined, self.norm.norm.eps)
        q, k, v = heads((attn.to_q, attn.to_k, attn.to_v), normed, attn)
        weights = attn.norm_q(), attn.norm_k()
        q, k = qk_norm_rope(q, k, rows.cos, rows.sin, rows.position, *weights, rows.joined, eps=attn.norm_q.eps)
        out = torch.cat([attend(q, k, v, rows.joined), self.act_mlp(self.proj_mlp(normed))], 1)
        return finite(gate_residual(x, self.proj_out(out), gate, rows.joined))


class FluxBlocks(JointBlocks):
    """Double blocks of FLUX, then single ones."""

    LISTS: ClassVar = ("transformer_blocks", "single_transformer_blocks")
    CLASSES: ClassVar = {
        theirs.FluxTransformerBlock: FluxTransformerBlock,
        theirs.FluxSingleTransformerBlock: FluxSingleTransformerBlock,
    }
    GRID: ClassVar = "img_ids"
    OPTIONS: ClassVar = ("attention_mask",)
    REFUSED: ClassVar = ("controlnet_block_samples", "controlnet_single_block_samples")

    def __init__(self, model: theirs.FluxTransformer2DModel, **options: Any) -> None:
        super().__init__(model, model.inner_dim, run=self.run_rows, **options)
        self.seen: Seen = deque(maxlen=32)

    def grid_of(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[int, ...]:
        """(H, W) of img_ids, which are (L, 3): 0, row, column.

        The host waits for a GPU once for each tensor, of which the last 32 are known: canvases may alternate.
        """
        ids = inputs.get("img_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() not in (2, 3) or ids.shape[-1] != 3 or not ids.numel():
            got = f"shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else f"a {type(ids).__name__}"
            raise ConfigError(f"chunked blocks take the grid from img_ids (tokens, 3), got {got}")
        grid = found_in(self.seen, ids)
        if grid is None:
            places = (ids[0] if ids.dim() == 3 else ids)[:, -2:]
            places = places - places.amin(0)
            grid = tuple(int(n) + 1 for n in places.amax(0).nan_to_num(-1).tolist())
            sides = f"{grid[0]}×{grid[1]}"
            if grid[0] * grid[1] != len(places):
                raise ConfigError(f"img_ids must be one grid of tokens, got {len(places)} for {sides}")
            in_turn = torch.cartesian_prod(*(torch.arange(n, device=ids.device) for n in grid))
            if not torch.equal(places, in_turn.to(places.dtype)):
                raise ConfigError(f"img_ids must be one grid of tokens, row by row, got {sides} in another order")
            self.seen.append((ids, changes_of(ids), grid))
        return grid

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As one of FLUX's blocks: (B, L, D) and text (B, S, D) → (text, image).

        A bool `attention_mask` (B, 1, 1, S + L) among joint_attention_kwargs says which text is no padding.
        """
        mask = (joint_attention_kwargs or {}).get("attention_mask")
        keep = kept_by(mask, encoder_hidden_states, hidden_states.shape[1])
        text = PackedText(encoder_hidden_states, keep, self.fixed)
        image, rows = super().forward(hidden_states, text=text, c=temb, rotary=image_rotary_emb)
        return text.back(rows), image

    def run_rows(
        self, blocks: list[nn.Module], image: torch.Tensor, plan, text: PackedText, c: torch.Tensor, rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image rows → (image rows, text rows)."""
        joined = text.packing.join(plan)
        position = joined.cat(text.column.int(), text.shape[1] + plan.cell_index)
        cos, sin = (table[:, ::2].contiguous() for table in rotary)  # diffusers has each number twice
        rows = Rows(c, plan, text.packing, joined, cos, sin, position)
        words, x = text.rows, None
        for block in blocks:
            if isinstance(block, FluxTransformerBlock):
                words, image = self.call(block, image, words, rows)
            else:
                x = joined.cat(words, image) if x is None else x
                x = self.call(block, x, rows)
        if x is not None:
            words, image = joined.split(x)
        return image, words
