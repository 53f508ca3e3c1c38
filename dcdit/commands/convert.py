"""`dcdit convert`: a `.pt` of the public release to a checkpoint directory, or a directory back to a `.pt`."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from ..files import expanded


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit convert`."""
    parser.add_argument("source", help="a .pt file of the public release, a checkpoint directory, or digits")
    parser.add_argument("target", help="the directory to write for a .pt source, the .pt to write for a directory")
    parser.add_argument("--which", choices=("ema", "model"), help="weights of a .pt to take (ema)")
    parser.add_argument("--num-heads", type=int, help="of a .pt that does not say (default: heads of 72 or 64)")
    parser.add_argument("--sigma", type=float, help="smoothing width of a .pt that does not say (default 1)")


def run(args: argparse.Namespace) -> None:
    """Convert. Tensors are copied bit by bit."""
    from ..checkpoints.folder import SHIPPED, load_checkpoint, locate, read_release, save_checkpoint, save_release

    if args.source in SHIPPED or expanded(args.source).is_dir():
        given = {"--which": args.which, "--num-heads": args.num_heads, "--sigma": args.sigma}
        for name in (name for name, value in given.items() if value is not None):
            raise ConfigError(f"{name} is of a .pt, and {args.source} is a checkpoint's folder: leave it out")
        model, use = load_checkpoint(locate(args.source))
        save_release(args.target, model, use)
    else:
        options = {"num_heads": args.num_heads, "sigma": args.sigma, "which": args.which or "ema"}
        model, use = read_release(args.source, **options)
        save_checkpoint(args.target, model, use)
    codec = use.get("codec")
    known = " ".join(str(value) for value in codec.values()) if isinstance(codec, dict) else "unknown"
    print(f"{args.source} → {args.target}: objective {use.get('objective', 'unknown')}, codec {known}")
