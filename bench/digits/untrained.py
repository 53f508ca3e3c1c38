"""Quality against tokens of routers that nobody trained: python -m bench.digits.untrained [--samples N]

The shipped digits model, whose own router is trained, samples with that router and with others in its place, each
with exactly so many of the 196 tokens. A classifier that shares nothing with the model says how many samples show what
was asked for. The rest of the model was trained with its own router: the numbers say what the choice of cells is worth
there, and not what a model loses that never saw a packed token.
"""

from __future__ import annotations

import argparse

import torch

from bench.arguments import positive
from dcdit.codecs import make_codec
from dcdit.model.dcdit import DCDiT
from dcdit.model.untrained_routers import DifferenceRouter
from dcdit.pictures.classifier import DigitClassifier
from dcdit.pictures.images import to_uint8
from dcdit.sampling.sampler import sample

TOKENS = (49, 25)


class InPlace(DifferenceRouter):
    """The router of a DC-DiT: p is near 1, as where a trained one is sure, or the smoothing would mix the tokens."""

    def score(self, h: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """h (B, L, D) → (B, L) in [0, 1]."""
        return super().forward(h, grid=grid)

    def forward(self, h: torch.Tensor, c: torch.Tensor, *, grid: tuple[int, ...] = (14, 14)) -> torch.Tensor:
        """h (B, L, D) → boundary_prob (B, L)."""
        return 0.99 + 0.01 * self.score(h, grid)


class Drawn(InPlace):
    """Other cells at each call, at random."""

    def score(self, h: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """h (B, L, D) → (B, L) in [0, 1]."""
        return torch.rand(h.shape[:2], dtype=h.dtype, device=h.device)


def recognised(model: DCDiT, judge: DigitClassifier, samples: int, tokens: int) -> float:
    """The share of samples that show their digit."""
    classes = [i % 10 for i in range(samples)]
    torch.manual_seed(0)
    out = sample(model, classes=classes, objective="flow", steps=20, guidance=2.0, tokens=tokens, batch_size=100)
    pictures = to_uint8(make_codec("pixel_unshuffle", factor=2).decode(out.latents))
    return float((judge(pictures[..., 0]) == classes).mean())


def main() -> None:
    """Print a table: a row for each router, a column for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=positive, default=200)
    samples = parser.parse_args().samples
    judge = DigitClassifier()
    print(f"| router | {' | '.join(f'{n} tokens' for n in TOKENS)} |\n|---|{'---|' * len(TOKENS)}")
    for name, router in (("its own", None), ("difference", InPlace()), ("spread", InPlace()), ("at random", Drawn())):
        model = DCDiT.from_pretrained("digits")
        model.router = router or model.router
        if name == "difference":
            router.watch(model)  # without predictions the cells are spread evenly at each step
        shares = [f"{recognised(model, judge, samples, tokens):.1%}" for tokens in TOKENS]
        print(f"| {name} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
