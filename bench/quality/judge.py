"""Judges of `bench.quality`: the classifier of the set, distances in its features and in raw patches.

python -m bench.quality.judge [--samples N]: what N real training pictures get, of the classes that are drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dcdit.files import replacing
from dcdit.pictures.conv_classifier import ConvClassifier, fit
from dcdit.pictures.evaluation import Features, agreement, compare, frechet

from .sets import FASHION, classes_to_draw, is_folder, open_half

FITTED = 120_000  # pictures that a classifier sees


class Patches(nn.Module):
    """The first `colours` of all disjoint 4×4 patches: uint8 (N, 3, H, W) → (n, 16·colours) in [0, 1]."""

    def __init__(self, colours: int) -> None:
        super().__init__()
        self.colours = colours

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        patches = images[:, : self.colours].unfold(2, 4, 4).unfold(3, 4, 4)
        return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 16 * self.colours) / 255


def judge(pictures: np.ndarray, labels: np.ndarray, data: Path, runs: Path) -> dict[str, float]:
    """The numbers of uint8 pictures (N, H, W, 3), which are to show `labels`, against the held-out set of `data`.

    The classifier is fitted once to the training set, and kept in `runs`.
    """
    net, drawn = classifier(data, runs), [pictures]
    real = lambda: open_half(data, "test").batches()  # noqa: E731
    patches = Patches(3 if is_folder(data) else 1)
    numbers = compare(Features(net, drawn), Features(net, real()))
    numbers["frechet_patches"] = frechet(Features(patches, drawn), Features(patches, real()))
    for name, batches, classes in (("", drawn, labels), ("_reference", real(), open_half(data, "test").labels)):
        numbers[f"recognised{name}"] = agreement(lambda x: net.out(net(x)).argmax(1), batches, classes)
    return numbers


def classifier(data: Path, runs: Path) -> ConvClassifier:
    """The set's classifier, read from `runs`, or fitted and kept there."""
    train, file = open_half(data, "train"), runs / f"{data.name}-classifier.pt"
    net = ConvClassifier(int(train.labels.max()) + 1)
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    net = fit(np.concatenate(list(train.batches())), train.labels, epochs=FITTED / train.count)
    runs.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        torch.save(net.state_dict(), temporary)
    return net


def main() -> None:
    """Means and standard deviations over several draws of the real pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--data", type=Path, default=FASHION, help="idx files, or a folder of classes")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the classifier")
    args = parser.parse_args()
    train, rng = open_half(args.data, "train"), np.random.default_rng(0)
    pictures, labels = np.concatenate(list(train.batches())), np.asarray(train.labels)
    wanted = np.bincount(classes_to_draw(args.data, args.samples))
    judged = []
    for _ in range(args.draws):
        of = [rng.permutation(np.flatnonzero(labels == name)) for name in range(len(wanted))]
        chosen = np.concatenate([own[:count] for own, count in zip(of, wanted, strict=True)])
        judged.append(judge(pictures[chosen], labels[chosen], args.data, args.runs))
    for name in judged[0]:
        values = [numbers[name] for numbers in judged]
        print(f"{name:22}{np.mean(values):10.5f} ± {np.std(values, ddof=1):.5f}", flush=True)


if __name__ == "__main__":
    main()
