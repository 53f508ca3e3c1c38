"""Ends of complaints that lead from a place without a checkpoint to one that has it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ..files import WEIGHTS


def folder_of(file: Path) -> str:
    """How to come from a file to a checkpoint's folder."""
    if file.suffix in (".yaml", ".yml"):
        return "; dcdit train makes one from a configuration"
    return f"; give {file.parent}" if file.name in (WEIGHTS, "config.json") else "; dcdit convert makes one of a .pt"


def near_folder(path: Path) -> str:
    """The checkpoints, or the pipeline of diffusers, that a folder holds."""
    if (path / "model_index.json").is_file():
        return ", it holds a pipeline of diffusers"
    inside = [file.parent for file in path.glob(f"*/{WEIGHTS}")]
    return f"; did you mean {min(inside, key=lambda place: (place.name != 'model', place))}?" if inside else ""


def near_name(path: Path) -> str:
    """A checkpoint beside the path whose name is like its own."""
    beside = {file.parent.name: file.parent for file in path.parent.glob(f"*/{WEIGHTS}")}
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {beside[near[0]]}?" if near else ""


def own_class(config: dict[str, Any]) -> str:
    """How the folder of our class of diffusers becomes one of dcdit, and what reads a chunked transformer's."""
    name = config.get("_class_name")
    if "dynamic_chunking" in config:
        return "; dcdit.integrations.attention.load_dynamic_chunking reads it"
    if name != "DCDiTTransformer2DModel":
        return ""
    return f": {name}.from_pretrained(…).model.save_pretrained(…) writes one"
