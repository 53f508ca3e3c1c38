"""Two of the paper's curves (arXiv 2603.06351) with the shipped digits: python -m bench.digits.paper [--num N]

Left, how near drawn digits are to real ones over the FLOPs, where ρ drops tokens of the unconditional half alone
(Lite-CFG), and where it drops those of both halves. Right, the share of cells that the router keeps of the same
held-out digits at 14 to 56 cells a side, over the times t from data (0) to noise (1); the model was trained at 14. Both
are printed, and drawn as docs/images/digits-paper.png.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from dcdit import DCDiT
from dcdit.data.sources import load_digits
from dcdit.model.flops import dcdit_flops
from dcdit.pictures.images import to_uint8
from dcdit.sampling import open_checkpoint, sample

from ..arguments import positive
from ..quality.pictures import IMAGES
from .tables import Judge

RHOS = (0.0, 0.3, 0.6, 0.9)
SIDES, TIMES = (14, 28, 42, 56), (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)


def guided(args: argparse.Namespace) -> dict[str, list[tuple[float, float, float, float]]]:
    """Name → ρ, GFLOP of an image, Fréchet distance and recognised share, for each ρ."""
    (model, objective, codec), judge = open_checkpoint("digits"), Judge()
    classes = np.arange(args.num) % 10
    options = {"objective": objective, "steps": args.steps, "guidance": args.guidance, "batch_size": 50}

    def draw(rho: float, conditional: float) -> tuple[float, float, float, float]:
        drawn = sample(model, classes, **options, drop_fraction=conditional, uncond_drop_fraction=rho)
        tokens = torch.cat([drawn.trace.tokens, drawn.trace.uncond_tokens]).double().mean(1)
        gflop = sum(dcdit_flops(model.config, float(count))["total"] for count in tokens)
        judged = judge(to_uint8(codec.decode(drawn.latents))[..., 0], classes)
        print(f"ρ {conditional:g} and {rho:g}: {gflop:.2f} GFLOP, {judged}", flush=True)
        return rho, gflop, judged["frechet"], judged["recognised"]

    alike = draw(0.0, 0.0)
    return {
        "ρ of the unconditional half": [alike, *(draw(rho, 0.0) for rho in RHOS[1:])],
        "ρ of both halves": [alike, *(draw(rho, rho) for rho in RHOS[1:])],
    }


@torch.no_grad()
def shares(model: DCDiT, images: np.ndarray, labels: np.ndarray, side: int) -> list[float]:
    """The share of cells that `model` keeps of images uint8 (N, 28, 28) at `side` cells a side, at each of TIMES."""
    pixels = torch.from_numpy(images)[:, None].float() / 127.5 - 1
    if side != 14:
        pixels = torch.nn.functional.interpolate(pixels, size=2 * side, mode="bicubic").clamp(-1, 1)
    latents, classes = torch.nn.functional.pixel_unshuffle(pixels, 2), torch.from_numpy(labels).long()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    kept = []
    for t in TIMES:
        times = torch.full((len(latents),), 1000 * t)
        routing = model((1 - t) * latents + t * noise, times, classes, return_routing=True)[1]
        kept.append(float(routing.kept.mean()))
    return kept


def main() -> None:
    """See the module."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=positive, default=400, help="digits drawn for each point")
    parser.add_argument("--steps", type=positive, default=12)
    parser.add_argument("--guidance", type=float, default=1.5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, points in guided(args).items():
        left.plot([point[1] for point in points], [point[2] for point in points], marker="o", label=name)
        for rho, gflop, distance, _ in points:
            left.annotate(f"{rho:g}", (gflop, distance), textcoords="offset points", xytext=(4, 4), fontsize=8)
    left.set(title="Lite-CFG", xlabel="GFLOP of an image", ylabel="Fréchet distance", yscale="log")
    images, labels, held_out = load_digits()
    chosen = np.flatnonzero(held_out)[::10]
    for side in SIDES:
        kept = shares(open_checkpoint("digits")[0], images[chosen], labels[chosen], side)
        print(f"{side} cells a side: " + ", ".join(f"{share:.1%}" for share in kept), flush=True)
        right.plot(TIMES, kept, marker="o", label=f"{side} cells a side")
    right.set(title="share of cells kept", xlabel="t", ylim=(0, None))
    for axis in (left, right):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(IMAGES / "digits-paper.png", dpi=100)


if __name__ == "__main__":
    main()
