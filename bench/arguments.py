"""Arguments of the benches that the package itself can judge."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from dcdit.errors import DCDiTError


def positive(text: str) -> int:
    """A type of argparse: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def several(what: str, known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A type of argparse: names of `known`, separated by commas; `what` says what they name."""

    def check(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return check


def existing(text: str) -> Path:
    """A type of argparse: the path of a file or folder that is there."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"there is nothing at {text}")
    return Path(text)


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--device`, cpu or cuda: by default what there is. cuda is refused where torch sees no GPU."""
    import torch

    there = torch.cuda.is_available()

    def check(text: str) -> str:
        if text == "cuda" and not there:
            raise argparse.ArgumentTypeError("cuda needs a GPU, and torch finds none")
        return text

    parser.add_argument(
        "--device", type=check, choices=["cpu", "cuda"], default=default or ("cuda" if there else "cpu")
    )


def known(read: Callable[[str], Any]) -> Callable[[str], str]:
    """A type of argparse: the text itself, refused in one line where `read` refuses it."""

    def check(text: str) -> str:
        try:
            read(text)
        except DCDiTError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check
