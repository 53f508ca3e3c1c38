"""SIGTERM and SIGHUP end a run as Ctrl-C does, and never in the middle of a training step."""

from __future__ import annotations

import contextlib
import os
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
    """Within it SIGTERM, SIGHUP and Ctrl-C raise Interrupted, unless the caller handles these signals."""
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


def ignored(_: int = 0) -> None:
    """For loading processes, which a terminal gives its signals as well: their parent ends them, by SIGTERM."""
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


def _raise(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_name == "__del__":  # Python drops what is raised there: the signal comes again
            again = threading.Timer(0.1, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise Interrupted(number)


@contextlib.contextmanager
def _handlers(handler) -> Iterator[None]:
    """Install a handler in the place of Python's and of ours. Other threads than the main one may not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    replaced = {}
    try:
        for number in SIGNALS:
            old = signal.getsignal(number)
            if old in (signal.SIG_DFL, signal.default_int_handler, _raise):
                replaced[number] = old
                signal.signal(number, handler)
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)
