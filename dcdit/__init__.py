"""Dynamic Chunking Diffusion Transformers: the model, training and sampling. The operators are in dcdit.ops."""

from ._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "model.config": "DCDiTConfig preset",
        "model.dcdit": "DCDiT",
        "model.dynamic_chunking": "DynamicChunking",
        "model.forward_graphs": "disable_cuda_graph enable_cuda_graph",
        "model.graphs": "graphed",
        "sampling.batcher": "Batcher",
        "ops": "__version__",
    },
)
