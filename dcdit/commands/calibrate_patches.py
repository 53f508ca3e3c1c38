"""`dcdit calibrate-patches`: the threshold τ by which a PatchDiT has a wished speed."""

from __future__ import annotations

import argparse
import dataclasses

from .options import add_sampling_options, parse_classes, prepared, sampling_arguments


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit calibrate-patches`."""
    parser.add_argument("checkpoint", help="a folder of a PatchDiT, or a Hub repository")
    parser.add_argument("--speed", type=float, default=2.0, help="FLOPs of the plain DiT over those wished for (2)")
    parser.add_argument("--num", type=int, default=8, help="images, the classes taking turns (8)")
    parser.add_argument("--save", action="store_true", help="write the policy into the checkpoint's config.json")
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print τ as a policy, and the speed that it reached."""
    from accelerate import PartialState

    from ..checkpoints.folder import locate, store_use
    from ..errors import ConfigError
    from ..sampling.calibration import calibrate
    from ..sampling.sampler import open_checkpoint

    if args.num < 1:
        raise ConfigError(f"num must be at least 1, got {args.num}")
    path = locate(args.checkpoint)
    model, objective, codec = open_checkpoint(path, PartialState(cpu=args.cpu).device)
    model = prepared(model, args)
    ids = parse_classes(args.classes, model.config.num_classes, model.use.get("class_names"))
    options = sampling_arguments(args, objective, codec, model)
    labels = [ids[number % len(ids)] for number in range(args.num)]
    tau, reached = calibrate(model, labels, args.speed, **options)
    policy = dataclasses.replace(options["policy"], patches=float(f"{tau:.4g}"))
    print(f"{policy}: {reached:.3g} times as fast in FLOPs, wished for {args.speed:g}")
    if args.save:
        store_use(path, {"policy": str(policy)})
