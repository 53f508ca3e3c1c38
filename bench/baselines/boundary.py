"""Boundary scores from PyTorch's own layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def predictability(
    features: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    score_weight: torch.Tensor,
    score_bias: torch.Tensor,
) -> torch.Tensor:
    """features (B, C, H, W) → p (B, H·W)."""
    normed = F.silu(F.group_norm(features, 8, norm_weight, norm_bias))
    logit = F.conv2d(normed, score_weight[None, :, None, None], score_bias)
    return force_ends(torch.sigmoid(logit).flatten(1))


def cosine(q: torch.Tensor, k: torch.Tensor, kernel: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """q, k (B, L, D), kernel (D, 3, 3) → p (B, L)."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    field = k.transpose(1, 2).unflatten(2, grid)
    mean = F.conv2d(field, kernel[:, None], padding=1, groups=k.shape[2]).flatten(2).transpose(1, 2)
    return force_ends(((1 - (q * mean).sum(-1)) / 2).clamp(0, 1))


def force_ends(prob: torch.Tensor) -> torch.Tensor:
    """p = 1 at the first and the last cell of each sample."""
    prob = prob.clone()
    prob[:, 0] = prob[:, -1] = 1
    return prob
