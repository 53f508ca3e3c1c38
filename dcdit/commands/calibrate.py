"""`dcdit calibrate`: the time of a step by batch size and tokens on this machine, the router's own tokens over t."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError
from ..files import check_file
from ..model.config import PRESETS, preset
from .options import add_precision, in_precision


def batch_sizes(text: str) -> list[int]:
    """Numbers such as 1,8,64. For argparse."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 2**20 for part in parts):
        raise argparse.ArgumentTypeError(f"expected batch sizes such as 1,8,64, at most 1048576, got {text!r}")
    return sorted({int(part) for part in parts})


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit calibrate`."""
    parser.add_argument("checkpoint", help=f"a folder, a Hub repository, or a preset ({', '.join(PRESETS)})")
    parser.add_argument(
        "--batch-sizes", type=batch_sizes, default=[1, 8, 64], metavar="LIST", help="images at a time (1,8,64)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind, whose median is taken (5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the table (in the user's cache)")
    add_precision(parser)
    parser.add_argument("--training", action="store_true", help="forward and backward of training, in float32")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")


def run(args: argparse.Namespace) -> None:
    """Measure, write the table, print it; store the router's tokens in a checkpoint's config.json."""
    import torch

    from ..checkpoints.folder import locate, store_use
    from ..model.dcdit import DCDiT
    from ..sampling.measuring import measure, measure_training, router_average
    from ..sampling.sampler import open_checkpoint
    from ..sampling.step_times import table_file

    if args.rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {args.rounds}")
    if args.output is not None:
        if args.output.is_dir():
            raise ConfigError(f"--output must be a file, got the folder {args.output}")
        check_file(args.output, ".json")
    if args.training and args.precision == "bfloat16":
        raise ConfigError("--training is in float32: leave --precision bfloat16 out")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    path = None
    sizes = args.checkpoint in PRESETS or args.checkpoint.startswith("DC-DiT-")
    if sizes and not Path(args.checkpoint).exists() and args.checkpoint != "digits":
        model = DCDiT(preset(args.checkpoint)).to(device).eval()
    else:
        path = locate(args.checkpoint)
        model, objective, _ = open_checkpoint(path, device)
    if not isinstance(model, DCDiT):
        raise ConfigError(f"calibrate is for a DC-DiT, this model is a {type(model).__name__}")
    if path is not None and "router_tokens" not in model.use and not args.training:
        shares = router_average(model, objective)
        store_use(path, {"router_tokens": shares})
        print(
            f"{path / 'config.json'}: the router keeps {shares[-1]:.1%} of the cells at t = 1000, {shares[0]:.1%} at 0"
        )
    if args.training:
        table = measure_training(model.requires_grad_(), args.batch_sizes, rounds=args.rounds)
    else:  # with guidance both halves of an image are rows
        in_precision(model, args.precision)
        rows = sorted({rows for size in args.batch_sizes for rows in (size, 2 * size)})
        table = measure(model, rows, rounds=args.rounds)
    file = table_file(table.of) if args.output is None else args.output
    table.save(file)
    print(f"{file}: milliseconds of a step, {table.of}")
    print(f"{'rows':>6}" + "".join(f"{f'{n} tokens':>13}" for n in table.tokens))
    for count, seconds in zip(table.rows, table.seconds, strict=True):
        print(f"{count:>6}" + "".join(f"{1e3 * value:13.3g}" for value in seconds))
