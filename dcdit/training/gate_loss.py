"""DyDiT's FLOPs loss (arXiv 2410.03456 section 3.4): it holds the share of the blocks' FLOPs that gates leave."""

from __future__ import annotations

import torch

from ..model.gates import Gates
from ..model.rival_macs import block_macs


def gate_rate(gates: Gates, tokens: int, width: int, mlp_ratio: float = 4.0) -> torch.Tensor:
    """The share of the blocks' multiply-adds that open gates leave, mean over the batch: a scalar.

    Heads scale attention; channel groups times tokens, each as a mean, scale the MLP. `tokens` and `width` are those of
    the model that is counted. Gradients go through the gates.
    """
    attention, mlp = block_macs(tokens, width, mlp_ratio)
    spent = gates.heads.mean(2) * attention + gates.groups.mean(2) * gates.tokens.mean(2) * mlp
    return spent.mean() / (attention + mlp)


def gate_loss(rate: torch.Tensor, target: float) -> torch.Tensor:
    """2·(rate − target)², of the batch's mean rate."""
    return 2 * (rate - target).square()


def gate_target(step: int, target: float, warmup: int, held: int = 100) -> float:
    """The rate aimed at: 1 for the first `held` steps, then on the line from 1 at step 0 to `target` at `warmup`."""
    return 1.0 if step < held else 1 - (1 - target) * min(1.0, step / max(1, warmup))
