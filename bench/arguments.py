"""Arguments of the benches that the package itself can judge."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dcdit.errors import DCDiTError


def positive(text: str) -> int:
    """A type of argparse: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def known(read: Callable[[str], Any]) -> Callable[[str], str]:
    """A type of argparse: the text itself, refused in one line where `read` refuses it."""

    def check(text: str) -> str:
        try:
            read(text)
        except DCDiTError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check
