"""The curves of docs/digits.md: loss and share of cells kept over a training run.

python examples/digits_curves.py runs/digits/metrics.jsonl docs/images/digits_curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch


def draw_curves(metrics: Path, picture: Path, window: int = 25) -> None:
    """Loss and share of cells kept over the steps, as running means of `window` logged ones."""
    import matplotlib.pyplot as plt

    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    rows = [line for line in lines if "diffusion_loss" in line]  # losses on held-out items have lines of their own
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = {"diffusion_loss": "velocity loss", "kept": "share of cells kept (after the drop)"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        values = torch.tensor([row[key] for row in rows])
        means = values.unfold(0, window, 1).mean(1) if len(values) >= window else values
        steps = [row["step"] for row in rows][-len(means) :]
        axis.plot(steps, means, linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, 0.5)
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    try:
        draw_curves(args.metrics, args.picture)
    except (OSError, ValueError) as error:
        parser.error(f"from {args.metrics}, a metrics.jsonl of dcdit train, to {args.picture}: {error}")


if __name__ == "__main__":
    main()
