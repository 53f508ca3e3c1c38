"""RMSNorms of diffusers' attentions whose weight a kernel applies."""

from __future__ import annotations

import torch
from diffusers.models.normalization import RMSNorm
from torch import nn


class WeightOf(nn.Module):
    """Mixed into a norm whose weight a kernel applies. A forward gives the weight: what moves weights to where they are
    needed acts on forwards."""

    def forward(self) -> torch.Tensor | None:
        return self.weight


class WeightOfRMSNorm(WeightOf, nn.RMSNorm):
    """torch's, in FLUX."""


class WeightOfDiffusersRMSNorm(WeightOf, RMSNorm):
    """diffusers', in the others."""


NORMS = {nn.RMSNorm: WeightOfRMSNorm, RMSNorm: WeightOfDiffusersRMSNorm}
