"""Judges of small grey pictures with classes: a convolutional classifier fitted to the set, and Fréchet distances."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg
from torch import nn

FEATURES = 64
EPOCHS = 3


class Classifier(nn.Module):
    """Three convolutions and a hidden layer of 64, whose values are the features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.hidden, self.out = nn.LazyLinear(FEATURES), nn.Linear(FEATURES, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 1, H, W) in [-1, 1] → (N, 64)."""
        for conv in self.convs:
            images = F.max_pool2d(F.relu(conv(images)), 2)
        return F.relu(self.hidden(images.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 1, H, W) in [-1, 1] → logits (N, classes)."""
        return self.out(self.features(images))


def to_float(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W) → (N, 1, H, W) in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32))[:, None] / 127.5 - 1


def fit(images: np.ndarray, labels: np.ndarray, file: Path) -> Classifier:
    """The classifier of a set, by Adam with a linear decay from seed 0; read from `file` where it is there."""
    torch.manual_seed(0)
    net = Classifier(int(labels.max()) + 1)
    pictures, classes = to_float(images), torch.from_numpy(labels.astype(np.int64))
    net(pictures[:1])
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    optimizer, steps = torch.optim.Adam(net.parameters()), EPOCHS * (len(labels) // 128)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        rows = torch.randint(len(labels), (128,))
        optimizer.zero_grad()
        F.cross_entropy(net(pictures[rows]), classes[rows]).backward()
        optimizer.step()
        decay.step()
        if step % 100 == 0:
            print(f"classifier: step {step} of {steps}", flush=True)
    torch.save(net.state_dict(), file)
    return net.eval()


@torch.no_grad()
def describe(net: Classifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 64) and recognised classes (N,) of uint8 pictures (N, H, W)."""
    features = torch.cat([net.features(to_float(part)) for part in np.array_split(images, -(-len(images) // 500))])
    return features.double().numpy(), net.out(features).argmax(1).numpy()


def patches(images: np.ndarray, side: int = 4) -> np.ndarray:
    """The raw pixels in [0, 1] of all disjoint side×side patches of uint8 pictures (N, H, W): (n, side²)."""
    count, height, width = images.shape
    parts = images.reshape(count, height // side, side, width // side, side).swapaxes(2, 3)
    return parts.reshape(-1, side**2) / 255


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions of rows a (N, F) and b (M, F) (arXiv 1706.08500 eq. 6)."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = linalg.sqrtm(cov_a @ cov_b)
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * np.real(root)))
