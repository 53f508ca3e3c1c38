"""The model that learns: a pretrained transformer, wrapped, with the losses of both stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from ...files import expanded
from ...integrations.attention import add_dynamic_chunking, chunking_of
from ...integrations.distillation import distillation_loss
from ...integrations.reading import read_config, read_untouched
from ...integrations.velocities import Velocity
from ..objectives import ratio_loss
from ..state import fill, whole

Batch = dict[str, Any]  # x and target (B, C, …), sigma (B,), texts, and what else the family takes


def find_source(folder: str, velocity: Velocity) -> tuple[Path, dict[str, Any]]:
    """Where the transformer of a folder is, there or in a pipeline's, and its config. Raises CheckpointError for any
    other."""
    places = [expanded(folder) / part for part in ("", "transformer")]
    place = next((place for place in places if (place / "config.json").is_file()), None)
    if place is None:
        raise CheckpointError(f"{folder} must be a folder of diffusers with config.json or transformer/config.json")
    config = read_config(place)
    if config["_class_name"] != velocity.name:
        raise CheckpointError(f"{place} must have a {velocity.name}, got {config['_class_name']}")
    if "dynamic_chunking" in config:
        raise CheckpointError(f"{place} has dynamic chunking already: give the model it was made from")
    return place, config


def read_source(folder: str, velocity: Velocity) -> nn.Module:
    """The transformer that `find_source` finds. Raises CheckpointError."""
    place, _ = find_source(folder, velocity)
    return read_untouched(place, velocity.name)


def count_blocks(folder: str, velocity: Velocity) -> int:
    """The blocks of the transformer that `find_source` finds, by its config."""
    _, config = find_source(folder, velocity)
    return sum(config.get(name) or 0 for name in velocity.depth)


def keep_a_share(chunking: nn.Module, n: float, boundary_prob: torch.Tensor | None = None) -> None:
    """Move a fresh router's bias so that it would have kept 1/n of the cells of these scores, or of its last forward.

    A predictability router always keeps the first and the last cell; they count.
    """
    scores = (scores_of(chunking) if boundary_prob is None else boundary_prob).float().logit().flatten()
    free = scores[scores.isfinite()]
    wanted = len(scores) / n - (len(scores) - len(free))
    if len(free):
        bias = chunking.router.score.bias
        fill(bias, whole(bias) - free.quantile(min(1.0, 1 - wanted / len(free))))


def scores_of(chunking: nn.Module) -> torch.Tensor:
    """boundary_prob (groups·B, L) of the last forward."""
    return torch.cat([routing.boundary_prob for routing in chunking.routings])


def save_model(kind: type[nn.Module], config: dict[str, Any], weights: dict[str, torch.Tensor], folder: Path) -> None:
    """A wrapped model of diffusers' class `kind`, as save_pretrained writes it."""
    config = dict(config)
    options = config.pop("dynamic_chunking")
    with torch.device("meta"):
        shell = kind.from_config(config)
        add_dynamic_chunking(shell, **{**options, "blocks": slice(*options["blocks"])})
    shell.load_state_dict(weights, assign=True)
    shell.save_pretrained(folder)


class Student(nn.Module):
    """A wrapped model with its losses as its forward."""

    def __init__(self, velocity: Velocity, model: nn.Module, teacher: nn.Module, target_ratio: float) -> None:
        super().__init__()
        self.model, self.velocity, self.target_ratio = model, velocity, target_ratio
        self.teacher = (teacher,)  # in a tuple: it is no part of this one

    def forward(
        self, batch: Batch, distil: bool, share: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stage's loss, the ratio loss and the share of the image tokens that was kept, all ().

        `share` of them are kept, the most probable ones of the batch, with the first and the last cell of each sample,
        which the router forces; None: as the router says.
        """
        x, target, more = batch["x"], batch["target"], {k: v for k, v in batch.items() if k not in ("x", "target")}
        inputs, chunking = self.velocity.inputs(self.model, x, **more), chunking_of(self.model)
        cells = math.prod(chunking.grid_of(self.model, inputs))
        chunking.budget = None if share is None else max(len(x) * min(2, cells), round(share * len(x) * cells))
        if distil:
            loss = distillation_loss(self.model, *self.teacher, **inputs)
        else:
            loss = (self.velocity.velocity(self.model(**inputs), x).float() - target).square().mean()
        of_groups = [
            torch.stack([ratio_loss(r.boundary_prob, r.natural_mask, self.target_ratio), r.kept.mean()])
            for r in chunking.routings
        ]
        return loss, *torch.stack(of_groups).mean(0)
