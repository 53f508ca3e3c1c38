"""DyDiT's gates (arXiv 2410.03456): hard decisions with the gradient of soft ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

TEMPERATURE = 5.0


class Gates(NamedTuple):
    """The computed parts of a forward, as 0 and 1: `heads` and `groups` (B, depth, H), `tokens` (B, depth, N).

    Head and group 0 are always on. Of one block the axis depth is missing, and tokens are (T, 1) packed.
    """

    heads: torch.Tensor
    groups: torch.Tensor
    tokens: torch.Tensor


class Routers(nn.Module):
    """The three routers of a block: heads and MLP groups by the embedded time, tokens by their hidden states."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.groups = nn.Linear(width, heads - 1), nn.Linear(width, heads - 1)
        self.tokens = nn.Sequential(nn.Linear(width, width // 16), nn.ReLU(), nn.Linear(width // 16, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every gate begins open: logits are the release's biases, whatever the weights of the rest."""
        nn.init.xavier_uniform_(self.tokens[0].weight)
        nn.init.zeros_(self.tokens[0].bias)
        for layer, bias in ((self.heads, 15.0), (self.groups, 15.0), (self.tokens[2], 35.0)):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, bias)


def decide(logits: torch.Tensor, training: bool = False) -> torch.Tensor:
    """Hard gates, 1 where the sigmoid exceeds 1/2, with the sigmoid's gradient (straight-through).

    In training a logistic noise, the difference of two Gumbel ones, is added, and the sum divided by the temperature 5.
    """
    soft = torch.sigmoid((logits + logistic_noise(logits)) / TEMPERATURE if training else logits)
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


def logistic_noise(like: torch.Tensor) -> torch.Tensor:
    """Independent draws of the standard logistic distribution in the shape of `like`."""
    return torch.special.logit(torch.rand_like(like), eps=1e-7)


def first_on(gates: torch.Tensor) -> torch.Tensor:
    """(B, H − 1) → (B, H), the first one constantly on."""
    return F.pad(gates, (1, 0), value=1.0)
