"""Dynamic chunking of QwenImageTransformer2DModel, on packed rows."""

from __future__ import annotations

import inspect
from numbers import Integral
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.models.transformers import transformer_qwenimage as theirs
from torch import nn

from dcdit_kernels import adaln_modulate, gate_residual, gate_residual_modulate

from ..errors import ConfigError
from .joint import JointBlocks, Rows, attend_jointly, finite
from .joint_text import PackedText


# Named as diffusers' own: compile_repeated_blocks and device maps go by names.
class QwenImageTransformerBlock(theirs.QwenImageTransformerBlock):
    """A block on packed rows."""

    def forward(self, image: torch.Tensor, text: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Image rows (T1, D), text rows (T2, D) → (text, image)."""
        attn = self.attn
        if type(attn.processor) is not theirs.QwenDoubleStreamAttnProcessor2_0:
            name = type(attn.processor).__name__
            raise ConfigError(f"chunked blocks need QwenDoubleStreamAttnProcessor2_0, got {name}")
        shift, scale, gate, *rest = self.img_mod(rows.c).chunk(6, 1)
        text_shift, text_scale, text_gate, *text_rest = self.txt_mod(rows.c).chunk(6, 1)
        x = adaln_modulate(image, shift, scale, rows.plan, self.img_norm1.eps)
        y = adaln_modulate(text, text_shift, text_scale, rows.text, self.txt_norm1.eps)
        y, x = attend_jointly(attn, x, y, rows)
        for layer in attn.to_out:
            x = layer(x)
        image, x = gate_residual_modulate(image, x, gate, *rest[:2], rows.plan, self.img_norm2.eps)
        image = gate_residual(image, self.img_mlp(x), rest[2], rows.plan)
        y = attn.to_add_out(y)
        text, y = gate_residual_modulate(text, y, text_gate, *text_rest[:2], rows.text, self.txt_norm2.eps)
        return finite(gate_residual(text, self.txt_mlp(y), text_rest[2], rows.text)), finite(image)


class QwenImageBlocks(JointBlocks):
    """The blocks of Qwen-Image; text is masked as the model is told."""

    LISTS: ClassVar = ("transformer_blocks",)
    CLASSES: ClassVar = {theirs.QwenImageTransformerBlock: QwenImageTransformerBlock}
    GRID: ClassVar = "img_shapes"
    REFUSED: ClassVar = ("controlnet_block_samples",)

    def __init__(self, model: theirs.QwenImageTransformer2DModel, **options: Any) -> None:
        if "txt_seq_lens" in inspect.signature(model.forward).parameters:  # blocks that are told of no mask
            raise ConfigError(f"chunked Qwen-Image needs diffusers 0.39 or newer, got {diffusers.__version__}")
        if model.zero_cond_t:
            raise ConfigError("chunked blocks need a model without zero_cond_t, which modulates each token apart")
        super().__init__(model, model.inner_dim, run=self.run_rows, **options)

    def grid_of(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[int, ...]:
        """(H, W), or (F, H, W) where there are frames, of img_shapes: one shape for all samples."""
        shapes, pictures = inputs.get("img_shapes"), []
        for shape in shapes if isinstance(shapes, list | tuple) else ():
            alone = shape[0] if isinstance(shape, list) and len(shape) == 1 else shape
            pictures.append(alone if isinstance(alone, tuple) and len(alone) == 3 else ())
        whole = all(isinstance(side, Integral) and side > 0 for picture in pictures for side in picture)
        if len(set(pictures)) != 1 or not pictures[0] or not whole:
            wanted = "one picture a sample, of one shape (frames, height, width)"
            raise ConfigError(f"chunked blocks need {wanted}, in img_shapes; got {shapes}")
        grid = pictures[0]
        return grid if grid[0] > 1 else grid[1:]

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As one of Qwen-Image's blocks: (B, L, D) and text (B, S, D) → (text, image)."""
        text = PackedText(encoder_hidden_states, encoder_hidden_states_mask, self.fixed)
        image, rows = super().forward(hidden_states, text=text, c=temb, freqs=image_rotary_emb)
        return text.back(rows), image

    def run_rows(
        self, blocks: list[nn.Module], image: torch.Tensor, plan, text: PackedText, c: torch.Tensor, freqs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image rows → (image rows, text rows)."""
        joined, words = text.packing.join(plan), text.rows
        position = joined.cat(text.column.int(), text.shape[1] + plan.cell_index)
        table = torch.cat([freqs[1], freqs[0]])
        cos, sin = table.real.contiguous(), table.imag.contiguous()
        rows = Rows(c, plan, text.packing, joined, cos, sin, position)
        for block in blocks:
            words, image = self.call(block, image, words, rows)
        return image, words
