"""Sizes of DiTs that spend less than a plain one: SparseDiT's, DyDiT's and PatchDiT's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .config import check_keys


@dataclass(frozen=True)
class DiTConfig:
    """The fields of all DiTs. The defaults are DiT-S/2 at 256 px, but for the blocks.

    `input_size` is the latent grid (H, W), a token is `patch`×`patch` cells of it. Raises ConfigError when the sizes do
    not fit together.
    """

    input_size: tuple[int, int] = (32, 32)
    patch: int = 2
    in_channels: int = 4
    num_classes: int = 1000
    hidden_size: int = 384
    num_heads: int = 6
    mlp_ratio: float = 4.0
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", pair("input_size", self.input_size))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("pooling", "groups", "sparse", "dense", "top") else 1
            if field.type == "int" and (type(value) is not int or value < least):
                raise ConfigError(f"{field.name} must be an integer of {least} or more, got {value!r}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads, {self.num_heads}, and of 4, got {self.hidden_size}"
            )
        if any(side % self.patch for side in self.input_size):
            raise ConfigError(f"input_size must be a multiple of patch, {self.patch}, got {self.input_size}")
        if not self.hidden_size * self.mlp_ratio >= 1:
            raise ConfigError(f"mlp_ratio must be positive, got {self.mlp_ratio}")

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens in a column and in a row."""
        return self.input_size[0] // self.patch, self.input_size[1] // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return self.grid[0] * self.grid[1]

    @property
    def cells(self) -> int:
        """Tokens; a model without a router keeps all."""
        return self.tokens

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: 2C with a learned variance, else C."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """Build from a dict. Unknown keys raise ConfigError."""
        check_keys(values, [field.name for field in dataclasses.fields(cls)], "model")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, in JSON types."""
        return {key: list(value) if type(value) is tuple else value for key, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class SparseDiTConfig(DiTConfig):
    """Sizes of a SparseDiT: `pooling` blocks, `groups` of one generating, `sparse` sparse, one recovering and `dense`
    dense blocks, and `top` dense ones. The sparse grid is `sparse_size` (h, w), where a forward names no other."""

    pooling: int = 2
    groups: int = 1
    sparse: int = 3
    dense: int = 1
    top: int = 2
    sparse_size: tuple[int, int] = (8, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sparse_size", fitting_size(self.sparse_size, self.grid))

    @property
    def depth(self) -> int:
        """Blocks of all kinds."""
        return self.pooling + self.groups * (2 + self.sparse + self.dense) + self.top


@dataclass(frozen=True)
class DyDiTConfig(DiTConfig):
    """Sizes of a DyDiT of `depth` blocks; the MLP has as many groups of channels as there are heads."""

    depth: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        if int(self.hidden_size * self.mlp_ratio) % self.num_heads or self.hidden_size < 16:
            raise ConfigError(
                f"the MLP's {int(self.hidden_size * self.mlp_ratio)} channels must be a multiple of num_heads, "
                f"{self.num_heads}, and hidden_size at least 16, got {self.hidden_size}"
            )


@dataclass(frozen=True)
class PatchDiTConfig(DiTConfig):
    """Sizes of a PatchDiT of `depth` blocks: patches of `patch` times each of `scales`, 1 first and out of 1, 2 and 4,
    and the `rank` of the additions to the feed-forward layers."""

    depth: int = 12
    scales: tuple[int, ...] = (1, 2, 4)
    rank: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        scales = tuple(self.scales) if isinstance(self.scales, tuple | list) else ()
        if scales not in ((1,), (1, 2), (1, 4), (1, 2, 4)):
            raise ConfigError(f"scales must be 1 and then 2, 4 or both, got {self.scales!r}")
        object.__setattr__(self, "scales", scales)
        for scale in scales:
            if any(side % scale for side in self.grid):
                raise ConfigError(
                    f"scale {scale}: patches of {scale * self.patch} cells do not fill the grid {self.input_size}"
                )


def pair(name: str, size: Any) -> tuple[int, int]:
    """Two positive integers (h, w); one stands for both. Raises ConfigError."""
    sides = (size, size) if type(size) is int else size
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(type(n) is int and n >= 1 for n in sides):
        raise ConfigError(f"{name} must be one or two positive integers (H, W), got {size!r}")
    return sides[0], sides[1]


def fitting_size(size: Any, grid: tuple[int, int]) -> tuple[int, int]:
    """A sparse grid (h, w) of at most `grid`; one integer stands for both sides. Raises ConfigError."""
    sides = pair("sparse_size", size)
    if sides[0] > grid[0] or sides[1] > grid[1]:
        raise ConfigError(f"sparse_size must be at most the grid of tokens, {grid}, got {sides}")
    return sides
