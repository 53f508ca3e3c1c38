"""The training configuration: one YAML file and `key=value` overrides, checked key by key."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, check_kind
from ..files import expanded, read_text
from ..model.config import DCDiTConfig, check_keys, preset
from ..model.density import Density
from .config_groups import CodecConfig, DataConfig, OptimConfig, SpendConfig, UpcycleConfig, ValidationConfig

# Which numbers the keys take, and how to say so.
RUN_LIMITS = (  # of every run
    ("steps batch_size log_every save_every", lambda value: value >= 1, "be at least 1"),
    ("batch_size", lambda value: value <= 2**20, "be at most 1048576"),
    ("seed", lambda value: value < 2**63, "be below 2**63"),  # NumPy makes keys of int64
    ("time_shift", lambda value: value > 0, "be positive"),
    ("seed ratio_weight", lambda value: value >= 0, "not be negative"),
    ("optim.lr optim.weight_decay optim.grad_clip optim.warmup_steps", lambda value: value >= 0, "not be negative"),
    ("optim.beta2", lambda value: 0 <= value < 1, "be in [0, 1)"),
)
LIMITS = (
    *RUN_LIMITS,
    ("accumulate data.size codec.factor validation.steps", lambda value: value >= 1, "be at least 1"),
    ("tokens_per_batch data.buckets", lambda value: value >= 0, "not be negative"),
    ("min_snr max_minutes data.workers", lambda value: value >= 0, "not be negative"),
    ("data.workers", lambda value: value <= 256, "be at most 256"),
    ("drop_warmup snapshot_every codec.scale", lambda value: value >= 0, "not be negative"),
    ("upcycle.distill_steps upcycle.distill_weight", lambda value: value >= 0, "not be negative"),
    ("validation.every validation.items validation.samples", lambda value: value >= 0, "not be negative"),
    ("validation.samples", lambda value: value <= 10_000, "be at most 10000"),
    ("validation.guidance", lambda value: value >= 0, "not be negative"),
    ("spend.warmup", lambda value: value >= 0, "not be negative"),
    ("spend.rate", lambda value: 0 < value <= 1, "be in (0, 1]"),
    ("upcycle.output_share", lambda value: 0 <= value <= 1, "be in [0, 1]"),
    ("label_drop", lambda value: 0 <= value < 1, "be in [0, 1)"),
)

# The kind of run that reads a key of `spend`.
SPENT_BY = {
    **dict.fromkeys(("least", "most"), "sparse"),
    **dict.fromkeys(("rate", "warmup"), "dydit"),
    **dict.fromkeys(("patch", "scales"), "patches"),
}


GROUPS = {"model": DCDiTConfig, "data": DataConfig, "codec": CodecConfig, "optim": OptimConfig}
GROUPS |= {"upcycle": UpcycleConfig, "spend": SpendConfig, "validation": ValidationConfig}


def check_limits(config: Any, limits: tuple) -> None:
    """Raise ConfigError for the first key of a configuration that passes its limits, which are as LIMITS."""
    for names, fits, words in limits:
        for name in names.split():
            value = attrgetter(name)(config)
            if not fits(value):
                raise ConfigError(f"{name} must {words}, got {value}")


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0 at the last step (or constant)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if not optim.cosine:
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return optim.lr * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `dcdit train` reads. `batch_size` is the global one. In its place `tokens_per_batch` (0: not)
    takes as many items for each step as have so many latent cells together. `drop_fractions` are the ρ to draw from.

    `budgets` are shares of all cells to draw from in place of ρ: a step keeps exactly so many cells of its batch, the
    most probable ones, whichever their samples.

    `kind` is the model: sparse, dydit and patches are SparseDiT, DyDiT and PatchDiT of `model`'s backbone, at the cost
    that `spend` names, from the DiT of upcycle.source (`from` in YAML), which patches alone needs. `init` is a DC-DiT
    to start from; kind dydit makes a DyDCDiT of it. `snapshot_every` steps (0: never) the first EMA model is kept in
    OUTPUT/snapshots. `log_with` names trackers of accelerate. `time_shift` is of flow matching, `min_snr` of ddpm; see
    `dcdit.training.objectives`.

    Each process goes through its slice of the batch in `accumulate` parts. With `checkpointing` the backward computes
    the activations of each block again instead of keeping them. With `cuda_graph` the forward and backward of a step
    are replayed as CUDA graphs, see `dcdit.training.step_graphs`.
    """

    output: str = "runs/train"
    kind: Literal["dcdit", "sparse", "dydit", "patches"] = "dcdit"
    init: str = ""
    seed: int = 0
    steps: int = 400_000
    batch_size: int = 256
    tokens_per_batch: int = 0
    accumulate: int = 1
    checkpointing: bool = False
    objective: Literal["flow", "ddpm"] = "flow"
    model: DCDiTConfig = field(default_factory=lambda: preset("digits"))
    data: DataConfig = field(default_factory=DataConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    spend: SpendConfig = field(default_factory=SpendConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    time_shift: float = 1.0
    min_snr: float = 0.0
    label_drop: float = 0.1
    ratio_weight: float = 0.03
    drop_fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    budgets: tuple[float, ...] = ()
    drop_warmup: int = 5000
    precision: Literal["no", "bf16"] = "no"
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    log_every: int = 10
    save_every: int = 1000
    snapshot_every: int = 0
    max_minutes: float = 0.0
    log_with: tuple[str, ...] = ()

    given = frozenset[str]()  # keys that `load_config` read, with dots; no field

    def __post_init__(self) -> None:
        check_types(self)
        check_limits(self, LIMITS)
        for rho in self.drop_fractions:
            if not 0 <= rho < 1 - 2**-25:  # from there on float32 has 1
                raise ConfigError(f"drop_fractions must lie in [0, 1), got {rho}")
        for share in self.budgets:
            if not 0 < share <= 1:
                raise ConfigError(f"budgets are shares of the cells and must lie in (0, 1], got {share}")
        if self.budgets and self.drop_fractions != TrainConfig.drop_fractions:
            raise ConfigError("budgets and drop_fractions exclude each other: leave one of them out")
        if self.budgets and self.cuda_graph:
            raise ConfigError("cuda_graph is for drop_fractions: leave it out, or budgets")
        for decay in self.optim.ema_decay:
            if not 0 <= decay <= 1:
                raise ConfigError(f"optim.ema_decay must be in [0, 1], got {decay}")
        if not self.optim.ema_decay or len(set(self.optim.ema_decay)) < len(self.optim.ema_decay):
            raise ConfigError(f"optim.ema_decay needs one or several different values, got {self.optim.ema_decay}")
        if not self.output:
            raise ConfigError("output must be a folder, got an empty name")
        if self.init and self.upcycle.source:
            raise ConfigError("a run starts from init or from upcycle.source, not from both")
        for key in ("init", "cuda_graph", "compile", "checkpointing", "data.buckets", "budgets"):
            kinds = ("dcdit", "dydit") if key == "init" else ("dcdit",)
            if self.kind not in kinds and attrgetter(key)(self):
                raise ConfigError(f"{key} is of kind {' and '.join(kinds)}, this run has {self.kind}")
        for key, kind in SPENT_BY.items():
            if self.kind != kind and getattr(self.spend, key) != getattr(SpendConfig, key):
                raise ConfigError(f"spend.{key} is of kind {kind}, this run has {self.kind}")
        Density(self.spend.least, self.spend.most)
        if self.cuda_graph:
            for name, value in {"compile": self.compile, "checkpointing": self.checkpointing}.items():
                if value:
                    raise ConfigError(f"cuda_graph and {name} exclude each other: leave one of them out")
            if self.upcycle.source:
                raise ConfigError("cuda_graph is not for upcycling, whose loss changes with the step: leave it out")
        if self.data.buckets:
            if self.data.kind not in ("folder", "latents"):
                raise ConfigError(f"data.buckets is of data.kind=folder or latents, got {self.data.kind}")
            others = {"cuda_graph": self.cuda_graph, "compile": self.compile, "upcycle.source": self.upcycle.source}
            for name, value in others.items():
                if value:
                    raise ConfigError(f"data.buckets and {name} exclude each other: leave one of them out")
        if self.cuda_graph and self.tokens_per_batch:
            raise ConfigError("cuda_graph and tokens_per_batch exclude each other: leave one of them out")
        for name, asked in (
            ("router guess", self.model.router == "guess"),
            ("predict_clean", self.model.predict_clean),
        ):
            if asked and self.objective != "flow":
                raise ConfigError(f"{name} is for objective: flow, got {self.objective}")
        if self.model.router == "guess":
            for key in ("cuda_graph", "compile", "data.buckets"):
                if attrgetter(key)(self):
                    raise ConfigError(f"router guess and {key} exclude each other: leave one of them out")
        if not self.drop_fractions:
            raise ConfigError("drop_fractions needs at least one value; [0] trains without dropping")
        if self.data.kind != "digits" and not self.data.path:
            raise ConfigError(f"data.kind={self.data.kind} needs data.path")
        if self.data.kind == "latents" and self.codec.kind == "pixel_unshuffle":
            raise ConfigError(
                "data.kind=latents needs the autoencoder that made them, for sampling: "
                "codec.kind=autoencoder_kl codec.pretrained=…"
            )
        for key, of in (("time_shift", "flow"), ("min_snr", "ddpm")):
            if self.objective != of and getattr(self, key) != getattr(TrainConfig, key):
                raise ConfigError(f"{key} is of objective {of}, this run has {self.objective}")
        if self.objective == "flow" and self.model.learn_sigma:
            raise ConfigError("objective flow has no variance to learn: set model.learn_sigma=false or objective=ddpm")

    def to_dict(self) -> dict[str, Any]:
        """All values in JSON types."""
        values = dataclasses.asdict(self)
        return json.loads(json.dumps({**values, "model": self.model.to_dict()}))


def load_config(path: str | Path, overrides: list[str] = (), kind: type = TrainConfig) -> Any:
    """A YAML file under `key=value` overrides, dots for nesting, as a configuration of that kind.

    Raises ConfigError for unusable values.
    """
    import yaml

    check_kind(overrides, (list, tuple), "overrides", "such as ['steps=100']")
    try:
        values = _read_yaml(read_text(expanded(path))) or {}
    except FileNotFoundError as error:
        raise ConfigError(f"no config file {path}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder, expected a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found {type(values).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"expected key=value, got {override!r}")
        try:
            value = _read_value(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"cannot read the value of {override!r}") from error
        _assign(values, key.split("."), value)
    if "from" in values:
        _assign(values, ["upcycle", "source"] if kind is TrainConfig else ["source"], values.pop("from"))
    config = _build(kind, values, "")
    object.__setattr__(config, "given", frozenset(_names(values, "")))
    return config


def _names(values: dict[str, Any], prefix: str) -> Iterator[str]:
    """The keys of nested mappings, with dots."""
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")


def _read_yaml(text: str) -> Any:
    """Plain YAML; a key that stands twice in one mapping is refused, where PyYAML takes the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"the key {twice} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)  # a SafeLoader: plain values only


def _read_value(text: str) -> Any:
    """The value of key=value: YAML, but without comments, so that #808080 is a text."""
    import yaml

    if any("\udc80" <= letter <= "\udcff" for letter in text):
        return text  # a path in letters that the locale does not have, which YAML would refuse
    *_, last, _ = yaml.scan(text)  # then the end of the stream
    return text if text[last.end_mark.index :].strip() else _read_yaml(text)


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key} is not a group of keys")
    values[keys[-1]] = value


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls) | ({"preset": str} if cls is DCDiTConfig else {})
    for key in values:
        groups = [name for name, hint in hints.items() if key in getattr(hint, "__dataclass_fields__", ())]
        if key not in hints and groups:
            raise ConfigError(f"unknown config key {key!r}; did you mean '{groups[0]}.{key}'?")
    check_keys(values, hints, (prefix or "config").rstrip("."))
    given = {key: _convert(hints[key], value, prefix + key) for key, value in values.items()}
    return cls.from_dict(given) if cls is DCDiTConfig else cls(**given)


def check_types(config: Any, prefix: str = "") -> None:
    """Fields of a configuration as its types say, also where it was made in Python. Raises ConfigError."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not dataclasses.is_dataclass(hint):
            object.__setattr__(config, name, _convert(hint, value, prefix + name))
            continue
        check_kind(value, hint, prefix + name)
        if hint is not DCDiTConfig:  # which looks after itself
            check_types(value, f"{prefix}{name}.")


def _convert(hint: Any, value: Any, name: str, others: str = "") -> Any:
    """`value` as the type that the field has. YAML reads 1e-3 as text and 4 as an integer; both are fine floats.
    `others` is what else the field takes."""
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
        # One value stands for a list of it, a size for both sides.
        single = isinstance(value, int | float | str)
        items = [value] * (1 if Ellipsis in args else len(args)) if single else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        if Ellipsis not in args and len(items) != len(args):
            raise ConfigError(f"{name} must be a list of {len(args)}, got {value!r}")
        others = f" or a list of {'them' if Ellipsis in args else len(args)}" if single else ""
        return tuple(_convert(args[0], item, name, others) for item in items)
    if hint is float and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is hint:
        if hint is float and not math.isfinite(value):
            raise ConfigError(f"{name} must be finite, got {value}")
        return value
    kinds = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{name} must be {kinds[hint]}{others}, got {value!r}")
