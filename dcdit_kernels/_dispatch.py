"""Which back-end is asked for: by a call, else by `use_backend(...)`, else by the environment's DCDIT_BACKEND.

"auto" takes the first of native, triton, reference that can run; any other name runs that back-end or raises
BackendError with the reason.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import torch

BACKENDS = ("native", "triton", "reference")
CHOICES = ("auto", *BACKENDS)

ENVIRONMENT = os.environ.get("DCDIT_BACKEND") or "auto"  # read once: a look takes longer than a small launch


class BackendError(RuntimeError):
    """The requested back-end cannot run this call; the message gives the reason and the remedy."""


_name: ContextVar[str] = ContextVar("dcdit_backend")  # each thread and each asyncio task has its own


class _Choice(threading.local):
    """The back-end of `use_backend`."""

    # torch.compile cannot call a ContextVar. It can read, and guard, a property with a getter written in C.
    eager = property(_name.get)  # the name, or this object itself where there is none

    def __init__(self) -> None:
        # torch.compile cannot set a ContextVar either: inside a graph `use_backend` sets this attribute of the thread.
        self.traced: str | None = None


current = _Choice()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside on this back-end, unless a call names its own.

    The choice holds in this thread and, under asyncio, in this task. Operators that have no implementation of that
    name (plan_chunks in Triton, say) choose for themselves. Raises BackendError for an unknown name.
    """
    checked(name)
    if torch.compiler.is_compiling():
        before, current.traced = current.traced, name
        try:
            yield
        finally:
            current.traced = before
        return
    token = _name.set(name)
    try:
        yield
    finally:
        _name.reset(token)


def requested_backend(backend: str | None = None) -> str:
    """The back-end asked for: by the call, the context manager, DCDIT_BACKEND, else "auto"."""
    chosen = backend or current.traced or current.eager
    return checked(chosen if isinstance(chosen, str) else ENVIRONMENT)


def checked(name: str) -> str:
    """`name`, or BackendError where no back-end is called so."""
    if name not in CHOICES:
        raise BackendError(f"unknown backend {name!r}; expected one of {', '.join(CHOICES)}")
    return name
