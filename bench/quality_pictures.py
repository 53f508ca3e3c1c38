"""python -m bench.quality_pictures VARIANT…: the first pictures of runs, as docs/images/quality.png."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

TARGET = Path(__file__).parents[1] / "docs" / "images" / "quality.png"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="+", metavar="VARIANT")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2, help="rows of ten classes for each variant")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    args = parser.parse_args()
    figure, axes = plt.subplots(len(args.variants), 1, figsize=(7.2, 1.5 * len(args.variants)), squeeze=False)
    for name, ax in zip(args.variants, axes[:, 0], strict=True):
        with Image.open(args.runs / f"{name}-{args.steps}-{args.seed}" / "pictures.png") as sheet:
            ax.imshow(sheet.crop((0, 0, sheet.width, sheet.height * args.rows // 10)), cmap="gray")
        ax.set_ylabel(name)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.tight_layout()
    figure.savefig(TARGET, dpi=100)


if __name__ == "__main__":
    main()
