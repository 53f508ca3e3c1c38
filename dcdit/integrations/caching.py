"""diffusers' caches on a backbone with other tokens in every step: the caches keep grids.

A cache compares and reuses hidden states of earlier steps. Packed tokens of two steps do not match, because the router
decides anew in each. The modules here show the hidden states of the whole grid instead, (B, L, D), where each cell has
those of the token that refills it. They have no parameters; the blocks stay where they are.
"""

from __future__ import annotations

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn

from dcdit_kernels import ChunkPlan, chunk

from ..model.blocks import MainNetwork, Stream


def on_grid(tokens: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """Packed tokens (capacity, D) → (B, L, D): each cell has the token that refills it."""
    return tokens[plan.nearest.clamp(min=0)].view(plan.batch_size, plan.cells, -1)


class GridStage(nn.Module):
    """Consecutive blocks of the backbone, from hidden states on the grid to hidden states on the grid."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.part = part

    def forward(
        self, hidden_states: torch.Tensor, network: MainNetwork, c: torch.Tensor, plan: ChunkPlan
    ) -> torch.Tensor:
        """(B, L, D) → (B, L, D); the other arguments are `MainNetwork.run`'s."""
        stream = network.run(Stream(chunk(hidden_states, plan)), c, plan, network.blocks[self.part])
        return on_grid(stream.hidden(plan), plan)


class GridChange(nn.Module):
    """The sum of all blocks' updates of the hidden states, on the grid."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        stages: nn.ModuleList,
        network: MainNetwork,
        c: torch.Tensor,
        plan: ChunkPlan,
    ) -> torch.Tensor:
        """(B, L, D) → (B, L, D)."""
        out = hidden_states
        for stage in stages:
            out = stage(out, network, c, plan)
        return out - hidden_states


TransformerBlockRegistry.register(GridStage, TransformerBlockMetadata(return_hidden_states_index=0))
