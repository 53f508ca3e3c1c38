"""Quality of small models at equal steps: python -m bench.quality VARIANT… [--steps N] [--seed N]

Each variant is trained on one thread, sampled from and judged, and a line with its numbers goes to
bench/results/quality.jsonl. A run that was stopped goes on from its last save; one that has its line is not run again.
`docs/quality.md` explains the variants and the numbers; python -m bench.quality_tables writes its tables.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from dcdit.model.flops import dcdit_flops, dit_flops
from dcdit.pictures.images import grid, save_png, to_uint8
from dcdit.sampling.sampler import sample
from dcdit.training.config import TrainConfig, load_config
from dcdit.training.run_output import average

from . import judge, machine
from .rivals import RivalTrainer

CONFIG = Path(__file__).with_name("quality.yaml")
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"

# Name → the kind of rival, and its changes to bench/quality.yaml.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "learned": ("learned", []),
    "means": ("learned", ["model.segment_mean=true"]),
    "kept-grid": ("learned", ["model.keep_grid=4"]),
    "groups": ("learned", ["model.norm_groups=8"]),
    "mended": ("learned", ["model.preset=digits-best"]),
    "random": ("random", []),
    "grid": ("grid", []),
    "grid-mended": ("grid", ["model.segment_mean=true", "model.norm_groups=8"]),
    "plain": ("plain", ["model.depth=11"]),
}
SAMPLES = {"steps": 30, "guidance": 1.5, "seed": 0, "batch_size": 100}


class StudyTrainer(RivalTrainer):
    """Keeps the CPU seconds of the process beside the run, over all its parts."""

    def __init__(self, config: TrainConfig, kind: str) -> None:
        self.kind, self.file = kind, Path(config.output) / "cpu_seconds"
        self.before = float(self.file.read_text()) if self.file.exists() else 0.0
        self.begin = time.process_time()
        super().__init__(config)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds so far."""
        return self.before + time.process_time() - self.begin

    def _save(self) -> None:
        super()._save()
        self.file.write_text(str(self.cpu_seconds))


def run(name: str, args: argparse.Namespace) -> dict:
    """Train or go on, sample and judge: the line of one variant."""
    kind, changes = VARIANTS[name]
    folder = args.runs / f"{name}-{args.steps}-{args.seed}"
    changes = [*changes, f"output={folder}", f"steps={args.steps}", f"seed={args.seed}", *data_paths(args.data)]
    config = load_config(CONFIG, changes)
    trainer = StudyTrainer(config, kind)
    trainer.run()
    trained = trainer.cpu_seconds
    model = average(trainer, trainer.emas[0]).eval()
    held_out = trainer.validation.loss(model, trainer.accelerator.autocast)
    tokens = held_out["validation_kept"] * config.model.cells
    plain = kind == "plain"
    gflop = dit_flops(config.model, tokens) if plain else dcdit_flops(config.model, tokens, model.router)["total"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    late = [line for line in lines if "diffusion_loss" in line and line["step"] > 0.75 * args.steps]
    trainer.close()
    return {
        **held_out,
        "running_loss": float(np.mean([line["diffusion_loss"] for line in late])),
        "train_cpu_seconds": trained,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflop": gflop,
        **(judged(trainer, model, folder, args) if args.samples else {}),
    }


def judged(trainer: StudyTrainer, model: torch.nn.Module, folder: Path, args: argparse.Namespace) -> dict:
    """Draw pictures, save the first hundred as pictures.png, and judge them against the held-out set."""
    config = trainer.config
    classes = torch.arange(args.samples) % config.model.num_classes
    torch.manual_seed(args.seed)
    drawn = sample(model, classes, objective=config.objective, **SAMPLES)
    sheet, labels = to_uint8(trainer.codec.decode(drawn.latents)), classes.numpy()
    save_png(folder / "pictures.png", grid(sheet[:100], 10))
    kept = drawn.trace.tokens.mean(1) / config.model.cells
    numbers = judge.judge(sheet, labels, args.data, args.runs)
    return {**numbers, "sampling_kept": [round(share, 4) for share in kept.tolist()]}


def data_paths(folder: Path) -> list[str]:
    """The configuration's keys of the data in a folder of idx files."""
    return [f"data.path={folder}/train", f"validation.path={folder}/t10k"]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=800, help="pictures to judge; 0: the losses alone")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.variants:
        key = {"set": args.data.name, "variant": name, "steps": args.steps, "seed": args.seed, "samples": args.samples}
        done = args.results.read_text().splitlines() if args.results.exists() else []
        if any(key.items() <= json.loads(line).items() for line in done):
            continue
        facts = machine.describe("cpu")
        facts = {fact: facts[fact] for fact in ("machine", "commit", "date", "torch")}
        line = {**key, **run(name, args), **facts}
        with open(args.results, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
