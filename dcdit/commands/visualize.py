"""`dcdit visualize`: chunk maps over the trajectory, and the cost of each step."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError
from ..model.config import DCDiTConfig
from .options import add_sampling_options, output_path, parse_classes, prepared, sampling_arguments, try_out

# The cost of a forward and the levels in curves.png depend on these fields.
SIZES = ("input_size", "hidden_size", "depth", "encoder_width", "encoder_stride", "mlp_ratio", "router", "target_ratio")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit visualize`."""
    parser.add_argument("checkpoint", nargs="+", help="one checkpoint folder, or several of one size to compare")
    add_sampling_options(parser)
    parser.add_argument("--num", type=int, default=4, metavar="N", help="samples to draw (4)")
    parser.add_argument("--times", type=int, default=7, metavar="T", help="timesteps to draw (7)")
    parser.add_argument(
        "--output", type=output_path, default="pictures", metavar="DIR", help="folder to write (pictures)"
    )


def run(args: argparse.Namespace) -> None:
    """Write chunks-NAME.png for each checkpoint and one curves.png."""
    import numpy as np
    import torch

    from ..model.dcdit import DCDiT
    from ..pictures.images import check_output, output_folder
    from ..pictures.trajectory import draw_chunk_maps, draw_curves, record
    from ..sampling.sampler import open_checkpoint

    if args.num < 1 or args.times < 1:
        raise ConfigError(f"expected at least one sample and one timestep, got {args.num} and {args.times}")
    check_output(args.output)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    names = _names(args.checkpoint)
    opened = {name: open_checkpoint(path, device) for name, path in zip(names, args.checkpoint, strict=True)}
    for path, (model, *_) in zip(args.checkpoint, opened.values(), strict=True):
        if not isinstance(model, DCDiT):
            raise ConfigError(f"chunk maps are of a DC-DiT, {path} is a {type(model).__name__}")
    _check_sizes({name: model.config for name, (model, *_) in opened.items()})
    with output_folder(args.output) as folder:
        traces = {}
        for name, (model, objective, codec) in opened.items():
            labels = np.resize(
                parse_classes(args.classes, model.config.num_classes, model.use.get("class_names")), args.num
            )
            model = prepared(model, args)
            options = sampling_arguments(args, objective, codec, model)
            try_out(model, labels, options, forwards=2)  # the first steps also pay for imports and allocations
            samples, snapshots = record(model, labels, args.times, **options)
            draw_chunk_maps(folder / f"chunks-{name}.png", samples, snapshots, codec)
            traces[f"{name} ({objective})"] = samples.trace
        draw_curves(folder / "curves.png", traces, model.config)
    print(f"wrote the chunk maps and curves.png in {args.output}/")


def _names(paths: list[str]) -> list[str]:
    """The folders' names, of the folders above where training called them just 'model'; longer where two are equal."""
    folders = [Path(path).resolve() for path in paths]
    folders = [folder.parent if folder.name == "model" else folder for folder in folders]
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["-".join(folder.parts[1:][-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"expected different checkpoints, got {', '.join(paths)}")


def _check_sizes(configs: dict[str, DCDiTConfig]) -> None:
    """Raise ConfigError where the named models differ in one of SIZES."""
    for key in SIZES:
        values = {name: getattr(config, key) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            raise ConfigError(f"checkpoints to compare must have one {key}, got {values}")
