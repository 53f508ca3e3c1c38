"""A small convolutional classifier of any set of pictures with classes: its features judge where no Inception fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FEATURES = 64
BATCH = 128


class ConvClassifier(nn.Module):
    """Three convolutions, pooled to 3×3 places, and a hidden layer of 64 values, the features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.hidden, self.out = nn.Linear(9 * widths[-1], FEATURES), nn.Linear(FEATURES, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images uint8 (N, 3, H, W) → features (N, 64)."""
        x = images.float() / 127.5 - 1
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2, ceil_mode=True)
        return F.relu(self.hidden(F.adaptive_avg_pool2d(x, 3).flatten(1)))


def fit(
    images: np.ndarray, labels: np.ndarray, epochs: float = 3, report: Callable[[str], object] = print
) -> ConvClassifier:
    """The classifier of uint8 pictures (N, H, W, 3) with labels (N,): Adam, linear decay; deterministic."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net, steps = ConvClassifier(int(labels.max()) + 1), max(round(epochs * len(labels) / BATCH), 100)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
        for step in range(steps):
            rows = torch.randint(len(labels), (BATCH,)).numpy()
            optimizer.zero_grad()
            logits = net.out(net(to_tensor(images[rows])))
            F.cross_entropy(logits, torch.from_numpy(labels[rows]).long()).backward()
            optimizer.step()
            decay.step()
            if step % 200 == 0:
                report(f"classifier: step {step} of {steps}")
    return net.eval()


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) → uint8 (N, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
