"""Where a model of `bench.quality` spends its tokens, and where it errs, over the times from data (0) to noise (1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcdit.pictures.conv_classifier import to_tensor

from .sets import is_folder, open_half

TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
COUNT = 500


def where(model: torch.nn.Module, data: Path, cell: int) -> list[list[float]]:
    """`lines` of the first test pictures, of a folder's from all classes; `cell` is the pixels of a cell's side."""
    test = open_half(data, "test")
    count = min(COUNT, test.count)
    rows = torch.linspace(0, test.count - 1 if is_folder(data) else count - 1, count).round().long()
    colours = 3 if is_folder(data) else 1
    pictures = to_tensor(np.concatenate(list(test.batches())))[rows, :colours]
    classes, device = torch.as_tensor(test.labels)[rows].long(), next(model.parameters()).device
    return lines(model, (pictures.float() / 127.5 - 1).to(device), classes.to(device), cell)


@torch.no_grad()
def lines(model: Callable[..., Any], pictures: torch.Tensor, classes: torch.Tensor, cell: int = 2) -> list[list[float]]:
    """t, the loss, the shares kept of foreground and of background cells, and the losses of both, for each time.

    pictures (n, C, H, W) in ±1, classes (n,), `cell` 1 or 2. Four grey pixels are foreground where one has at least 5 %
    of white, four coloured ones where a colour differs among them by as much.
    """
    blocks = torch.nn.functional.pixel_unshuffle(pictures, 2).unflatten(1, (pictures.shape[1], 4))
    front = (blocks.amax(2) - (blocks.amin(2) if pictures.shape[1] > 1 else -1)).amax(1) > 0.1
    front = front.repeat_interleave(2 // cell, 1).repeat_interleave(2 // cell, 2).flatten(1)
    latents = torch.nn.functional.pixel_unshuffle(pictures, cell)
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
