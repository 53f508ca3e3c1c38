"""Where a model of `bench.quality` spends its tokens, and where it errs, over the times from data (0) to noise (1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dcdit.data.picture_sets import open_set

TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
COUNT = 500


def where(model: torch.nn.Module, data: Path) -> list[list[float]]:
    """`lines` of the first test pictures."""
    test = open_set(data / "t10k")
    pictures = torch.cat([torch.from_numpy(part[..., 0]) for part in test.batches()])[:COUNT, None]
    classes, device = torch.as_tensor(test.labels[:COUNT]).long(), next(model.parameters()).device
    return lines(model, (pictures.float() / 127.5 - 1).to(device), classes.to(device))


@torch.no_grad()
def lines(model: Callable[..., Any], pictures: torch.Tensor, classes: torch.Tensor) -> list[list[float]]:
    """t, the loss, the shares kept of foreground and of background cells, and the losses of both, for each time.

    pictures (n, 1, H, W) in ±1, classes (n,). A cell with a pixel of at least 5 % of white is foreground.
    """
    latents = torch.nn.functional.pixel_unshuffle(pictures, 2)
    front = latents.amax(1).flatten(1) > -0.9
    generator, out = torch.Generator().manual_seed(0), []
    for t in TIMES:
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        times = torch.full((len(latents),), 1000 * t, device=latents.device)
        velocity, routing = model((1 - t) * latents + t * noise, times, classes, return_routing=True)
        error = (velocity - (noise - latents)).square().mean(1).flatten(1)
        kept = routing.boundary_mask.float()
        parts = [part[cells].mean() for part in (kept, error) for cells in (front, ~front)]
        out.append([t, *(round(float(number), 6) for number in (error.mean(), *parts))])
    return out
