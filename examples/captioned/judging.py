"""Judging by captions: sampling, a detector that reads the digits of a picture, and chunk maps."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dcdit.integrations.attention import chunking_of
from dcdit.model.routing import Routing

from .compositions import NONE, SIZES, UNCAPTIONED, Captions, Compositions, caption_id
from .training import train, wait


class Detector(nn.Module):
    """Pictures (B, 1, H, W) of any shape → logits of the first digit (B, 10) and of the second or none (B, 11)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, pool in ((1, 32, 2), (32, 64, 2), (64, 128, 1)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(pool)]
        self.features = nn.Sequential(*layers, nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(6))
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(128 * 36, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 21))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        return self.out(self.features(pictures)).split((10, 11), 1)


def train_detector(data: Compositions, seconds: float, batch: int) -> Detector:
    """On compositions of the training digits."""
    device = data.digits.device
    net, generator, host = Detector().to(device), torch.Generator(device).manual_seed(3), torch.Generator()

    def loss_of(share: float) -> torch.Tensor:
        size = SIZES[int(torch.randint(len(SIZES), (), generator=host))]
        pictures, *digits = data.draw(batch, size, generator)
        return sum(F.cross_entropy(*pair) for pair in zip(net(pictures), digits, strict=True))

    train([{"params": list(net.parameters()), "lr": 2e-3}], seconds, loss_of)
    return net.eval()


@torch.no_grad()
def recognised(net: Detector, pictures: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Whether all digits that the caption names are read, in order, and no other: bool (B,)."""
    heads = net(pictures)
    return (heads[0].argmax(1) == first) & (heads[1].argmax(1) == second)


def ask(
    count: int, size: tuple[int, int], device: torch.device, most: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every caption of one digit, or of `most` 2, in turn: captions' rows, first and second digits (count,)."""
    which = torch.arange(count, device=device) % (UNCAPTIONED // 2 if most == 2 else NONE)
    first, second = (which // 11, which % 11) if most == 2 else (which, torch.full_like(which, NONE))
    return caption_id(first, second, size[0] > size[1]), first, second


@torch.no_grad()
def sample(
    model: nn.Module,
    family: Any,
    captions: Captions,
    which: torch.Tensor,
    size: tuple[int, int],
    seed: int,
    settings: dict[str, Any],
) -> tuple[torch.Tensor, float, list[Routing]]:
    """Pictures (B, 1, H, W) for the captions of the rows `which` (B,) by Euler's method with guidance; the
    share of image tokens that the chunked blocks had; the routing of each step, if there is any."""
    device, chunking = captions.device, chunking_of(model)
    count, steps, generator = len(which), settings["steps"], torch.Generator(device).manual_seed(seed)
    x = torch.randn(count, 1, *size, generator=generator, device=device)
    both, kept, routings = captions[torch.cat([which, torch.full_like(which, UNCAPTIONED)])], [], []
    for step in range(steps):
        t = 1 - step / steps
        inputs = family.inputs(torch.cat([x, x]), torch.full((2 * count,), t, device=device), both)
        with_caption, without = family.velocity(model(**inputs)).chunk(2)
        x = x - (without + settings["guidance"] * (with_caption - without)) / steps
        if chunking is not None:
            routings.append(chunking.routing)
            kept.append(chunking.routing.kept.mean())
    return x, float(torch.stack(kept).mean()) if kept else 1.0, routings


@torch.no_grad()
def judge(
    models: dict[str, tuple[nn.Module, dict[str, Any]]],
    family: Any,
    captions: Captions,
    net: Detector,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """A line for each named model: the share recognised, the share of image tokens in its chunked blocks, seconds for a
    picture. Beside each model stand the attributes of its chunking.

    The models take turns, batch by batch, on the same captions and noise, one size after the other. They end with the
    last picture, or when the time is used up. The first batch of each is not timed.
    """
    batch, device = settings["batch"], captions.device
    found: dict[str, dict[str, Any]] = {name: {"right": [], "kept": [], "seconds": []} for name in models}
    start = time.monotonic()
    for turn in range(max(2, settings["pictures"] // batch)):
        if turn >= len(SIZES) and time.monotonic() - start > settings["seconds"]:
            break
        size = SIZES[turn % len(SIZES)]
        which, first, second = ask(batch, size, device, settings["digits"])
        for name, (model, budget) in models.items():
            set_budget(model, budget)
            wait(device)
            begin = time.monotonic()
            pictures, kept, _ = sample(model, family, captions, which, size, turn, settings)
            wait(device)
            seconds = (time.monotonic() - begin) / batch
            found[name]["seconds"] += [seconds] if turn else []
            found[name]["right"].append(recognised(net, pictures, first, second).float().mean())
            found[name]["kept"].append(kept)
    return [
        {
            "name": name,
            "recognised": round(float(torch.stack(parts["right"]).mean()), 4),
            "kept": round(sum(parts["kept"]) / len(parts["kept"]), 4),
            "seconds": round(sorted(parts["seconds"])[len(parts["seconds"]) // 2], 6),
            "pictures": batch * len(parts["right"]),
        }
        for name, parts in found.items()
    ]


def set_budget(model: nn.Module, budget: dict[str, Any]) -> None:
    """Set attributes of the model's chunking, such as drop_fraction; a model without chunking has an empty budget."""
    for name, value in budget.items():
        setattr(chunking_of(model), name, value)
