"""Upcycling: a DC-DiT that starts from a pretrained DiT and is distilled from it (arXiv 2603.06351 v1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..checkpoints.dit import check_source, load_dit
from ..checkpoints.dit import to_dit as to_dit
from ..errors import CheckpointError, ConfigError, check_kind
from ..model.config import DCDiTConfig
from ..model.dcdit import DCDiT
from ..model.embedders import sincos_2d
from ..model.plain_dit import BLOCKS, PlainDiT, check_start
from ..model.routing import Routing
from .config import TrainConfig
from .trainer import Trainer


def upcycle(teacher: PlainDiT, config: DCDiTConfig) -> DCDiT:
    """A DCDiT with the teacher's blocks and frozen embedders; everything else is fresh.

    Needs `config.cond_norm`. The position table counts in the teacher's patches, the unit that the blocks know. Where
    the teacher has another number of classes, the student's embeddings are fresh and trained, but for "no class".
    Raises ConfigError, where the sizes of the blocks differ too.
    """
    check_kind(teacher, PlainDiT, "teacher", "load_dit reads one")
    check_kind(config, DCDiTConfig, "config")
    if not config.cond_norm:
        raise ConfigError("an upcycled model needs cond_norm=True in its configuration")
    model = DCDiT(config)
    check_start(model, teacher, BLOCKS)
    pairs = [(model.main.blocks, teacher.blocks), (model.time_embed, teacher.time_embed)]
    same_classes = model.class_embed.weight.shape == teacher.class_embed.weight.shape
    if same_classes:
        pairs.append((model.class_embed, teacher.class_embed))
    else:
        with torch.no_grad():
            model.class_embed.weight[-1] = teacher.class_embed.weight[-1]
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())
    model.pos_embed.copy_(sincos_2d(config.hidden_size, config.input_size, teacher.patch))
    model.time_embed.requires_grad_(False)
    model.class_embed.requires_grad_(not same_classes)
    return model


def distillation_loss(
    outputs: list[torch.Tensor], targets: list[torch.Tensor], routing: Routing, patch: int
) -> torch.Tensor:
    """Distance of the student's block outputs from the teacher's, mean over the blocks; 1 for outputs of zero.

    A teacher's token stands for patch×patch cells, of which the student kept some, or none. Its state is compared with
    the mean of the student's rows inside its patch; patches without a row are left out. The rows of one patch
    stay free to differ, as tokens of single cells should. Squares are relative to the teacher's own, so that
    the growing residual stream of late blocks does not outweigh the others.

    Args:
        outputs: (T, D) for each block, packed by `routing.plan`.
        targets: (B, M, D) for each block, M patches in raster order.
    """
    plan = routing.plan
    height, width = plan.grid
    cell = plan.token_index.long() % plan.cells
    place = cell // width // patch * (width // patch) + cell % width // patch
    patches = height // patch * (width // patch)
    index = plan.sample_index.long() * patches + place
    count = torch.bincount(index, minlength=plan.batch_size * patches)
    seen = count.nonzero().flatten()
    losses = []
    for output, target in zip(outputs, targets, strict=True):
        sums = output.new_zeros(len(count), output.shape[1], dtype=torch.float32).index_add(0, index, output.float())
        mean, known = sums[seen] / count[seen, None], target.flatten(0, 1)[seen].float()
        losses.append((mean - known).square().mean() / known.square().mean())
    return torch.stack(losses).mean()


class Upcycler(Trainer):
    """Training that starts from `config.upcycle.source`.

    `distillation_loss` is added in the first `upcycle.distill_steps` steps. The squared distance between the two
    predictions has a share of the diffusion loss, from `upcycle.output_share` in the first step to 0 in the last.
    """

    def __init__(self, config: TrainConfig, allow: Sequence[str] = ()) -> None:
        check_source(config.upcycle.source)  # before the data is looked for
        super().__init__(dataclasses.replace(config, model=dataclasses.replace(config.model, cond_norm=True)), allow)

    def make_net(self) -> DCDiT:
        config = self.config
        self.teacher: PlainDiT | None = load_dit(config.upcycle.source, config.model, config.upcycle.teacher)
        self.teacher = self.teacher.to(self.device)
        self._check_teacher()
        self.targets: list[torch.Tensor] = []
        for block in self.teacher.blocks:
            block.register_forward_hook(lambda _, inputs, output: self.targets.append(output))
        net = upcycle(self.teacher, self.config.model)
        net.main.record = []
        return net

    @torch.no_grad()
    def _check_teacher(self) -> None:
        """Compare the teacher's loss on the first items with the loss of predicting zero. Raises CheckpointError."""
        items = [self.stream[i] for i in range(min(self.config.batch_size, 64))]
        image, noise, t, y = (
            torch.stack([i[key] for i in items]).to(self.device) for key in ("image", "noise", "t", "y")
        )
        x0 = image if self.codec is None else self.codec.encode(image)
        x, channels = self.objective.add_noise(x0, noise, t), self.config.model.in_channels
        target = noise - x0 if self.config.objective == "flow" else noise
        known = self.teacher(x, t, self._labels(y))[:, :channels]
        loss, zero = float((known - target).square().mean()), float(target.square().mean())
        source = self.config.upcycle.source
        self.accelerator.print(f"teacher {source}: loss {loss:.4g} on the first items; predicting zero has {zero:.4g}")
        if loss >= zero and self.config.upcycle.check_teacher:
            raise CheckpointError(
                f"{source} is no teacher for objective {self.config.objective}: its loss is {loss:.4g} on the first "
                f"items, predicting zero has {zero:.4g}; upcycle.teacher=sit is for SiT's convention, "
                "upcycle.check_teacher=false goes on"
            )

    def _labels(self, y: torch.Tensor) -> torch.Tensor:
        """The teacher's labels: its own "no class" for all, where it has other classes."""
        count = self.teacher.class_embed.num_embeddings
        return y if count == self.config.model.num_classes + 1 else torch.full_like(y, count - 1)

    def teach(
        self, diffusion: torch.Tensor, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, routing: Routing
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, loss, parts = self.config.upcycle, diffusion, {}
        by_block = self.step < config.distill_steps
        if not by_block:
            self.net.main.record = None
        if not (by_block or config.output_share):
            self.teacher = None
            return loss, parts
        with torch.no_grad(), self.accelerator.autocast():
            x, t, y = inputs
            known = self.teacher(x, t, self._labels(y)).float()
        if config.output_share:
            # Where a model learns a variance, its channels are the second half.
            channels = self.config.model.in_channels
            parts["output_loss"] = (output[:, :channels] - known[:, :channels]).square().mean()
            share = config.output_share * (1 - self.step / self.config.steps)
            loss = torch.lerp(loss, parts["output_loss"], share)
        if by_block:
            parts["distillation_loss"] = config.distill_weight * distillation_loss(
                self.net.main.record, self.targets, routing, self.teacher.patch
            )
            loss = loss + parts["distillation_loss"]
            self.net.main.record.clear()
        self.targets.clear()
        return loss, parts
