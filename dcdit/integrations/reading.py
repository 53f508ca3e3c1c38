"""Reading a wrapped model's folder by its own class, without diffusers' warnings about what wrapping has added."""

from __future__ import annotations

import os
from typing import Any

import diffusers
from torch import nn


class _Wrapped:
    """Mixed into a model's class while it is read: its config has `dynamic_chunking`, its weights a router's."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """diffusers' own, on the rest of the config."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "dynamic_chunking"}, **kwargs)


def read_untouched(folder: str | os.PathLike, name: str, **options: Any) -> nn.Module:
    """The model of diffusers' class `name` in a folder that a wrapped one was saved in, as it was before.

    `options` are those of from_pretrained. diffusers warns of weights that are missing or unknown, but of no router's.
    """
    kind = getattr(diffusers, name)
    ignored = [*(kind._keys_to_ignore_on_load_unexpected or ()), r"^\w+\.router\."]
    reader = type(name, (_Wrapped, kind), {"_keys_to_ignore_on_load_unexpected": ignored})
    model = reader.from_pretrained(folder, **options)
    model.__class__ = kind
    return model
