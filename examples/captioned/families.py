"""A FLUX-like and a Z-Image-like model of captioned pictures: their inputs, and the velocity in their output."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import nn

from .compositions import BYTES, Captions


def close(*layers: nn.Linear) -> None:
    """Zero the weights and biases of layers."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class Flux:
    """FluxTransformer2DModel on tokens of 2×2 or 4×4 pixels; `options` are the model's own."""

    KIND = diffusers.FluxTransformer2DModel

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.patch = options, math.isqrt(options["in_channels"])
        self.ids: dict[tuple, torch.Tensor] = {}

    def model(self) -> nn.Module:
        """A model of random weights with closed gates and an output of zero."""
        model = self.KIND(**self.options)
        close(model.proj_out, *(m for name, m in model.named_modules() if name.endswith(".linear")))
        return model

    def inputs(self, x: torch.Tensor, t: torch.Tensor, captions: Captions) -> dict[str, Any]:
        """Keywords of the model's forward, of x (B, 1, H, W) at times t (B,) and captions."""
        height, width = self.grid = x.shape[2] // self.patch, x.shape[3] // self.patch
        key = (*self.grid, x.device)
        if key not in self.ids:
            sides = (torch.arange(float(side), device=x.device) for side in (1, height, width))
            self.ids[key] = torch.cartesian_prod(*sides)
        tokens = F.pixel_unshuffle(x, self.patch).flatten(2).mT
        words = {"encoder_hidden_states": captions.text, "pooled_projections": captions.pooled}
        ids = {"img_ids": self.ids[key], "txt_ids": torch.zeros(BYTES, 3, device=x.device)}
        return {"hidden_states": tokens, "timestep": t, **words, **ids}

    def velocity(self, output: Any) -> torch.Tensor:
        """The velocity (B, 1, H, W) in the output for the last inputs."""
        return F.pixel_shuffle(output.sample.float().mT.unflatten(2, self.grid), self.patch)


class ZImage:
    """ZImageTransformer2DModel on pictures of one frame, in patches of their options' first size, or 2×2 pixels."""

    KIND = diffusers.ZImageTransformer2DModel

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.patch = options, options.get("all_patch_size", [2])[0]

    def model(self) -> nn.Module:
        """A model of random weights with closed gates and an output of zero."""
        model = self.KIND(**self.options)
        close(*(m for name, m in model.named_modules() if ".adaLN_modulation." in name and isinstance(m, nn.Linear)))
        close(*(layer.linear for layer in model.all_final_layer.values()))
        return model

    def inputs(self, x: torch.Tensor, t: torch.Tensor, captions: Captions) -> dict[str, Any]:
        """Keywords of the model's forward, of x (B, 1, H, W) at times t (B,) and captions."""
        return {"x": list(x[:, :, None]), "t": t, "cap_feats": list(captions.text), "patch_size": self.patch}

    def velocity(self, output: Any) -> torch.Tensor:
        """The velocity (B, 1, H, W) in the output for the last inputs."""
        return torch.stack(list(output.sample)).float()[:, :, 0]


FAMILIES = {"flux": Flux, "z-image": ZImage}
