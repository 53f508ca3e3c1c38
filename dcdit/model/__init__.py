"""The network: configuration, encoder, router, main network and decoder; the plain DiT; FLOPs; CUDA graphs."""

from .._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "blocks": "DiTBlock MainNetwork",
        "config": "DCDiTConfig preset",
        "dcdit": "DCDiT",
        "density": "Density",
        "dit_config": "DiTConfig DyDiTConfig PatchDiTConfig SparseDiTConfig",
        "dydit": "DyDiT",
        "dydit_main": "DyDCDiT",
        "dynamic_chunking": "DynamicChunking",
        "flops": "dcdit_flops dit_flops",
        "gates": "Gates",
        "graphs": "graphed",
        "guess_router": "GuessRouter",
        "patch_dit": "PatchDiT",
        "plain_dit": "PlainDiT",
        "precision": "cast_weights float32_products sampling_dtype",
        "routers": "CosineRouter PredictabilityRouter",
        "routing": "Routing route",
        "sparse_dit": "SparseDiT",
        "untrained_routers": "DifferenceRouter MapRouter MotionRouter",
    },
)
