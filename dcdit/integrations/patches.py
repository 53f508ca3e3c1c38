"""Patch sizes by step for diffusers' FLUX and Wan transformers (dynamic tokenisation, arXiv 2602.16968).

The model keeps its class, weights and forward. Hooks on its embedding, positions and last layer take the place of
their outputs where a step is coarse; at scale 1 they leave everything as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from peft import LoraConfig
from torch import nn

from ..errors import ConfigError
from ..model.patch_dit import resized_filters, resized_rows
from ..sampling.patches import checked_threshold, roughness
from .attention import chunking_of

ADAPTER = "patches"


class PatchScales(nn.Module):
    """The coarse patches of a transformer: embeddings and last layers of each scale, and the choice of a scale.

    `scale` is that of the calls to come; with a threshold τ each step chooses its own by the latents' history, one for
    all samples of a call: the smallest of theirs. A step begins where the timestep changes, a run where it rises.
    """

    patch: int

    def __init__(self, model: nn.Module, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.scales, self.scale, self.threshold = scales, 1, None
        self.history: list[torch.Tensor] = []
        self.time: float | None = None
        first, last = self.layers(model)
        self.stems = nn.ModuleDict({str(s): self.embedding(first, s) for s in scales[1:]})
        self.heads = nn.ModuleDict({str(s): self.output(last, s) for s in scales[1:]})

    @property
    def threshold(self) -> float | None:
        """τ; None: calls are at `scale`. Setting raises ConfigError for anything but a finite number of at least 0."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self._threshold = None if value is None else checked_threshold(value)

    @contextlib.contextmanager
    def at(self, scale: int) -> Iterator[None]:
        """Calls at one scale. Raises ConfigError for one that the model has not."""
        if type(scale) is not int or scale not in self.scales:
            raise ConfigError(f"scale must be one of {', '.join(map(str, self.scales))}, got {scale}")
        before = self.scale, self.threshold
        self.scale, self.threshold = scale, None
        try:
            yield
        finally:
            self.scale, self.threshold = before

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """In front of the model's forward: choose the scale, and switch the adapters."""
        if args:
            raise ConfigError("a transformer with patch scales takes its inputs by keyword")
        if getattr(model, "is_cache_enabled", False):
            raise ConfigError("a cache keeps tokens of one patch size: disable it, or leave the scales out")
        self.grid = self.grid_of(kwargs)
        if self.threshold is not None:
            self.scale = self._chosen(kwargs)
        if any(side % self.scale for side in self.grid):
            raise ConfigError(f"scale {self.scale} does not divide the grid of {self.grid[0]}×{self.grid[1]} patches")
        (model.disable_adapters if self.scale == 1 else model.enable_adapters)()

    def _chosen(self, kwargs: dict[str, Any]) -> int:
        picture, time = self.picture(kwargs["hidden_states"]), float(kwargs["timestep"].flatten()[0])
        if time == self.time:
            return self.scale  # the other pass of guidance
        fresh = self.time is None or time > self.time or self.history[-1].shape != picture.shape
        self.history, self.time = [*([] if fresh else self.history[-3:]), picture.detach()], time
        best = torch.ones(len(picture), dtype=torch.long)
        for scale, rough in roughness(self.history, self).items():
            fits = not any(side % scale for side in self.grid)
            best[(rough < self.threshold).cpu() & fits] = scale
        return int(best.min())

    @property
    def coarse(self) -> tuple[int, int]:
        """Patches in a column and in a row at this scale."""
        return self.grid[0] // self.scale, self.grid[1] // self.scale


class FluxScales(PatchScales):
    """Of FluxTransformer2DModel, whose pipeline packs 2×2 cells into a token: (channel, row, column)."""

    patch = 2
    adapted = r".*transformer_blocks\.\d+\.(ff\.net\.(0\.proj|2)|proj_mlp)"

    def layers(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        return model.x_embedder, model.proj_out

    def embedding(self, first: Any, scale: int) -> nn.Module:
        weight = first.weight.unflatten(1, (-1, 2, 2))
        return resized_embedding(weight, first.bias, scale)

    def output(self, last: Any, scale: int) -> nn.Module:
        return resized_output(last.weight.unflatten(0, (-1, 4)), last.bias.unflatten(0, (-1, 4)), 2 * scale)

    def grid_of(self, kwargs: dict[str, Any]) -> tuple[int, int]:
        ids = kwargs["img_ids"]
        height, width = (int(n) + 1 for n in (ids[-1] if ids.dim() == 2 else ids[0, -1])[1:])
        if height * width != kwargs["hidden_states"].shape[1]:
            raise ConfigError(f"img_ids must be those of one picture, {height}×{width} of them are not all tokens")
        return height, width

    def picture(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, h·w, 4·C) → (B, C, 2h, 2w)."""
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.grid), 2)

    def embed(self, tokens: torch.Tensor, stem: nn.Module) -> torch.Tensor:
        return stem(self.picture(tokens)).flatten(2).transpose(1, 2)

    def tokens(self, out: torch.Tensor) -> torch.Tensor:
        """(B, M, C·(2s)²) → (B, h·w, 4·C), as at scale 1."""
        picture = F.pixel_shuffle(out.transpose(1, 2).unflatten(2, self.coarse), 2 * self.scale)
        return F.pixel_unshuffle(picture, 2).flatten(2).transpose(1, 2)

    def positions(self, module: Any, args: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary tables of the text and of the coarse patches' middles."""
        ids, count = args[0], self.grid[0] * self.grid[1]
        image = ids[-count:].unflatten(0, self.grid).movedim(2, 0)[:, None].float()
        middles = F.avg_pool2d(image, self.scale)[:, 0].flatten(1).T
        return module.forward(torch.cat([ids[:-count].float(), middles]))


class WanScales(PatchScales):
    """Of WanTransformer3DModel: frames stay as they are, patches grow in rows and columns."""

    adapted = r"blocks\.\d+\.ffn\.net\.(0\.proj|2)"

    def layers(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        self.frames, self.patch, wide = model.config.patch_size
        if self.patch != wide:
            raise ConfigError(f"patches must be square, got {self.patch}×{wide}")
        return model.patch_embedding, model.proj_out

    def embedding(self, first: Any, scale: int) -> nn.Module:
        return resized_embedding(first.weight, first.bias, scale)

    def output(self, last: Any, scale: int) -> nn.Module:
        """Rows (time, row, column, channel) of the base; (channel, time, row, column) here."""
        cells = self.frames, self.patch**2, -1
        parts = (part.unflatten(0, cells).movedim(2, 0).flatten(0, 1) for part in (last.weight, last.bias))
        return resized_output(*parts, self.patch * scale)

    def grid_of(self, kwargs: dict[str, Any]) -> tuple[int, int]:
        height, width = kwargs["hidden_states"].shape[3:]
        return height // self.patch, width // self.patch

    def picture(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, F, H, W) → (B, C·F, H, W)."""
        return latents.flatten(1, 2)

    def embed(self, latents: torch.Tensor, stem: nn.Module) -> torch.Tensor:
        return stem(latents)

    def tokens(self, out: torch.Tensor) -> torch.Tensor:
        """(B, f·M, C·time·(ps)²) → (B, f·h·w, time·p²·C), as at scale 1."""
        batch = len(out)
        rows = out.unflatten(1, (-1, *self.coarse)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        fine = F.pixel_unshuffle(F.pixel_shuffle(rows, self.patch * self.scale), self.patch)
        fine = fine.unflatten(1, (-1, self.frames, self.patch, self.patch)).permute(0, 5, 6, 2, 3, 4, 1)
        return fine.flatten(3).unflatten(0, (batch, -1)).flatten(1, 3)

    def positions(self, module: Any, args: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary tables of the coarse patches' middles."""
        frames, device = args[0].shape[2] // self.frames, args[0].device
        axes = [(module.t_dim, torch.arange(frames))]
        for width, count in zip((module.h_dim, module.w_dim), self.coarse, strict=True):
            axes.append((width, torch.arange(count) * self.scale + (self.scale - 1) / 2))
        options = {"use_real": True, "repeat_interleave_real": True, "freqs_dtype": torch.float64}
        tables = [get_1d_rotary_pos_embed(width, place.double(), 10000.0, **options) for width, place in axes]
        out = []
        for time, row, column in zip(*tables, strict=True):
            shape = (len(time), len(row), len(column), -1)
            parts = time[:, None, None], row[None, :, None], column[None, None]
            out.append(torch.cat([part.expand(shape) for part in parts], 3).flatten(0, 2)[None, :, None].to(device))
        return out[0].to(module.freqs_cos.dtype), out[1].to(module.freqs_cos.dtype)


FAMILIES: dict[type, tuple[type[PatchScales], str, str]] = {
    diffusers.FluxTransformer2DModel: (FluxScales, "x_embedder", "pos_embed"),
    diffusers.WanTransformer3DModel: (WanScales, "patch_embedding", "rope"),
}


def add_patch_scales(model: nn.Module, scales: tuple[int, ...] = (1, 2, 4), rank: int = 32) -> PatchScales:
    """Give a FLUX or Wan transformer coarse patches; returns `model.patches`, whose scale or threshold decides.

    The model is frozen. `model.patches` and a LoRA named "patches" in the feed-forward layers are trained, by the
    distance of coarse answers from those at scale 1. They begin with the model's own layers, resized, and 0. Raises
    ConfigError for another class, a model with adapters already, or scales other than 1 and then 2, 4 or both.
    """
    if type(model) not in FAMILIES:
        raise ConfigError(f"patch scales are for {', '.join(c.__name__ for c in FAMILIES)}, got {type(model).__name__}")
    if chunking_of(model) is not None:
        raise ConfigError("the model has dynamic chunking, which plans for patches of one size: remove it first")
    scales = tuple(scales) if isinstance(scales, list) else scales
    if scales not in ((1, 2), (1, 4), (1, 2, 4)):
        raise ConfigError(f"scales must be 1 and then 2, 4 or both, got {scales!r}")
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"rank must be an integer of at least 1, got {rank!r}")
    if getattr(model, "peft_config", None):
        raise ConfigError(f"the model has adapters already ({', '.join(model.peft_config)}): fuse them first")
    kind, first, place = FAMILIES[type(model)]
    model.requires_grad_(False)
    patches = kind(model, scales)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=kind.adapted)
    model.add_adapter(config, adapter_name=ADAPTER)
    model.patches = patches

    def replace(function):
        return lambda module, args, out: None if patches.scale == 1 else function(module, args)

    stem, head = (lambda parts: parts[str(patches.scale)]), model.proj_out
    model.register_forward_pre_hook(patches.begin, with_kwargs=True)
    getattr(model, first).register_forward_hook(replace(lambda _, args: patches.embed(args[0], stem(patches.stems))))
    getattr(model, place).register_forward_hook(replace(patches.positions))
    head.register_forward_hook(replace(lambda _, args: patches.tokens(stem(patches.heads)(args[0]))))
    return patches


@torch.no_grad()
def resized_embedding(weight: torch.Tensor, bias: torch.Tensor, scale: int) -> nn.Module:
    """A convolution over patches `scale` times as large, from one of weight (D, C, …, p, p)."""
    large = resized_filters(weight, scale * weight.shape[-1])
    kind = nn.Conv2d if weight.dim() == 4 else nn.Conv3d
    stem = kind(weight.shape[1], weight.shape[0], large.shape[2:], stride=large.shape[2:])
    stem.weight, stem.bias = nn.Parameter(large), nn.Parameter(bias.clone())
    return stem


@torch.no_grad()
def resized_output(weight: torch.Tensor, bias: torch.Tensor, side: int) -> nn.Linear:
    """A linear map to patches of `side` cells, from weight (C, p², D) and bias (C, p²)."""
    large = resized_rows(weight, side)
    head = nn.Linear(large.shape[1], large.shape[0], device="meta")
    head.weight, head.bias = nn.Parameter(large), nn.Parameter(resized_rows(bias, side))
    return head
