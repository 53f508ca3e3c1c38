"""What a sampling step may spend, as text: "budget=64:32", "density=0.5:0.75", "teacache=0.15", joined by &."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..model.config import check_keys
from ..model.density import Density
from ..model.dydit import DyDiT
from ..model.dydit_main import DyDCDiT
from ..model.graphs import Graphed
from ..model.guess_router import takes_guess
from ..model.patch_dit import PatchDiT
from ..model.plain_dit import PlainDiT
from ..model.sparse_dit import SparseDiT
from .paced import GatedModel, GridModel, Paced, RoutingReuse, TeaCache, innermost
from .patches import PatchChoice
from .schedulers import TRAIN_STEPS


class Ramp(NamedTuple):
    """A number that depends on the timestep: `data` at t = 0, `noise` at t = 1000, and on the line between."""

    data: float
    noise: float

    def at(self, t: float) -> float:
        """The number at t."""
        return self.data + (self.noise - self.data) * t / TRAIN_STEPS


@dataclass(frozen=True)
class Policy:
    """What each step of sampling may spend. None leaves a part out; policies of different parts are joined by `&`.

    - `rho`: the drop fraction of a model with a router.
    - `budget`: in its place the tokens of an image in each half of a step, exactly so many.
    - `guidance`: the timesteps, low and high, between which guidance is applied.
    - `grid`: the share of the full grid's sides, and the timestep above which a DC-DiT's steps have it.
    - `density`: the sparse grid of a SparseDiT over t.
    - `patches`: τ of a PatchDiT, under which a patch of the latents' third difference counts as smooth.
    - `gates`: the share λ of a DyDiT's heads and channel groups that are on; at 1 all gates are left out.
    - `reuse`: the router of a DCDiT is asked at every so many steps.
    - `teacache`: the change of the input, relative, below which a sample's last prediction is given again.
    """

    rho: Ramp | None = None
    budget: Ramp | None = None
    guidance: tuple[float, float] | None = None
    grid: tuple[float, float] | None = None
    density: Density | None = None
    patches: float | None = None
    gates: float | None = None
    reuse: int | None = None
    teacache: float | None = None

    def __post_init__(self) -> None:
        for name, value in self._parts().items():
            numbers = value if isinstance(value, tuple) else ()
            if not isinstance(value, _PARTS[name][2]) or not all(isinstance(number, Real) for number in numbers):
                raise ConfigError(
                    f"{name} of a policy must be as Policy.of reads {name}={_PARTS[name][1]}, got {value!r}"
                )
        if self.rho is not None and self.budget is not None:
            raise ConfigError(f"rho and budget exclude each other, got {self}")
        if self.rho is not None and not all(0 <= value < 1 for value in self.rho):
            raise ConfigError(f"rho must be in [0, 1), got {_text(self.rho)}")
        if self.budget is not None and not all(1 <= value < 2**31 and value % 1 == 0 for value in self.budget):
            raise ConfigError(f"budget must be whole numbers of tokens, at least 1, got {_text(self.budget)}")
        if self.guidance is not None and not 0 <= self.guidance[0] <= self.guidance[1] <= TRAIN_STEPS:
            raise ConfigError(f"guidance must be timesteps 0 <= low <= high <= 1000, got {_text(self.guidance)}")
        if self.grid is not None and not (0 < self.grid[0] < 1 and 0 < self.grid[1] < TRAIN_STEPS):
            raise ConfigError(f"grid must be a share in (0, 1) and a timestep in (0, 1000), got {_text(self.grid)}")
        if self.gates is not None and not 0 < self.gates <= 1:
            raise ConfigError(f"gates must be a share in (0, 1], got {self.gates}")

    @classmethod
    def of(cls, policy: Policy | str | None) -> Policy:
        """From text such as "reuse=2 & teacache=0.15", parts apart by & or ;. Raises ConfigError."""
        if policy is None or isinstance(policy, Policy):
            return policy or cls()
        if not isinstance(policy, str):
            raise ConfigError(f"a policy must be a Policy or text such as reuse=2 & teacache=0.15, got {policy!r}")
        joined = cls()
        for part in filter(None, (part.strip() for part in policy.replace(";", "&").split("&"))):
            name, _, value = (text.strip() for text in part.partition("="))
            check_keys([name], _PARTS, "policy")
            try:
                read = _PARTS[name][0](value)
            except ConfigError:
                raise
            except ValueError as error:
                if "=" in value:
                    raise ConfigError(f"parts of a policy are joined by & or ;, got {part!r}") from error
                raise ConfigError(f"policy {name} must look like {name}={_PARTS[name][1]}, got {part!r}") from error
            joined &= cls(**{name: read})
        return joined

    def __and__(self, other: Policy) -> Policy:
        if not isinstance(other, Policy):
            return NotImplemented
        mine, theirs = self._parts(), other._parts()
        twice = mine.keys() & theirs.keys()
        if twice:
            raise ConfigError(f"a policy has {twice.pop()} once, got it twice: {self} and {other}")
        return Policy(**mine, **theirs)

    def __str__(self) -> str:
        return " & ".join(f"{name}={_text(value)}" for name, value in self._parts().items())

    def spending(
        self, drop_fraction: Any, tokens: Any, guidance_interval: tuple[float, float]
    ) -> tuple[Any, Any, tuple[float, float]]:
        """These arguments of `sample` with the policy's own in their place. Raises ConfigError where both say one."""
        plain = isinstance(drop_fraction, float | int) and drop_fraction == 0
        for name, free in (
            ("rho", plain),
            ("budget", tokens is None),
            ("guidance", guidance_interval in ((0, TRAIN_STEPS), [0, TRAIN_STEPS])),
        ):
            if getattr(self, name) is not None and not free:
                raise ConfigError(f"the policy has {name} already, {self}: leave one of them out")
        rho, budget = self.rho, self.budget
        drop_fraction = drop_fraction if rho is None else rho.at
        tokens = tokens if budget is None else lambda t: round(budget.at(t))
        return drop_fraction, tokens, guidance_interval if self.guidance is None else self.guidance

    def wrap(self, model: Any) -> Any:
        """The model as the sampler calls it. Raises ConfigError for a part that the model lacks."""
        if isinstance(model, Graphed) and self._parts().keys() - {"rho", "budget", "guidance", "grid"}:
            raise ConfigError(f"CUDA graphs take rho, budget, guidance and grid of a policy, got {self}")
        if self.gates is not None and not isinstance(model, DyDiT | DyDCDiT):
            raise ConfigError(f"gates are of a DyDiT, this model is a {type(model).__name__}")
        if self.density is not None and not isinstance(model, SparseDiT):
            raise ConfigError(f"density is of a SparseDiT, this model is a {type(model).__name__}")
        routerless = type(model) in (
            PlainDiT,
            SparseDiT,
            DyDiT,
            PatchDiT,
        )  # a subclass may answer with a routing itself
        if self.rho is not None and routerless:
            raise ConfigError(f"rho is of a model with a router, this one is a {type(model).__name__}")
        if self.patches is not None:
            model = PatchChoice(model, self.patches)
        elif routerless:
            model = GridModel(model, self.density, self.gates)
        if isinstance(model, DyDCDiT):
            model = GatedModel(model, self.gates)
        if self.reuse is not None:
            model = RoutingReuse(model, self.reuse)
        if self.teacache is not None:
            model = TeaCache(model, self.teacache)
        if isinstance(model, Paced) and takes_guess(innermost(model)):
            raise ConfigError(f"router guess runs without gates, reuse and teacache, got {self}")
        return model

    def _parts(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, Density):
        value = value.least, value.most
    if not isinstance(value, tuple):
        return str(value)
    return ":".join(
        f"{number:g}" for number in (value[:1] if isinstance(value, Ramp) and value[0] == value[1] else value)
    )


def _two(text: str) -> tuple[float, float]:
    first, _, second = text.partition(":")
    return float(first), float(second or first)


def _pair(text: str) -> tuple[float, float]:
    """As `_two`, where one number for both has no meaning."""
    first, second = text.split(":")
    return float(first), float(second)


# How a part's value is read, an example, and its type.
_PARTS: dict[str, tuple[Callable[[str], Any], str, Any]] = {
    "rho": (lambda text: Ramp(*_two(text)), "0.2:0.6", Ramp),
    "budget": (lambda text: Ramp(*_two(text)), "64:32", Ramp),
    "guidance": (_pair, "200:800", tuple),
    "grid": (_pair, "0.5:700", tuple),
    "density": (lambda text: Density(*_two(text)), "0.5:0.75", Density),
    "patches": (float, "0.02", Real),
    "gates": (float, "0.5", Real),
    "reuse": (int, "2", Real),
    "teacache": (float, "0.15", Real),
}
