"""Operators for dynamic token counts: plan once in C++/CUDA, move features in Triton, attend with FlashAttention.

Every operator has a plain PyTorch twin under its name in `dcdit_kernels.reference`.
"""

import os

try:
    os.getcwd()
except FileNotFoundError:  # torch's libraries end the process there
    reason = "the working directory is deleted: change to one that is there"
    raise ImportError(reason, name=__name__) from None

from ._dispatch import BackendError, use_backend
from ._explain import explain
from .attention import varlen_attention
from .boundary import boundary_cosine, boundary_predictability
from .chunk import chunk
from .chunk_plan import ChunkPlan
from .dechunk import dechunk
from .ema import ema_smooth
from .group_norm import group_norm_silu
from .modulate import adaln_modulate, gate_residual, gate_residual_modulate
from .pack import pack_rows, unpack_rows
from .packing import Packing
from .padding import pad_input, unpad_input
from .plan import plan_chunks
from .qk_norm_rope import qk_norm_rope

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ChunkPlan",
    "Packing",
    "adaln_modulate",
    "boundary_cosine",
    "boundary_predictability",
    "chunk",
    "dechunk",
    "ema_smooth",
    "explain",
    "gate_residual",
    "gate_residual_modulate",
    "group_norm_silu",
    "pack_rows",
    "pad_input",
    "plan_chunks",
    "qk_norm_rope",
    "unpack_rows",
    "unpad_input",
    "use_backend",
    "varlen_attention",
]
