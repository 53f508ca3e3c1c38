"""Which system a state dict or a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import read_json
from .systems_folder import SYSTEMS

PLAIN, RELEASE = "a plain DiT", "DC-DiT's public release"
# Parts of keys that one system alone has; the first that fits counts.
_SIGNS = (
    ("hnet.", RELEASE),
    ("dumbbell_blocks.", "SparseDiT"),
    ("poolingformer_blocks.", "SparseDiT"),
    (".attn_rate.", "DyDiT"),
    ("transformer_blocks.", "a DiT of diffusers"),
    ("x_embedder.", PLAIN),
    ("class_embed.", "weights of dcdit, which are read as a folder with its config.json"),
)


def looks_like(state: dict[str, Any]) -> str:
    """The system that has such keys, in words."""
    found = (system for sign, system in _SIGNS if any(sign in f".{key}" for key in state))
    return next(found, f"no DiT known here (keys such as {next(iter(state), 'none')})")


def own_folder(path: Path) -> str | None:
    """The system of a folder that `save_checkpoint` wrote, in words; None of any other."""
    values = _config(path)
    if not isinstance(values.get("model"), dict):
        return None
    kind = values.get("kind")
    return SYSTEMS[kind][0].__name__ if kind in SYSTEMS else "DC-DiT"


def foreign_class(path: Path) -> str | None:
    """The class of diffusers that a folder's config.json names; None of any other."""
    return _config(path).get("_class_name")


def _config(path: Path) -> dict[str, Any]:
    """A folder's config.json; empty where there is none that can be read."""
    try:
        values = read_json(path / "config.json")
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
