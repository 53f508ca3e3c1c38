"""Which library computes varlen attention on a GPU, and why the others cannot; `flash_calls` calls it.

flash-attn 4, 3 and 2 (arXiv 2307.08691, 2407.08608) come first, where a user has installed them. A kernel of our own in
Triton serves short samples without gradients where a prototype of it took less time than PyTorch's FlashAttention.
PyTorch's own operators are called as `torch.ops.aten` has them, differentiable in C++: FlashAttention 2 for half
precision, and the memory-efficient attention of xFormers (arXiv 2112.05682) for float32. torch.compile takes torch's
varlen_attn in their place.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from ._check import PLAIN
from ._triton_support import assume_constant, capability

KEYWORDS = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
TORCH_KEYWORDS = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
ATEN_FLASH = ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
              "return_debug_mask", "scale")  # fmt: skip
ATEN_EFFICIENT = ("query", "key", "value", "bias", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
                  "dropout_p", "custom_mask_type", "compute_log_sumexp", "scale")  # fmt: skip
TRITON = (*KEYWORDS, "scale")
HALF = (torch.float16, torch.bfloat16)
# Rows of a short sample: the longest for which Triton's kernel was timed beside FlashAttention 2.
SHORT = 512


@dataclass(frozen=True)
class Library:
    """One varlen function, and its limits."""

    name: str
    module: str
    function: str
    keywords: tuple[str, ...]
    majors: tuple[int, ...]  # of the compute capability
    head_dim: int  # the largest
    dtypes: tuple[torch.dtype, ...] = HALF
    rocm: bool = False
    grouped: bool = True  # takes fewer heads of k and v than of q
    causal: bool = True  # takes a causal mask
    uneven_causal: bool = True  # takes one where q and k differ in length
    gradients: bool = True  # and subclasses of tensors, and transforms
    long: bool = True  # serves samples above SHORT rows
    compiles: bool = True  # has operators that torch.compile can trace
    # Loads whole tiles, past a sample's end: the rows there must be finite, as 0 · NaN would reach the sums.
    reads_past: bool = False


LIBRARIES = (
    Library("flash-attn 4", "flash_attn.cute", "flash_attn_varlen_func", KEYWORDS, (9, 10, 11), 128,
            compiles=False, reads_past=True),
    Library("flash-attn 3", "flash_attn_interface", "flash_attn_varlen_func", KEYWORDS, (9,), 256, reads_past=True),
    Library("flash-attn 2", "flash_attn", "flash_attn_varlen_func", KEYWORDS, (8, 9, 10, 11, 12), 256, rocm=True),
    Library("Triton attention", "dcdit_kernels.triton.attention", "varlen_attention", TRITON, (9,), 128,
            causal=False, gradients=False, long=False, compiles=False),
    Library("torch FlashAttention", "torch.ops.aten", "_flash_attention_forward", ATEN_FLASH, (8, 9, 10, 11, 12), 256,
            compiles=False),
    Library("torch varlen_attn", "torch.nn.attention.varlen", "varlen_attn", TORCH_KEYWORDS, (8, 9, 10, 11, 12), 256,
            grouped=False),
    Library("torch efficient attention", "torch.ops.aten", "_efficient_attention_forward", ATEN_EFFICIENT,
            (8, 9, 10, 11, 12), 256, dtypes=(torch.float32,), compiles=False, grouped=False, uneven_causal=False),
)  # fmt: skip

# (module, function) → the function with the names of its parameters, or why there is none. Filled on first use.
_found: dict[tuple[str, str], tuple[Callable[..., Any], frozenset[str]] | str] = {}


# Both see names, not objects: torch.compile evaluates them once, as constants.
@assume_constant
def _missing(module: str, function: str, keywords: tuple[str, ...]) -> str | None:
    """Why the function cannot be imported or called, or None."""
    if (module, function) not in _found:
        _found[module, function] = _find(module, function, keywords)
    result = _found[module, function]
    return result if isinstance(result, str) else None


def found(library: Library) -> tuple[Callable[..., Any], frozenset[str]]:
    """The function of a library that can run, with the names of its parameters."""
    return _found[library.module, library.function]  # type: ignore[return-value]


def _find(module: str, function: str, keywords: tuple[str, ...]) -> tuple[Callable[..., Any], frozenset[str]] | str:
    try:
        call, parameters = _aten(function) if module == "torch.ops.aten" else _python(module, function)
    except (ImportError, AttributeError, OSError) as error:  # OSError: a shared library of another CUDA
        return f"not installed ({error})"
    lacking = [keyword for keyword in keywords if keyword not in parameters]
    return f"this release does not take {', '.join(lacking)}" if lacking else (call, parameters)


def _python(module: str, function: str) -> tuple[Callable[..., Any], frozenset[str]]:
    call = getattr(importlib.import_module(module), function)
    return call, frozenset(inspect.signature(call).parameters)


def _aten(function: str) -> tuple[Callable[..., Any], frozenset[str]]:
    """An operator of PyTorch; a build for CPUs, or one without the kernel, has the name and no kernel behind it."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{function}", "CUDA"):
        raise ImportError(f"this PyTorch has no CUDA kernel for aten::{function}")
    if "flash" in function and not torch.backends.cuda.is_flash_attention_available():
        raise ImportError("this PyTorch was built without FlashAttention")
    call = getattr(torch.ops.aten, function).default
    return call, frozenset(argument.name for argument in call._schema.arguments)


@assume_constant
def _refuses_device(majors: tuple[int, ...], rocm: bool, kind: str, index: int | None) -> str | None:
    if kind != "cuda":
        return f"needs a GPU, got {kind}"
    if torch.version.hip:
        return None if rocm else "not for ROCm"
    major, minor = capability(index)
    wanted = ", ".join(f"{m}.x" for m in majors)
    return None if major in majors else f"needs compute capability {wanted}, got {major}.{minor}"


def beyond_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether autograd, a transform of torch.func or a subclass of tensors may follow a call with these."""
    if type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN:
        return True
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def short(*lengths: Any) -> bool:
    """Whether no sample passes SHORT rows; of a length that is no number, which a check refuses, False."""
    try:
        return max(lengths, default=0) <= SHORT
    except TypeError:
        return False


def why_not(
    library: Library,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    uneven: bool = False,
    gradients: bool = False,
    long: bool = False,
) -> str | None:
    """Reason why the library cannot take these tensors, or None.

    With a causal mask; with k not of q's lengths; as `beyond_forward`; with samples that may pass SHORT rows.
    """
    if causal and not library.causal:
        return "takes no causal mask"
    if causal and uneven and not library.uneven_causal:
        return "takes a causal mask only where q and k have the same cu_seqlens"
    if gradients and not library.gradients:
        return "serves plain tensors without gradients"
    if long and not library.long:
        return f"serves samples of at most {SHORT} rows"
    if q.dtype not in library.dtypes or not q.dtype == k.dtype == v.dtype:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in library.dtypes)
        return f"needs q, k and v in {names}, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[2] % 8 or q.shape[2] > library.head_dim:
        return f"needs a head_dim that is a multiple of 8 up to {library.head_dim}, got {q.shape[2]}"
    if torch.compiler.is_compiling():  # a graph may not know the number of rows
        if not library.compiles:
            return "torch.compile cannot trace it"
    elif q.shape[0] == 0 or k.shape[0] == 0:
        return "there are no rows"
    device = _refuses_device(library.majors, library.rocm, q.device.type, q.device.index)
    return device or _missing(library.module, library.function, library.keywords)


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **call: bool) -> Library | None:
    """The first library that can take these tensors, or None. `call` as in `why_not`."""
    for library in LIBRARIES:
        if why_not(library, q, k, v, **call) is None:
            return library
    return None


def describe(*args: Any, **kwargs: Any) -> list[str]:
    """For `explain`: native's choice, and why not the others. Without k and v they are like q."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    q, k, v = tensors[:3] if len(tensors) > 2 else tensors[:1] * 3
    lengths = [value for value in (*args, kwargs.get("max_seqlen_q"), kwargs.get("max_seqlen_k")) if type(value) is int]
    call = {
        "causal": bool(kwargs.get("causal")),
        "uneven": len(tensors) > 4 and tensors[3] is not tensors[4],
        "gradients": beyond_forward(q, k, v),
        "long": not short(*lengths),
    }
    reasons = {library: why_not(library, q, k, v, **call) for library in LIBRARIES}
    chosen = next((library for library, reason in reasons.items() if reason is None), None)
    name = "SDPA sample by sample" if chosen is None else chosen.name
    sync = ", which reads the lengths: one synchronisation" if chosen is None and q.is_cuda else ""
    others = [f"    {library.name}: {why or 'can run'}" for library, why in reasons.items() if library is not chosen]
    return [f"  native is {name}{sync}", *others]
