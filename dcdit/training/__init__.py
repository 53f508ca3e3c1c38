"""Training: configuration, objectives, the trainer, its state on disk, upcycling."""

from .._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "config": "TrainConfig load_config",
        "objectives": "DDPM FlowMatching ratio_loss",
        "run": "train",
        "trainer": "Trainer",
        "upcycling": "upcycle",
    },
)
