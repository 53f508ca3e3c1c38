"""Errors that a user can mend. The command line prints them as one line and exits with status 2."""

import re
from typing import Any


class DCDiTError(ValueError):
    """Something in the input is wrong; the message names the expected value and the value that came."""


class ConfigError(DCDiTError):
    """A configuration, preset or option that cannot be used."""


class CheckpointError(DCDiTError):
    """A checkpoint that is missing, truncated, foreign or does not fit."""


class DataError(DCDiTError):
    """A data set or a picture folder that cannot be used."""


def check_kind(value: Any, kind: type | tuple[type, ...], name: str, hint: str = "") -> None:
    """Raise ConfigError where the argument `name` is no `kind`, or none of several; `hint` says how one is made."""
    if not isinstance(value, kind):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise ConfigError(f"{name} must be a {names}, got a {type(value).__name__}{hint and '; ' + hint}")


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())


def first_sentence(error: BaseException) -> str:
    """Of an error's first line: torch goes on to say where to report it."""
    return re.split(r"\.\s", first_line(error))[0]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
