"""Codecs between images in [-1, 1] and the latents that the model sees."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .config import check_keys
from .errors import ConfigError, DataError


class PixelUnshuffle:
    """Lossless: each `factor`×`factor` square of pixels becomes the channels of one cell."""

    def __init__(self, factor: int = 2) -> None:
        if not isinstance(factor, int) or factor < 1:
            raise ConfigError(f"codec.factor must be a positive integer, got {factor!r}")
        self.factor = factor

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, C·f², H/f, W/f). Raises DataError when the size does not divide."""
        if images.shape[-1] % self.factor or images.shape[-2] % self.factor:
            size = "×".join(map(str, images.shape[-2:]))
            raise DataError(f"images of {size} pixels do not divide into {self.factor}×{self.factor} squares")
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`."""
        return F.pixel_shuffle(latents, self.factor)


class AutoencoderKL:
    """A diffusers `AutoencoderKL`, frozen; latents are the posterior's mean times `scale`, in float32."""

    def __init__(self, pretrained: str = "stabilityai/sd-vae-ft-ema", scale: float | None = None) -> None:
        try:
            import diffusers
        except ImportError as error:
            raise ConfigError("codec autoencoder_kl needs diffusers: pip install diffusers") from error
        try:
            self.vae = diffusers.AutoencoderKL.from_pretrained(pretrained).eval().requires_grad_(False)
        except OSError as error:
            raise ConfigError(f"codec.pretrained {pretrained!r} cannot be loaded: {error}") from error
        self.scale = scale or self.vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, 4, H/8, W/8) for the usual weights."""
        with torch.autocast(images.device.type, enabled=False):
            return self.vae.to(images.device).encode(images).latent_dist.mode() * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in about [-1, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.to(latents.device).decode(latents / self.scale).sample


CODECS = {"pixel_unshuffle": PixelUnshuffle, "autoencoder_kl": AutoencoderKL}


def make_codec(kind: str, **options: Any) -> PixelUnshuffle | AutoencoderKL:
    """A codec by name, with the options of its class. Raises ConfigError for an unknown name or option."""
    check_keys([kind], CODECS, "codec")
    try:
        return CODECS[kind](**options)
    except TypeError as error:
        raise ConfigError(f"codec {kind}: {error}") from error
