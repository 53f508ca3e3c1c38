"""How float32 matrix products are computed where the rest of the model is in half precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def float32_products(precision: str | None) -> Iterator[None]:
    """Within it `torch.set_float32_matmul_precision(precision)`; None leaves it as it is, and so does TF32 asked for by
    `torch.backends`' fp32_precision.

    "high" lets a GPU compute the residual path in TF32. At PyTorch's default that path, 1 % of XL's FLOPs, has a tenth
    of the tensor cores' rate or less. TF32 holds features in half precision exactly and rounds the weights to 11 bits;
    the router's convolutions are in TF32 by PyTorch's default.
    """
    # PyTorch refuses to tell the one setting where the other has said TF32.
    if precision is None or torch.backends.cuda.matmul.fp32_precision == "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
