"""Dynamic chunking of ZImageTransformer2DModel: its single-stream layers, on packed rows.

Z-Image fills image and caption up to multiples of 32 tokens. The filling of both goes with the caption.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_z_image as theirs
from torch import nn

from dcdit_kernels import adaln_modulate, gate_residual, gate_residual_modulate, qk_norm_rope

from ..errors import ConfigError
from .joint import JointBlocks, Rows, attend, heads
from .joint_text import PackedText


# Named as diffusers' own: compile_repeated_blocks and device maps go by names.
class ZImageTransformerBlock(theirs.ZImageTransformerBlock):
    """A layer on joined rows."""

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) → (T, D)."""
        attn, joined = self.attention, rows.joined
        if type(attn.processor) is not theirs.ZSingleStreamAttnProcessor:
            name = type(attn.processor).__name__
            raise ConfigError(f"chunked blocks need ZSingleStreamAttnProcessor, got {name}")
        scale, gate, next_scale, next_gate = self.adaLN_modulation(rows.c).chunk(4, 1)
        gate, next_gate, none = gate.tanh(), next_gate.tanh(), torch.zeros_like(scale)
        norm = self.attention_norm1
        y = adaln_modulate(x, none, scale, joined, norm.eps, "rms", norm())
        q, k, v = heads((attn.to_q, attn.to_k, attn.to_v), y, attn)
        normed = isinstance(attn.norm_q, RMSNorm)
        options = {"eps": attn.norm_q.eps} if normed else {"norm": "none"}
        weights = (attn.norm_q(), attn.norm_k()) if normed else (None, None)
        q, k = qk_norm_rope(q, k, rows.cos, rows.sin, rows.position, *weights, joined, **options)
        y = attend(q, k, v, joined)
        for layer in attn.to_out:
            y = layer(y)
        norm = self.ffn_norm1
        x, y = gate_residual_modulate(
            x, self.attention_norm2(y), gate, none, next_scale, joined, norm.eps, "rms", norm()
        )
        return gate_residual(x, self.ffn_norm2(self.feed_forward(y)), next_gate, joined)


class ZImageBlocks(JointBlocks):
    """The layers of Z-Image; its refiners stay as they are."""

    LISTS: ClassVar = ("layers",)
    CLASSES: ClassVar = {theirs.ZImageTransformerBlock: ZImageTransformerBlock}
    WEIGHTS: ClassVar = ("norm_q", "norm_k", "attention_norm1", "ffn_norm1")
    REFUSED: ClassVar = ("controlnet_block_samples", "siglip_feats", "image_noise_mask")

    def __init__(self, model: theirs.ZImageTransformer2DModel, **options: Any) -> None:
        super().__init__(model, model.dim, run=self.run_rows, **options)

    def grid_of(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[int, ...]:
        """(H, W), or (F, H, W) where there are frames, in patches of the latents, a list of (C, F, height, width)."""
        latents = inputs["x"]
        if not isinstance(latents, list | tuple) or not latents:
            raise ConfigError(f"chunked blocks take a list of latents, got {type(latents).__name__} of {len(latents)}")
        if isinstance(latents[0], list):
            raise ConfigError("chunked blocks take one picture a sample, got lists of them")
        sizes = {tuple(latent.shape[1:]) for latent in latents}
        if len(sizes) > 1:
            raise ConfigError(f"chunked blocks need latents of one size in a batch, got {sorted(sizes)}")
        frames, height, width = sizes.pop()
        side, depth = inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)
        grid = (frames // depth, height // side, width // side)
        return grid if grid[0] > 1 else grid[1:]

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None,
        freqs_cis: torch.Tensor,
        adaln_input: torch.Tensor,
        *rest: None,
    ) -> torch.Tensor:
        """As one of Z-Image's layers: (B, S, D) → (B, S, D), the cells first; zero in the batch's padding."""
        cells = 1
        for side in self.grid:
            cells *= side
        image, words = x[:, :cells], x[:, cells:]
        keep = None if attn_mask is None else attn_mask[:, cells:].bool()
        text = PackedText(words, keep, self.fixed)
        image, rows = super().forward(image, text=text, c=adaln_input, freqs=freqs_cis)
        return torch.cat([image, text.back(rows)], 1)

    def run_rows(
        self, blocks: list[nn.Module], image: torch.Tensor, plan, text: PackedText, c: torch.Tensor, freqs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image rows → (image rows, rows of the rest)."""
        joined, length = text.packing.join(plan), freqs.shape[1]
        column = joined.cat((plan.cells + text.column).int(), plan.cell_index)
        position = joined.sample_index.clamp(min=0) * length + column
        cos, sin = (part.flatten(0, 1).contiguous() for part in (freqs.real, freqs.imag))
        rows = Rows(c, plan, text.packing, joined, cos, sin, position)
        x = joined.cat(text.rows, image)
        for block in blocks:
            x = self.call(block, x, rows)
        words, image = joined.split(x)
        return image, words
