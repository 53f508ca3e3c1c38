"""Argument checks shared by the public operators: each error names the expected value and the value that came."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

if TYPE_CHECKING:
    from .packing import Packing

# Recorders of make_fx, in its two modes.
PROXY, PRE_DISPATCH = torch._C._TorchDispatchModeKey.PROXY, torch._C.DispatchKey.PreDispatch
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = (torch.Tensor, torch.nn.Parameter)
SIZES = (int, torch.SymInt, Integral)  # cheapest first
CHUNK_PLAN = "ChunkPlan, as plan_chunks makes it"  # where no other packing will do


def traced(tensor: torch.Tensor) -> bool:
    """Whether a call is compiled or recorded: a kernel may not run then, or would not be seen."""
    if torch.compiler.is_compiling():
        return True
    if type(tensor) not in PLAIN and isinstance(tensor, FakeTensor | FunctionalTensor):
        return True
    if torch._C._dispatch_tls_is_dispatch_key_included(PRE_DISPATCH):
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and torch._C._get_dispatch_mode(PROXY) is not None


def with_memory(op: str, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Kernels are handed addresses, which a subclass that wraps other tensors (DTensor, say) does not have."""
    for name, tensor in tensors.items():
        if tensor is not None and type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            raise TypeError(
                f"{op}: {name} is a {type(tensor).__name__}, whose memory no kernel can read; pass its local tensor "
                f'({name}.to_local()) or run under use_backend("reference")'
            )


def dense(op: str, **tensors: torch.Tensor | None) -> None:
    """Each named tensor must be strided, and the first not on the meta device; `one_device` compares the others."""
    for number, (name, tensor) in enumerate(tensors.items()):
        if tensor is None:
            continue
        came = "one on the meta device" if number == 0 and tensor.device.type == "meta" else tensor.layout
        if came is not torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor with memory, got {came}")


def require(condition: bool, message: str, *values: object) -> None:
    """Raise ValueError(message.format(*values)) unless the condition holds.

    Values are put in only then: torch.compile cannot write a size that it does not know into a string.
    """
    if not condition:
        raise ValueError(message.format(*values))


def floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Each named tensor must be floating point."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in FLOATS:
            came = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor)
            raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {came}")


def all_tensors(op: str, **given: object) -> None:
    """Raise TypeError for the first that is no tensor, or a nested one.

    An operator asks where one lacked an attribute, or its sizes, and else not.
    """
    for name, value in given.items():
        if not isinstance(value, torch.Tensor) or value.is_nested:
            kind = "a nested one" if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{op}: {name} must be a tensor, got {kind}") from None


def not_negative(op: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number of 0 or more."""
    number = isinstance(value, (float, Real))
    if not (number and value >= 0):
        raise ValueError(f"{op}: {name} must not be negative, got {value!r}")


def grouped(op: str, channels: int, groups: Any) -> None:
    """Raise ValueError unless so many channels fall into so many groups."""
    number = isinstance(groups, SIZES)
    if not (number and groups >= 1 and channels % groups == 0):
        raise ValueError(f"{op}: {channels} channels do not fit {groups!r} groups")


def indices(op: str, name: str, index: torch.Tensor, rows: int) -> None:
    """Raise unless `index` is of integers in [-1, rows); values are looked at on a CPU alone."""
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {index.dtype}")
    if not traced(index) and index.device.type == "cpu" and index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < -1 or high >= rows:
            raise IndexError(f"{op}: {name} must be in [-1, {rows}), got {low if low < -1 else high}")


def shaped(op: str, name: str, tensor: torch.Tensor, *shape: int | None) -> None:
    """`tensor` must have this shape; None matches any size."""
    try:
        sizes = tensor.shape
    except (AttributeError, RuntimeError):
        all_tensors(op, **{name: tensor})
        raise
    fits = len(sizes) == len(shape)
    for want, have in zip(shape, sizes, strict=False):  # a generator would take three times as long
        fits = fits and (want is None or want == have)
    if not fits:
        wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(tensor.shape)}")


def offsets(op: str, name: str, cu_seqlens: torch.Tensor, rows: int) -> int | None:
    """(B + 1,) integers that rise from 0 to at most `rows`. Returns the longest sample; None where the values are not
    looked at, which is anywhere but on a CPU."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name} must be integers (B + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device.type == "cpu" and not traced(cu_seqlens):
        values = cu_seqlens.tolist()
        lengths = [b - a for a, b in itertools.pairwise(values)]
        if values[0] != 0 or values[-1] > rows or any(length < 0 for length in lengths):
            raise ValueError(f"{op}: {name} must rise from 0 to at most {rows}, got {values}")
        return max(lengths, default=0)
    return None


def one_device(op: str, first: torch.Tensor, others: Mapping[str, torch.Tensor | None]) -> None:
    """All that are given must be where the first is: kernels are handed bare addresses."""
    device = first.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device} as the first tensor is, got {tensor.device}")


def packed(op: str, name: str, tensor: torch.Tensor, plan: Packing) -> None:
    """`tensor` must be packed features of this packing, (capacity, D)."""
    try:
        capacity = plan.capacity
    except AttributeError:
        raise no_plan(op, plan) from None
    shaped(op, name, tensor, capacity, None)


def no_plan(op: str, plan: object, kind: str = "Packing or ChunkPlan") -> TypeError:
    """The error where `plan` lacks what every plan has. A call that finds it there asks for nothing more."""
    return TypeError(f"{op}: plan must be a {kind}, got {type(plan).__name__}")
