"""Validation during training: the loss on held-out data, and a sheet of samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from ..codecs import PixelUnshuffle, make_codec
from ..data.sources import Digits, Source, make_source
from ..errors import ConfigError
from ..files import replacing
from ..model.dcdit import DCDiT
from ..model.mixed import by_size
from ..pictures.images import enlarge, grid, save_png, to_uint8
from ..sampling.policy import Policy
from ..sampling.sampler import sample
from .batches import TrainingStream
from .config import TrainConfig
from .parts import moved

BATCH = 64


class Validation:
    """Held-out items with fixed noises and times, at ρ = 0, with the averaged weights.

    Validation draws no random number of the training, so it leaves the training's losses as they are.
    """

    def __init__(self, config: TrainConfig, objective, codec, class_names: list[str] | None, unit: int = 0) -> None:
        self.config, self.objective, self.codec = config, objective, codec
        self.stream: TrainingStream | None = None
        if config.validation.items:
            source = self._source(class_names)
            shape = (config.model.in_channels, *config.model.input_size)
            self.items = min(config.validation.items, len(source))
            options = {"seed": config.seed, "batch_size": len(source), "unit": unit}
            self.stream = TrainingStream(source, objective, shape, config.model.num_classes, **options)
        if config.validation.samples:
            self.decoder = codec or make_codec(**config.codec.options())

    def _source(self, class_names: list[str] | None) -> Source:
        data, path = self.config.data, self.config.validation.path
        if data.kind == "digits":
            return Digits(held_out=True)
        if not path:
            raise ConfigError(f"validation with data.kind={data.kind} needs validation.path, or validation.items=0")
        source = make_source(dataclasses.replace(data, path=path, flip=False), self.config.model)
        if class_names and source.class_names and source.class_names != class_names:
            raise ConfigError(f"the classes of {path} are not those of the training data: {source.class_names}")
        return source

    @torch.no_grad()
    def loss(self, model: DCDiT, autocast) -> dict[str, float]:
        """Means over the held-out items: the diffusion loss, and the share of the cells that was kept."""
        if self.stream is None:
            return {}
        model = Policy().wrap(model)
        device, losses, kept = next(model.parameters()).device, [], []
        for first in range(0, self.items, BATCH):
            items = [self.stream[i] for i in range(first, min(first + BATCH, self.items))]
            batch = self.stream.collate(items)
            image, noise, t, y = (moved(batch[key], device) for key in ("image", "noise", "t", "y"))
            x0 = image if self.codec is None else by_size(self.codec.encode, image)
            with autocast():
                out, routing = model(by_size(self.objective.add_noise, x0, noise, t), t, y, return_routing=True)
            each = by_size(self.objective.loss, by_size(torch.Tensor.float, out), x0, noise, t)
            losses += [loss.double() for loss in each]
            kept.append(routing.kept.double())
        return {"validation_loss": float(torch.stack(losses).mean()), "validation_kept": float(torch.cat(kept).mean())}

    def draw(self, model: DCDiT, file: Path) -> None:
        """Write a sheet of samples of the first classes. The noises are fixed."""
        options = self.config.validation
        labels = np.arange(options.samples) % self.config.model.num_classes
        settings = {"steps": options.steps, "guidance": options.guidance, "seed": self.config.seed % 2**32}
        clip = isinstance(self.decoder, PixelUnshuffle)
        latents = sample(model, labels, objective=self.config.objective, clip=clip, **settings).latents
        images = to_uint8(self.decoder.decode(latents.to(next(model.parameters()).device)))
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, durable=False) as temporary:
            save_png(temporary, grid(enlarge(images), min(len(images), 10)))
