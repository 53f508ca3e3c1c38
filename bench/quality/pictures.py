"""python -m bench.quality.pictures VARIANT…: the first pictures of runs, as docs/images/NAME.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from .study import arguments, folder_of

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main() -> None:
    """See the module."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=2, help="rows of ten classes for each variant")
    parser.add_argument("--name", default="quality", help="of the picture")
    args = parser.parse_args()
    figure, axes = plt.subplots(
        len(args.variants), 1, figsize=(7.2, 0.75 * args.rows * len(args.variants)), squeeze=False
    )
    for name, ax in zip(args.variants, axes[:, 0], strict=True):
        with Image.open(folder_of(name, args) / "pictures.png") as sheet:
            ax.imshow(sheet.crop((0, 0, sheet.width, sheet.height * args.rows // 10)), cmap="gray")
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set_xticks([])
        ax.set_yticks([])
    figure.tight_layout()
    figure.savefig(IMAGES / f"{args.name}.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
