"""Checkpoints on disk: a folder of ours, the public release, a DiT of either layout, the Hub."""

from .._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "dit": "load_dit to_dit",
        "systems": "load_dydit load_sparsedit",
        "folder": "from_pretrained load_checkpoint load_release load_state save_checkpoint save_release",
    },
)
