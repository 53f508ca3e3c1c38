"""FSDP2 by torch's fully_shard. accelerate has it for GPUs alone, and prepares one model, where two run here."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import fully_shard


def shard(model: nn.Module) -> None:
    """Split the parameters of a transformer of diffusers over all processes, block by block, in place.

    Its blocks are those that its class names. Weights on the CPU move to the processes' device, a block at a time. What
    is in no block stays whole from a forward to the backward: model.reshard() splits it where no backward follows.
    """
    names = {*(model._no_split_modules or ()), *(model._repeated_blocks or ())}
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module)
    fully_shard(model)
