"""Which back-end runs an operator, and why the others cannot.

`backend="auto"` takes the first of native, triton, reference that can run; any other name runs that back-end or
raises BackendError with the reason. The default comes from `use_backend(...)`, then from DCDIT_BACKEND.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ._check import first_tensor

BACKENDS = ("native", "triton", "reference")
CHOICES = ("auto", *BACKENDS)

# op -> backend -> ("module:function", why_not). why_not gets the operator's arguments and returns a reason or None.
_registry: dict[str, dict[str, tuple[str, Callable[..., str | None]]]] = {}
# op -> what `explain` adds about a choice that a back-end makes inside.
_details: dict[str, Callable[..., list[str]]] = {}


class _Choice(threading.local):
    """The back-end of `use_backend`; torch.compile can read a thread's attribute, and not a ContextVar."""

    backend: str | None = None


_current = _Choice()


class BackendError(RuntimeError):
    """The back-end that was asked for cannot run this call; the message says why and what to do."""


def register(op: str, backend: str, target: str, why_not: Callable[..., str | None]) -> None:
    """Make `target` ("module:function", imported on first use) the implementation of `op` on `backend`."""
    _registry.setdefault(op, {})[backend] = (target, why_not)


def register_reference(op: str) -> None:
    """Register the operator of the same name in `dcdit_kernels.reference`, which runs everywhere."""
    register(op, "reference", f"dcdit_kernels.reference:{op}", lambda *args, **kwargs: None)


def register_details(op: str, lines: Callable[..., list[str]]) -> None:
    """Let `explain` add these lines, made from the operator's arguments."""
    _details[op] = lines


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside on this back-end, unless a call names its own.

    Operators that have no implementation of that name (plan_chunks in Triton, say) choose for themselves.
    """
    before, _current.backend = _current.backend, _checked(name)
    try:
        yield
    finally:
        _current.backend = before


def requested_backend(backend: str | None = None) -> str:
    """The back-end asked for: by the call, the context manager, DCDIT_BACKEND, else "auto"."""
    return _checked(backend or _current.backend or os.environ.get("DCDIT_BACKEND") or "auto")


def run(op: str, backend: str | None, *args: Any, **kwargs: Any) -> Any:
    """Call `op` on the back-end asked for. Raises BackendError where an explicit choice cannot run."""
    return call(op, choose(op, backend, *args, **kwargs), *args, **kwargs)


def call(op: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the implementation of `op` on the back-end `name`."""
    implementation, device = load(op, name), first_tensor((*args, *kwargs.values())).device.type
    if not torch.is_autocast_enabled(device):
        return implementation(*args, **kwargs)
    # Every operator states its own precision; autocast would turn float32 accumulation into bfloat16.
    with torch.autocast(device, enabled=False):
        return implementation(*args, **kwargs)


def load(op: str, name: str) -> Any:
    """The implementation of `op` on `name`: a function, or for Triton a class with `forward` and `backward`."""
    return _load(_registry[op][name][0])


def choose(op: str, backend: str | None, *args: Any, **kwargs: Any) -> str:
    """Name of the back-end that `run` would take for these arguments."""
    asked = requested_backend(backend)
    if backend is None and asked not in _registry[op]:
        asked = "auto"  # use_backend and DCDIT_BACKEND speak to the operators that have such an implementation
    for name in BACKENDS if asked == "auto" else (asked,):
        reason = why_not(op, name, *args, **kwargs)
        if reason is None:
            return name
    raise BackendError(f"{op}: backend {asked!r} cannot run: {reason}")


def why_not(op: str, backend: str, *args: Any, **kwargs: Any) -> str | None:
    """Reason why `backend` cannot run `op` on these arguments, or None where it can."""
    if backend not in _registry[op]:
        return f"{op} has no {backend} implementation"
    return _registry[op][backend][1](*args, **kwargs)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """One line per back-end: chosen, not needed, or the reason why it cannot run these arguments."""
    if op not in _registry:
        raise BackendError(f"unknown operator {op!r}; known: {', '.join(sorted(_registry))}")
    if not any(isinstance(a, torch.Tensor) for a in (*args, *kwargs.values())):
        raise BackendError(f"explain({op!r}, …) needs the operator's arguments, got no tensor")
    chosen = choose(op, None, *args, **kwargs)
    lines = [f"{op}: {chosen} (asked for: {requested_backend()})"]
    for name in BACKENDS:
        if name != chosen:
            lines.append(f"  {name}: {why_not(op, name, *args, **kwargs) or 'can run'}")
    if op in _details:
        lines += _details[op](*args, **kwargs)
    return "\n".join(lines)


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise BackendError(f"unknown backend {name!r}; expected one of {', '.join(CHOICES)}")
    return name


@functools.cache
def _load(target: str) -> Callable[..., Any]:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)
