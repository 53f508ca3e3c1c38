"""`dcdit data`: look at a training set before the training, or encode it to latents once."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path

from ..data.image_folder import ImageFolder, looks
from ..data.picture_files import read_picture
from ..data.sources import Latents, load_npy
from ..errors import ConfigError, DataError
from ..files import expanded

ACTIONS = ("check", "encode")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit data`."""
    parser.add_argument("action", choices=ACTIONS, help="check: read every file; encode: write latents to OUT")
    parser.add_argument("folder", help="a folder with a sub-folder of pictures per class; check also takes latents")
    parser.add_argument("out", nargs="?", metavar="OUT", help="the folder of latents to write, or to go on with")
    parser.add_argument("--codec", metavar="VAE", help="an autoencoder of diffusers: a folder or Hub repository")
    parser.add_argument("--scale", type=float, default=0.0, help="of the latents (0: the autoencoder's own)")
    parser.add_argument("--size", type=int, default=256, help="pixels of a picture's side when encoded (256)")
    parser.add_argument("--buckets", type=int, default=0, help="multiples of pixels, as data.buckets (0: squares)")
    parser.add_argument("--background", default="white", help="colour under transparent pixels (white)")
    parser.add_argument("--batch-size", type=int, help="pictures at a time when encoded (8)")
    parser.add_argument("--skip-broken", action="store_true", help="leave out pictures that cannot be read")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")


def run(args: argparse.Namespace) -> int:
    """Check or encode; 1 where `check` found files that cannot be read."""
    if args.buckets < 0:
        raise ConfigError(f"--buckets must be at least 0, got {args.buckets}")
    if args.action == "check":
        given = {"OUT": args.out, "--codec": args.codec, "--scale": args.scale, "--batch-size": args.batch_size}
        for name in (name for name, value in given.items() if value):
            raise ConfigError(f"{name} is of dcdit data encode, check writes nothing: leave it out")
    args.batch_size = 8 if args.batch_size is None else args.batch_size
    if args.size < 1 or args.batch_size < 1 or not 0 <= args.scale < math.inf:
        given = f"{args.size}, {args.batch_size} and {args.scale:g}"
        raise ConfigError(f"expected a size and a batch size of at least 1 and a scale of at least 0, got {given}")
    if args.action == "check":
        return check(args)
    if not args.out or not args.codec:
        raise ConfigError("dcdit data encode needs a folder to write and --codec, such as stabilityai/sd-vae-ft-ema")
    encode(args)
    return 0


def check(args: argparse.Namespace) -> int:
    """Read every file; print a summary and each unreadable file."""
    from tqdm import tqdm

    root = expanded(args.folder)
    if any(root.glob("*_features")) or any(root.glob("*_labels/*.npy")):
        return check_latents(root, args.buckets)
    source = ImageFolder(root, args.size, args.background, args.buckets)
    bad, counts = [], [0] * source.classes
    for file, label in tqdm(source.files, unit="picture", disable=None, leave=False):
        try:
            read_picture(file, args.background)
            counts[label] += 1
        except DataError as error:
            bad.append(str(error))
    print(source.describe())
    print(f"all files: {looks([file for file, _ in source.files])}")
    for name, count in zip(source.class_names, counts, strict=True):
        print(f"  {name}: {count}")
    if args.buckets:
        print("buckets, height×width:")
        for (height, width), count in sorted(Counter(source.shapes).items()):
            print(f"  {height}×{width}: {count}")
    return _report(bad, len(source))


def check_latents(root: Path, buckets: int) -> int:
    """Check latents likewise; all files must have the first file's shape, with buckets its channels alone."""
    first = min(root.glob("*_features/*.npy"), default=None)
    shape = load_npy(first).shape[-3:] if first else (1, 1, 1)
    source = Latents(root, shape, buckets)
    print(source.describe())
    bad, labels = [], set()
    for index in range(len(source)):
        try:
            labels.add(source.load(index, flip=False)[1])
        except DataError as error:
            bad.append(str(error))
    if labels:
        print(f"class ids from {min(labels)} to {max(labels)}, {len(labels)} different")
    return _report(bad, len(source))


def encode(args: argparse.Namespace) -> None:
    """Write latents; a second call goes on."""
    import torch
    from tqdm import tqdm

    from ..codecs import AutoencoderKL
    from ..data.encode import encode_folder
    from ..files import check_folder, locked

    source = ImageFolder(args.folder, args.size, args.background, args.buckets)
    target = check_folder(expanded(args.out), args.folder)
    print(source.describe(), flush=True)
    use = {"kind": "autoencoder_kl", "pretrained": args.codec, "scale": args.scale or None}
    codec = AutoencoderKL(args.codec, args.scale or None)
    target.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    with locked(target), tqdm(total=len(source), unit="picture", disable=None, leave=False) as bar:
        options = {"batch_size": args.batch_size, "device": device, "skip_broken": args.skip_broken}
        broken = encode_folder(source, target, codec, use, progress=bar.update, **options)
    for line in broken:
        print(f"left out: {line}")
    sizes = " data.buckets=1" if args.buckets else ""
    print(f"{len(source) - len(broken)} latents in {target}: data.kind=latents data.path={target}{sizes}")


def _report(bad: list[str], count: int) -> int:
    for line in bad:
        print(f"bad: {line}")
    print(f"{count - len(bad)} of {count} can be read" + ("; data.skip_broken=true trains on these" if bad else ""))
    return 1 if bad else 0
