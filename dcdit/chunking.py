"""DynamicChunking: someone else's transformer blocks, run on the tokens that a router keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dcdit_kernels import ChunkPlan

from .config import DCDiTConfig
from .errors import ConfigError
from .router import PredictabilityRouter
from .routing import Routing

# Bias of a fresh router's score: p ≈ 0.95, so that a wrapped model still computes what it did before.
KEEP_ALL = 3.0

Run = Callable[..., torch.Tensor]


class DynamicChunking(nn.Module):
    """A stack of blocks on (B, L, D), of which each sample's boundary cells alone are run: y = h + dechunk(f(x) − x).

    x = chunk(h) are the retained cells, packed (T, D), and f is the stack. A cell that is not retained keeps its own
    features and takes the change of its nearest retained one. With all cells retained the result is f(h), so a
    pretrained stack starts from what it knows; `drop_fraction` and the ratio loss then take tokens away.

    Args:
        blocks: the stack, kept as `self.blocks`.
        width: D, a multiple of 32 for the router of this project.
        grid: (H, W), (F, H, W) for video, or (L,): the cells in raster order.
        run: run(blocks, tokens, plan, *args, **kwargs) → tokens, packed (capacity, D) in and out, where the further
            arguments are those of `forward`. None: each block is called as block(tokens, plan, *args, **kwargs).
        router: module (B, L, D) → boundary_prob (B, L). None: the predictability router (arXiv 2603.06351 v2), frame
            by frame on a video, that keeps everything at first.
        sigma: width of the Gaussian smoothing of the change, in cells; None: no smoothing.

    `drop_fraction` is an attribute, ρ in [0, 1) or a tensor (B,), for models whose own forward has no such argument.
    After a forward `routing` holds its Routing, for `dcdit.diffusion.ratio_loss`; copies and pickles have none.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        width: int,
        grid: tuple[int, ...],
        *,
        run: Run | None = None,
        router: nn.Module | None = None,
        sigma: float | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grid = tuple(grid)
        if len(self.grid) not in (1, 2, 3) or min(self.grid) < 1:
            raise ValueError(f"grid must be (L,), (H, W) or (F, H, W), got {grid}")
        self.run = run or run_in_turn
        self.sigma = sigma
        self.drop_fraction: float | torch.Tensor = 0.0
        self.routing: Routing | None = None
        # The router looks at planes: a sequence is one row, the frames of a video are planes of their own.
        self.plane = (1, *self.grid)[-2:]
        self.router = router or _keep_all_router(width, self.plane)
        self._folds = router is None

    def forward(self, h: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """h (B, L, D) → (B, L, D); what follows h goes to `run`. Raises ValueError for a wrong shape."""
        batch, cells = h.shape[0], math.prod(self.grid)
        if h.dim() != 3 or h.shape[1] != cells:
            raise ValueError(f"h must have shape (B, {cells}, D) for grid {self.grid}, got {tuple(h.shape)}")
        boundary_prob = self._score(h)
        if boundary_prob.shape != (batch, cells):
            raise ValueError(
                f"router must return boundary_prob of shape {(batch, cells)}, got {tuple(boundary_prob.shape)}"
            )
        self.routing = routing = Routing.of(boundary_prob, self.grid, self.drop_fraction)
        tokens = routing.chunk(h)
        out = self.run(self.blocks, tokens, routing.plan, *args, **kwargs)
        if out.shape != tokens.shape:
            raise ValueError(f"run must return tokens of shape {tuple(tokens.shape)}, got {tuple(out.shape)}")
        return routing.dechunk(out - tokens, h, self.sigma)

    def _score(self, h: torch.Tensor) -> torch.Tensor:
        if not self._folds:
            return self.router(h)
        with torch.autocast(h.device.type, enabled=False):
            planes = h.reshape(-1, math.prod(self.plane), h.shape[2])
            return self.router(planes.to(torch.promote_types(h.dtype, torch.float32))).view(h.shape[:2])

    def __getstate__(self) -> dict:
        # The routing belongs to one forward: its graph cannot be copied, and its tensors are no state of the module.
        return {**self.__dict__, "routing": None}


def run_in_turn(blocks: Iterable[nn.Module], tokens: torch.Tensor, plan: ChunkPlan, *args, **kwargs) -> torch.Tensor:
    """Call each block as block(tokens, plan, *args, **kwargs) on packed tokens (capacity, D)."""
    for block in blocks:
        tokens = block(tokens, plan, *args, **kwargs)
    return tokens


def _keep_all_router(width: int, plane: tuple[int, int]) -> PredictabilityRouter:
    if width % 32:
        raise ConfigError(f"width must be a multiple of 32 where no router is given, got {width}")
    router = PredictabilityRouter(DCDiTConfig(input_size=plane, hidden_size=width, num_heads=1))
    nn.init.constant_(router.score.bias, KEEP_ALL)
    return router
