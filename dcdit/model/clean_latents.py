"""Between the velocity of the straight path, v = noise − x_0, and the clean latents x_0 = x_t − σ·v (σ = t/1000)."""

from __future__ import annotations

import torch

LEAST = 0.1  # below this σ a model's output stands for x_t − LEAST·v: an error in x_0 is one of 1/σ times it in v


def clean_guess(x: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x, velocity (B, C, H, W), t (B,) from 0 to 1000 → the clean latents by flow matching's straight path."""
    return x - velocity * (t / 1000).to(x.dtype).view(-1, 1, 1, 1)


def velocity_to(x: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x, clean (B, C, H, W), t (B,) from 0 to 1000 → the velocity (x − clean)/max(σ, LEAST), of clean's dtype.

    `clean` is the output of a model whose loss is that of the velocity: JiT (arXiv 2511.13720).
    """
    sigma = (t / 1000).clamp(min=LEAST).view(-1, 1, 1, 1)
    return ((x - clean) / sigma).to(clean.dtype)
