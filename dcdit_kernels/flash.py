"""FlashAttention's varlen functions: which library runs, why the others cannot, and how each is called.

flash-attn 4, 3 and 2 (arXiv 2307.08691, 2407.08608) share their keywords and differ in the order of their arguments,
so they are called by keyword alone; torch's varlen_attn has keywords of its own. None of them writes the rows past
cu_seqlens[-1], neither of the output nor of the gradients.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ._triton_support import assume_constant, capability

KEYWORDS = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
TORCH_KEYWORDS = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")


@dataclass(frozen=True)
class Library:
    """One varlen function, and what it can take."""

    name: str
    module: str
    function: str
    keywords: tuple[str, ...]
    majors: tuple[int, ...]  # of the compute capability
    head_dim: int  # the largest
    rocm: bool = False
    compiles: bool = True  # has operators that torch.compile can trace
    # Loads whole tiles, past a sample's end: what lies there must be finite, as 0 · NaN would reach the sums.
    reads_past: bool = False


LIBRARIES = (
    Library("flash-attn 4", "flash_attn.cute", "flash_attn_varlen_func", KEYWORDS, (9, 10, 11), 128,
            compiles=False, reads_past=True),
    Library("flash-attn 3", "flash_attn_interface", "flash_attn_varlen_func", KEYWORDS, (9,), 256, reads_past=True),
    Library("flash-attn 2", "flash_attn", "flash_attn_varlen_func", KEYWORDS, (8, 9, 10, 11, 12), 256, rocm=True),
    Library("torch varlen_attn", "torch.nn.attention.varlen", "varlen_attn", TORCH_KEYWORDS, (8, 9, 10, 11, 12), 256),
)  # fmt: skip

# module → the function with the names of its parameters, or why there is none. Filled on first use.
_found: dict[str, tuple[Callable[..., Any], frozenset[str]] | str] = {}


# Both see names, not objects: torch.compile evaluates them once, as constants.
@assume_constant
def _missing(module: str, function: str, keywords: tuple[str, ...]) -> str | None:
    """Why the function cannot be imported or called, or None."""
    if module not in _found:
        _found[module] = _find(module, function, keywords)
    found = _found[module]
    return found if isinstance(found, str) else None


def _find(module: str, function: str, keywords: tuple[str, ...]) -> tuple[Callable[..., Any], frozenset[str]] | str:
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, OSError) as error:  # OSError: a shared library of another CUDA
        return f"not installed ({error})"
    parameters = frozenset(inspect.signature(found).parameters)
    lacking = [keyword for keyword in keywords if keyword not in parameters]
    return f"this release does not take {', '.join(lacking)}" if lacking else (found, parameters)


@assume_constant
def _refuses_device(majors: tuple[int, ...], rocm: bool, kind: str, index: int | None) -> str | None:
    if kind != "cuda":
        return f"needs a GPU, got {kind}"
    if torch.version.hip:
        return None if rocm else "not for ROCm"
    major, minor = capability(index)
    wanted = ", ".join(f"{m}.x" for m in majors)
    return None if major in majors else f"needs compute capability {wanted}, got {major}.{minor}"


def why_not(library: Library, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Reason why the library cannot take these tensors, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"needs q, k and v in float16 or bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[2] % 8 or q.shape[2] > library.head_dim:
        return f"needs a head_dim that is a multiple of 8 up to {library.head_dim}, got {q.shape[2]}"
    if torch.compiler.is_compiling():  # a graph may not know the number of rows
        if not library.compiles:
            return "torch.compile cannot trace it"
    elif q.shape[0] == 0 or k.shape[0] == 0:
        return "there are no rows"
    device = _refuses_device(library.majors, library.rocm, q.device.type, q.device.index)
    return device or _missing(library.module, library.function, library.keywords)


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Library | None:
    """The first library that can take these tensors, or None."""
    for library in LIBRARIES:
        if why_not(library, q, k, v) is None:
            return library
    return None


def attend(
    library: Library,
    exact: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
) -> torch.Tensor:
    """Attention by this library, zero in the output and in every gradient past the last live row; none with `exact`.

    Gradients agree bit for bit between runs under torch.use_deterministic_algorithms(True); faster without.
    """
    call = _torch if library.keywords == TORCH_KEYWORDS else _flash
    places = (cu_seqlens_q.int(), cu_seqlens_k.int(), max_seqlen_q, max_seqlen_k)
    if exact:
        return call(library, q, k, v, places, softmax_scale)
    live_q = _live(q, cu_seqlens_q)
    live_k = live_q if cu_seqlens_k is cu_seqlens_q and k.shape[0] == q.shape[0] else _live(k, cu_seqlens_k)
    if library.reads_past:
        q, k, v = (torch.where(live, x, 0.0) for live, x in ((live_q, q), (live_k, k), (live_k, v)))
    else:
        q, k, v = (_LiveGradient.apply(x, live) for live, x in ((live_q, q), (live_k, k), (live_k, v)))
    return torch.where(live_q, call(library, q, k, v, places, softmax_scale), 0.0)


def _live(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """bool (T, 1, 1): rows before the last live one's end, without waiting for the device."""
    return (torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1])[:, None, None]


class _LiveGradient(torch.autograd.Function):
    """x itself; its gradient is zero where no live row is."""

    @staticmethod
    def forward(ctx, x, live):
        ctx.save_for_backward(live)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.saved_tensors[0], grad, 0.0), None


def _flash(library, q, k, v, places, softmax_scale):
    function, _ = _found[library.module]
    options = {"softmax_scale": softmax_scale}
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    out = function(**dict(zip(KEYWORDS, (q, k, v, *places), strict=True)), **options)
    return out[0] if isinstance(out, tuple) else out  # flash-attn 4 and the first 3 return (out, logsumexp)


def _torch(library, q, k, v, places, softmax_scale):
    function, parameters = _found[library.module]
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    options = {}
    if softmax_scale is not None and "scale" in parameters:
        options["scale"] = softmax_scale
    elif softmax_scale is not None:  # torch 2.10 always scales by head_dim ** -0.5
        q = q * (softmax_scale * math.sqrt(q.shape[2]))
    return function(**dict(zip(TORCH_KEYWORDS, (q, k, v, *places), strict=True)), **options)


def describe(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> list[str]:
    """For `explain`: what native takes, and why not the others."""
    chosen = choose(q, k, v)
    name = "SDPA sample by sample" if chosen is None else chosen.name
    sync = ", which reads the lengths: one synchronisation" if chosen is None and q.is_cuda else ""
    reasons = [(library, why_not(library, q, k, v)) for library in LIBRARIES]
    lines = [f"    {library.name}: {reason or 'can run'}" for library, reason in reasons if library is not chosen]
    return [f"  native is {name}{sync}", *lines]
