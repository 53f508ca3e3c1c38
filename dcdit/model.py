"""DC-DiT: encoder, router, chunk, DiT backbone on the retained tokens, dechunk, decoder (arXiv 2603.06351)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcdit_kernels import ChunkPlan, chunk, dechunk, plan_chunks

from .blocks import ConvStack, FinalLayer, MainNetwork, TimestepEmbedding, sincos_2d
from .config import DCDiTConfig
from .router import make_router


@dataclass(frozen=True)
class Routing:
    """What the router decided: `boundary_prob` float32, `boundary_mask` after the tail drop and `natural_mask`
    before it (bool), each (B, L); `plan`, the ChunkPlan that the operators used."""

    boundary_prob: torch.Tensor
    boundary_mask: torch.Tensor
    natural_mask: torch.Tensor
    plan: ChunkPlan


class DCDiT(nn.Module):
    """A Dynamic Chunking Diffusion Transformer on (B, C, H, W) latents, one token per latent cell."""

    pos_embed: torch.Tensor

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, narrow = config.hidden_size, config.encoder_width
        self.stem = nn.Conv2d(config.in_channels, narrow, 3, padding=1)
        self.time_embed = TimestepEmbedding(width)
        self.class_embed = nn.Embedding(config.num_classes + 1, width)  # the last class is 'no label'
        # Pretrained embedders have a scale of their own; the fresh layers around the backbone see it normalised.
        self.cond_norm = nn.LayerNorm(width, eps=1e-6) if config.cond_norm else nn.Identity()
        self.encoder = ConvStack((narrow, narrow, width), width)
        self.residual_proj = nn.Linear(width, width)
        self.router = make_router(config)
        self.main = MainNetwork(width, config.depth, config.num_heads, config.mlp_ratio)
        self.decoder = ConvStack((width, narrow, narrow), width)
        self.final = FinalLayer(narrow, width, config.out_channels)
        self.register_buffer("pos_embed", sincos_2d(width, config.input_size))
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier linears, zero adaLN and output (DiT), zero residual projection (H-Net)."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear) or name.startswith("router"):
                continue
            if name.endswith(("adaln.1", "final.linear", "residual_proj")):
                nn.init.zeros_(module.weight)
            elif name.startswith("time_embed"):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> DCDiT:
        """The model of a checkpoint directory or Hub repository, in eval mode; see `dcdit.checkpoints`."""
        from .checkpoints import from_pretrained

        return from_pretrained(name, **hub)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model.safetensors and config.json."""
        from .checkpoints import save_checkpoint

        save_checkpoint(directory, self)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        drop_fraction: float | torch.Tensor = 0.0,
        return_routing: bool = False,
        capacity: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Routing]:
        """Predict noise (and variance) or velocity.

        Args:
            x: (B, C, H, W) with (H, W) = config.input_size.
            t: (B,) timesteps from 0 (data) to 1000 (noise).
            y: (B,) int64 class ids; `config.num_classes` stands for no label.
            drop_fraction: ρ in [0, 1), the share of boundaries to drop; a tensor (B,) for one per sample.
            capacity: rows for the retained tokens of the whole batch. None: as many as there are, for which the host
                waits once; a number: nothing waits, as CUDA graphs need, and what has no room is dropped from the end
                of the batch and counted in `routing.plan.overflow`.

        Returns (B, C, H, W), or (B, 2C, H, W) with config.learn_sigma; with `return_routing` also a Routing.
        Raises ValueError for a wrong shape, dtype, class id or ρ.
        """
        self._check(x, t, y)
        c = self.time_embed(t) + self.class_embed(y)
        outer = self.cond_norm(c)
        h = self.encoder(self.stem(x), outer)
        with torch.autocast(x.device.type, enabled=False):
            residual = self.residual_proj(h.to(self.residual_proj.weight.dtype))
            boundary_prob = self.router(h.to(self.residual_proj.weight.dtype))
        plan = plan_chunks(boundary_prob, self.config.input_size, drop_fraction, capacity=capacity)
        tokens = self.main(chunk(h, plan, self.pos_embed), c, plan)
        y_grid = dechunk(tokens, boundary_prob, plan, residual, self.config.sigma)
        out = self.decoder(y_grid.transpose(1, 2).unflatten(2, self.config.input_size), outer)
        out = self.final(out, outer).transpose(1, 2).unflatten(2, self.config.input_size)
        if not return_routing:
            return out
        return out, Routing(boundary_prob, plan.boundary_mask, boundary_prob > 0.5, plan)

    def _check(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> None:
        shape = (self.config.in_channels, *self.config.input_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
        wanted = self.stem.weight.dtype
        if not x.is_floating_point() or (x.dtype != wanted and not torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"x must be {wanted} as the model is, got {x.dtype}")
        for name, tensor in (("t", t), ("y", y)):
            if tuple(tensor.shape) != (x.shape[0],):
                raise ValueError(f"{name} must have shape ({x.shape[0]},), got {tuple(tensor.shape)}")
        if y.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"y must hold integer class ids, got {y.dtype}")
        # On a GPU this look would be a synchronisation; there the embedding's own assert speaks.
        on_cpu = y.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and y.numel() and not 0 <= int(y.min()) <= int(y.max()) <= self.config.num_classes:
            raise ValueError(
                f"class ids must be in [0, {self.config.num_classes}], got {int(y.min())} to {int(y.max())}"
            )
