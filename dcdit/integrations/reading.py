"""Reading a wrapped model's folder by its own class, without diffusers' warnings about what wrapping has added."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from ..checkpoints.folder import SHIPPED
from ..checkpoints.looks import own_folder
from ..errors import CheckpointError, ConfigError, first_line
from ..files import expanded, read_json


class _Wrapped:
    """Mixed into a model's class while it is read: its config has `dynamic_chunking`, its weights a router's."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """diffusers' own, on the rest of the config."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "dynamic_chunking"}, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, **_: Any) -> dict[str, Any]:
        """diffusers' own refuses a byte order mark; that of 0.35 has an option more."""
        return read_json(Path(json_file))


def check_foreign(name: str | os.PathLike, kind: type | None = None, subfolder: str | None = None) -> None:
    """Raise ConfigError for a checkpoint of this project where diffusers' from_pretrained expects one of its own, and
    for a folder of another class than `kind`, from which diffusers would make a model of random weights."""
    if os.fspath(name) in SHIPPED or own_folder(expanded(name)):
        raise ConfigError(
            f"{name} must be what save_pretrained of diffusers wrote, got a checkpoint of dcdit: "
            f"DCDiTTransformer2DModel.from_dcdit(DCDiT.from_pretrained({os.fspath(name)!r})) makes the transformer"
        )
    folder = expanded(name) / (subfolder or "")
    if kind and (folder / "config.json").is_file():
        found = _read(folder / "config.json").get("_class_name")
        if found not in [one.__name__ for one in kind.__mro__]:
            raise ConfigError(f"{folder} must hold a {kind.__name__}, got a {found}")


def _read(file: Path) -> dict[str, Any]:
    """A config.json of diffusers; empty where it is no mapping. Raises CheckpointError where it is not JSON."""
    try:
        config = read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """config.json of a model's folder. Raises CheckpointError where there is none of a class of diffusers."""
    file = expanded(folder) / "config.json"
    try:
        config = _read(file)
    except OSError as error:
        raise CheckpointError(f"{folder} must be a folder of diffusers with config.json: {error}") from error
    name = config.get("_class_name")
    if not isinstance(name, str) or not issubclass(getattr(diffusers, name, object), diffusers.ModelMixin):
        known = f"diffusers {diffusers.__version__}"  # older ones lack the newer families
        raise CheckpointError(f"{file} must name a model of {known} as _class_name, got {name}")
    return config


def read_untouched(folder: str | os.PathLike, name: str, **options: Any) -> nn.Module:
    """The model of diffusers' class `name` in a folder that a wrapped one was saved in, as it was before.

    `options` are those of from_pretrained. diffusers warns of unknown weights, but of no router's. Raises
    CheckpointError where weights are missing, cannot be read or have other shapes than the config says.
    """
    kind = getattr(diffusers, name)
    ignored = [*(kind._keys_to_ignore_on_load_unexpected or ()), r"^\w+\.router\."]
    reader = type(name, (_Wrapped, kind), {"_keys_to_ignore_on_load_unexpected": ignored})
    try:
        model, found = reader.from_pretrained(expanded(folder), output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        reason = first_line(error).split(" If you want")[0]  # diffusers' advice is for callers of its own
        raise CheckpointError(f"{folder} cannot be read as a {name}: {reason}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} weights that its config asks for, such as {missing[0]}")
    model.__class__ = kind
    return model
