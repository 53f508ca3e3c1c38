"""`dcdit sample`: images from a checkpoint; under `accelerate launch` the processes share the work."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ..errors import ConfigError, DataError
from ..pictures import check_output, enlarge, grid, output_folder, save_png, to_uint8
from ..ranks import cpu_ranks
from ..sampling import open_checkpoint, sample
from .options import add_sampling_options, parse_classes, sampling_arguments

FORMATS = ("grid", "png", "npz")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit sample`."""
    parser.add_argument("checkpoint", help="a folder with model.safetensors and config.json")
    add_sampling_options(parser)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--per-class", type=int, default=1, metavar="N", help="images of each class (1)")
    amount.add_argument("--num", type=int, metavar="N", help="images in all, the classes taking turns")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time on each device (64)")
    parser.add_argument("--output", default="samples", metavar="DIR", help="folder to write (samples)")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["grid"],
        help="grid.png; one PNG for each image; samples.npz as the ADM evaluation suite reads it (grid)",
    )


def run(args: argparse.Namespace) -> None:
    """Sample, gather on the first process, write."""
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm import tqdm

    state = PartialState(cpu=args.cpu or cpu_ranks())
    check_output(args.output)
    model, objective, codec = open_checkpoint(args.checkpoint, state.device)
    ids = parse_classes(args.classes, model.config.num_classes)
    count = args.num if args.num is not None else len(ids) * args.per_class
    if count < 1 or args.batch_size < 1:
        raise ConfigError(f"expected at least one image and a batch size of at least 1, got {count}, {args.batch_size}")
    # The classes take turns, so that the first images stay the same when more are asked for.
    labels = np.resize(ids, count)
    if "png" in args.format:
        check_mixture(args.output, labels)
    options = {**sampling_arguments(args, objective, codec), "batch_size": args.batch_size}

    images, traces = [], []
    together = args.batch_size * state.num_processes
    rounds = range(0, count, together)
    # Only on a terminal, and not before the options have passed every check.
    quiet = None if state.is_main_process else True
    with tqdm(total=len(rounds) * args.steps, unit="step", disable=quiet, delay=0.5, leave=False) as bar:
        for first in rounds:
            mine = np.array_split(np.arange(first, min(first + together, count)), state.num_processes)
            mine = mine[state.process_index]
            part = None
            if len(mine):
                result = sample(model, labels[mine], indices=mine, callback=lambda _: bar.update(), **options)
                traces.append(result.trace)
                part = to_uint8(codec.decode(result.latents.to(state.device)))
            images += [part for part in gather_object([part]) if part is not None and state.is_main_process]
    # At exit gloo's threads abort a process that is still in a group; nothing is exchanged from here on.
    state.destroy_process_group()
    if state.is_main_process:
        write(args.output, args.format, np.concatenate(images), labels, columns=len(ids))
        print(f"{count} images in {args.output}/: {summary(traces, model.config)}")


def png_names(labels: np.ndarray) -> list[str]:
    """The files of --format png, one for each image."""
    return [f"{i:06d}_class{label}.png" for i, label in enumerate(labels)]


def check_mixture(directory: str, labels: np.ndarray) -> None:
    """Raise DataError where images of another run would stay among those of `labels`, as FID is taken over a folder."""
    others = {file.name for file in Path(directory).glob("*_class*.png")} - set(png_names(labels))
    if others:
        raise DataError(f"cannot write {directory}: it holds images of another run, such as {min(others)}")


def write(directory: str, formats: list[str], images: np.ndarray, labels: np.ndarray, columns: int) -> None:
    """Write uint8 images (N, H, W, 3) in the formats asked for; all files appear, or none."""
    with output_folder(directory) as folder:
        if "grid" in formats:
            columns = columns if columns <= 32 else int(np.ceil(len(images) ** 0.5))
            save_png(folder / "grid.png", grid(enlarge(images), min(columns, len(images))))
        if "png" in formats:
            for name, image in zip(png_names(labels), images, strict=True):
                save_png(folder / name, image)
        if "npz" in formats:
            np.savez(folder / "samples.npz", images, labels)  # arr_0 and arr_1, as ADM's own scripts write them


def summary(traces, config) -> str:
    """One line about the tokens, FLOPs and time of this process's images."""
    tokens = torch.cat([trace.tokens for trace in traces], dim=1)
    text = f"{tokens.mean() / config.cells:.1%} of {config.cells} cells kept"
    if traces[0].uncond_tokens is not None:
        uncond = torch.cat([trace.uncond_tokens for trace in traces], dim=1)
        text += f" ({uncond.mean() / config.cells:.1%} without class)"
    weights = [trace.tokens.shape[1] / tokens.shape[1] for trace in traces]
    gflops = sum(w * float(trace.gflops(config).sum()) for w, trace in zip(weights, traces, strict=True))
    seconds = sum(float(trace.seconds.sum()) for trace in traces)
    return f"{text}, {gflops:.4g} GFLOP and {seconds / tokens.shape[1]:.3g} s per image"
