"""What every command that samples has: its options, and what they say."""

from __future__ import annotations

import argparse

import torch

from ..codecs import PixelUnshuffle
from ..errors import ConfigError
from ..sampling import class_ids
from ..schedulers import SCHEDULERS


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options of the trajectory."""
    parser.add_argument("--classes", metavar="IDS", help="such as 0-9 or 1,3,5 (all)")
    parser.add_argument("--steps", type=int, default=50, help="steps from noise to image (50)")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance; 1 is none (2)")
    parser.add_argument(
        "--drop-fraction",
        default="0",
        metavar="RHO",
        help="share of tokens to drop (0); 0.6,0.3,0 gives each an equal share of the steps, noise first",
    )
    parser.add_argument(
        "--uncond-drop-fraction",
        metavar="RHO",
        help="the same for the unconditional half, Lite-CFG (as --drop-fraction)",
    )
    parser.add_argument("--scheduler", default="auto", help=f"auto, {', '.join(SCHEDULERS)}")
    parser.add_argument("--seed", type=int, default=0, help="image I draws its noise from (seed, I) (0)")
    parser.add_argument("--bf16", action="store_true", help="run the model under bfloat16 autocast")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")


def sampling_arguments(args: argparse.Namespace, objective: str, codec) -> dict:
    """Keywords of `sample` from the options above."""
    uncond = args.uncond_drop_fraction
    return {
        "objective": objective,
        "scheduler": args.scheduler,
        "steps": args.steps,
        "guidance": args.guidance,
        "drop_fraction": parse_drop_fraction(args.drop_fraction),
        "uncond_drop_fraction": uncond if uncond is None else parse_drop_fraction(uncond),
        "seed": args.seed,
        "clip": isinstance(codec, PixelUnshuffle),
        "precision": torch.bfloat16 if args.bf16 else None,
    }


def parse_classes(text: str | None, num_classes: int) -> list[int]:
    """Class ids from text such as "0-9" or "1,3,5-7"; without text all of them. Raises ConfigError."""
    if not text:
        return list(range(num_classes))
    ids = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"classes must look like 0-9 or 1,3,5, got {text!r}")
        low, high = int(first), int(last or first)
        if low > high:
            raise ConfigError(f"classes {part.strip()!r} run backwards")
        class_ids([low, high], num_classes)
        ids.extend(range(low, high + 1))
    return ids


def parse_drop_fraction(text: str) -> float | list[float]:
    """ρ from text such as "0.3", or "0,0.3,0.6" for a list over the steps. Raises ConfigError."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"a drop fraction must look like 0.3 or 0,0.3,0.6, got {text!r}") from error
    return values if len(values) > 1 else values[0]
