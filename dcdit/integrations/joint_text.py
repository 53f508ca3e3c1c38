"""Text beside chunked image tokens: which of it is no padding, and its packed rows."""

from __future__ import annotations

import math

import torch

from dcdit_kernels import Packing, pack_rows, plan_chunks, unpack_rows

from ..errors import ConfigError


class PackedText:
    """Text (B, S, D) as packed rows without its padding, and back; `keep` is bool (B, S), or None where all is kept.

    The host waits for the number of kept tokens, unless the rows are `fixed`: B·S then, the spare ones last.
    """

    def __init__(self, text: torch.Tensor, keep: torch.Tensor | None, fixed: bool = False) -> None:
        batch, length = text.shape[:2]
        self.shape, self.indices = (batch, length), None
        if keep is None:
            self.rows = text.flatten(0, 1)
            ends = torch.arange(batch + 1, dtype=torch.int32, device=text.device) * length
            self.packing = Packing.from_cu_seqlens(ends, length, batch * length, exact=True)
            self.column = torch.arange(length, device=text.device).repeat(batch)
            return
        room = {"capacity": batch * length, "max_seqlen": length} if fixed else {}
        self.packing = plan_chunks(keep.float(), (length,), nearest="previous", **room)
        self.indices, self.column = self.packing.token_index, self.packing.cell_index
        self.rows = pack_rows(text.flatten(0, 1), self.indices)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """Packed rows as (B, S, D), zero in the padding."""
        if self.indices is not None:
            rows = unpack_rows(rows, self.indices, math.prod(self.shape))
        return rows.unflatten(0, self.shape)


def kept_by(mask: torch.Tensor | None, text: torch.Tensor, cells: int) -> torch.Tensor | None:
    """Of a bool attention mask over text and image keys, text first, the text that it keeps: (B, S), or None."""
    if mask is None:
        return None
    batch, length = text.shape[:2]
    flat = mask.reshape(mask.shape[0], -1) if mask.dim() in (2, 4) else mask
    fits = mask.dtype == torch.bool and flat.shape == (batch, length + cells)
    if not fits:
        wanted = f"bool ({batch}, 1, 1, {length + cells}), one for each text and image token"
        raise ConfigError(f"attention_mask must be {wanted}, got {mask.dtype} {tuple(mask.shape)}")
    return flat[:, :length]


def kept_text(text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The tokens of text (B, S, D) that are no padding, bool (B, S). `mask` (B, S) is 1 for text and 0 for
    padding, or it is the bias (B, 1, S) that diffusers makes of that.

    A sample that is all padding keeps it, as it does in diffusers. Raises ConfigError for a mask of another shape.
    """
    given, wanted = (mask.shape[0], mask.shape[-1]), tuple(text.shape[:2])
    if given != wanted:
        raise ConfigError(f"encoder_attention_mask must be {wanted}, one value for each text token, got {given}")
    keep = mask[:, 0] > -1 if mask.dim() == 3 else mask.bool()  # in a bias 0 keeps and -10000 hides
    return keep | ~keep.any(1, keepdim=True)  # diffusers' bias hides nothing where it is the same for all
