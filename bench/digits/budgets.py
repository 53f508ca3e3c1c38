"""Budgets beside ρ at equal mean tokens, on the shipped digits: python -m bench.digits.budgets [--num N] [--steps N]

For each ρ the digits are drawn by ρ; then with as many tokens in each step for each image as ρ kept on average; then
with as many for each batch, which its images share as the router sees fit; then with their mean in every step. The
classifier of the demo says how many it takes for the wanted digit.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from bench.arguments import positive
from dcdit import DCDiT
from dcdit.pictures.classifier import DigitClassifier
from dcdit.pictures.images import to_uint8
from dcdit.sampling import open_checkpoint, sample


class Shared(DCDiT):
    """A DCDiT whose samples share their tokens."""

    def forward(self, x, t, y, *args, budget_per_sample=None, **options):
        """As DCDiT's."""
        budget = None if budget_per_sample is None else len(x) * budget_per_sample
        return super().forward(x, t, y, *args, budget=budget, **options)


def main() -> None:
    """Print a line for each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=positive, default=500)
    parser.add_argument("--steps", type=positive, default=12)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--drop-fractions", type=float, nargs="+", default=[0.0, 0.5])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, objective, codec = open_checkpoint("digits")
    shared = Shared(model.config).eval()
    shared.load_state_dict(model.state_dict())
    classify, classes = DigitClassifier(), np.arange(args.num) % 10

    def draw(name, net, **budget) -> torch.Tensor:
        """The mean tokens of the steps (S,)."""
        options = {"objective": objective, "steps": args.steps, "guidance": args.guidance, "batch_size": 50}
        drawn = sample(net, classes, **options, **budget)
        right = int((classify(to_uint8(codec.decode(drawn.latents))[..., 0]) == classes).sum())
        halves = [half for half in (drawn.trace.tokens, drawn.trace.uncond_tokens) if half is not None]
        each = torch.stack(halves).mean((0, 2))
        spread = float(drawn.trace.tokens.mean(0).std())
        tokens = f"{float(each.mean()):7.2f} tokens, ± {spread:4.1f} between images"
        print(f"{name:28}{tokens}{right:7d} of {args.num} recognised ({right / args.num:.1%})", flush=True)
        return each

    for rho in args.drop_fractions:
        each = draw(f"ρ = {rho:g}", model, drop_fraction=rho)
        steps = each.round().int().tolist()
        draw("  per sample, ρ's own steps", model, tokens=steps)
        draw("  shared by 50 and both halves", shared, tokens=steps)
        draw("  per sample, constant", model, tokens=round(float(each.mean())))


if __name__ == "__main__":
    main()
