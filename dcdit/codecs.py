"""Codecs between images in [-1, 1] and the latents that the model sees."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from .checkpoints.hub import hub_options, why_not
from .checkpoints.looks import own_folder
from .errors import ConfigError, DataError
from .files import expanded
from .model.config import check_keys


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
        """The inverse of `encode`. Raises DataError when the channels do not divide."""
        if latents.shape[-3] % self.factor**2:
            raise DataError(
                f"latents of {latents.shape[-3]} channels do not divide into {self.factor}×{self.factor} squares"
            )
        return F.pixel_shuffle(latents, self.factor)


class AutoencoderKL:
    """An autoencoder of diffusers, frozen, in float32: AutoencoderKL, AutoencoderDC, AutoencoderTiny, Wan's, Qwen's.

    Latents are (z − offset)·factor, z the posterior's mean. The weights' own configuration gives both: offset is
    `latents_mean` (per channel) or `shift_factor`, and factor is `scaling_factor` / `latents_std`, as diffusers'
    pipelines use them. `scale` replaces `scaling_factor`.
    """

    def __init__(self, pretrained: str = "stabilityai/sd-vae-ft-ema", scale: float | None = None) -> None:
        self.vae = _load_vae(pretrained)
        self.offset, self.factor = latent_scaling(self.vae.config, scale)
        # Autoencoders of video take an axis of frames; a picture is one frame.
        self.frames = any(isinstance(module, torch.nn.Conv3d) for module in self.vae.modules())

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, 4, H/8, W/8) for the usual weights."""
        with torch.autocast(images.device.type, enabled=False):
            out = self.vae.to(images.device).encode(images.unsqueeze(2) if self.frames else images)
            z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out[0]
            z = z.squeeze(2) if self.frames else z
            return (z - self.offset.to(z)) * self.factor.to(z)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in about [-1, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            z = latents / self.factor.to(latents) + self.offset.to(latents)
            images = self.vae.to(latents.device).decode(z.unsqueeze(2) if self.frames else z).sample
            return images.squeeze(2) if self.frames else images


def latent_scaling(config: Any, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(offset, factor) of a diffusers autoencoder, each (C or 1, 1, 1): latents are (z − offset)·factor."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    offset = mean if mean is not None else config.get("shift_factor") or 0.0
    scale = scale or config.get("scaling_factor") or 1.0
    factor = scale / torch.tensor(1.0 if std is None else std)
    return torch.tensor(offset).view(-1, 1, 1), factor.view(-1, 1, 1)


CODECS = {"pixel_unshuffle": PixelUnshuffle, "autoencoder_kl": AutoencoderKL}


def make_codec(kind: str = "", **options: Any) -> PixelUnshuffle | AutoencoderKL:
    """A codec by name, with the options of its class. Raises ConfigError for an unknown name or option."""
    check_keys([kind], CODECS, "codec")
    check_keys(options, inspect.signature(CODECS[kind]).parameters, f"codec {kind}")
    try:
        return CODECS[kind](**options)
    except TypeError as error:
        raise ConfigError(f"codec {kind}: {error}") from error


def _load_vae(pretrained: str):
    """The autoencoder of a folder or Hub repository, which may hold a whole pipeline."""
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError("codec autoencoder_kl needs diffusers: pip install diffusers") from error
    folder = expanded(pretrained)
    source = str(folder) if folder.exists() else pretrained
    subfolder, options = "vae" if (folder / "vae").is_dir() else None, {}
    try:
        if own := own_folder(folder):
            raise ValueError(f"the folder holds a {own}")
        options = {} if folder.exists() else hub_options(pretrained)
        vae = diffusers.AutoModel.from_pretrained(source, subfolder=subfolder, **options)
        if not (hasattr(vae, "encode") and hasattr(vae, "decode")):
            raise ValueError(f"{type(vae).__name__} is no autoencoder")
        return vae.eval().requires_grad_(False).float()
    except (OSError, ValueError, RuntimeError, AttributeError) as error:  # CheckpointError among them
        reason = why_not(error, options)
        raise ConfigError(f"the autoencoder {pretrained!r} of the codec cannot be loaded: {reason}") from error
