"""`dcdit sample`: images from a checkpoint; under `accelerate launch` the processes share the work."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import sys

from ..errors import ConfigError
from .options import (
    add_sampling_options,
    output_path,
    parse_classes,
    picture_size,
    prepared,
    sampling_arguments,
    settings_of,
    try_out,
)

FORMATS = ("grid", "png", "npz")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit sample`."""
    parser.add_argument(
        "checkpoint", help="a folder with model.safetensors and config.json, a Hub repository, or digits"
    )
    add_sampling_options(parser)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--per-class", type=int, metavar="N", help="images of each class (1)")
    amount.add_argument("--num", type=int, metavar="N", help="images in all, the classes taking turns")
    parser.add_argument(
        "--size", type=picture_size, metavar="HxW", help="height and width in pixels, such as 192x320 (the model's own)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time on each device (64)")
    parser.add_argument(
        "--output", type=output_path, default="samples", metavar="DIR", help="folder to write (samples)"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["grid"],
        help="grid.png; one PNG for each image; samples.npz as the ADM evaluation suite reads it (grid)",
    )
    parser.add_argument("--table", action="store_true", help="print what was decided for each step of the first batch")


def run(args: argparse.Namespace) -> None:
    """Sample; write every picture as soon as it is there; a second call goes on."""
    from accelerate import PartialState
    from tqdm import tqdm

    from ..checkpoints.folder import locate
    from ..files import locked
    from ..pictures.images import check_output
    from ..sampling.picture_run import PictureRun
    from ..sampling.sampler import latent_size, open_checkpoint
    from ..sampling.trajectory import plan_trajectory
    from ..training.ranks import cpu_ranks, joining

    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", "bf16" if args.precision == "bfloat16" else "no"):
        takes = "dcdit sample takes --precision bfloat16"
        raise ConfigError(f"accelerate launch asks for mixed_precision={wanted}; {takes}")
    with joining():
        state = PartialState(cpu=args.cpu or cpu_ranks())
    output = check_output(args.output)
    checkpoint = locate(args.checkpoint)
    model, objective, codec = open_checkpoint(checkpoint, state.device)
    model = prepared(model, args)
    ids = parse_classes(args.classes, model.config.num_classes, model.use.get("class_names"))
    per_class = 1 if args.per_class is None else args.per_class  # no default: argparse excludes none that is given
    count = args.num if args.num is not None else len(ids) * per_class
    if count < 1 or args.batch_size < 1:
        raise ConfigError(f"expected at least one image and a batch size of at least 1, got {count}, {args.batch_size}")
    options = sampling_arguments(args, objective, codec, model)
    config = model.config
    if args.size:
        options["size"] = latent_size(args.size, config, codec)
        times = math.prod(options["size"]) / math.prod(config.input_size)
        if times > 64:
            print(f"warning: {times:.0f} times the model's own cells; attention takes its square", file=sys.stderr)
        config = dataclasses.replace(config, input_size=options["size"])
    settings = settings_of(args, checkpoint, ids)
    if args.seconds_per_image is not None:
        # The tokens of all pictures, also of those in a last batch that is smaller; another table gives others.
        if str(options["policy"]):
            raise ConfigError(f"--seconds-per-image and a policy exclude each other, got {options['policy']}")
        without = {name: value for name, value in options.items() if name != "policy"}
        planned = plan_trajectory(model, 1, batch_size=min(args.batch_size, count), **without)
        settings["tokens"] = planned.budgets[0][:, 0].tolist()
        options |= {"tokens": settings["tokens"], "seconds_per_image": None}
        options |= {"calibration": None, "budget_schedule": "constant"}
    pictures = PictureRun(output, ids, count, settings, args.format)
    if pictures.finished:
        if state.is_main_process:
            print(f"{count} images are in {output}/ already")
        return
    try_out(model, ids[:1], options)
    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            output.mkdir(exist_ok=True)
            stack.enter_context(locked(output))
            pictures.begin()
        state.wait_for_everyone()
        costs = Costs(config)
        rounds = Rounds(pictures, args.batch_size, state.num_processes, state.process_index)
        # Only on a terminal.
        quiet = None if state.is_main_process else True
        bar = stack.enter_context(tqdm(total=len(rounds), unit="batch", disable=quiet, delay=0.5, leave=False))
        state.wait_for_everyone()  # each has looked at the folder
        try:
            for mine in rounds:
                if mine:
                    draw(pictures, mine, model, codec, options, costs)
                bar.update()
        except KeyboardInterrupt:
            print(f"{costs.images} images are new in {output}/; the same command goes on", file=sys.stderr)
            raise
        state.wait_for_everyone()
        # At exit gloo's threads abort a process that is still in a group; nothing is exchanged from here on.
        state.destroy_process_group()
        if state.is_main_process:
            pictures.finish()
            graphs = f"; {model.summary()}" if args.cuda_graph else ""
            if args.table and costs.table:
                print(costs.table)
            print(f"{count} images in {output}/: {costs.summary()}{graphs}")


class Rounds:
    """Indices of this process's batches, those without a missing picture empty.

    Every call has equal batches. A resumed run is therefore bit-equal to an uninterrupted one.
    """

    def __init__(self, pictures, batch_size: int, processes: int, process: int) -> None:
        self.pictures, self.processes, self.process = pictures, processes, process
        self.starts = range(0, pictures.count, batch_size * processes)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self):
        for first in self.starts:
            size = min(self.starts.step, self.pictures.count - first)
            # As even as can be, the longer ones first.
            shares = [
                min(rank, size % self.processes) + rank * (size // self.processes) for rank in range(self.processes + 1)
            ]
            mine = range(first + shares[self.process], first + shares[self.process + 1])
            yield range(0) if all(self.pictures.done(index) for index in mine) else mine


def draw(pictures, indices: range, model, codec, options: dict, costs: Costs) -> None:
    """Sample one batch and write its missing pictures."""
    from ..pictures.images import to_uint8
    from ..sampling.sampler import sample

    labels = [pictures.label(index) for index in indices]
    result = sample(model, labels, indices=list(indices), batch_size=len(indices), **options)
    images = to_uint8(codec.decode(result.latents.to(next(model.parameters()).device)))
    for index, image in zip(indices, images, strict=True):
        if not pictures.done(index):
            pictures.save(index, image)
    costs.add(result.trace)


class Costs:
    """Sums over the pictures of this process."""

    def __init__(self, config) -> None:
        self.config, self.images, self.kept, self.uncond, self.gflops, self.seconds = config, 0, 0.0, None, 0.0, 0.0
        self.table = ""  # of the first batch

    def add(self, trace) -> None:
        images = trace.tokens.shape[1]
        self.table = self.table or trace.table()
        self.images += images
        self.kept += float(trace.tokens.mean()) * images
        if trace.uncond_tokens is not None:
            self.uncond = (self.uncond or 0.0) + float(trace.uncond_tokens.nanmean()) * images
        self.gflops += float(trace.gflops(self.config).sum()) * images
        self.seconds += float(trace.seconds.sum())

    def summary(self) -> str:
        """One line about the tokens, FLOPs and time."""
        if not self.images:
            return "all were there"
        cells = self.config.cells * self.images
        text = f"{self.kept / cells:.1%} of {self.config.cells} cells kept"
        if self.uncond is not None:
            text += f" ({self.uncond / cells:.1%} without class)"
        return f"{text}, {self.gflops / self.images:.4g} GFLOP and {self.seconds / self.images:.3g} s per image"
