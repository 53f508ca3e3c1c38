"""unpad_input and pad_input, with the names, arguments and return order of flash_attn.bert_padding (2.7 and later)."""

from __future__ import annotations

import torch

from ._check import all_tensors, require, shaped, traced
from .pack import pack_rows, unpack_rows
from .plan import plan_chunks


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Take the tokens of a padded batch that the mask marks, in order, as one packed tensor.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or 0 / 1: the tokens in use.
        unused_mask: (batch, seqlen), bool or 0 / 1: tokens that take room without being used.

    Returns:
        hidden_states: (total, ...), the tokens of either mask.
        indices: int64 (total,), their places in the flattened batch.
        cu_seqlens: int32 (batch + 1,).
        max_seqlen_in_batch: int; with `total` the only copy from the device.
        seqused: int32 (batch,), the tokens of each sequence that attention_mask marks.

    Raises ValueError for a mask of another shape or with other values, such as an additive one of 0 and -10000. On a
    GPU the values of floating point masks alone are looked at, at the price of one more copy.
    """
    all_tensors("unpad_input", hidden_states=hidden_states, attention_mask=attention_mask)
    shape = tuple(hidden_states.shape)
    require(len(shape) >= 2, "unpad_input: hidden_states must be (batch, seqlen, ...), got {}", shape)
    used = taken = _marks("attention_mask", attention_mask, *shape[:2])
    if unused_mask is not None:
        taken = used | _marks("unused_mask", unused_mask, *shape[:2])
    plan = plan_chunks(taken.float(), (taken.shape[1],), nearest="previous")
    indices = plan.token_index.long()
    seqused = used.sum(-1, dtype=torch.int32)
    return pack_rows(hidden_states.flatten(0, 1), indices), indices, plan.cu_seqlens, plan.max_seqlen, seqused


def _marks(name: str, mask: torch.Tensor, *shape: int) -> torch.Tensor:
    """A mask of 0 and 1 as bool."""
    shaped("unpad_input", name, mask, *shape)
    looked_at = mask.device.type == "cpu" or mask.is_floating_point()
    if looked_at and mask.dtype != torch.bool and not traced(mask):
        other = mask[(mask != 0) & (mask != 1)]
        if other.numel():
            raise ValueError(f"unpad_input: {name} must be bool or hold 0 and 1, got {other[0].item()}")
    return mask.bool()


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Put packed tokens (total, ...) back at their `indices` (total,) of a batch (batch, seqlen, ...), zero elsewhere.

    Raises ValueError for indices of another shape.
    """
    all_tensors("pad_input", hidden_states=hidden_states, indices=indices)
    shaped("pad_input", "indices", indices, *hidden_states.shape[:1])
    return unpack_rows(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
