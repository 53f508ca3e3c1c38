"""Every operator in plain PyTorch: the CPU path, and the oracle of the tests (float64-capable)."""

from .attention import varlen_attention
from .boundary import boundary_cosine, boundary_predictability
from .chunk import chunk
from .dechunk import dechunk
from .ema import ema_smooth
from .group_norm import group_norm_silu
from .modulate import adaln_modulate, gate_residual, gate_residual_modulate
from .pack import pack_rows, unpack_rows
from .plan import plan_chunks
from .qk_norm_rope import qk_norm_rope

__all__ = [
    "adaln_modulate",
    "boundary_cosine",
    "boundary_predictability",
    "chunk",
    "dechunk",
    "ema_smooth",
    "gate_residual",
    "gate_residual_modulate",
    "group_norm_silu",
    "pack_rows",
    "plan_chunks",
    "qk_norm_rope",
    "unpack_rows",
    "varlen_attention",
]
