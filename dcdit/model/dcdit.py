"""DC-DiT: encoder, router, chunk, DiT backbone on the retained tokens, dechunk, decoder (arXiv 2603.06351)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dcdit_kernels import Packing

from ..errors import ConfigError
from .blocks import MainNetwork
from .clean_latents import clean_guess, velocity_to
from .config import DCDiTConfig
from .conv_blocks import Stem, make_decoder, make_encoder
from .embedders import TimestepEmbedding, positions_of, sincos_2d
from .final_layer import FinalLayer
from .guess_router import GuessRouter
from .layers import WideLinear, init_linears
from .mixed import MixedRouting, check_inputs, forward_mixed
from .routers import make_router
from .routing import Routing, regular_cells, route


class DCDiT(nn.Module):
    """A Dynamic Chunking Diffusion Transformer on (B, C, H, W) latents, one token per latent cell.

    A forward is five steps: `condition`, `encode`, `route`, `backbone`, `decode`. Each can be called alone, and
    overridden.

    Args:
        config: the sizes.
        router: a module of your own in place of the router that the configuration names; see `dcdit.router`.
        backbone: a module of your own in place of the DiT blocks, called as backbone(tokens, c, packing, **inputs) with
            packed tokens (capacity, D), c (B, D) and the plan; it returns tokens of that shape. `inputs` are further
            arguments of the model's forward.
    """

    pos_embed: torch.Tensor

    def __init__(
        self, config: DCDiTConfig, *, router: nn.Module | None = None, backbone: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not isinstance(config, DCDiTConfig):
            raise ConfigError(
                f"config must be a DCDiTConfig, got {config!r}: DCDiTConfig.from_dict makes one, and "
                "DCDiT.from_pretrained reads a checkpoint"
            )
        self.config = config
        width, narrow = config.hidden_size, config.encoder_width
        self.stem = Stem(config.in_channels, narrow, config.encoder_stride)
        self.time_embed = TimestepEmbedding(width)
        self.class_embed = nn.Embedding(config.num_classes + 1, width)  # the last class is 'no label'
        # Pretrained embedders have a scale of their own; the fresh layers around the backbone see it normalised.
        self.cond_norm = nn.LayerNorm(width, eps=1e-6) if config.cond_norm else nn.Identity()
        self.encoder = make_encoder(config)
        self.residual_proj = WideLinear(width, width)
        self.router = make_router(config) if router is None else router
        self.takes_guess = isinstance(self.router, GuessRouter)
        self.main = backbone or MainNetwork(width, config.depth, config.num_heads, config.mlp_ratio)
        self.decoder = make_decoder(config)
        self.final = FinalLayer(narrow, width, config.out_channels * config.encoder_stride**2)
        self.register_buffer("pos_embed", sincos_2d(width, config.input_size))
        given = {"router": router, "backbone": backbone}
        self.own_parts = {name: type(part).__name__ for name, part in given.items() if part is not None}
        self._init_linears()

    def init_weights(self) -> None:
        """The weights of a fresh model, for one made on the meta device and given memory by `to_empty`.

        Modules of your own are asked for their `reset_parameters`, where they have it.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        if "router" not in self.own_parts:
            self.router.init_weights()  # type: ignore[operator]
        self.pos_embed.copy_(sincos_2d(self.config.hidden_size, self.config.input_size))
        self._init_linears()

    def _init_linears(self) -> None:
        """Xavier linears, zero adaLN and output (DiT), zero residual projection (H-Net) or, if configured, identity."""
        skipped = ("router", "main") if "backbone" in self.own_parts else ("router",)
        init_linears(self, ("adaln.1", "final.linear", "residual_proj"), skipped)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        if self.config.direct_init:
            nn.init.eye_(self.residual_proj.weight)
            with torch.no_grad():
                centre = 3 * self.stem.weight[..., 1, 1]  # as much variance as of nine taps
                self.stem.weight.zero_()[..., 1, 1] = centre

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> DCDiT:
        """The model of a checkpoint directory or Hub repository, in eval mode; see `dcdit.checkpoints`."""
        from ..checkpoints.folder import from_pretrained

        return from_pretrained(name, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model.safetensors and config.json."""
        from ..checkpoints.folder import save_checkpoint

        save_checkpoint(directory, self)

    def forward(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        t: torch.Tensor,
        y: torch.Tensor,
        drop_fraction: float | torch.Tensor = 0.0,
        return_routing: bool = False,
        capacity: int | None = None,
        *,
        max_seqlen: int | None = None,
        keep: torch.Tensor | Sequence[torch.Tensor] | None = None,
        ban: torch.Tensor | Sequence[torch.Tensor] | None = None,
        budget: int | None = None,
        budget_per_sample: int | torch.Tensor | None = None,
        routing: Routing | MixedRouting | None = None,
        guess: torch.Tensor | None = None,
        **backbone_inputs: Any,
    ) -> Any:
        """Predict noise (and variance) or velocity.

        Args:
            x: (B, C, H, W), of any size that `encoder_stride` divides; config.input_size is the one trained on. Or a
                list of B samples (C, H, W) of different sizes: encoder and decoder run once for each size, the backbone
                once for all.
            t: (B,) timesteps from 0 (data) to 1000 (noise).
            y: (B,) int64 class ids; `config.num_classes` stands for no label.
            drop_fraction: ρ in [0, 1), the share of boundaries to drop; a tensor (B,) for one per sample.
            capacity: rows for the retained tokens of the whole batch. None: as many as there are, for which the host
                waits once; a number: nothing waits, as CUDA graphs need, and what has no room is the least
                probable of the batch and counted in `routing.plan.overflow`.
            max_seqlen: rows for each sample's at most; its least probable boundaries past them are dropped and counted
                likewise. Under a fixed capacity attention's launches are sized by it.
            keep, ban: bool (B, L), cells that the backbone gets, and that it does not get, whatever the router says of
                them: a region to edit, cells whose content is known. See `dcdit.ops.plan_chunks`. For a list of samples
                lists of (L,), with the cells of each.
            budget: in place of ρ, the tokens of the whole batch: its most probable cells, exactly so many. Nothing
                waits.
            budget_per_sample: in place of ρ, the tokens of each sample; a tensor (B,) for one per sample. Where it is a
                number nothing waits.
            routing: an earlier call's, for a batch of this size, to use in place of the router's. It has a budget
                already: every other budget must be left out.
            guess: (B, C, H, W), the clean latents as far as they are known, for `router: guess`: `clean_guess` of the
                step before. Without it a pass of backbone and decoder, on a regular grid of cells, makes one first.
            backbone_inputs: inputs of a backbone of yours beside tokens, c and packing.

        Returns (B, C, H, W), or (B, 2C, H, W) with config.learn_sigma; with `return_routing` also the Routing. For a
        list the prediction is a list, and the routing a MixedRouting.
        Raises ValueError for a wrong shape, dtype, class id, ρ, budget, mask, routing or guess.
        """
        self._check(x, t, y)
        if self.takes_guess or guess is not None:
            self._check_guess(x, guess)
        asked = {"capacity": capacity, "max_seqlen": max_seqlen, "keep": keep, "ban": ban}
        asked |= {"budget": budget, "budget_per_sample": budget_per_sample}
        limits: dict[str, Any] = {name: limit for name, limit in asked.items() if limit is not None}
        if isinstance(drop_fraction, torch.Tensor) or drop_fraction != 0.0:
            limits["drop_fraction"] = drop_fraction
        if not isinstance(x, torch.Tensor):
            outs, mixed = forward_mixed(self, x, t, *self.condition(t, y), limits, routing, backbone_inputs)
            return (outs, mixed) if return_routing else outs
        grid = tuple(x.shape[2:])
        if routing is not None:
            if not isinstance(routing, Routing):
                raise ValueError(f"routing must be a Routing for a batch of one size, got a {type(routing).__name__}")
            routing.check(x.shape[0], grid, limits)
        c, outer = self.condition(t, y)
        backbone_inputs |= self._begun(c, backbone_inputs)
        h = self.encode(x, outer)
        # Router and residual path are at least float32, whatever autocast makes of the rest; h is copied once for both.
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        if routing is None:
            told = self.named(grid)
            if self.takes_guess:
                told["guess"] = self.guess(x, t, h, c, outer, **backbone_inputs) if guess is None else guess
            routing = self.route(wide, c, **told, **limits)
        tokens = self.backbone(self.gather(h, routing), c, routing.plan, **backbone_inputs)
        out = self.decode(tokens, wide, routing, outer)
        if self.config.predict_clean:
            out = velocity_to(x, out, t)
        return (out, routing) if return_routing else out

    def condition(self, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """t, y (B,) → the conditioning (B, D) of the backbone, and of encoder and decoder, through their SiLU."""
        c = self.time_embed(t) + self.class_embed(y)
        return c, F.silu(self.cond_norm(c))

    def encode(self, x: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), outer (B, D) → h (B, L, D), a feature of each cell in raster order."""
        return self.encoder(self.stem(x), outer)

    @torch.no_grad()
    def guess(
        self, x: torch.Tensor, t: torch.Tensor, h: torch.Tensor, c: torch.Tensor, outer: torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        """x (B, C, H, W), t (B,), h (B, L, D), conditioning → the clean latents (B, C, H, W) that the model expects, by
        tokens of a regular grid. No gradient passes."""
        kind, grid = x.device.type, tuple(x.shape[2:])
        # torch 2.10 would keep weights that autocast has cast here, without a gradient, for the pass that trains.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            wide = h.to(torch.promote_types(h.dtype, torch.float32))
            count = self.router.count(grid)  # type: ignore[operator]  # known, so that the host waits for nothing
            routing = route(functools.partial(self.router, grid=grid), wide, c, grid=grid, budget_per_sample=count)
            tokens = self.backbone(self.gather(h, routing), c, routing.plan, **inputs)
            out = self.decode(tokens, wide, routing, outer)
            return clean_guess(x, velocity_to(x, out, t) if self.config.predict_clean else out, t)

    def route(
        self,
        h: torch.Tensor,
        c: torch.Tensor,
        drop_fraction: float | torch.Tensor = 0.0,
        *,
        grid: tuple[int, ...] | None = None,
        guess: torch.Tensor | None = None,
        **limits: Any,
    ) -> Routing:
        """h (B, L, D), c (B, D) → which cells the backbone gets. The router sees both in float32 at least.

        `grid` is config.input_size where None; a router is told of any other, and of a `guess` (B, C, H, W), by its
        keyword of that name. `limits` are `capacity`, `max_seqlen`, masks and budgets where given, as `plan_chunks`
        takes them.
        """
        c = c.to(torch.promote_types(h.dtype, torch.float32))
        own = self.config.input_size
        grid = own if grid is None else grid
        told = self.named(grid) | ({} if guess is None else {"guess": guess})
        router = functools.partial(self.router, **told) if told else self.router
        if grid != own and "grid" not in inspect.signature(self.router.forward).parameters:
            raise ValueError(f"x must have sides {own}: {type(self.router).__name__}.forward takes no grid, got {grid}")
        if self.config.keep_grid:
            regular = regular_cells(grid, self.config.keep_grid, h.device).expand(h.shape[:2])
            keep, ban = (limits.get(name) for name in ("keep", "ban"))
            regular = regular if ban is None else regular & ~ban
            limits["keep"] = regular if keep is None else regular | keep
        return route(router, h, c, grid=grid, drop_fraction=drop_fraction, **limits)

    def named(self, grid: tuple[int, ...]) -> dict[str, Any]:
        """The keyword `grid` of `route` and routers: none for config.input_size, which they know."""
        return {} if grid == self.config.input_size else {"grid": grid}

    def positions(self, grid: tuple[int, ...]) -> torch.Tensor:
        """The position table (H·W, D) of a grid (H, W): `pos_embed` for config.input_size, else computed alike."""
        return self.pos_embed if grid == self.config.input_size else positions_of(self.pos_embed, grid)

    def gather(self, h: torch.Tensor, routing: Routing) -> torch.Tensor:
        """h (B, L, D) → the tokens of the retained cells with their positions, packed (capacity, D)."""
        positions = self.positions(routing.plan.grid)
        if self.config.mean_positions:
            return routing.chunk(h + positions.to(h.dtype), reduce="mean")
        return routing.chunk(h, positions, "mean" if self.config.segment_mean else "own")

    def backbone(self, tokens: torch.Tensor, c: torch.Tensor, packing: Packing, **inputs: Any) -> torch.Tensor:
        """Packed tokens (capacity, D), c (B, D) → tokens (capacity, D)."""
        return self.main(tokens, c, packing, **inputs)

    def decode(self, tokens: torch.Tensor, h: torch.Tensor, routing: Routing, outer: torch.Tensor) -> torch.Tensor:
        """Tokens (capacity, D) back on the grid, with h (B, L, D) beside them → the prediction (B, C or 2C, H, W); with
        config.predict_clean clean latents."""
        (height, width), stride = routing.plan.grid, self.config.encoder_stride
        refilled = routing.dechunk(tokens, self.residual_proj(h), self.config.sigma)
        batch, _, features = refilled.shape
        out = self.decoder(refilled.view(batch, height, width, features).permute(0, 3, 1, 2), outer)
        out = self.final(out, outer)
        out = out.view(batch, height // stride, width // stride, out.shape[2]).permute(0, 3, 1, 2)
        return out if stride == 1 else F.pixel_shuffle(out, stride)

    def _begun(self, c: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the backbone begins before its tokens are known; nothing of a backbone, step or inputs of your own."""
        own = type(self.main) is MainNetwork and getattr(self.backbone, "__func__", None) is DCDiT.backbone
        return self.main.ahead(c) if own and not inputs else {}  # type: ignore[operator]

    def _check_guess(self, x: Any, guess: Any) -> None:
        if not self.takes_guess:
            raise ValueError(f"a guess is for router: guess, this model has a {type(self.router).__name__}")
        if not isinstance(x, torch.Tensor):
            raise ValueError("router: guess takes samples of one size (B, C, H, W), got a list")
        if guess is not None and getattr(guess, "shape", None) != x.shape:
            got = tuple(guess.shape) if isinstance(guess, torch.Tensor) else f"a {type(guess).__name__}"
            raise ValueError(f"guess must have x's shape {tuple(x.shape)}, got {got}")

    def _check(self, x: Any, t: torch.Tensor, y: torch.Tensor) -> None:
        if torch.jit.is_tracing():
            raise RuntimeError("torch.jit.trace cannot follow a number of tokens that changes; use torch.export")
        check_inputs(x, t, y, self.config.in_channels, self.config.num_classes)
        stride = self.config.encoder_stride
        parts = {"x": x} if isinstance(x, torch.Tensor) else {f"x[{i}]": part for i, part in enumerate(x)}
        for name, part in parts.items():
            if part.shape[-2] % stride or part.shape[-1] % stride:
                sides = tuple(part.shape[-2:])
                raise ValueError(f"{name} must have sides that encoder_stride {stride} divides, got {sides}")
