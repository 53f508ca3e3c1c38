"""The training configuration: one YAML file and `key=value` overrides, checked key by key."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from .config import DCDiTConfig, check_keys
from .errors import ConfigError

# Which numbers the keys take, and how to say so.
LIMITS = (
    ("steps batch_size accumulate log_every save_every data.size", lambda value: value >= 1, "be at least 1"),
    ("seed ratio_weight max_minutes data.workers", lambda value: value >= 0, "not be negative"),
    ("optim.lr optim.weight_decay optim.grad_clip", lambda value: value >= 0, "not be negative"),
    ("upcycle.distill_weight", lambda value: value >= 0, "not be negative"),
    ("upcycle.output_share optim.ema_decay", lambda value: 0 <= value <= 1, "be in [0, 1]"),
    ("label_drop optim.beta2", lambda value: 0 <= value < 1, "be in [0, 1)"),
)


@dataclass(frozen=True)
class DataConfig:
    """`kind` digits, folder (`path`, `size` pixels, transparency on `background`) or latents (`path`).

    `skip_broken` takes the next picture of the epoch in the place of an unreadable one; all others keep their places.
    """

    kind: Literal["digits", "folder", "latents"] = "digits"
    path: str = ""
    size: int = 256
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
        """The keywords of `dcdit.codecs.make_codec`, without those of the other kind."""
        if self.kind == "pixel_unshuffle":
            return {"kind": self.kind, "factor": self.factor}
        return {"kind": self.kind, "pretrained": self.pretrained, "scale": self.scale or None}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to 0, gradients clipped by norm (0: not), EMA of the weights."""

    lr: float = 1e-4
    weight_decay: float = 0.0
    beta2: float = 0.999
    warmup_steps: int = 0
    cosine: bool = True
    grad_clip: float = 1.0
    ema_decay: float = 0.9999


@dataclass(frozen=True)
class UpcycleConfig:
    """`source`: the DiT to start from (empty: from scratch); its blocks teach in the first `distill_steps` steps.

    `output_share` is the share that the distance from the teacher's prediction has in the first step's diffusion loss;
    it falls linearly to 0. The teacher must have the same objective.
    """

    source: str = ""
    distill_steps: int = 5000
    distill_weight: float = 1.0
    output_share: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `dcdit train` reads. `batch_size` is the global one; `drop_fractions` are the ρ to draw from.

    Each process goes through its slice of the batch in `accumulate` parts. With `checkpointing` the backward computes
    the activations of each block again instead of keeping them.
    """

    output: str = "runs/train"
    seed: int = 0
    steps: int = 400_000
    batch_size: int = 256
    accumulate: int = 1
    checkpointing: bool = False
    objective: Literal["flow", "ddpm"] = "flow"
    model: DCDiTConfig = field(default_factory=DCDiTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    label_drop: float = 0.1
    ratio_weight: float = 0.03
    drop_fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    drop_warmup: int = 5000
    precision: Literal["no", "bf16"] = "no"
    channels_last: bool = False
    compile: bool = False
    log_every: int = 10
    save_every: int = 1000
    max_minutes: float = 0.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for names, fits, words in LIMITS:
            for name in names.split():
                value = attrgetter(name)(self)
                if not fits(value):
                    raise ConfigError(f"{name} must {words}, got {value}")
        if self.seed >= 2**63:  # NumPy makes keys of int64
            raise ConfigError(f"seed must be below 2**63, got {self.seed}")
        for rho in self.drop_fractions:
            if not 0 <= rho < 1 - 2**-25:  # from there on float32 has 1
                raise ConfigError(f"drop_fractions must lie in [0, 1), got {rho}")
        if not self.drop_fractions:
            raise ConfigError("drop_fractions needs at least one value; [0] trains without dropping")
        if self.data.kind != "digits" and not self.data.path:
            raise ConfigError(f"data.kind={self.data.kind} needs data.path")
        if self.data.kind == "latents" and self.codec.kind == "pixel_unshuffle":
            raise ConfigError(
                "data.kind=latents needs the autoencoder that made them, for sampling: "
                "codec.kind=autoencoder_kl codec.pretrained=…"
            )
        if self.objective == "flow" and self.model.learn_sigma:
            raise ConfigError("objective flow has no variance to learn: set model.learn_sigma=false or objective=ddpm")

    def to_dict(self) -> dict[str, Any]:
        """All values in JSON types."""
        values = dataclasses.asdict(self)
        return {**values, "model": self.model.to_dict(), "drop_fractions": list(self.drop_fractions)}


def load_config(path: str | Path, overrides: list[str] = ()) -> TrainConfig:
    """A YAML file under `key=value` overrides, dots for nesting. Raises ConfigError for what cannot be used."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError as error:
        raise ConfigError(f"no config file {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found {type(values).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"expected key=value, got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"cannot read the value of {override!r}") from error
        _assign(values, key.split("."), value)
    return _build(TrainConfig, values, "")


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key} is not a group of keys")
    values[keys[-1]] = value


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls) | ({"preset": str} if cls is DCDiTConfig else {})
    check_keys(values, hints, (prefix or "config").rstrip("."))
    given = {key: _convert(hints[key], value, prefix + key) for key, value in values.items()}
    return cls.from_dict(given) if cls is DCDiTConfig else cls(**given)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type that the field has. YAML reads 1e-3 as text and 4 as an integer; both are fine floats."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a group of keys, got {value!r}")
        return _build(hint, value, name + ".")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        value = "no" if value is False and "no" in args else value  # YAML reads a bare no as false
        if value not in args:
            raise ConfigError(f"{name} must be one of {', '.join(args)}, got {value!r}")
        return value
    if origin is tuple:
        # One number stands for a list of it, a size for both sides.
        items = [value] * (1 if Ellipsis in args else len(args)) if isinstance(value, (int, float)) else value
        if not isinstance(items, list):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        return tuple(_convert(args[0], item, name) for item in items)
    if hint is float and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is hint:
        if hint is float and not math.isfinite(value):
            raise ConfigError(f"{name} must be finite, got {value}")
        return value
    kinds = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{name} must be {kinds[hint]}, got {value!r}")
