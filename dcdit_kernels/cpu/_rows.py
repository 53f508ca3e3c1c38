"""Row helpers of the CPU back-end. Reading a count from a CPU tensor synchronises with nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import extension
from ..packing import Packing

TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Reason why the CPU back-end cannot take tensors like these: they lie elsewhere, or its C++ is not built."""
    if device.type != "cpu":
        return f"this formulation is for CPU tensors, got {device}"
    return extension.missing(device)


def live_count(packing: Packing) -> int:
    """Rows that hold a token; the rest of the capacity is zero."""
    return packing.capacity if packing.exact else int(packing.cu_seqlens[-1])


def with_tail(live_rows: torch.Tensor, capacity: int) -> torch.Tensor:
    """`live_rows` (N, …), followed by zero rows up to `capacity`."""
    tail = capacity - live_rows.shape[0]
    return live_rows if tail == 0 else torch.cat([live_rows, live_rows.new_zeros(tail, *live_rows.shape[1:])])


def kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The C++ loop of this name on numbers of this dtype: float32, float64, for some forwards bfloat16."""
    return getattr(extension._C, f"{name}_{TYPES[dtype]}")


def address(tensor: torch.Tensor | None) -> int:
    """Of a tensor's first number; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def threads(x: torch.Tensor) -> int:
    """As many threads as the bytes of x are worth."""
    return min(torch.get_num_threads(), 1 + x.nbytes // extension.BYTES_PER_THREAD)
