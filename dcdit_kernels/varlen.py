"""unpad_input and pad_input, with the names, arguments and return order of flash_attn.bert_padding (2.7 and later)."""

from __future__ import annotations

import torch

from ._check import require, shaped
from .pack import pack_rows, unpack_rows
from .plan import plan_chunks


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Take the tokens of a padded batch that the mask marks, in order, as one packed tensor.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or 0 / 1: the tokens in use.
        unused_mask: (batch, seqlen), tokens that take room without being used.

    Returns:
        hidden_states: (total, ...), the tokens of either mask.
        indices: int64 (total,), their places in the flattened batch.
        cu_seqlens: int32 (batch + 1,).
        max_seqlen_in_batch: int; with `total` the only copy from the device.
        seqused: int32 (batch,), the tokens of each sequence that attention_mask marks.
    """
    shape = tuple(hidden_states.shape)
    require(len(shape) >= 2, "unpad_input: hidden_states must be (batch, seqlen, ...), got {}", shape)
    shaped("unpad_input", "attention_mask", attention_mask, *shape[:2])
    taken = attention_mask
    if unused_mask is not None:
        shaped("unpad_input", "unused_mask", unused_mask, *shape[:2])
        taken = attention_mask + unused_mask
    plan = plan_chunks(taken.float(), (taken.shape[1],), nearest="previous")
    indices = plan.token_index.long()
    seqused = attention_mask.sum(-1, dtype=torch.int32)
    return pack_rows(hidden_states.flatten(0, 1), indices), indices, plan.cu_seqlens, plan.max_seqlen, seqused


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Put packed tokens (total, ...) back at their `indices` of a batch (batch, seqlen, ...), zero elsewhere."""
    return unpack_rows(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
