"""`dcdit upcycle`: train from the weights of a pretrained DiT or transformer; the command run again resumes."""

from __future__ import annotations

import argparse
import json

from ..errors import ConfigError
from ..files import expanded
from ..integrations.families import FAMILIES
from .options import add_allow


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit upcycle`."""
    parser.add_argument("config", help="a YAML file, such as configs/imagenet256-xl-n4.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as upcycle.distill_steps=5000"
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="CHECKPOINT",
        help="a .pt of the original DiT; or a directory or Hub repository of diffusers' DiT; with --family a directory",
    )
    parser.add_argument(
        "--family",
        choices=FAMILIES,
        help="of a transformer of diffusers, which learns from latents and text embeddings",
    )
    add_allow(parser)


def run(args: argparse.Namespace) -> None:
    """Upcycle, or resume."""
    from ..training.config import load_config

    for override in args.overrides:
        if override.partition("=")[0] in ("source", "family", "from", "upcycle.source"):
            raise ConfigError(f"--from and --family name the model to start from: leave {override} out")
    if not args.family:
        check_family(args.source)
    source = json.dumps(args.source, ensure_ascii=False)  # quoted: a folder may be called 2024
    if args.family:
        from ..training.transformers import TransformerConfig, train_transformer

        overrides = [*args.overrides, f"source={source}", f"family={args.family}"]
        train_transformer(load_config(args.config, overrides, TransformerConfig), args.allow)
        return
    from ..training.run import train

    train(load_config(args.config, [*args.overrides, f"upcycle.source={source}"]), args.allow)


def check_family(source: str) -> None:
    """Raise ConfigError where a folder, or a pipeline's in it, is of a transformer that --family is for."""
    from ..checkpoints.looks import foreign_class

    name = next(filter(None, (foreign_class(expanded(source) / part) for part in ("", "transformer"))), None)
    if name is None:
        return
    from ..integrations.velocities import VELOCITIES

    family = next((family for family, velocity in VELOCITIES.items() if velocity.name == name), None)
    if family:
        raise ConfigError(f"{source} has a {name}: give --family {family}")
