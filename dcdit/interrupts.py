"""SIGTERM and SIGHUP end a run as Ctrl-C does, and never in the middle of a training step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within it SIGTERM, SIGHUP and Ctrl-C raise Interrupted; a signal that the caller ignores stays ignored."""
    with _handlers(_raise):
        yield


@contextlib.contextmanager
def held_back(ignore: bool = False) -> Iterator[None]:
    """Within it a first signal waits for the end of the block, and is then raised, or dropped with `ignore`.

    A second one is raised at once.
    """
    received: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        if received:
            _raise(number, frame)
        received.append(number)

    with _handlers(keep):
        yield
    if received and not ignore:
        raise Interrupted(received[0])


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


@contextlib.contextmanager
def _handlers(handler) -> Iterator[None]:
    """Install a handler for the signals that are not ignored; other threads than the main one may not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, old in before.items():
            if old is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            # None: a handler that Python did not install and cannot put back.
            if old is not None:
                signal.signal(number, old)
