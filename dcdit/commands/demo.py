"""`dcdit demo`, the command behind `make demo`."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path

from ..errors import ConfigError
from ..model.config import DCDiTConfig, preset
from .options import in_precision, output_path

ASSETS = Path(__file__).parents[1] / "assets"
DIGITS = ASSETS / "digits"
# Blocks of trained plain DiTs → their files: as many as DC-DiT has, and for about as many FLOPs as it has at ρ = 0.
PLAIN_DITS = {6: ASSETS / "digits-dit.pt", 10: ASSETS / "digits-dit-10.pt"}
# The pictures of the page, with their captions.
FIGURES = {
    "digits.gif": "Ten digits from noise to picture. Below each the cells that the transformer sees are orange; lines "
    "bound the cells that one kept cell refills.",
    "digits.png": "The same digits at the end, and the cells kept in the last step.",
    "trajectory.png": "Three digits at several times, with the share of the cells that is kept.",
    "maps.png": "The cells kept in the last step at each ρ, of equal noise.",
    "budgets.png": "Equal noise at each ρ, the share of boundaries that is dropped, and from the plain DiTs.",
    "curves.png": "Tokens, FLOPs and time of each step, from noise to image.",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit demo`."""
    parser.add_argument("--checkpoint", default=str(DIGITS), help="a digits checkpoint (the one that is shipped)")
    parser.add_argument("--drop-fractions", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6], metavar="RHO")
    parser.add_argument("--samples", type=int, default=200, metavar="N", help="samples at each ρ (200)")
    parser.add_argument("--steps", type=int, default=50, help="steps from noise to image (50)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance (1: none)")
    parser.add_argument("--batch-size", type=int, default=50, help="images at a time (50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=output_path, default="demo", metavar="DIR", help="folder for the pictures (demo)"
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")


def run(args: argparse.Namespace) -> None:
    """Sample at each ρ, draw, and print the table."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from ..checkpoints.dit import load_dit
    from ..model.plain_dit import PlainDiT
    from ..pictures.demo import LATE, TURNS, plain_dit_cost, run_budget, run_plain_dit, seconds_in_turns, table
    from ..pictures.images import check_output, output_folder
    from ..pictures.page import write_page
    from ..pictures.trajectory import (
        chunk_maps,
        draw_animation,
        draw_budgets,
        draw_chunk_maps,
        draw_curves,
        draw_poster,
        record,
    )
    from ..sampling.sampler import open_checkpoint, sample
    from ..sampling.trajectory import plan_trajectory

    check_output(args.output)
    if args.samples < 1 or args.batch_size < 1:
        raise ConfigError(
            f"expected at least one sample and a batch size of at least 1, got {args.samples}, {args.batch_size}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    model, objective, codec = open_checkpoint(args.checkpoint, device)
    shape = codec.decode(torch.zeros(1, model.config.in_channels, *model.config.input_size, device=device)).shape[1:]
    if shape != (1, 28, 28) or model.config.num_classes != 10:
        raise ConfigError(f"the demo needs a checkpoint that makes 28×28 digits, this one makes {tuple(shape)} pixels")
    options = {"objective": objective, "steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    for rho in args.drop_fractions:
        plan_trajectory(model, 1, drop_fraction=rho, **options)
    from ..pictures.classifier import DigitClassifier

    print("Fitting a classifier to real digits …", flush=True)
    classifier = DigitClassifier()
    print(f"It recognises {classifier.accuracy:.1%} of 500 real digits that it has not seen.", flush=True)
    in_precision(model, "auto")
    config, classes = model.config, np.arange(args.samples) % 10
    halves = 1 if args.guidance == 1 else 2

    # The first steps of a batch size also pay for imports and allocations.
    batch = min(args.batch_size, args.samples)
    record(model, classes[:batch], 1, **{**options, "steps": 3})
    budgets = []
    for rho in tqdm(args.drop_fractions, desc=f"{args.samples} digits at each ρ", unit="ρ", disable=None):
        budgets.append(run_budget(model, codec, classifier, rho, classes, batch_size=args.batch_size, **options))
    rows = {f"ρ = {b.drop_fraction:g}": b.images for b in budgets}
    plain, dits = [], []
    for depth, file in PLAIN_DITS.items() if args.checkpoint == str(DIGITS) else ():
        dits.append(load_dit(file, dataclasses.replace(config, depth=depth)).to(device))
        row, rows[f"DiT, {depth} blocks"] = run_plain_dit(
            dits[-1], codec, classifier, classes, batch_size=args.batch_size, **options
        )
        plain.append(row)
    for patch in (1,) if dits else (2, 1):
        dits.append(PlainDiT(config, patch).to(model.pos_embed).eval())
        plain.append((*plain_dit_cost(dits[-1], args.steps * halves), "–"))
    print("Timing all of them in turns …", flush=True)
    timed = {**options, "batch_size": batch}
    draws = [partial(sample, model, classes[:batch], drop_fraction=b.drop_fraction, **timed) for b in budgets]
    draws += [partial(sample, dit, classes[:batch], **timed) for dit in dits]
    seconds = seconds_in_turns(draws, args.steps)

    with output_folder(args.output) as folder:
        digits, snapshots = record(model, range(10), 50, **options)
        draw_poster(folder / "digits.png", digits, snapshots[-1], codec)
        some = record(model, [3, 5, 8], 7, **options)
        draw_chunk_maps(folder / "trajectory.png", *some, codec)
        drawn = {rho: record(model, range(10), 2, drop_fraction=rho, **options) for rho in args.drop_fractions}
        maps = {f"ρ = {rho:g}": chunk_maps(some, shots[-1], codec, 84) for rho, (some, shots) in drawn.items()}
        draw_budgets(folder / "maps.png", maps)
        draw_budgets(folder / "budgets.png", rows)
        traces = {f"ρ = {b.drop_fraction:g}": b.samples.trace for b in budgets}
        draw_curves(folder / "curves.png", traces, config, plain_s=seconds[len(budgets)])
        draw_animation(folder / "digits.gif", digits, snapshots, codec)
        text = table(budgets, plain, seconds, config.cells)
        (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
        first = budgets[0]
        times = f" ({first.ink / first.blank:.1f} times as often)" if first.blank > 0 else ""
        said = [
            f"{args.steps} steps, guidance {args.guidance:g}, on {device.type}; GFLOPs as the paper counts them. "
            f"Seconds are medians of {TURNS} shorter draws, in which all rows took turns.",
            f"At ρ = {first.drop_fraction:g} a share of {first.share:.1%} is kept over the trajectory, 1/N is "
            f"{1 / config.target_ratio:.1%}; in the last {1 - LATE:.0%} of the steps {first.ink:.1%} of the cells with "
            f"ink and {first.blank:.1%} of the blank ones{times}.",
            f"Encoder, router and decoder are {outside(config):.0%} of this model's FLOPs at 1/N, and "
            f"{outside(preset('DC-DiT-XL/N4')):.0%} of DC-DiT-XL's: large models save more (docs/gpu.md).",
        ]
        write_page(folder / "index.html", "Digits by a Dynamic Chunking DiT", said, text, FIGURES)

    print(f"\n{text}\n", *said, f"A page with all pictures: {args.output}/index.html", sep="\n")


def outside(config: DCDiTConfig) -> float:
    """The share of the FLOPs, with 1/N of the cells kept, that is outside of the main network."""
    from ..model.flops import dcdit_flops

    flops = dcdit_flops(config, config.cells / config.target_ratio)
    return 1 - flops["main"] / flops["total"]
