"""`dcdit evaluate`: how far pictures are from a reference, and whether they show the requested class."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import ConfigError, first_sentence
from ..files import check_file, naming


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit evaluate`."""
    sets = "a folder of dcdit sample, an .npz of ADM's layout, a folder of class folders, or idx files"
    parser.add_argument("samples", type=Path, help=sets)
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="DATA", help="real pictures, of the same kinds"
    )
    parser.add_argument("--features", type=Path, metavar="FILE",
                        help="TorchScript network: uint8 (N, 3, H, W) to features (N, F); "
                        "without it, those of a classifier that is fitted")  # fmt: skip
    parser.add_argument("--fit", type=Path, metavar="DATA", help="what the classifier is fitted to (the reference)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON as well")


def run(args: argparse.Namespace) -> None:
    """Print a line for each number."""
    from ..data.picture_sets import open_set
    from ..pictures.evaluation import Features, agreement, compare

    if args.output:
        if args.output.is_dir() or not args.output.absolute().parent.is_dir():
            raise ConfigError(f"--output must be a file in a folder that is there, got {args.output}")
        check_file(args.output, ".json")
    samples = open_set(args.samples)
    first = next(samples.batches())
    size = first.shape[1]
    open_again = lambda path: open_set(path, size)  # noqa: E731
    network, classify = _network(args, open_again)
    named = {"samples": args.samples, "reference": args.reference}
    found = {}
    for name, path in named.items():
        source = open_again(path)
        print(f"{name:9} {source.count} pictures in {source.name}", flush=True)
        found[name] = Features(network, source.batches())
    numbers = compare(**found)
    for name, path in named.items():
        source = open_again(path)
        if classify and source.labels is not None:
            key = "recognised" if name == "samples" else "recognised_reference"
            numbers[key] = agreement(classify, source.batches(), source.labels)
    for name, value in numbers.items():
        print(f"{name:20} {value:.4f}")
    if args.output:
        with naming(args.output):
            args.output.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _network(args, open_again):
    """(the network of the features, the classifier or None)."""
    import numpy as np
    import torch

    from ..pictures.conv_classifier import fit

    if args.features:
        if args.fit:
            raise ConfigError("--fit is of the classifier, which --features FILE stands in for: give one of them")
        try:
            return torch.jit.load(str(args.features), map_location="cpu").eval(), None
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{args.features} is not a TorchScript network: {first_sentence(error)}") from error
    source = open_again(args.fit or args.reference)
    if source.labels is None:
        raise ConfigError(f"{source.name} has no classes to fit a classifier to: give --features FILE")
    net = fit(np.concatenate(list(source.batches())), source.labels)
    return net, lambda images: net.out(net(images)).argmax(1)
