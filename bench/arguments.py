"""Arguments of the benches that the package itself can judge."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dcdit.errors import DCDiTError


def known(read: Callable[[str], Any]) -> Callable[[str], str]:
    """A type of argparse: the text itself, refused in one line where `read` refuses it."""

    def check(text: str) -> str:
        try:
            read(text)
        except DCDiTError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check
