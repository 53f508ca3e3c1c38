"""python -m bench.trained_tables STAGE FOLDER: what `bench.trained_rivals` drew, judged, timed on this CPU and shown.

judge FOLDER: recognised share and Fréchet distance of the unpacked run, into bench/results/trained_rivals.jsonl
time FOLDER: processor seconds of an image there, all runs in turn
show FOLDER: the tables of docs/rivals.md, its curves and pictures
"""

from __future__ import annotations

import argparse
import json
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from dcdit.data.sources import load_digits
from dcdit.pictures.classifier import DigitClassifier
from dcdit.pictures.conv_classifier import fit
from dcdit.pictures.evaluation import Features, compare

from .trained_parts import MADE, draw, load, load_pictures
from .trained_show import show

RESULTS = Path(__file__).parent / "results" / "trained_rivals.jsonl"


def judge(folder: Path) -> list[dict]:
    """The lines of a run with `recognised`, by `DigitClassifier`, and `frechet`, by a small convolutional classifier.

    The reference of the distance are the 4 500 training digits.
    """
    images, labels, held_out = load_digits()
    colours = lambda pictures: pictures[..., None].repeat(3, 3)  # noqa: E731
    real, recognise = colours(images[~held_out]), DigitClassifier()
    net = fit(real, labels[~held_out], epochs=10, report=lambda text: None)
    reference, judged = Features(net, [real]), dict[str, dict]()
    for line in map(json.loads, (folder / "lines.jsonl").read_text().splitlines()):
        pictures = load_pictures(folder / line["pictures"])
        wanted = np.arange(10).repeat(len(pictures) // 10)
        numbers = compare(Features(net, [colours(pictures)]), reference)
        right = float((recognise(pictures) == wanted).mean())
        numbers = {key: round(numbers[key], 4) for key in ("frechet", "precision", "recall")}
        judged[line["pictures"]] = line | {"images": len(pictures), "recognised": right} | numbers
        print(
            line["part"], line["policy"] or "–", line["steps"], f"{line['gflop']:.2f} GFLOP", right, numbers, flush=True
        )
    return list(judged.values())


def timed(folder: Path, lines: list[dict], dit: Path, rounds: int, per_class: int) -> list[dict]:
    """The lines with `cpu_seconds`, processor time of an image: the least of `rounds`, in which all runs take turns.

    A model that was trained longer is not timed: it costs what the shorter one costs.
    """
    parts = {line["part"] for line in lines}
    models = {name: load(name, folder, dit) for name in parts & {"plain", "dcdit", *MADE}}
    best: dict[str, float] = {}
    for number in range(rounds):
        for line in lines:
            if line["part"] not in models:
                continue
            begin = time.process_time()
            steps = line["steps"]
            options = Namespace(per_class=per_class, sampling_steps=50, batch=10 * per_class)
            draw(models[line["part"]], line["policy"], steps, options)
            seconds = (time.process_time() - begin) / (10 * per_class)
            best[line["pictures"]] = min(seconds, best.get(line["pictures"], seconds))
        print(f"round {number + 1} of {rounds}", flush=True)
    return [line | ({"cpu_seconds": best[line["pictures"]]} if line["pictures"] in best else {}) for line in lines]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["judge", "time", "show"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--dit", type=Path, default=Path("build/dit.pt"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--per-class", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "judge":
        lines = judge(args.folder)
    else:
        lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    if args.stage == "show":
        show(lines, args.folder)
        return
    if args.stage == "time":
        lines = timed(args.folder, lines, args.dit, args.rounds, args.per_class)
    args.results.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
