"""Distillation by block: a chunked transformer of diffusers learns the untouched model's features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dcdit_kernels import chunk

from ..errors import ConfigError
from .attention import chunking_of
from .joint import JointBlocks, Rows


def distillation_loss(model: nn.Module, teacher: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Mean over the chunked blocks of |x − x̂|² / var(x̂): image tokens x behind a block, and the teacher's x̂.

    Only retained cells are compared (upcycling of DC-DiT, arXiv 2603.06351 v1). The teacher gets no gradient.

    Args:
        model: one of FAMILIES, wrapped by `add_dynamic_chunking`.
        teacher: an untouched copy of the model.
        args, kwargs: inputs, given to both.

    Returns a scalar. Raises ConfigError for an unwrapped model, a wrapped teacher, or a teacher with other blocks.
    """
    chunking = chunking_of(model)
    if not isinstance(chunking, JointBlocks) or chunking_of(teacher) is not None:
        raise ConfigError("distillation_loss needs a wrapped model and a teacher that is not")
    every = [block for name in chunking.LISTS for block in getattr(teacher, name, ())]
    whole = every[chunking.start : chunking.stop]
    if len(whole) != len(chunking.stack):
        raise ConfigError(f"teacher must have the model's blocks, got {len(whole)} of {len(chunking.stack)}")
    ours: list[tuple[torch.Tensor, Any]] = []
    theirs: list[torch.Tensor] = []

    def note_rows(block: nn.Module, given: tuple, output: Any) -> None:
        # No product here: activation checkpointing would miss it when it runs the block again, without hooks.
        ours.append((output[1] if isinstance(output, tuple) else output, given[-1]))

    def note_cells(block: nn.Module, given: tuple, output: Any) -> None:
        theirs.append(output[1] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(note_rows) for block in chunking.stack]
    hooks += [block.register_forward_hook(note_cells) for block in whole]
    try:
        model(*args, **kwargs)
        with torch.no_grad():
            teacher(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    losses = []
    for (own, rows), dense in zip(ours, theirs, strict=True):
        if isinstance(rows, Rows) and len(own) == rows.joined.capacity:
            own = rows.joined.split(own)[1]
        plan = rows.plan if isinstance(rows, Rows) else rows
        dense = dense[:, : plan.cells]  # Z-Image's text is behind
        losses.append((own - chunk(dense, plan)).square().mean() / dense.var())
    return torch.stack(losses).mean()
