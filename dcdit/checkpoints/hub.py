"""The Hugging Face Hub asked once, before libraries that would try a typo again and again."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import CheckpointError, one_line


def hub_options(name: str) -> dict[str, Any]:
    """Options with which `from_pretrained` of diffusers reads the repository `name`: from the cache where the Hub
    cannot be reached. Raises CheckpointError where there is no such repository."""
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")  # diffusers' way of asking
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=10)
    except HFValidationError as error:
        raise CheckpointError(f"there is no folder {name}, and it is no name of a repository") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no folder {name}, and no repository of that name that can be read") from error
    except Exception:  # no network, offline mode, a server that is down: the cache can still be read
        return {"local_files_only": True}
    return {}


def why_not(error: Exception, options: dict[str, Any]) -> str:
    """Why `from_pretrained` failed with `hub_options`: diffusers says that the repository lacks a file where it is the
    cache that does."""
    cached = "the Hub cannot be reached, and in its cache " if options and isinstance(error, OSError) else ""
    return cached + one_line(error)
