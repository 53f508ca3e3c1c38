"""Processes of `accelerate launch`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ..errors import ConfigError, first_line

# What a launcher, or a cluster's batch system, tells each process.
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def cpu_ranks() -> bool:
    """Whether to say cpu=True to accelerate: several processes without a GPU are CPU ranks over gloo.

    accelerate would take each for a separate run.
    """
    return "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """What accelerate and torch raise where processes cannot find each other, as a ConfigError with the variables."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        found = " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
        if not found:
            raise
        raise ConfigError(
            f"cannot join the processes of {found}: {first_line(error)}; a run without a launcher needs these unset"
        ) from error
