"""DynamicChunking: someone else's transformer blocks, run on the tokens that a router keeps."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import nn

from dcdit_kernels import ChunkPlan

from ..errors import ConfigError
from .config import DCDiTConfig
from .routers import PredictabilityRouter
from .routing import Routing, route, rows_known

# Bias of a fresh router's score: p ≈ 0.95, so that a wrapped model still computes as before.
KEEP_ALL = 3.0

# Which tokens a forward keeps and how many, by attribute or keyword, as `plan_chunks` takes it.
FORMS = ("drop_fraction", "budget", "budget_per_sample")  # one of them at a time
BUDGET = (*FORMS, "capacity", "max_seqlen", "keep", "ban", "valid")


class DynamicChunking(nn.Module):
    """A stack of blocks on (B, L, D) that runs on each sample's boundary cells alone: y = h + dechunk(f(x) − x).

    x = chunk(h) are the retained cells, packed (capacity, D), and f is the stack. A cell that is not retained keeps its
    own features and takes the change of its nearest retained one. With all cells retained the result is f(h), so a
    pretrained stack starts from its own output; `drop_fraction` and the ratio loss then take tokens away.

    The blocks are children by their numbers, as in an nn.ModuleList: `model.blocks = DynamicChunking(model.blocks, …)`
    leaves their weights' names as they are, and `model.blocks = model.blocks.unwrap()` undoes it.

    Args:
        blocks: the stack.
        width: D, a multiple of 32 for the router of this project.
        grid: (H, W), (F, H, W) for video, or (L,): the cells in raster order.
        run: run(blocks, tokens, plan, *args, **kwargs) → tokens, packed (capacity, D) in and out, where the further
            arguments are those of `forward`; or a tuple of tokens and whatever else `forward` shall return. None: each
            block is called as block(tokens, plan, *args, **kwargs).
        router: module (B, L, D) → boundary_prob (B, L), called with h in float32 at least and with those arguments of
            `forward` that its own forward takes, `grid` among them. None: the predictability router (arXiv 2603.06351
            v2), frame by frame on a video, that keeps everything at first.
        sigma: width of the Gaussian smoothing of the change, in cells; None: no smoothing.

    Attributes, for models with a forward without such arguments: `grid`, and `drop_fraction`, `budget`,
    `budget_per_sample`, `capacity`, `max_seqlen`, `keep`, `ban` and `valid` as in `dcdit.ops.plan_chunks`. After a
    forward `routing` holds its Routing, for `dcdit.training.ratio_loss`; copies and pickles have none.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = (*BUDGET, "_grid", "sigma")  # attributes that a forward reads

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        width: int,
        grid: tuple[int, ...],
        *,
        run: Callable[..., Any] | None = None,
        router: nn.Module | None = None,
        sigma: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(blocks, Iterable):
            raise ConfigError(f"blocks must be a list of modules, got a {type(blocks).__name__}")
        if sigma is not None and not (isinstance(sigma, Real) and 0 < sigma < math.inf):
            raise ConfigError(f"sigma must be positive and finite, or None, got {sigma!r}")
        self.depth = 0
        for block in blocks:
            self.add_module(str(self.depth), block)
            self.depth += 1
        self.grid = grid
        self.run = run or run_in_turn
        self.sigma = sigma
        self.drop_fraction: float | torch.Tensor = 0.0
        self.budget: int | None = None
        self.budget_per_sample: int | torch.Tensor | None = None
        self.capacity: int | None = None
        self.max_seqlen: int | None = None
        self.keep: torch.Tensor | None = None
        self.ban: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.routing: Routing | None = None
        if router is not None and not isinstance(router, nn.Module):
            raise ValueError(f"router must be a module, called as router(h), got a {type(router).__name__}")
        for block in self.blocks if run is None else ():
            _check_call(block)
        self.router = router or _keep_all_router(width, self.grid)
        self._asked: tuple[type, tuple[inspect.Parameter, ...]] | None = None

    @property
    def blocks(self) -> list[nn.Module]:
        """The stack."""
        return [self._modules[str(i)] for i in range(self.depth)]

    @property
    def running(self) -> list[nn.Module]:
        """The blocks that a forward runs on one choice of tokens: the stack."""
        return self.blocks

    @property
    def grid(self) -> tuple[int, ...]:
        """The cells in raster order, for calls that do not name a grid themselves."""
        return self._grid

    @grid.setter
    def grid(self, grid: tuple[int, ...]) -> None:
        self._grid = _checked(grid)

    def unwrap(self) -> nn.ModuleList:
        """The blocks alone, as they were."""
        return nn.ModuleList(self.blocks)

    def forward(
        self,
        h: torch.Tensor,
        *args: Any,
        grid: tuple[int, ...] | None = None,
        routing: Routing | None = None,
        **kwargs: Any,
    ) -> Any:
        """h (B, L, D) → (B, L, D), or a tuple that begins with it where `run` returns one.

        Args:
            args, kwargs: inputs of `run` and the router beside h. Those among them that say what is kept, as the
                attributes of these names do, go before the attributes.
            grid: of this call, with L cells. None: the attribute.
            routing: an earlier call's, to use in place of the router's.

        Raises ValueError for a wrong shape.
        """
        grid = self.grid if grid is None else _checked(grid)
        asked = {name: kwargs.pop(name) for name in BUDGET if name in kwargs}
        if routing is None:
            taken, named = self._taken(args, {**kwargs, "grid": grid})
            routing = route(functools.partial(self.router, **named), h, *taken, grid=grid, **self.options(**asked))
        else:
            routing.check(len(h), grid, asked)
        self.routing = routing
        tokens = routing.chunk(h)
        given = _counted(tokens)
        result = self.run(self.running, given, routing.plan, *args, **kwargs)
        out, *rest = result if isinstance(result, tuple) else (result,)
        if not isinstance(out, torch.Tensor) or out.shape != tokens.shape:
            came = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"run must return tokens of shape {tuple(tokens.shape)}, got {came}")
        if given is tokens and tokens._version:  # blocks that work in place have overwritten them
            tokens = routing.chunk(h)
        y = routing.dechunk(out - tokens, h, self.sigma)
        return (y, *rest) if isinstance(result, tuple) else y

    def options(self, **asked: Any) -> dict[str, Any]:
        """What a forward gives to `plan_chunks`: what it is asked for, and for the rest the attributes."""
        left = set(BUDGET).difference(FORMS if any(form in asked for form in FORMS) else ())
        options = {name: getattr(self, name) for name in left} | asked
        return {name: value for name, value in options.items() if value is not None}

    @property
    def fixed(self) -> bool:
        """Whether the attributes say how many rows a forward has, so that it waits for no GPU."""
        return rows_known(self.options())

    def _taken(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The forward's arguments after h that the router's forward takes."""
        kind = type(self.router)
        if self._asked is None or self._asked[0] is not kind:
            self._asked = kind, tuple(inspect.signature(kind.forward).parameters.values())[2:]
        parameters = self._asked[1]
        names = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
        by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            args = args[: len(by_place)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            kwargs = {name: value for name, value in kwargs.items() if name in names}
        return args, kwargs

    def __getstate__(self) -> dict:
        # The routing belongs to one forward: its graph cannot be copied, and its tensors are no state of the module.
        return {**self.__dict__, "routing": None}


def run_in_turn(blocks: Iterable[nn.Module], tokens: torch.Tensor, plan: ChunkPlan, *args, **kwargs) -> torch.Tensor:
    """Call each block as block(tokens, plan, *args, **kwargs) on packed tokens (capacity, D)."""
    for block in blocks:
        tokens = block(tokens, plan, *args, **kwargs)
    return tokens


def _check_call(block: nn.Module) -> None:
    """Raise ValueError where a block cannot take tokens and plan."""
    kinds = [parameter.kind for parameter in inspect.signature(block.forward).parameters.values()]
    places = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    if places < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        name = type(block).__name__
        raise ValueError(f"blocks are called as block(tokens, plan), {name} takes {places} arguments: give run=")


def _checked(grid: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(grid, Iterable):
        raise ConfigError(f"grid must be (L,), (H, W) or (F, H, W), got {grid!r}")
    grid = tuple(grid)
    if len(grid) not in (1, 2, 3) or min(grid) < 1:
        raise ValueError(f"grid must be (L,), (H, W) or (F, H, W), got {grid}")
    return grid


def _counted(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens whose changes in place are counted: themselves, or a copy where nothing counts."""
    uncounted = torch.compiler.is_compiling() or tokens.is_inference()
    return tokens.clone() if uncounted else tokens


def _keep_all_router(width: int, grid: tuple[int, ...]) -> PredictabilityRouter:
    if width % 32:
        raise ConfigError(f"width must be a multiple of 32 where no router is given, got {width}")
    router = PredictabilityRouter(DCDiTConfig(input_size=(1, *grid)[-2:], hidden_size=width, num_heads=1))
    nn.init.constant_(router.score.bias, KEEP_ALL)
    return router
