"""Dynamic Chunking Diffusion Transformers: the model, training and sampling. The operators are in dcdit.ops."""

from dcdit_kernels import __version__

from .config import DCDiTConfig, preset

__all__ = ["DCDiT", "DCDiTConfig", "__version__", "preset"]


def __getattr__(name: str):
    # The model is imported on first use, so that `import dcdit.ops` stays cheap.
    if name == "DCDiT":
        from .model import DCDiT

        return DCDiT
    raise AttributeError(f"module 'dcdit' has no attribute {name!r}")
