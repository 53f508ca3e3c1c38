"""Dynamic Chunking Diffusion Transformers: the model, training and sampling. The operators are in dcdit.ops."""

import importlib

from .config import DCDiTConfig, preset

__all__ = ["DCDiT", "DCDiTConfig", "DynamicChunking", "__version__", "graphed", "preset"]


# Imported on first use: `import dcdit.ops` stays cheap, and the command line answers before torch is there.
_LAZY = {"DCDiT": "model", "DynamicChunking": "chunking", "graphed": "graphs"}


def __getattr__(name: str):
    if name == "__version__":
        return importlib.import_module("dcdit_kernels").__version__
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module 'dcdit' has no attribute {name!r}")
