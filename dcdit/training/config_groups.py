"""The groups of the training configuration: data, codec, optimiser, upcycling, cost of other systems, validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class DataConfig:
    """`kind` digits, folder (`path`, `size` pixels, transparency on `background`), idx or latents (`path`).

    The `path` of idx files is their folder and the beginning of their names, see `dcdit.data.idx`.

    With `buckets` pictures of a folder keep their aspect: their sides are multiples of so many pixels, their area is
    size² at most (0: every picture is cropped to a square). Latents with `buckets` may differ in size; their sides are
    multiples of so many cells.

    `skip_broken` takes the next picture of the epoch in the place of an unreadable one; all others keep their places.
    """

    kind: Literal["digits", "folder", "idx", "latents"] = "digits"
    path: str = ""
    size: int = 256
    buckets: int = 0
    flip: bool = False
    background: str = "white"
    skip_broken: bool = False
    workers: int = 0


@dataclass(frozen=True)
class CodecConfig:
    """`kind` pixel_unshuffle (`factor`) or autoencoder_kl (`pretrained`, `scale`; 0 takes the weights' own)."""

    kind: Literal["pixel_unshuffle", "autoencoder_kl"] = "pixel_unshuffle"
    factor: int = 2
    pretrained: str = "stabilityai/sd-vae-ft-ema"
    scale: float = 0.0

    def options(self) -> dict[str, Any]:
        """The keywords of `dcdit.codecs.make_codec`, without the other kind's."""
        if self.kind == "pixel_unshuffle":
            return {"kind": self.kind, "factor": self.factor}
        return {"kind": self.kind, "pretrained": self.pretrained, "scale": self.scale or None}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to 0, gradients clipped by norm (0: not), EMAs of the weights.

    `ema_decay` may be several; the first makes OUTPUT/model, the others OUTPUT/model-DECAY.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    beta2: float = 0.999
    warmup_steps: int = 0
    cosine: bool = True
    grad_clip: float = 1.0
    ema_decay: tuple[float, ...] = (0.9999,)


@dataclass(frozen=True)
class UpcycleConfig:
    """`source`: the DiT to start from (empty: from scratch); its blocks teach in the first `distill_steps` steps.

    `output_share` is the share that the distance from the teacher's prediction has in the first step's diffusion loss;
    it falls linearly to 0. The teacher must have the same objective. `teacher` is its convention: dit (times 0 to 1000,
    as here) or sit (times in [0, 1], 1 is data, velocity data − noise; arXiv 2401.08740). `check_teacher` refuses one
    whose loss on the first items is no better than predicting zero.
    """

    source: str = ""
    teacher: Literal["dit", "sit"] = "dit"
    check_teacher: bool = True
    distill_steps: int = 5000
    distill_weight: float = 1.0
    output_share: float = 0.0


@dataclass(frozen=True)
class SpendConfig:
    """Of `kind` sparse the share of tokens left out, `least` for t < 250, then linear to `most` at t = 1000; of dydit
    the `rate` of the blocks' FLOPs to come down to in `warmup` steps; of patches the DiT's `patch` and the patch sizes
    in units of it, `scales`, of which 1 is the DiT itself."""

    least: float = 0.5
    most: float = 0.75
    rate: float = 0.5
    warmup: int = 1000
    patch: int = 2
    scales: tuple[int, ...] = (1, 2, 4)


@dataclass(frozen=True)
class ValidationConfig:
    """Every so many steps (0: never) the loss of `items` held-out items, and a sheet of `samples` images.

    Digits have held-out items of their own; other data needs `path`, of the same kind as data.path.
    """

    every: int = 0
    path: str = ""
    items: int = 512
    samples: int = 0
    steps: int = 25
    guidance: float = 2.0
