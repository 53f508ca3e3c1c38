"""DyDiT's FLOPs loss (arXiv 2410.03456 section 3.4): it holds the share of the blocks' FLOPs that gates leave."""

from __future__ import annotations

import torch


def gate_loss(rate: torch.Tensor, target: float) -> torch.Tensor:
    """2·(rate − target)² of a batch's mean rate, a scalar: the mean of `gate_rates`."""
    return 2 * (rate - target).square()


def gate_target(step: int, target: float, warmup: int, held: int = 100) -> float:
    """The rate aimed at: 1 for the first `held` steps, then on the line from 1 at step 0 to `target` at `warmup`."""
    return 1.0 if step < held else 1 - (1 - target) * min(1.0, step / max(1, warmup))
