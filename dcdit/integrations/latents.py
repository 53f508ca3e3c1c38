"""The latents that a model is called with, by the cell, for routers that look at them."""

from __future__ import annotations

import torch


def cells_of(latents: torch.Tensor | list[torch.Tensor], grid: tuple[int, ...]) -> torch.Tensor:
    """A model's latents by the cell, (B, L, C) without a gradient, float32 at least: tokens as they are, and of
    pictures or videos (B, C, …) the patch that is a cell."""
    x = (torch.stack(list(latents)) if isinstance(latents, list | tuple) else latents).detach()
    if x.dim() > 3:
        sides = (1, *grid)[2 - x.dim() :]  # Z-Image's pictures have an axis for one frame
        for axis, side in enumerate(sides):
            x = x.unflatten(2 + 2 * axis, (side, -1))
        x = x.permute(0, *range(2, x.dim(), 2), 1, *range(3, x.dim(), 2)).flatten(1, len(sides)).flatten(2)
    return x.to(torch.promote_types(x.dtype, torch.float32))
