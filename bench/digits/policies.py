"""python -m bench.digits.policies: the shipped digits by policies: cost, what is recognised, how far pictures move.

The distance is the root mean square of the difference from the pictures without a policy, of the same noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.arguments import known, positive
from dcdit import DCDiT
from dcdit.pictures.images import to_uint8
from dcdit.sampling import Policy, sample

POLICIES = (
    "reuse=2",
    "reuse=4",
    "teacache=0.05",
    "teacache=0.1",
    "teacache=0.2",
    "reuse=2 & teacache=0.1",
    "guidance=200:800",
    "budget=24",
    "budget=36:12",
    "budget=24 & teacache=0.1",
    "grid=0.5:900",
    "grid=0.5:800",
    "grid=0.5:600",
)


class Row(NamedTuple):
    """One policy: distance, share of the forwards that were computed, GFLOP of an image, recognised images."""

    policy: str
    distance: float
    computed: float
    gflops: float
    recognised: int


def measure(
    model: DCDiT,
    decode: Callable[[torch.Tensor], torch.Tensor],
    classify: Callable[[np.ndarray], np.ndarray],
    classes: np.ndarray,
    policies: Sequence[str],
    **options: Any,
) -> Iterator[Row]:
    """Yield a Row for no policy and for each of `policies`; `options` are `sample`'s."""
    plain = None
    for policy in ("", *policies):
        latents, trace = (run := sample(model, classes, policy=Policy.of(policy), **options)).latents, run.trace
        plain = latents if plain is None else plain
        halves = [trace.tokens] if trace.uncond_tokens is None else [trace.tokens, trace.uncond_tokens]
        tokens = torch.cat(halves)
        images = to_uint8(decode(latents))
        yield Row(
            policy or "none",
            float((latents - plain).square().mean().sqrt()),
            float((tokens > 0).float().mean()),
            float(trace.gflops(model.config).sum()),
            int((classify(images[..., 0]) == classes).sum()),
        )


def main() -> None:
    """Print a table in Markdown."""
    from dcdit.codecs import make_codec
    from dcdit.pictures.classifier import DigitClassifier

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "policies", nargs="*", type=known(Policy.of), default=POLICIES, help="as of dcdit sample --policy"
    )
    parser.add_argument("--per-class", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=25)
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args()
    model, classify = DCDiT.from_pretrained("digits"), DigitClassifier()
    codec, classes = make_codec(**model.use["codec"]), np.arange(10).repeat(args.per_class)
    options = {"objective": model.use["objective"], "steps": args.steps, "guidance": args.guidance, "clip": True}
    print(f"{len(classes)} digits, {args.steps} steps, guidance {args.guidance:g}\n")
    print_rows(measure(model, codec.decode, classify, classes, args.policies, **options))


def print_rows(rows: Iterable[Row]) -> None:
    """A table in Markdown, line by line."""
    print("| policy | distance, rms | forwards computed | GFLOP per image | recognised |\n|---|---|---|---|---|")
    for row in rows:
        name = row.policy if row.policy == "none" else f"`{row.policy}`"
        print(f"| {name} | {row.distance:.3f} | {row.computed:.0%} | {row.gflops:.2f} | {row.recognised} |", flush=True)


if __name__ == "__main__":
    main()
