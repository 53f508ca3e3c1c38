"""Keys of a training configuration that are given and that its run does not read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter

from .config import SPENT_BY, TrainConfig

# Keys, what reads them, and whether that is in a run.
READERS: tuple[tuple[str, str, Callable[[TrainConfig], object]], ...] = (
    ("codec.factor", "codec.kind=pixel_unshuffle", lambda run: run.codec.kind == "pixel_unshuffle"),
    ("codec.pretrained codec.scale", "codec.kind=autoencoder_kl", lambda run: run.codec.kind == "autoencoder_kl"),
    ("data.size data.background", "data.kind=folder", lambda run: run.data.kind == "folder"),
    ("data.path", "data.kind=folder, idx or latents", lambda run: run.data.kind != "digits"),
    ("upcycle", "dcdit upcycle, or a key from", lambda run: run.upcycle.source),
    ("validation", "validation.every", lambda run: run.validation.every),
    ("validation.steps validation.guidance", "validation.samples", lambda run: run.validation.samples),
    (
        "drop_fractions drop_warmup ratio_weight model.router model.segment_mean model.mean_positions "
        "model.keep_grid model.direct_init model.predict_clean",
        "kind=dcdit",
        lambda run: run.kind == "dcdit" or run.init,
    ),
    ("ratio_weight", "a router that learns", lambda run: run.model.router != "guess"),
    ("drop_fractions", "a run without budgets", lambda run: not run.budgets),
    ("batch_size", "a run without tokens_per_batch", lambda run: not run.tokens_per_batch),
    ("time_shift", "objective=flow", lambda run: run.objective == "flow"),
    ("min_snr", "objective=ddpm", lambda run: run.objective == "ddpm"),
    *((f"spend.{key}", f"kind={kind}", lambda run, kind=kind: run.kind == kind) for key, kind in SPENT_BY.items()),
)


def unused(config: TrainConfig) -> list[str]:
    """Such keys with what would read them: those that `load_config` read, and those without their default."""
    default, readers = TrainConfig(), dict[str, str]()
    for names, reader, reads in READERS:
        for key in (key for name in names.split() for key in _keys(name)):
            given = key in config.given or attrgetter(key)(config) != attrgetter(key)(default)
            if given and key != reader and not reads(config):
                readers.setdefault(key, reader)
    return [f"{key} is of {reader}" for key, reader in readers.items()]


def _keys(name: str) -> list[str]:
    group = attrgetter(name)(TrainConfig())
    return [f"{name}.{part.name}" for part in dataclasses.fields(group)] if dataclasses.is_dataclass(group) else [name]
