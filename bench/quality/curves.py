"""Training losses less the plain DiT's, as docs/images/NAME.png: python -m bench.quality.curves VARIANT…

Runs of one seed see equal pictures, times and noises: their difference has little noise.
"""

from __future__ import annotations

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..machine import read_lines
from .pictures import IMAGES
from .study import RESULTS, VARIANTS

BEGIN = 0.18  # of the steps: before, the learning of the first strokes is all there is to see


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--panels", nargs="+", default=["fashion-mnist/0"], metavar="SET/SEED")
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--name", default="quality-losses", help="of the picture")
    args = parser.parse_args()
    figure, axes = plt.subplots(
        1, len(args.panels), figsize=(2.6 + 2.4 * len(args.panels), 3.2), sharey=True, squeeze=False
    )
    for panel, ax in zip(args.panels, axes[0], strict=True):
        plain = losses("plain", panel, args)
        for name in args.variants:
            own = losses(name, panel, args)
            count = min(len(own), len(plain))
            gap = np.convolve(own[:count, 1] - plain[:count, 1], np.full(5, 0.2), "valid")
            late = own[2 : count - 2, 0] > BEGIN * plain[-1, 0]
            ax.plot(own[2 : count - 2, 0][late], gap[late], label=name)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_title(", seed ".join(panel.split("/")), fontsize=10)
        ax.set_xlabel("step")
    axes[0, 0].set_ylabel("training loss − plain DiT's")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(IMAGES / f"{args.name}.png", dpi=100, bbox_inches="tight")


def losses(name: str, panel: str, args: argparse.Namespace) -> np.ndarray:
    """Steps and training losses (n, 2) of a run in bench/results/quality; `panel` is SET/SEED."""
    data, seed = panel.split("/")
    rows = read_lines(RESULTS.with_suffix("") / data / f"{name}-{args.width}-{args.steps}-{seed}.jsonl")
    return np.array([[row["step"], row["diffusion_loss"]] for row in rows])


if __name__ == "__main__":
    main()
