"""The straightforward formulations that the operators are measured against, each as one would first write it."""

from .attention import attention
from .boundary import cosine, predictability
from .chunk import chunk, segment_means
from .dechunk import dechunk
from .group_norm import group_norm_silu
from .modulate import gate_modulate
from .pad import unpad_and_pad
from .plan import nearest, pad_rows, places, plan
from .rope import norm_rope

__all__ = [
    "attention",
    "chunk",
    "cosine",
    "dechunk",
    "gate_modulate",
    "group_norm_silu",
    "nearest",
    "norm_rope",
    "pad_rows",
    "places",
    "plan",
    "predictability",
    "segment_means",
    "unpad_and_pad",
]
