"""Processes of `accelerate launch`."""

from __future__ import annotations

import os

import torch


def cpu_ranks() -> bool:
    """Whether to say cpu=True to accelerate: several processes without a GPU are CPU ranks over gloo.

    accelerate would take each for a separate run.
    """
    return "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
