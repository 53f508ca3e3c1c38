"""python -m bench.quality_curves VARIANT…: how far training losses are from the plain DiT's, as docs/images/NAME.png.

Runs of one seed see equal pictures, times and noises: their difference has little noise.
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .machine import read_lines
from .quality import RESULTS, arguments
from .quality_pictures import IMAGES

BEGIN = 0.4  # of the steps: before, the learning of the first strokes is all there is to see


def main() -> None:
    """See the module."""
    parser = arguments(__doc__)
    parser.add_argument("--name", default="quality-losses", help="of the picture")
    args = parser.parse_args()
    figure, ax = plt.subplots(figsize=(7.2, 3.6))
    plain = losses("plain", args)
    for name in args.variants:
        own = losses(name, args)
        count = min(len(own), len(plain))
        gap = np.convolve(own[:count, 1] - plain[:count, 1], np.full(5, 0.2), "same")
        ax.plot(own[2 : count - 2, 0], gap[2:-2], label=name)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xlim(left=BEGIN * plain[-1, 0])
    late = [line.get_ydata()[int(BEGIN * len(plain)) :] for line in ax.lines[:-1]]
    ax.set_ylim(min(0, *(part.min() for part in late)) - 0.002, max(part.max() for part in late) + 0.002)
    ax.set_xlabel("step")
    ax.set_ylabel("training loss − plain DiT's")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(IMAGES / f"{args.name}.png", dpi=100, bbox_inches="tight")


def losses(name: str, args) -> np.ndarray:
    """Steps and training losses (n, 2) of a run in bench/results/quality."""
    file = RESULTS.with_suffix("") / args.data.name / f"{name}-{args.width}-{args.steps}-{args.seed}.jsonl"
    rows = read_lines(file)
    return np.array([[row["step"], row["diffusion_loss"]] for row in rows])


if __name__ == "__main__":
    main()
