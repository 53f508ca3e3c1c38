"""Half precision: where it is faster, which weights are cast, and how the float32 products beside them are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import ConfigError, check_kind

# The parts of a model that the method computes in float32.
WIDE = ("router", "residual_proj")
# A narrower model at a batch of one loses more around its products than they gain.
LEAST_WIDTH = 256
Model = TypeVar("Model", bound=nn.Module)


def sampling_dtype(config: Any, device: torch.device | str) -> torch.dtype:
    """The dtype in which a model of this configuration samples, where nobody names one: bfloat16 on a CPU with AMX for
    a `hidden_size` of LEAST_WIDTH or more, else float32.

    AMX multiplies in bfloat16 at several times float32's rate. AVX512-BF16 alone does not make up for the conversions,
    and a GPU's user says what is wanted. Raises ConfigError for anything else than a configuration.
    """
    if not hasattr(config, "hidden_size"):
        raise ConfigError(f"config must be a model's configuration, as model.config, got a {type(config).__name__}")
    wide = config.hidden_size >= LEAST_WIDTH
    return torch.bfloat16 if wide and torch.device(device).type == "cpu" and has_amx() else torch.float32


def has_amx() -> bool:
    """Whether this CPU, and the oneDNN of this PyTorch (2.11 or newer), multiply bfloat16 in tiles."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("amx_bf16")) and torch.backends.mkldnn.is_available()


def cast_weights(model: Model, dtype: torch.dtype) -> Model:
    """The model itself, its weights in `dtype`, except for router and residual path.

    For inference: autocast would cast the weights in every step or keep a second copy of them, and would normalise in
    float32. Inputs x are then of that dtype. Raises ConfigError for anything else than a module and a real
    floating point dtype.
    """
    check_kind(model, nn.Module, "model")
    check_kind(dtype, torch.dtype, "dtype")
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating point one, got {dtype}")
    for name, part in model.named_children():
        if name not in WIDE:
            part.to(dtype)
    for name, buffer in model.named_buffers(recurse=False):
        setattr(model, name, buffer.to(dtype))
    return model


@contextlib.contextmanager
def float32_products(precision: str | None) -> Iterator[None]:
    """Within it `torch.set_float32_matmul_precision(precision)`; None leaves it as it is, and so does TF32 asked for by
    `torch.backends`' fp32_precision.

    "high" lets a GPU compute the residual path in TF32. At PyTorch's default that path, 1 % of XL's FLOPs, has a tenth
    of the tensor cores' rate or less. TF32 holds features in half precision exactly and rounds the weights to 11 bits;
    the router's convolutions are in TF32 by PyTorch's default.
    """
    if precision not in (None, "highest", "high", "medium"):
        raise ConfigError(f"precision must be highest, high, medium or None, got {precision!r}")
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
