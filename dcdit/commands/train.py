"""`dcdit train`: train from a YAML file; the command run again resumes."""

from __future__ import annotations

import argparse

from .options import add_allow


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit train`."""
    parser.add_argument("config", help="a YAML file, such as configs/digits.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as steps=1000 optim.lr=1e-3"
    )
    add_allow(parser)


def run(args: argparse.Namespace) -> None:
    """Train or resume."""
    from ..training.config import load_config
    from ..training.run import train

    train(load_config(args.config, args.overrides), args.allow)
