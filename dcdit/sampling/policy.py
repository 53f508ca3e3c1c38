"""How a sampling step costs less, as text: "density=0.5:0.75", "reuse=2", "teacache=0.15", joined by &."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..model.config import check_keys
from ..model.density import Density
from ..model.dydit import DyDiT
from ..model.dydit_main import DyDCDiT
from ..model.graphs import Graphed
from ..model.patch_dit import PatchDiT
from ..model.plain_dit import PlainDiT
from ..model.sparse_dit import SparseDiT
from .paced import GatedModel, GridModel, RoutingReuse, TeaCache
from .patches import PatchChoice


@dataclass(frozen=True)
class Policy:
    """How each step of sampling costs less. None leaves a part out; policies of different parts are joined by `&`.

    - `density`: the sparse grid of a SparseDiT over t.
    - `reuse`: the router of a DCDiT is asked at every so many steps.
    - `teacache`: the change of the input, relative, below which a sample's last prediction is given again.
    - `patches`: τ of a PatchDiT, under which a patch of the latents' third difference counts as smooth.
    """

    density: Density | None = None
    patches: float | None = None
    reuse: int | None = None
    teacache: float | None = None

    @classmethod
    def of(cls, policy: Policy | str | None) -> Policy:
        """From text such as "reuse=2 & teacache=0.15", parts apart by & or ;. Raises ConfigError."""
        if policy is None or isinstance(policy, Policy):
            return policy or cls()
        joined = cls()
        for part in filter(None, (part.strip() for part in policy.replace(";", "&").split("&"))):
            name, _, value = (text.strip() for text in part.partition("="))
            check_keys([name], _READERS, "policy")
            try:
                read = _READERS[name](value)
            except ConfigError:
                raise
            except ValueError as error:
                raise ConfigError(f"policy {name} must look like {_EXAMPLES[name]}, got {part!r}") from error
            joined &= cls(**{name: read})
        return joined

    def __and__(self, other: Policy) -> Policy:
        mine, theirs = self._parts(), other._parts()
        twice = mine.keys() & theirs.keys()
        if twice:
            raise ConfigError(f"a policy has {twice.pop()} once, got it twice: {self} and {other}")
        return Policy(**mine, **theirs)

    def __str__(self) -> str:
        parts = self._parts()
        if self.density is not None:
            parts["density"] = f"{self.density.least:g}:{self.density.most:g}"
        return " & ".join(f"{name}={value}" for name, value in parts.items())

    def wrap(self, model: Any) -> Any:
        """The model as the sampler calls it. Raises ConfigError for a part that the model lacks."""
        if isinstance(model, Graphed) and self._parts():
            raise ConfigError(f"a policy and CUDA graphs exclude each other, got {self}")
        if self.density is not None and not isinstance(model, SparseDiT):
            raise ConfigError(f"density is of a SparseDiT, this model is a {type(model).__name__}")
        if self.patches is not None:
            model = PatchChoice(model, self.patches)
        elif type(model) in (PlainDiT, SparseDiT, DyDiT, PatchDiT):  # a subclass may answer with a routing itself
            model = GridModel(model, self.density)
        if isinstance(model, DyDCDiT):
            model = GatedModel(model)
        if self.reuse is not None:
            model = RoutingReuse(model, self.reuse)
        return model if self.teacache is None else TeaCache(model, self.teacache)

    def _parts(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def _density(text: str) -> Density:
    least, _, most = text.partition(":")
    return Density(float(least), float(most or least))


_READERS = {"density": _density, "patches": float, "reuse": int, "teacache": float}
_EXAMPLES = {
    "density": "density=0.5:0.75",
    "patches": "patches=0.02",
    "reuse": "reuse=2",
    "teacache": "teacache=0.15",
}
