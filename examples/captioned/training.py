"""Training by time: a dense model by flow matching, and its upcycling, distillation by block and then flow matching."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcdit.integrations.attention import add_dynamic_chunking, chunking_of
from dcdit.integrations.distillation import distillation_loss
from dcdit.interrupts import held_back
from dcdit.training import ratio_loss
from dcdit.training.transformers.student import keep_a_share

from .compositions import SIZES, UNCAPTIONED, Captions, Compositions, caption_id
from .unfinished import Unfinished

WARM_UP, LOGGED = 50, 25  # steps
HELD_OUT = 64  # pictures of each size


class Task:
    """Batches of flow matching: pictures of one random size, captions, times and noise.

    With `bfloat16` models are trained and sampled from under autocast, with compiled blocks.
    """

    def __init__(self, family: Any, data: Compositions, captions: Captions, batch: int, bfloat16: bool = False) -> None:
        self.family, self.data, self.captions, self.batch, self.bfloat16 = family, data, captions, batch, bfloat16
        self.generator = torch.Generator(captions.device).manual_seed(1)
        self.host = torch.Generator().manual_seed(1)

    def draw(self, size: tuple[int, int] | None = None) -> tuple[dict[str, Any], torch.Tensor]:
        """Inputs of the model and the velocity it should predict. A tenth of the captions says nothing."""
        size = size or SIZES[int(torch.randint(len(SIZES), (), generator=self.host))]
        clean, first, second = self.data.draw(self.batch, size, self.generator)
        options = {"generator": self.generator, "device": clean.device}
        which = caption_id(first, second, size[0] > size[1])
        which = torch.where(torch.rand(self.batch, **options) < 0.1, UNCAPTIONED, which)
        t, noise = torch.randn(self.batch, **options).sigmoid(), torch.randn(clean.shape, **options)
        noisy = clean + t[:, None, None, None] * (noise - clean)
        return self.family.inputs(noisy, t, self.captions[which]), noise - clean

    def autocast(self) -> torch.autocast:
        """For the passes of a training or of sampling."""
        return torch.autocast(self.captions.device.type, torch.bfloat16, enabled=self.bfloat16)

    def prepared(self, model: nn.Module) -> nn.Module:
        """The model as it is run. Attention is made of products: a CPU's own takes four times as long."""
        if self.bfloat16:
            model.set_attention_backend("_native_math")
            torch._dynamo.config.recompile_limit = 64  # blocks of one class share it: chunked and not, frozen and not
            model.compile_repeated_blocks(dynamic=True)
        return model

    def loss(self, model: nn.Module, inputs: dict[str, Any], velocity: torch.Tensor) -> torch.Tensor:
        """Mean square error of the velocity."""
        return (self.family.velocity(model(**inputs)) - velocity).square().mean()

    @torch.no_grad()
    def held_out(self, model: nn.Module, data: Compositions) -> float:
        """The loss on pictures of other digits, the same for every model."""
        other = Task(self.family, data, self.captions, HELD_OUT)
        losses = [other.loss(model, *other.draw(size)) for size in SIZES]
        return float(torch.stack(losses).mean())


def train(
    groups: list[dict[str, Any]],
    seconds: float,
    loss_of: Callable[[float], torch.Tensor],
    unfinished: Unfinished | None = None,
) -> list[dict]:
    """AdamW for so many seconds, at rates that fall to zero with the share of the time that is used; the curve.

    `loss_of` takes that share. Two passes come first, in which kernels are compiled. A training that a signal ends is
    left in `unfinished`, and the next call goes on from there. Raises RuntimeError where the loss is not finite.
    """
    for _ in range(2):
        loss_of(0.0).backward()
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    learned = [parameter for group in groups for parameter in group["params"]]
    first, used, curve = unfinished.resume(learned, optimizer) if unfinished else (1, 0.0, [])
    losses, begin = [], time.monotonic() - used
    try:
        for step in itertools.count(first):
            with held_back():
                used = time.monotonic() - begin
                share = min(1, used / seconds)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * min(1, step / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * share))
                loss = loss_of(share)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                losses.append(loss.detach())
                if step % LOGGED == 0 or share == 1:
                    mean = float(torch.stack(losses).mean())
                    if not math.isfinite(mean):
                        raise RuntimeError(f"the loss is {mean} at step {step}")
                    curve.append({"step": step, "seconds": round(used, 2), "loss": round(mean, 5)})
                    losses.clear()
                if share == 1:
                    return curve
    except KeyboardInterrupt:
        if unfinished:
            unfinished.leave(learned, optimizer, step + 1, used, curve)
        raise


def wait(device: torch.device) -> None:
    """For the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def train_dense(task: Task, config: dict[str, Any], file: Path) -> tuple[nn.Module, list[dict]]:
    """A model of the family, by flow matching, and the curve. An unfinished training is in `file`."""
    device = task.captions.device
    model = task.prepared(task.family.model().to(device))

    def loss_of(share: float) -> torch.Tensor:
        with task.autocast():
            return task.loss(model, *task.draw())

    groups = [{"params": list(model.parameters()), "lr": config["lr"]}]
    return model, train(groups, config["seconds"], loss_of, Unfinished(file, (task.generator, task.host)))


def upcycle(
    task: Task, dense: nn.Module, config: dict[str, Any], file: Path, begun: nn.Module | None = None
) -> tuple[nn.Module, list[dict]]:
    """A wrapped copy of the dense model, or `begun`, trained on the tokens that its router keeps, and the curve. An
    unfinished training is in `file`.

    Each batch keeps as many tokens as ρ leaves of a share 1/N, and the ratio loss teaches the router to mark that share
    by itself. The teacher's prediction is a second target: its share of the velocity loss falls from `output_share` in
    the first step to none in the last.
    """
    n = config["target_ratio"]
    model, teacher = begun or copy.deepcopy(dense), copy.deepcopy(dense).requires_grad_(False)
    chunking = chunking_of(model) or add_dynamic_chunking(model, blocks=slice(*config["blocks"]))
    for name in config["frozen"]:
        model.get_submodule(name).requires_grad_(False)
    router = list(chunking.router.parameters())
    own = {id(parameter) for parameter in router}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    if begun is None:
        with torch.no_grad():
            model(**task.draw()[0])
            keep_a_share(chunking, n)
    task.prepared(model)
    task.prepared(teacher)

    def loss_of(share: float) -> torch.Tensor:
        with task.autocast():
            return loss_at(share)

    def loss_at(share: float) -> torch.Tensor:
        inputs, velocity = task.draw()
        which = int(torch.randint(len(config["drop_fractions"]), (), generator=task.host))
        kept = (1 - config["drop_fractions"][which]) / n
        chunking.budget = round(velocity.numel() / task.family.patch**2 * kept)
        if share < config["distill_share"]:
            loss = distillation_loss(model, teacher, **inputs)
        else:
            if (weight := config["output_share"] * (1 - share)) > 0:
                with torch.no_grad():
                    velocity = velocity + weight * (task.family.velocity(teacher(**inputs)) - velocity)
            loss = task.loss(model, inputs, velocity)
        routing = chunking.routing
        return loss + config["ratio_weight"] * ratio_loss(routing.boundary_prob, routing.natural_mask, n)

    groups = [{"params": rest, "lr": config["lr"]}, {"params": router, "lr": config["router_lr"]}]
    curve = train(groups, config["seconds"], loss_of, Unfinished(file, (task.generator, task.host)))
    chunking.budget = None
    return model, curve
