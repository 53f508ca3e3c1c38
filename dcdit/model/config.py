"""Model configuration and the presets of the paper (arXiv 2603.06351)."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

ROUTERS = ("predictability", "cosine", "guess")


@dataclass(frozen=True)
class DCDiTConfig:
    """Sizes of a DC-DiT. The defaults are DC-DiT-S/N4 at 256 px.

    `input_size` is the latent grid (H, W), `target_ratio` is N: about 1/N of the cells are kept. `cond_norm` puts a
    LayerNorm on the conditioning of encoder and decoder, for upcycled models. `norm_groups` are groups of GroupNorms in
    encoder and decoder: `encoder_width` should be at least twice as many, or each group has one channel and takes away
    the time and class just added to it. The paper's `encoder_stride` is 1; 2 runs encoder and decoder on blocks of 2×2
    cells, at a fifth of their FLOPs. With `segment_mean` a token is the mean of the cells that it will refill; the
    paper's is its own cell. With `mean_positions` besides, a token's position is the mean of theirs, which says where
    they are and how far apart. `keep_grid` k > 0 keeps every k-th cell of every k-th row besides the router's; they
    count towards 1/N. `direct_init` starts the stem with its centre tap alone and the residual path as the identity, so
    that cells reach the decoder from the first step; the paper's start with nine taps and zeros. With `predict_clean`
    the last layer makes clean latents, and the model returns the velocity to them, for flow matching; the paper's makes
    the noise or velocity itself. `router` is the paper's "predictability" (v2) or "cosine" (v1), or "guess": the cells
    with most contrast in the model's own guess of the clean latents, without parameters, for flow matching and an N
    that is a square.
    Raises ConfigError when the sizes do not fit together.
    """

    input_size: tuple[int, int] = (32, 32)
    in_channels: int = 4
    num_classes: int = 1000
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    encoder_width: int = 96
    encoder_stride: int = 1
    norm_groups: int = 32
    mlp_ratio: float = 4.0
    target_ratio: float = 4.0
    router: str = "predictability"
    sigma: float = 1.0
    learn_sigma: bool = True
    cond_norm: bool = False
    segment_mean: bool = False
    mean_positions: bool = False
    keep_grid: int = 0
    direct_init: bool = False
    predict_clean: bool = False

    def __post_init__(self) -> None:
        size = self.input_size
        if isinstance(size, int):
            size = (size, size)
        if not isinstance(size, tuple | list) or len(size) != 2 or not all(isinstance(n, int) and n >= 1 for n in size):
            raise ConfigError(f"input_size must be two positive integers (H, W), got {size!r}")
        object.__setattr__(self, "input_size", tuple(size))
        for name in (
            "in_channels",
            "num_classes",
            "hidden_size",
            "depth",
            "num_heads",
            "encoder_width",
            "encoder_stride",
            "norm_groups",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
            if value >= 2**31:
                raise ConfigError(f"{name} must be less than 2**31, got {value}")
        if not isinstance(self.keep_grid, int) or self.keep_grid < 0:
            raise ConfigError(f"keep_grid must be an integer of at least 0, got {self.keep_grid!r}")
        for name in ("mlp_ratio", "target_ratio", "sigma"):
            if not isinstance(getattr(self, name), int | float):
                raise ConfigError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("learn_sigma", "cond_norm", "segment_mean", "mean_positions", "direct_init", "predict_clean"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.mean_positions and not self.segment_mean:
            raise ConfigError("mean_positions needs segment_mean: true")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 32 or self.encoder_width % 32:
            raise ConfigError(
                "hidden_size and encoder_width must be multiples of 32 (GroupNorm groups), "
                f"got {self.hidden_size} and {self.encoder_width}"
            )
        if math.gcd(self.hidden_size, self.encoder_width) % self.norm_groups:
            raise ConfigError(
                f"hidden_size and encoder_width must be multiples of norm_groups {self.norm_groups}, "
                f"got {self.hidden_size} and {self.encoder_width}"
            )
        if any(side % self.encoder_stride for side in self.input_size):
            raise ConfigError(
                f"input_size must be a multiple of encoder_stride {self.encoder_stride}, got {self.input_size}"
            )
        if self.router not in ROUTERS:
            raise ConfigError(f"router must be one of {ROUTERS}, got {self.router!r}")
        for name, asked in (("router guess", self.router == "guess"), ("predict_clean", self.predict_clean)):
            if asked and self.learn_sigma:
                raise ConfigError(f"{name} is for flow matching: set learn_sigma to false")
        if not 1 <= self.hidden_size * self.mlp_ratio < math.inf:
            raise ConfigError(
                f"mlp_ratio must be finite and at least 1/hidden_size = 1/{self.hidden_size}, got {self.mlp_ratio}"
            )
        if not 1 < self.target_ratio < math.inf:
            raise ConfigError(f"target_ratio N must be greater than 1 and finite, got {self.target_ratio}")
        if self.router == "guess" and math.isqrt(int(self.target_ratio)) ** 2 != self.target_ratio:
            raise ConfigError(f"router guess needs a target_ratio N that is a square, got {self.target_ratio:g}")
        if not 0 < self.sigma < math.inf:
            raise ConfigError(f"sigma must be positive and finite, got {self.sigma}")

    @property
    def cells(self) -> int:
        """Cells of the latent grid, H·W."""
        return math.prod(self.input_size)

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: 2C with a learned variance, else C."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DCDiTConfig:
        """Build from a dict; an optional key `preset` is the starting point. Unknown keys raise ConfigError."""
        values = dict(values)
        base = preset(values.pop("preset")) if "preset" in values else cls()
        check_keys(values, [f.name for f in dataclasses.fields(cls)], "model")
        return dataclasses.replace(base, **values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, in JSON types."""
        return {**dataclasses.asdict(self), "input_size": list(self.input_size)}


def _presets() -> dict[str, DCDiTConfig]:
    layouts = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
    presets = {}
    for size, (depth, width, heads) in layouts.items():
        for ratio in (4, 16):
            for suffix, side in (("", 32), ("-512", 64)):
                presets[f"DC-DiT-{size}/N{ratio}{suffix}"] = DCDiTConfig(
                    input_size=(side, side),
                    hidden_size=width,
                    depth=depth,
                    num_heads=heads,
                    encoder_width=width // 4,
                    target_ratio=float(ratio),
                )
    # 28×28 digits, unshuffled 2×2 pixels to a 14×14 grid of 4 channels.
    presets["digits"] = DCDiTConfig(
        input_size=(14, 14),
        num_classes=10,
        hidden_size=96,
        depth=6,
        num_heads=3,
        encoder_width=32,
        learn_sigma=False,
    )
    # Three changes that lower the loss on Fashion-MNIST; on the digits they do not (docs/quality.md).
    presets["digits-best"] = dataclasses.replace(presets["digits"], segment_mean=True, keep_grid=4, norm_groups=8)
    return presets


PRESETS = _presets()


def preset(name: str) -> DCDiTConfig:
    """A preset by name: DC-DiT-{S,B,L,XL}/N{4,16} at 256 px, with -512 at 512 px, digits and digits-best."""
    check_keys([name], PRESETS, "preset")
    return PRESETS[name]


def preset_of_size(name: str) -> str | None:
    """The preset of the backbone that a name such as DiT-XL/2 or DC-DiT-S/N4 means, None for names of other forms."""
    match = re.fullmatch(r"[\w-]*it-(s|b|l|xl)(/[\w-]*)?", name, re.ASCII | re.IGNORECASE)
    return match and f"DC-DiT-{match[1].upper()}/N4"


def check_keys(given, known, what: str) -> None:
    """Raise ConfigError for the first of `given` that is not in `known`, naming the nearest known one."""
    known = list(known)
    for key in given:
        if key not in known:
            names = {name.lower(): name for name in known}
            near, sure = (difflib.get_close_matches(str(key).lower(), names, n=1, cutoff=c) for c in (0.65, 0.8))
            near = near or [name for name in names if sorted(name) == sorted(str(key).lower())]  # lr for rl
            hints = [f"did you mean {names[near[0]]!r}?"] if near else []
            if not sure or len(known) <= 8:  # another may have been meant
                more = f" and {len(known) - 40} more" if len(known) > 40 else ""  # of a thousand classes
                hints.append(f"known: {', '.join(known[:40])}{more}")
            raise ConfigError(f"unknown {what} {'name' if what == 'preset' else 'key'} {key!r}; {' '.join(hints)}")
