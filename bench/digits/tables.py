"""python -m bench.digits.tables STAGE FOLDER: what `bench.digits.rivals` drew, drawn from again, judged and shown.

free FOLDER: digits without guidance from the models of an unpacked run, and their processor seconds on this CPU
judge FOLDER: recognised shares and Fréchet distances of both, into bench/results/trained_rivals.jsonl
show FOLDER: the tables of docs/rivals.md, its curves and pictures
"""

from __future__ import annotations

import argparse
import json
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dcdit.commands.demo import PLAIN_DITS
from dcdit.data.sources import load_digits
from dcdit.pictures.classifier import DigitClassifier
from dcdit.pictures.conv_classifier import fit
from dcdit.pictures.evaluation import Features, frechet

from ..arguments import existing
from ..machine import read_lines
from .parts import MADE, draw, load, load_pictures
from .show import show

TIMED = ("plain", "dcdit", *MADE)  # the parts of which there are weights
RESULTS = Path(__file__).parents[1] / "results" / "trained_rivals.jsonl"


def free(folder: Path, dit: Path, seeds: Sequence[int], per_class: int) -> None:
    """Digits of each run without guidance, all runs in turn for each seed, with processor seconds of an image.

    They go to FOLDER/free. A model of which no weights came back costs what its part trained for less costs.
    """
    (folder / "free").mkdir(exist_ok=True)
    lines = [line for line in read_lines(folder / "lines.jsonl") if line["part"] in TIMED]
    models = {name: load(name, folder, dit) for name in dict.fromkeys(line["part"] for line in lines)}
    for seed in seeds:
        options = Namespace(per_class=per_class, sampling_steps=50, batch=10 * per_class, guidance=1.0, seed=seed)
        for line in lines:
            begin = time.process_time()
            facts, pictures = draw(models[line["part"]], line["policy"], line["steps"], options)
            facts["seconds"] = (time.process_time() - begin) / len(pictures)
            facts["file"] = f"{line['pictures'].removesuffix('.npy.xz')}-{seed}.npy"
            np.save(folder / "free" / facts["file"], pictures)
            with open(folder / "free" / f"lines-{seed}.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"pictures": line["pictures"], **facts}) + "\n")
        print(f"seed {seed}", flush=True)


class Judge:
    """`recognised`, by `DigitClassifier`, and `frechet`, in the features of a small convolutional classifier.

    The distance is from the 4 500 training digits.
    """

    def __init__(self) -> None:
        images, labels, held_out = load_digits()
        self.classify = DigitClassifier()
        self.net = fit(colours(images[~held_out]), labels[~held_out], epochs=10, report=lambda text: None)
        self.reference = Features(self.net, [colours(images[~held_out])])

    def __call__(self, pictures: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Of digits uint8 (N, 28, 28) that are to show `labels` (N,)."""
        distance = frechet(Features(self.net, [colours(pictures)]), self.reference)
        seen = float((self.classify(pictures) == labels).mean())
        return {"images": len(pictures), "recognised": round(seen, 4), "frechet": round(distance, 3)}


def colours(pictures: np.ndarray) -> np.ndarray:
    """(N, H, W) → (N, H, W, 3)."""
    return pictures[..., None].repeat(3, 3)


def judged(folder: Path, judge: Callable[[np.ndarray, np.ndarray], dict[str, float]]) -> list[dict]:
    """The lines of a run with the numbers of its pictures, and as `free` those of the pictures without guidance."""
    lines = read_lines(folder / "lines.jsonl")
    timed = {line["pictures"] for line in lines if line["part"] in TIMED}
    seeds = [read_lines(file) for file in sorted((folder / "free").glob("lines-*.jsonl"))]
    # Equally many pictures of each run: the distance falls with their number.
    again = [line for seed in seeds if {line["pictures"] for line in seed} == timed for line in seed]
    results = {}
    for line in lines:
        pictures = load_pictures(folder / line["pictures"])
        found = line | judge(pictures, np.arange(10).repeat(len(pictures) // 10))
        same = [other for other in again if other["pictures"] == line["pictures"]]
        if same:
            sheets = [np.load(folder / "free" / other["file"]) for other in same]
            wanted = np.concatenate([np.arange(10).repeat(len(sheet) // 10) for sheet in sheets])
            found["free"] = {
                **judge(np.concatenate(sheets), wanted),
                "gflop": float(np.mean([other["gflop"] for other in same])),
                "cpu_seconds": min(other["seconds"] for other in same),
            }
        results[line["pictures"]] = found  # of a part that ran again the last
        print(json.dumps(found), flush=True)
    return list(results.values())


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["free", "judge", "show"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--dit", type=existing, default=PLAIN_DITS[6])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--per-class", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "free":
        free(args.folder, args.dit, args.seeds, args.per_class)
    elif args.stage == "judge":
        lines = judged(args.folder, Judge())
        args.results.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    else:
        show(read_lines(args.results), args.folder)


if __name__ == "__main__":
    main()
