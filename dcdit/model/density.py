"""How many tokens a SparseDiT keeps at a timestep."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

T = 1000.0


@dataclass(frozen=True)
class Density:
    """The share of tokens that the sparse blocks leave out: `least` for t < T/4, then linear up to `most` at t = T.

    T = 1000 is noise (arXiv 2412.06028). Raises ConfigError where not 0 ≤ least ≤ most < 1.
    """

    least: float
    most: float

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most < 1:
            raise ConfigError(f"density needs 0 <= least <= most < 1, got {self.least} and {self.most}")

    def left_out(self, t: float) -> float:
        """1 − M/N wished for at t in [0, 1000]."""
        return self.least + (self.most - self.least) * max(0.0, (t / T - 0.25) / 0.75)

    def size(self, t: float, grid: tuple[int, int]) -> tuple[int, int]:
        """The sparse grid (h, w) at t with the sides nearest to the wished ones, in a `grid` of tokens."""
        side = (1 - self.left_out(t)) ** 0.5
        return max(1, round(grid[0] * side)), max(1, round(grid[1] * side))
