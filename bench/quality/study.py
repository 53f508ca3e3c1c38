"""Quality of small models at equal steps: python -m bench.quality VARIANT… [--steps N] [--seed N]

Each variant is trained, sampled from and judged, and a line with its numbers goes to bench/results/quality.jsonl. One
that has its line is not run again. On a CPU a variant takes one thread after another, and one that was stopped goes on
from its last save. On a GPU all variants are trained together, step by step (`bench.quality.lockstep`).

With --drop-fractions or --guidances the trained models are drawn from and judged once more, at each pair of both; the
lines go to quality_drawn.jsonl beside the other results.

`docs/quality.md` explains the variants and the numbers; python -m bench.quality.tables writes its tables, and
python -m bench.quality.farm makes many calls side by side on one GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from dcdit.codecs import make_codec
from dcdit.model.flops import dcdit_flops, dit_flops
from dcdit.pictures.images import grid, save_png, to_uint8
from dcdit.sampling.sampler import sample
from dcdit.sampling.trace import Trace
from dcdit.training.config import TrainConfig, load_config
from dcdit.training.run_output import average

from .. import machine
from ..arguments import add_device
from ..euler import stand_in
from . import judge, sets
from .lockstep import train_together
from .places import where
from .rivals import RivalTrainer, make_rival
from .sets import SCALE

CONFIG = Path(__file__).with_name("study.yaml")
RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"
DRAWN = "quality_drawn.jsonl"  # beside RESULTS

# The changes of digits-best; its kept grid has a quarter of the tokens at any N.
FIXED = ["model.segment_mean=true", "model.norm_groups=8"]
MENDED = [*FIXED, "model.keep_grid={kept}"]
DIRECT = "model.direct_init=true"
PLACES = "model.mean_positions=true"
CLEAN = "model.predict_clean=true"
# Name → the kind of rival, and its changes to bench/quality/study.yaml.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "learned": ("learned", []),
    "means": ("learned", ["model.segment_mean=true"]),
    "kept-grid": ("learned", ["model.keep_grid={kept}"]),
    "groups": ("learned", ["model.norm_groups=8"]),
    "mended": ("learned", MENDED),
    "direct": ("learned", [*MENDED, DIRECT]),
    "direct-free": ("learned", [*FIXED, DIRECT]),
    "coarse": ("learned", ["model.encoder_stride=2"]),
    "random": ("random", []),
    "random-mended": ("random", MENDED),
    "random-direct": ("random", [*MENDED, DIRECT]),
    "grid": ("grid", []),
    "grid-mended": ("grid", FIXED),
    "grid-direct": ("grid", [*FIXED, DIRECT]),
    "guess-direct": ("learned", [*FIXED, DIRECT, "model.router=guess"]),
    "direct-places": ("learned", [*MENDED, DIRECT, PLACES]),
    "guess-places": ("learned", [*FIXED, DIRECT, "model.router=guess", PLACES]),
    "guess-clean": ("learned", [*FIXED, DIRECT, "model.router=guess", PLACES, CLEAN]),
    "latents": ("latents", ["model.norm_groups=8", DIRECT, "model.depth=5"]),
    "plain": ("plain", []),
    "plain-clean": ("plain", [CLEAN]),
    "plain-guess": ("plain-guess", []),
}
# Width → the sizes of the model.
WIDTHS: dict[int, list[str]] = {
    96: [],
    192: ["model.hidden_size=192", "model.num_heads=6", "model.encoder_width=64", "model.depth=8", "optim.lr=1.0e-3"],
}
# Width, N and pixels of a cell's side → the depth of a plain DiT of about as many FLOPs, on 2×2 cells a token.
DEPTHS = {(96, 4, 2): 11, (96, 16, 2): 6, (96, 4, 1): 10, (96, 16, 1): 5, (192, 4, 2): 13}
ON_GPU = ["cuda_graph=true", "batch_size=64", "data.workers=2", "log_every=10", "save_every=1000000"]
SAMPLES = {"steps": 30, "guidance": 1.5, "seed": 0}


class StudyTrainer(RivalTrainer):
    """Keeps the seconds of the run over all its parts: the process's on a CPU, the clock's on a GPU."""

    def __init__(self, config: TrainConfig, kind: str) -> None:
        self.kind, self.file = kind, Path(config.output) / "seconds"
        super().__init__(config)
        self.clock = time.process_time if self.device.type == "cpu" else time.monotonic
        self.before = float(self.file.read_text()) if self.file.exists() else 0.0
        self.begin = self.clock()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self.before + self.clock() - self.begin

    def _save(self) -> None:
        super()._save()
        self.file.write_text(str(self.seconds))


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """The folder of a run."""
    return args.runs / args.data.name / f"{name}-{args.width}-{args.steps}-{args.seed}{sets.scale(vars(args))}"


def configuration(name: str, args: argparse.Namespace) -> TrainConfig:
    """A variant's configuration."""
    kind, changes = VARIANTS[name]
    changes = [change.format(kept=2 * math.isqrt(args.ratio)) for change in changes] + WIDTHS[args.width]
    if kind.startswith("plain"):
        changes.append(f"model.depth={DEPTHS[args.width, args.ratio, args.cell]}")
    changes += [f"output={folder_of(name, args)}", f"steps={args.steps}", f"seed={args.seed}"]
    changes += [f"model.target_ratio={args.ratio}", *sets.changes(args.data, args.cell)]
    return load_config(CONFIG, changes + (ON_GPU if args.device == "cuda" else []))


def run(names: list[str], args: argparse.Namespace) -> Iterator[dict]:
    """Train or go on, together, then sample and judge: the lines of the variants."""
    trainers = {StudyTrainer(configuration(name, args), VARIANTS[name][0]): name for name in names}
    device = next(iter(trainers)).device.type
    if args.device == "cuda":
        left = train_together(list(trainers), args.until)
        trainers = {trainer: name for trainer, name in trainers.items() if trainer in left}
    else:
        for trainer in trainers:
            trainer.run()
    seconds = [trainer.seconds for trainer in trainers]
    facts = facts_of(device)
    clock = "cpu" if facts["device"] == "cpu" else "wall"
    if args.samples:
        judge.classifier(args.data, args.runs)  # fitted before several judges ask for it
    waiting = []
    with ThreadPoolExecutor(len(names)) as judges:
        for (trainer, name), spent in zip(trainers.items(), seconds, strict=True):
            model = average(trainer, trainer.emas[0]).to(trainer.device).eval()
            line = {"variant": name, "steps": trainer.step, "together": len(names), f"train_{clock}_seconds": spent}
            line |= {**numbers(model, trainer), "where": where(model, args.data, args.cell), **facts}
            verdict = None
            if args.samples:
                sheet, labels, trace = pictures(model, trainer.config, args, **SAMPLES)
                save_png(folder_of(name, args) / "pictures.png", grid(sheet[:100], 10))
                line["sampling_kept"] = kept(trace, trainer.config)
                verdict = judges.submit(judge.judge, sheet, labels, args.data, args.runs)
            trainer.close()
            waiting.append((line, verdict))
        for line, verdict in waiting:
            yield {**line, **(verdict.result() if verdict else {})}


def numbers(model: torch.nn.Module, trainer: StudyTrainer) -> dict:
    """Losses and costs of a trained model."""
    config = trainer.config
    held_out = trainer.validation.loss(model, trainer.accelerator.autocast)
    gflop = gflops(model, config, trainer.kind, held_out["validation_kept"] * config.model.cells)
    log = machine.read_lines(Path(config.output) / "metrics.jsonl")
    late = [line["diffusion_loss"] for line in log if line["step"] > 0.75 * trainer.step]
    parameters = sum(p.numel() for p in model.parameters())
    return {**held_out, "running_loss": float(np.mean(late)), "gflop": gflop, "parameters": parameters}


def gflops(model: torch.nn.Module, config: TrainConfig, kind: str, tokens: float) -> float:
    """GFLOP of a forward pass of one picture."""
    if kind.startswith("plain"):
        return dit_flops(config.model, tokens)
    return dcdit_flops(config.model, tokens, model.router)["total"]


def pictures(
    model: torch.nn.Module, config: TrainConfig, args: argparse.Namespace, **options
) -> tuple[np.ndarray, np.ndarray, Trace]:
    """Drawn pictures uint8 (N, H, W, 3), their labels, and the trace, by the options of `sample`."""
    classes = torch.from_numpy(sets.classes_to_draw(args.data, args.samples))
    torch.manual_seed(args.seed)
    stand_in()  # where diffusers is not installed
    batch = 1000 if args.device == "cuda" else 100
    drawn = sample(model, classes, objective=config.objective, **options, batch_size=batch)
    return to_uint8(make_codec(**config.codec.options()).decode(drawn.latents)), classes.numpy(), drawn.trace


def kept(trace: Trace, config: TrainConfig) -> list[float]:
    """The share of cells that each step kept."""
    return [round(share, 4) for share in (trace.tokens.mean(1) / config.model.cells).tolist()]


def again(name: str, rho: float, guidance: float, args: argparse.Namespace) -> dict:
    """The line of a trained model, drawn at a drop fraction and a guidance."""
    config, kind, model = configuration(name, args), VARIANTS[name][0], trained(name, args)
    sheet, labels, trace = pictures(model, config, args, **{**SAMPLES, "guidance": guidance, "drop_fraction": rho})
    halves = [half.mean() for half in (trace.tokens, trace.uncond_tokens) if half is not None]
    line = {"sampling_kept": kept(trace, config), "gflop": gflops(model, config, kind, float(np.mean(halves)))}
    return {**line, **facts_of(args.device), **judge.judge(sheet, labels, args.data, args.runs)}


def trained(name: str, args: argparse.Namespace) -> torch.nn.Module:
    """The averaged model of a run. Ends where there is none."""
    file = folder_of(name, args) / "model" / "model.safetensors"
    if not file.exists():
        raise SystemExit(f"{name} must be trained before it is drawn again: there is no {file}")
    model = make_rival(configuration(name, args).model, VARIANTS[name][0])
    model.load_state_dict(load_file(file))
    return model.to(args.device).eval()


def facts_of(device: str) -> dict:
    """What a line says of the machine and the commit."""
    facts = machine.describe(device)
    return {fact: facts[fact] for fact in ("machine", "device", "commit", "date", "torch")}


def arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that name runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=96, choices=WIDTHS)
    parser.add_argument("--ratio", type=int, default=4, choices=[4, 16], help="N: 1/N of the cells are kept")
    parser.add_argument("--cell", type=int, default=2, choices=[1, 2], help="pixels of a cell's side")
    parser.add_argument("--data", type=Path, default=sets.FASHION, help="idx files, or a folder of classes")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder for the runs")
    add_device(parser)
    return parser


def main() -> None:
    """See the module."""
    parser = arguments(__doc__)
    parser.prog = "python -m bench.quality"
    parser.add_argument("--samples", type=int, default=800, help="pictures to judge; 0: the losses alone")
    parser.add_argument("--until", type=float, default=math.inf, help="end training on a GPU at this time.time()")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--drop-fractions", type=float, nargs="+", metavar="RHO", help="draw again at these")
    parser.add_argument("--guidances", type=float, nargs="+", metavar="W", help="draw again at these")
    args = parser.parse_args()
    check(parser, args)
    torch.set_num_threads(1)
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        torch.set_float32_matmul_precision("high")  # TF32, as PyTorch's convolutions have by default
    key = {"set": args.data.name, "width": args.width, "seed": args.seed, "samples": args.samples}
    key |= {"device": args.device, "steps": args.steps, "ratio": args.ratio, "cell": args.cell}
    if args.drop_fractions or args.guidances:
        pairs = product(args.drop_fractions or [0.0], args.guidances or [SAMPLES["guidance"]])
        drawn = args.results.with_name(DRAWN)
        for name, (rho, guidance) in product(args.variants, list(pairs)):
            own = {**key, "variant": name, "drop_fraction": rho, "guidance": guidance}
            if not found(own, drawn):
                write({**own, **again(name, rho, guidance, args)}, drawn)
        return
    left = [name for name in args.variants if not found({**key, "variant": name}, args.results)]
    for names in [left] if args.device == "cuda" and left else [[name] for name in left]:
        for line in run(names, args):
            write({**key, **line}, args.results)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line where the options cannot be used, before anything is trained."""
    least = 1 if args.drop_fractions or args.guidances else 0
    if args.samples < least:
        parser.error(f"--samples must be at least {least}, got {args.samples}")
    for rho in args.drop_fractions or ():
        if not 0 <= rho < 1:
            parser.error(f"--drop-fractions must be in [0, 1), got {rho}")
    for guidance in args.guidances or ():
        if not math.isfinite(guidance):
            parser.error(f"--guidances must be finite, got {guidance}")


def found(key: dict, results: Path) -> bool:
    """Whether the results have a line with this key."""
    return results.exists() and any(key.items() <= {**SCALE, **line}.items() for line in machine.read_lines(results))


def write(line: dict, results: Path) -> None:
    """Append a line to the results, and print it."""
    text = json.dumps(line)
    with open(results, "a", encoding="utf-8") as stream:
        stream.write(text + "\n")
    print(text, flush=True)
