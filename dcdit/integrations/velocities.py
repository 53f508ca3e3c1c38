"""What diffusers' transformers take and give, as their pipelines have it: noisy latents and text in, velocities out.

Of each family: the model's class, the modules of text and time, and the calls from latents (B, C, H, W), for video
(B, C, F, H, W), at times σ in [0, 1], 1 for noise. The velocity is noise − latents.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import DataError
from .families import Family

Texts = list[torch.Tensor]  # (S, D) for each sample


def filled(texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of several lengths as (B, S, D), and a bool mask (B, S) of what is text."""
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return nn.utils.rnn.pad_sequence(texts, True), mask.to(texts[0].device)


class Velocity:
    """One family; `ragged` ones take texts of several lengths in a batch, `pooled` ones a vector of each text too."""

    name: ClassVar[str]
    text_and_time: ClassVar[tuple[str, ...]]
    depth: ClassVar[tuple[str, ...]] = ("num_layers",)  # in the model's config, of its lists of blocks
    pooled = ragged = False

    def inputs(self, model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, texts: Texts, **more: Any) -> dict:
        """Keywords of the model's forward."""
        raise NotImplementedError

    def velocity(self, output: Any, x: torch.Tensor) -> torch.Tensor:
        """Of the shape of x."""
        return output.sample

    def sizes(self, config: Any) -> tuple[int, tuple[int, ...], int]:
        """Of a model with this config: the latents' channels, the sides of a token in them, the width of text."""
        raise NotImplementedError

    def check(self, config: Any, shapes: tuple[tuple[int, ...], ...], file: Any) -> None:
        """Raise DataError where a file's latents, text and pooled of these shapes do not fit a model's config."""
        channels, patch, width = self.sizes(config)
        (found, *sides), text, *pooled = shapes
        fits = len(sides) == len(patch) and not any(side % n for side, n in zip(sides, patch, strict=True))
        if found != channels or not fits:
            wanted = ", ".join(f"a multiple of {n}" for n in patch)
            raise DataError(f"{file} must have latents of ({channels}, {wanted}), got {shapes[0]}")
        if text[1] != width:
            raise DataError(f"{file} must have text of (S, {width}), got {text}")
        if pooled and pooled[0] != (config.pooled_projection_dim,):
            raise DataError(f"{file} must have pooled of ({config.pooled_projection_dim},), got {pooled[0]}")


class Flux(Velocity):
    """Latents in patches of 2×2; `guidance` for models that have its embedding."""

    name, text_and_time, pooled = "FluxTransformer2DModel", ("time_text_embed", "context_embedder"), True
    depth = ("num_layers", "num_single_layers")

    def __init__(self) -> None:
        self.ids: dict[tuple, torch.Tensor] = {}

    def sizes(self, config: Any) -> tuple[int, tuple[int, ...], int]:
        """As for all."""
        return config.in_channels // 4, (2, 2), config.joint_attention_dim

    def inputs(
        self,
        model: nn.Module,
        x: torch.Tensor,
        sigma: torch.Tensor,
        texts: Texts,
        pooled: torch.Tensor,
        guidance: float = 3.5,
    ) -> dict:
        """As for all; pooled (B, P)."""
        key = *x.shape[2:], x.device
        if key not in self.ids:  # kept, because the chunked blocks read the grid from it once
            sides = (torch.arange(float(side), device=x.device) for side in (1, x.shape[2] // 2, x.shape[3] // 2))
            self.ids[key] = torch.cartesian_prod(*sides)
        text = torch.stack(texts)
        inputs = {"hidden_states": F.pixel_unshuffle(x, 2).flatten(2).mT, "timestep": sigma}
        inputs |= {"encoder_hidden_states": text, "pooled_projections": pooled}
        inputs |= {"img_ids": self.ids[key], "txt_ids": torch.zeros(text.shape[1], 3, device=x.device)}
        return inputs | ({"guidance": torch.full_like(sigma, guidance)} if model.config.guidance_embeds else {})

    def velocity(self, output: Any, x: torch.Tensor) -> torch.Tensor:
        """As for all."""
        return F.pixel_shuffle(output.sample.mT.unflatten(2, (x.shape[2] // 2, x.shape[3] // 2)), 2)


class SD3(Velocity):
    """SD3 and SD3.5."""

    name, text_and_time, pooled = "SD3Transformer2DModel", ("time_text_embed", "context_embedder"), True

    def sizes(self, config: Any) -> tuple[int, tuple[int, ...], int]:
        """As for all."""
        return config.in_channels, (config.patch_size,) * 2, config.joint_attention_dim

    def check(self, config: Any, shapes: tuple[tuple[int, ...], ...], file: Any) -> None:
        """As for all; the table of positions bounds the sides."""
        super().check(config, shapes, file)
        side = config.pos_embed_max_size * config.patch_size
        if max(shapes[0][1:]) > side:
            raise DataError(f"{file} must have latents of sides up to {side}, got {shapes[0]}")

    def inputs(
        self, model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, texts: Texts, pooled: torch.Tensor, **_: Any
    ) -> dict:
        """As for all; pooled (B, P)."""
        text = {"encoder_hidden_states": torch.stack(texts), "pooled_projections": pooled}
        return {"hidden_states": x, "timestep": 1000 * sigma, **text}


class ZImage(Velocity):
    """Its time is 1 for data, and its output points to the data."""

    name, ragged, depth = "ZImageTransformer2DModel", True, ("n_layers",)
    text_and_time = "t_embedder", "cap_embedder", "context_refiner"

    def sizes(self, config: Any) -> tuple[int, tuple[int, ...], int]:
        """As for all."""
        return config.in_channels, (2, 2), config.cap_feat_dim

    def inputs(self, model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, texts: Texts, **_: Any) -> dict:
        """As for all."""
        return {"x": list(x[:, :, None]), "t": 1 - sigma, "cap_feats": texts}

    def velocity(self, output: Any, x: torch.Tensor) -> torch.Tensor:
        """As for all."""
        return -torch.stack(list(output.sample))[:, :, 0]


class QwenImage(Velocity):
    """Latents in patches of 2×2; texts are filled up, under a mask."""

    name, ragged = "QwenImageTransformer2DModel", True
    text_and_time = "time_text_embed", "txt_norm", "txt_in"

    sizes = Flux.sizes

    def inputs(self, model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, texts: Texts, **_: Any) -> dict:
        """As for all."""
        text, mask = filled(texts)
        text = {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}
        shapes = [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)
        return {"hidden_states": F.pixel_unshuffle(x, 2).flatten(2).mT, "timestep": sigma, "img_shapes": shapes, **text}

    velocity = Flux.velocity


class Wan(Velocity):
    """Wan 2.1, text to video."""

    name, text_and_time = "WanTransformer3DModel", ("condition_embedder",)

    def sizes(self, config: Any) -> tuple[int, tuple[int, ...], int]:
        """As for all."""
        return config.in_channels, config.patch_size, config.text_dim

    def inputs(self, model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, texts: Texts, **_: Any) -> dict:
        """As for all."""
        return {"hidden_states": x, "timestep": 1000 * sigma, "encoder_hidden_states": torch.stack(texts)}


class LTX(Velocity):
    """LTX-Video; `scale` is of a cell, in seconds at 25 frames each and in pixels, as of its own VAE."""

    name, ragged = "LTXVideoTransformer3DModel", True
    text_and_time = "time_embed", "caption_projection"
    scale = 8 / 25, 32, 32

    def sizes(self, config: Any) -> tuple[int, tuple[int, ...], int]:
        """As for all."""
        return config.in_channels, (1, 1, 1), config.caption_channels

    def inputs(self, model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, texts: Texts, **_: Any) -> dict:
        """As for all."""
        text, mask = filled(texts)
        inputs = {"hidden_states": x.flatten(2).mT, "timestep": 1000 * sigma, "rope_interpolation_scale": self.scale}
        inputs |= {"encoder_hidden_states": text, "encoder_attention_mask": mask.long()}
        return inputs | dict(zip(("num_frames", "height", "width"), x.shape[2:], strict=True))

    def velocity(self, output: Any, x: torch.Tensor) -> torch.Tensor:
        """As for all."""
        return output.sample.mT.unflatten(2, x.shape[2:])


VELOCITIES: dict[Family, type[Velocity]] = {
    "flux": Flux,
    "sd3": SD3,
    "z-image": ZImage,
    "qwen-image": QwenImage,
    "wan": Wan,
    "ltx": LTX,
}
