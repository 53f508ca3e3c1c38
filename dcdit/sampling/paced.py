"""Models as the sampler calls them, and wrappers by which a step costs less: density, a kept routing, TeaCache.

Each is called as a DCDiT with return_routing, has `begin(timesteps)` for the start of a batch and `observe(x)` for that
of a step, and says by `spent` (B,) how many tokens each sample of the last call cost; 0 where nothing was computed.
`decided` has numbers or (B,) for a table of decisions. `rows` names the rows of the batch that a call holds, where it
does not hold all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dcdit_kernels import adaln_modulate

from ..errors import ConfigError
from ..model.dcdit import DCDiT
from ..model.density import Density
from ..model.dit_shell import DiTShell
from ..model.dydit import DyDiT
from ..model.gated_macs import gated_tokens, main_rates
from ..model.rival_macs import gate_rates
from ..model.routing import Routing, regular_cells
from ..model.sparse_dit import SparseDiT

Answer = tuple[torch.Tensor, Routing]


class Paced(nn.Module):
    """A model, passed through."""

    spent: torch.Tensor
    decided: dict[str, float | torch.Tensor]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def begin(self, timesteps: torch.Tensor) -> None:
        """A batch starts on its way through `timesteps` (S,)."""
        if isinstance(self.model, Paced):
            self.model.begin(timesteps)

    def observe(self, x: torch.Tensor) -> None:
        """The latents x (B, C, H, W) of the batch's next step, each image once."""
        if isinstance(self.model, Paced):
            self.model.observe(x)

    def ask(self, x, t, y, drop_fraction, rows: torch.Tensor | None, **options: Any) -> Answer:
        """The wrapped model's answer."""
        if isinstance(self.model, Paced):
            options["rows"] = rows
        out, routing = self.model(x, t, y, drop_fraction, return_routing=True, **options)
        inner = isinstance(self.model, Paced)
        self.spent = self.model.spent if inner else routing.plan.lengths
        self.decided = dict(self.model.decided) if inner else {}
        return out, routing

    def refuse(self, drop_fraction: Any, budget: dict[str, Any]) -> None:
        """Raise ConfigError where ρ or a budget is asked of a model without a router."""
        if budget or torch.as_tensor(drop_fraction).any():
            name = "budget" if budget else "drop_fraction"
            raise ConfigError(f"{name} is of a model with a router, this one is a {type(self.model).__name__}")


class GridModel(Paced):
    """A model without a router: a PlainDiT, a SparseDiT at a Density over t, a DyDiT tabulated over the timesteps.

    It answers with a Routing of all its tokens. A DyDiT's `spent` are all tokens times the share of its products.
    """

    def __init__(self, model: nn.Module, density: Density | None = None, gates: float | None = None) -> None:
        super().__init__(model)
        self.density, self.gates, self.table = density, gates, None

    def begin(self, timesteps: torch.Tensor) -> None:
        if isinstance(self.model, DyDiT):
            self.table = self.model.tabulate(timesteps, self.gates)

    def forward(self, x, t, y, drop_fraction=0.0, return_routing: bool = True, rows=None, **budget: Any) -> Answer:
        self.refuse(drop_fraction, budget)
        grid, rate, self.decided = self.model.grid, torch.ones(len(x)), {}
        if isinstance(self.model, SparseDiT):
            grid = self.config.sparse_size if self.density is None else self.density.size(float(t[0]), grid)
            out = self.model(x, t, y, grid)
            self.decided["density"] = 1 - grid[0] * grid[1] / self.config.tokens
        elif self.table is not None:
            out, gates = self.table(x, t, y, return_gates=True)
            sizes = self.config.tokens, self.config.hidden_size, self.config.mlp_ratio
            rate = gate_rates(gates, *sizes)
            self.decided["gates"] = rate
        else:
            out = self.model(x, t, y)
        self.spent = rate.cpu() * (grid[0] * grid[1])
        return out, Routing.of(torch.ones(len(x), len(self.model.pos_embed), device=x.device), self.model.grid)


class GatedModel(Paced):
    """A DyDCDiT, tabulated over the timesteps of a batch; `spent` are the tokens that cost as much without gates."""

    def __init__(self, model: nn.Module, gates: float | None = None) -> None:
        super().__init__(model)
        self.gates = gates

    def begin(self, timesteps: torch.Tensor) -> None:
        self.table = self.model.tabulate(timesteps, self.gates)

    def forward(self, x, t, y, drop_fraction=0.0, return_routing: bool = True, rows=None, **options: Any) -> Answer:
        out, routing = self.table(x, t, y, drop_fraction, return_routing=True, **options)
        lengths = routing.plan.lengths
        rates = main_rates(self.model.main.decided, routing.plan, self.config)
        self.spent, self.decided = gated_tokens(self.config, lengths, rates), {"kept": lengths, "gates": rates}
        return out, routing


class RoutingReuse(Paced):
    """A DCDiT that asks its router at every `every`-th step, and keeps the probabilities between."""

    def __init__(self, model: nn.Module, every: int) -> None:
        super().__init__(model)
        if not isinstance(innermost(model), DCDiT):
            raise ConfigError(f"reuse is of a model with a router, this one is a {type(innermost(model)).__name__}")
        if type(every) is not int or every < 1:
            raise ConfigError(f"reuse must be an integer of 1 or more, got {every!r}")
        self.every = every

    def begin(self, timesteps: torch.Tensor) -> None:
        super().begin(timesteps)
        self.prob: torch.Tensor | None = None
        self.fresh = {float(t) for t in timesteps[:: self.every]}

    def forward(self, x, t, y, drop_fraction=0.0, return_routing: bool = True, rows=None, **budget: Any) -> Answer:
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        if self.prob is not None and self.prob.shape[1] != x.shape[2] * x.shape[3]:
            self.prob = None  # of another grid
        known = self.prob is not None and int(rows.max()) < len(self.prob) and bool(self.prob[rows].isfinite().all())
        if not known or float(t[0]) in self.fresh:
            out, routing = self.ask(x, t, y, drop_fraction, rows, **budget)
            self.prob = stored(self.prob, rows, routing.boundary_prob)
            self.decided["router"] = 1
            return out, routing
        grid, stride = tuple(x.shape[2:]), self.config.keep_grid
        kept = {"keep": regular_cells(grid, stride, x.device).expand(len(x), -1)} if stride else {}
        routing = Routing.of(self.prob[rows], grid, drop_fraction, **kept, **budget)
        out, routing = self.ask(x, t, y, 0.0, rows, routing=routing)
        self.decided["router"] = 0
        return out, routing


class TeaCache(Paced):
    """A model that is run for a sample when its input has changed enough since, else its last answer is given again.

    `signal` changes from step to step, relative in L1 norm; the change adds up until it reaches `threshold`
    (TeaCache, arXiv 2411.19108, without its fitted polynomial). The first and the last step are always computed, and
    all of them at threshold 0. Each sample decides for itself, so that its picture does not depend on its batch.
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        super().__init__(model)
        if not 0 <= threshold < float("inf"):
            raise ConfigError(f"teacache must be a number of at least 0, got {threshold!r}")
        self.threshold = threshold

    def begin(self, timesteps: torch.Tensor) -> None:
        super().begin(timesteps)
        self.last, self.before = float(timesteps[-1]), None
        self.out = self.prob = None

    def forward(self, x, t, y, drop_fraction=0.0, return_routing: bool = True, rows=None, **budget: Any) -> Answer:
        if self.out is not None and self.out.shape[2:] != x.shape[2:]:
            self.before = self.out = self.prob = None  # of another grid
        due = self._due(signal(self.model, x, t, y), float(t[0]))
        if due.all():
            out, routing = self.ask(x, t, y, drop_fraction, None, **budget)
            self.out, self.prob, self.grid = out, routing.boundary_prob, routing.plan.grid
            self.decided["computed"] = 1
            return out, routing
        rows = due.nonzero().squeeze(1)
        spent, self.decided = torch.zeros(len(x)), {}
        if len(rows):
            some, own = rows_of(drop_fraction, rows), {name: rows_of(value, rows) for name, value in budget.items()}
            if isinstance(own.get("budget_per_sample"), torch.Tensor):
                own["capacity"] = int(own["budget_per_sample"].sum())
            out, routing = self.ask(x[rows], t[rows], y[rows], some, rows, **own)
            spent[rows.cpu()] = self.spent.cpu().float()
            self.out, self.prob = stored(self.out, rows, out), stored(self.prob, rows, routing.boundary_prob)
            for name, value in self.decided.items():
                whole = torch.full((len(x),), torch.nan)
                whole[rows.cpu()] = torch.as_tensor(value, dtype=torch.float32).cpu()
                self.decided[name] = whole
        self.spent, self.decided["computed"] = spent, due
        return self.out[: len(x)], Routing.of(self.prob[: len(x)], self.grid)

    def _due(self, now: torch.Tensor, t: float) -> torch.Tensor:
        """Which samples are computed, bool (B,)."""
        changed = now.new_full((len(now),), torch.inf)  # a row that was not there before is due
        if self.before is not None:
            both = min(len(now), len(self.before))
            before, now_too = self.before[:both].flatten(1), now[:both].flatten(1)
            changed[:both] = self.changed[:both] + (now_too - before).abs().mean(1) / before.abs().mean(1)
        due = changed >= (-torch.inf if t == self.last else self.threshold)
        self.before, self.changed = now, changed.masked_fill(due, 0)
        return due


def signal(model: nn.Module, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A cheap sign of how a model's answer will change.

    Of a DiT the first modulated tokens (B, N, D), of a DCDiT the conditioning (B, D).
    """
    model = innermost(model)
    if not isinstance(model, DiTShell):
        return model.condition(t, y)[0].float()
    c = F.silu(model.time_embed(t) + model.class_embed(y))
    block = next(module for module in model.modules() if hasattr(module, "proj"))
    shift, scale = block.adaln[1](c)[:, : 2 * c.shape[1]].chunk(2, dim=1)
    return adaln_modulate(model.patches(x), shift, scale).float()


def innermost(model: nn.Module) -> nn.Module:
    """The model within all wrappers."""
    while isinstance(model, Paced):
        model = model.model
    return model


def rows_of(value: Any, rows: torch.Tensor) -> Any:
    """A number as it is, and the `rows` of a tensor."""
    return value[rows] if isinstance(value, torch.Tensor) else value


def stored(kept: torch.Tensor | None, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`kept` with `values` in its `rows`, longer where it must be; NaN where nothing was stored yet."""
    count = max(int(rows.max()) + 1, 0 if kept is None else len(kept))
    out = values.new_full((count, *values.shape[1:]), torch.nan)
    if kept is not None:
        out[: len(kept)] = kept
    out[rows] = values
    return out
