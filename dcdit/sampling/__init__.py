"""Sampling: from a checkpoint to pictures, step by step."""

from .._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "batcher": "Batcher Request",
        "edits": "Edit read_edit",
        "policy": "Policy",
        "sampler": "open_checkpoint sample",
        "schedulers": "make_scheduler",
        "trace": "Samples Step Trace",
    },
)
