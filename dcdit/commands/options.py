"""Options of every command that samples."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..files import expanded
from ..model.config import check_keys
from ..sampling.schedulers import SCHEDULERS

ALL_TIMES = (0.0, 1000.0)


def output_path(text: str) -> str:
    """A folder to write, ~ expanded. For argparse."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    try:
        return str(expanded(text))
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def interval(text: str) -> tuple[float, float]:
    """Two timesteps such as 100,900. For argparse."""
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected two timesteps such as 100,900, got {text!r}") from error
    if not 0 <= low <= high <= 1000:
        raise argparse.ArgumentTypeError(f"expected 0 ≤ low ≤ high ≤ 1000, got {text!r}")
    return low, high


def picture_size(text: str) -> tuple[int, int]:
    """Height and width such as 192x320. For argparse."""
    match = re.fullmatch(r"(\d+)[x×](\d+)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected height and width in pixels such as 192x320, got {text!r}")
    return int(match[1]), int(match[2])


def add_allow(parser: argparse.ArgumentParser) -> None:
    """--allow of `dcdit train` and `dcdit upcycle`."""
    parser.add_argument(
        "--allow",
        type=lambda text: [key.strip() for key in text.split(",") if key.strip()],
        action="extend",
        default=[],
        metavar="KEYS",
        help="keys that may differ from the run that is resumed, such as optim.lr,precision; the change is recorded",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options of the trajectory."""
    parser.add_argument("--classes", metavar="IDS", help="such as 0-9 or 1,3,5, or names such as cat,dog (all)")
    parser.add_argument("--steps", type=int, default=50, help="steps from noise to image (50)")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance; 1 is none (2)")
    parser.add_argument(
        "--guidance-channels",
        type=int,
        metavar="C",
        help="channels of the latent that it moves (as the checkpoint says)",
    )
    parser.add_argument(
        "--guidance-interval",
        type=interval,
        metavar="LOW,HIGH",
        help="timesteps, 0 (data) to 1000 (noise), between which it is applied (0,1000)",
    )
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
    parser.add_argument(
        "--policy",
        metavar="TEXT",
        help='what steps may spend, such as "budget=64:32 & teacache=0.1" (what the checkpoint says)',
    )
    parser.add_argument(
        "--gflops-per-image",
        type=float,
        metavar="X",
        help="in place of RHO: what a whole image costs, kept to 1 percent",
    )
    parser.add_argument(
        "--seconds-per-image",
        type=float,
        metavar="S",
        help="in place of RHO: the time of a whole image, by the table of dcdit calibrate, kept to 1 percent",
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="that table (this machine's, in the cache)")
    parser.add_argument(
        "--budget-schedule",
        choices=("constant", "linear", "router"),
        default="constant",
        help="tokens of a budget's steps: alike, twice as many at the end, or as the router's own average (constant)",
    )
    parser.add_argument("--image", metavar="FILE", help="a picture to edit: outside of --edit-mask it stays")
    parser.add_argument(
        "--edit-mask", metavar="FILE", help="black and white, of the same size: white is sampled, and gets tokens first"
    )
    parser.add_argument("--scheduler", default="auto", help=f"auto, {', '.join(SCHEDULERS)}")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1 (0)")
    parser.add_argument("--shift", type=float, default=1.0, help="of flow matching's times towards the noise (1: none)")
    parser.add_argument("--seed", type=int, default=0, help="image I draws its noise from (seed, I) (0)")
    add_precision(parser)
    parser.add_argument(
        "--cuda-graph", action="store_true", help="replay the model as CUDA graphs: small batches are faster"
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """--precision of every command that samples, for `in_precision`."""
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of weights and features; auto is bfloat16 where a CPU with AMX is faster so, else float32 (auto)",
    )


def in_precision(model, asked: str) -> str:
    """Cast a model's weights to what --precision asks for; returns the precision.

    A line says where bfloat16 was not asked for.
    """
    import torch

    from ..model.precision import cast_weights, sampling_dtype

    dtype = getattr(torch, asked, None) or sampling_dtype(model.config, next(model.parameters()).device)
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16:
        cast_weights(model, dtype)
        if asked == "auto" and os.environ.get("RANK", "0") == "0":
            print("In bfloat16, for which this CPU has AMX; --precision float32 is slower and exact.", flush=True)
    return name


def prepared(model, args: argparse.Namespace):
    """A model that was opened for sampling, in the precision and as the graphs that the options ask for.

    `args` then has the precision, and the checkpoint's policy where none was given.
    """
    from ..model.dcdit import DCDiT
    from ..model.graphs import Graphed

    if args.policy is None:
        args.policy = model.use.get("policy")  # the policy of its training
    args.precision = in_precision(model, args.precision)
    if not args.cuda_graph:
        return model
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ConfigError(f"--cuda-graph needs a GPU, the model is on {device}; leave it out")
    if not isinstance(model, DCDiT):
        raise ConfigError(f"--cuda-graph is for a DC-DiT, this model is a {type(model).__name__}; leave it out")
    return Graphed(model)


def sampling_arguments(args: argparse.Namespace, objective: str, codec, model) -> dict[str, Any]:
    """Keywords of `sample` from the options above. Warns where the model was trained without dropping classes."""
    from ..codecs import PixelUnshuffle
    from ..sampling.policy import Policy

    uncond, channels, interval = args.uncond_drop_fraction, args.guidance_channels, args.guidance_interval
    given = {"--uncond-drop-fraction": uncond, "--guidance-channels": channels, "--guidance-interval": interval}
    idle = [name for name, value in given.items() if args.guidance == 1 and value is not None]
    if idle:
        raise ConfigError(f"{idle[0]} is of guidance, and --guidance 1 is none: leave one of them out")
    training = model.use.get("training")
    if args.guidance != 1 and isinstance(training, dict) and training.get("label_drop") == 0:
        print(
            f"warning: guidance {args.guidance:g} needs the prediction without a class, which this model has not "
            "learned (label_drop 0); --guidance 1 runs without",
            file=sys.stderr,
        )
    return {
        "objective": objective,
        "scheduler": args.scheduler,
        "steps": args.steps,
        "guidance": args.guidance,
        "guidance_channels": model.use.get("guidance_channels") if channels is None else channels,
        "guidance_interval": interval or ALL_TIMES,
        "eta": args.eta,
        "shift": args.shift,
        "drop_fraction": parse_drop_fraction(args.drop_fraction),
        "uncond_drop_fraction": uncond if uncond is None else parse_drop_fraction(uncond),
        "policy": Policy.of(args.policy),
        "gflops_per_image": args.gflops_per_image,
        "seconds_per_image": args.seconds_per_image,
        "calibration": args.calibration,
        "budget_schedule": args.budget_schedule,
        "seed": args.seed,
        "clip": isinstance(codec, PixelUnshuffle),
        "edit": _edit(args, codec, model),
    }


def try_out(model, labels: Sequence[int], options: dict[str, Any], forwards: int = 1) -> None:
    """The first forwards of a run, whose pictures are left: `sample` has then checked its options."""
    from ..sampling.sampler import sample

    class Enough(Exception):
        pass

    def stop(step) -> None:
        if step.number + 1 == forwards:
            raise Enough

    with contextlib.suppress(Enough):
        sample(model, labels, callback=stop, batch_size=len(labels), **options)


def _edit(args: argparse.Namespace, codec, model):
    """The edit of --image and --edit-mask, or None."""
    from ..sampling.edits import read_edit
    from ..sampling.sampler import pixel_size

    if args.image is None and args.edit_mask is None:
        return None
    if args.image is None or args.edit_mask is None:
        given, missing = ("--edit-mask", "--image") if args.image is None else ("--image", "--edit-mask")
        raise ConfigError(f"{given} needs {missing} as well")
    pixels = getattr(args, "size", None) or pixel_size(model.config, codec)
    return read_edit(args.image, args.edit_mask, codec, model.config, pixels, next(model.parameters()).device)


def settings_of(args: argparse.Namespace, checkpoint: Path, ids: list[int]) -> dict[str, Any]:
    """The settings on which a run's pictures depend, in JSON types."""
    from ..checkpoints.folder import weights_hash

    names = ("scheduler", "steps", "guidance", "guidance_channels", "eta", "shift")
    names += ("drop_fraction", "uncond_drop_fraction", "seed", "precision", "cuda_graph")
    values = {name: getattr(args, name) for name in names}
    # What is not asked for is None, so that a folder with it is another run's.
    budgets = {"gflops_per_image": args.gflops_per_image, "seconds_per_image": args.seconds_per_image}
    budgeted = any(value is not None for value in budgets.values())
    values |= {**budgets, "budget_schedule": args.budget_schedule if budgeted else None}
    for name, file in (("image", args.image), ("edit_mask", args.edit_mask)):
        values[name] = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    interval = list(args.guidance_interval or ALL_TIMES)
    values["policy"] = args.policy or None
    values |= {"guidance_interval": interval, "size": list(args.size) if args.size else None}
    return {"weights": weights_hash(checkpoint), "classes": ids, **values}


def parse_classes(text: str | None, num_classes: int, names: list[str] | None = None) -> list[int]:
    """Class ids from text such as "0-9", "1,3,5-7" or, with the names of the classes, "cat,dog"; without text all
    that were trained.

    A name is looked for first. Raises ConfigError.
    """
    names = list(names or ())
    if text is None:
        return list(range(len(names) or num_classes))
    if text in names:
        return [names.index(text)]
    ids: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        if part in names:
            ids.append(names.index(part))
        elif span:
            low, high = int(span[1]), int(span[2] or span[1])
            if low > high:
                raise ConfigError(f"classes {part!r} run backwards")
            if high >= num_classes:
                raise ConfigError(f"class id {high} is outside [0, {num_classes - 1}], the classes of this model")
            ids.extend(range(low, high + 1))
        elif names and part:
            check_keys([part], names, "class")
        else:
            raise ConfigError(f"classes must look like 0-9 or 1,3,5, got {text!r}")
    return ids


def parse_drop_fraction(text: str) -> float | list[float]:
    """ρ from text such as "0.3", or "0,0.3,0.6" for a list over the steps. Raises ConfigError."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"a drop fraction must look like 0.3 or 0,0.3,0.6, got {text!r}") from error
    return values if len(values) > 1 else values[0]
