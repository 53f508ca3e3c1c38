"""The rivals of DC-DiT in its own trainer and sampler: other boundaries, learned latents, and the plain DiT."""

from __future__ import annotations

import math

import torch
from torch import nn

from dcdit.model.clean_latents import clean_guess, velocity_to
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.model.layers import init_linears
from dcdit.model.plain_dit import PlainDiT
from dcdit.model.routing import Routing, regular_cells
from dcdit.training.trainer import Trainer

CPU = torch.device("cpu")


class RandomRouter(nn.Module):
    """L/N random cells of each sample, drawn anew at each call; the cells of `keep_grid` are always among them."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.kept = round(config.cells / config.target_ratio)
        self.stride, self.grid = config.keep_grid, config.input_size

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """h (B, L, D) → boundary_prob (B, L): 1 at the cells of the draw, 0 elsewhere."""
        lots = torch.rand(h.shape[:2], device=h.device)
        if self.stride:
            lots = lots + regular_cells(self.grid, self.stride, h.device)
        chosen = lots.topk(self.kept, dim=1).indices
        return torch.zeros_like(h[..., 0]).scatter_(1, chosen, 1.0)

    def macs(self, cells: int) -> float:
        """Multiply-adds of one image."""
        return 0.0


class GridRouter(nn.Module):
    """Every √N-th cell of every √N-th row."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.stride, self.grid = math.isqrt(int(config.target_ratio)), config.input_size
        self.width = config.hidden_size

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """h (B, L, D) → boundary_prob (B, L), alike for all samples."""
        return self.cells(h.device).to(h.dtype).expand(h.shape[:2])

    def cells(self, device: torch.device = CPU) -> torch.Tensor:
        """The cells of the grid, bool (L,)."""
        return regular_cells(self.grid, self.stride, device)

    def macs(self, cells: int) -> float:
        """Multiply-adds of one image."""
        return 0.0


class LatentRouter(GridRouter):
    """A regular grid, for as many tokens as there are latents; its cost is Read's and Write's."""

    def macs(self, cells: int) -> float:
        """Multiply-adds of one image: projections of latents and of cells in both, scores, and weighted sums."""
        latents = cells / self.stride**2
        return 4 * self.width * (self.width * (latents + cells) + latents * cells)


class LatentRival(DCDiT):
    """L/N learned latents in place of chosen cells, after ELIT (arXiv 2603.12245) with a fixed number: they read all
    cells by cross-attention, the blocks run on them, and each cell reads them where DC-DiT refills."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__(config, router=LatentRouter(config))
        width, count = config.hidden_size, int(self.router.cells().sum())
        self.latents = nn.Parameter(torch.randn(count, width))
        self.read, self.write = (Read(width, config.num_heads) for _ in range(2))

    def gather(self, h: torch.Tensor, routing: Routing) -> torch.Tensor:
        """h (B, L, D) → the latents after Read, (B·L/N, D)."""
        cells = h + self.positions(routing.plan.grid)
        return (self.latents + self.read(self.latents.expand(len(h), -1, -1), cells)).flatten(0, 1)

    def decode(self, tokens: torch.Tensor, h: torch.Tensor, routing: Routing, outer: torch.Tensor) -> torch.Tensor:
        """As DCDiT's, with Write in place of dechunk."""
        height, width = routing.plan.grid
        asked = h + self.positions(routing.plan.grid)
        refilled = self.residual_proj(h) + self.write(asked, tokens.unflatten(0, (len(h), -1)))
        out = self.decoder(refilled.transpose(1, 2).unflatten(2, (height, width)), outer)
        return self.final(out, outer).permute(0, 2, 1).unflatten(2, (height, width))


class Read(nn.Module):
    """What queries read of other tokens by cross-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, queries: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """queries (B, Q, D), others (B, K, D) → (B, Q, D)."""
        asked, told = (norm(part) for norm, part in zip(self.norms, (queries, others), strict=True))
        return self.attend(asked, told, told, need_weights=False)[0]


class PlainRival(PlainDiT):
    """The plain DiT behind the calls of a DCDiT; it keeps its own tokens, one of each 2×2 cells, and routes nothing."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__(config)
        self.config, self.own_parts, self.main = config, {"model": "PlainDiT"}, nn.Identity()
        init_linears(self, ("adaln.1", "head"))
        nn.init.xavier_uniform_(self.stem.weight.flatten(1))
        nn.init.zeros_(self.stem.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)

    def forward(self, x, t, y, drop_fraction=0.0, return_routing: bool = False, **limits):
        """As DCDiT's; the routing is a regular grid with as many tokens as patches, whose rows `limits` may fix."""
        out = super().forward(x, t, y)
        if self.config.predict_clean:
            out = velocity_to(x, out, t)
        if not return_routing:
            return out
        own = regular_cells(self.config.input_size, self.patch, x.device).float().expand(len(x), -1)
        return out, Routing.of(own, self.config.input_size, **limits)


class PlainGuessRival(PlainRival):
    """The plain DiT that also reads its own guess of the clean picture: self-conditioning (arXiv 2208.04202)."""

    takes_guess = True
    seen: torch.Tensor | None = None

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__(config)
        self.told = nn.Conv2d(config.in_channels, config.hidden_size, self.patch, self.patch, bias=False)
        nn.init.zeros_(self.told.weight)

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) → tokens (B, N, D), with those of the guess where there is one."""
        tokens = super().patches(x)
        return tokens if self.seen is None else tokens + self.told(self.seen).flatten(2).transpose(1, 2)

    def forward(self, x, t, y, *args, guess: torch.Tensor | None = None, **options):
        """As PlainRival's; without a `guess` (B, C, H, W) a pass before makes one."""
        if guess is None:
            with torch.no_grad():
                guess = clean_guess(x, super().forward(x, t, y), t)
        self.seen = guess
        try:
            return super().forward(x, t, y, *args, **options)
        finally:
            self.seen = None


ROUTERS = {"random": RandomRouter, "grid": GridRouter}
OTHERS = {"latents": LatentRival, "plain": PlainRival, "plain-guess": PlainGuessRival}


def make_rival(config: DCDiTConfig, kind: str) -> nn.Module:
    """`kind` learned, random, grid, latents, plain or plain-guess."""
    if kind in OTHERS:
        return OTHERS[kind](config)
    return DCDiT(config, router=ROUTERS[kind](config) if kind in ROUTERS else None)


class RivalTrainer(Trainer):
    """The trainer of `dcdit train`, of another model."""

    kind = "learned"

    def blank(self) -> nn.Module:
        return make_rival(self.config.model, self.kind)
