"""Upcycling on digits: train a plain DiT, upcycle it, and compare with DC-DiTs from scratch.

for stage in teacher scratch scratch-6e-3 scratch-long upcycled draw; do
    python examples/upcycle_digits.py $stage runs/upcycle
done

teacher trains a DiT on 2×2 patches and saves it in the original DiT's layout. The others are configs/digits.yaml with
ρ = 0 and separate learning rates; upcycled is to reach the loss of scratch's 4 000 steps in a quarter of them. draw
makes docs/images/upcycling.png. Three hours on a core.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import nn

from dcdit.codecs import make_codec
from dcdit.data.sources import Digits, load_digits
from dcdit.errors import DCDiTError
from dcdit.model.config import preset
from dcdit.model.dcdit import DCDiT
from dcdit.model.plain_dit import PlainDiT
from dcdit.training.batches import TrainingStream, batches
from dcdit.training.config import OptimConfig, load_config
from dcdit.training.objectives import FlowMatching
from dcdit.training.state import EMA
from dcdit.training.trainer import Trainer, learning_rate
from dcdit.training.upcycling import Upcycler, to_dit

CONFIG, BATCH = preset("digits"), 64  # as in configs/digits.yaml
TEACHER = ["upcycle.source={folder}/teacher.pt", "upcycle.distill_steps=200", "upcycle.output_share=0.8"]
RUNS = {
    "scratch": ["steps=4000", "optim.lr=3e-3", "drop_fractions=[0]"],
    "scratch-6e-3": ["steps=4000", "optim.lr=6e-3", "drop_fractions=[0]"],
    "scratch-long": ["steps=8000", "optim.lr=3e-3", "drop_fractions=[0]"],
    "upcycled": ["steps=2000", "optim.lr=6e-3", "optim.warmup_steps=50", "drop_fractions=[0]", *TEACHER],
}
CODEC = make_codec("pixel_unshuffle", factor=2)


def train_teacher(folder: Path, steps: int, depth: int) -> None:
    """A plain DiT with `depth` of the digits' blocks, 49 tokens; its EMA goes to FOLDER/teacher.pt."""
    torch.manual_seed(0)
    model, objective = PlainDiT(dataclasses.replace(CONFIG, depth=depth)), FlowMatching()
    for module in [*(block.adaln[1] for block in model.blocks), model.adaln[1], model.head]:
        nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    for table in (model.class_embed.weight, model.time_embed.mlp[0].weight, model.time_embed.mlp[2].weight):
        nn.init.normal_(table, std=0.02)
    optim, ema = OptimConfig(lr=3e-3, warmup_steps=200, ema_decay=(0.999,)), EMA(model, 0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=(0.9, optim.beta2), weight_decay=0, fused=True)
    stream = TrainingStream(Digits(), objective, (4, 14, 14), 10, seed=1, batch_size=BATCH, label_drop=0.1)
    total = 0.0
    for step, batch in enumerate(batches(stream, 0, steps)):
        x0, noise, t, y = CODEC.encode(batch["image"]), batch["noise"], batch["t"], batch["y"]
        loss = objective.loss(model(objective.add_noise(x0, noise, t), t, y), x0, noise, t).mean()
        optimizer.param_groups[0]["lr"] = learning_rate(optim, step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        ema.update(step)
        total += loss.item()
        if step % 500 == 499:
            print(f"step {step + 1}: loss {total / 500:.4f}", file=sys.stderr, flush=True)
            total = 0.0
    model.load_state_dict(ema.state_dict(), strict=False)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(to_dit(model), folder / "teacher.pt")


def held_out() -> dict[str, torch.Tensor]:
    """The 500 digits that no training sees, each with a fixed noise and time."""
    images, labels, out = load_digits()
    stream = TrainingStream(Digits(), FlowMatching(), (4, 14, 14), 10, seed=2, batch_size=500)
    drawn = [stream[i] for i in range(500)]
    pixels = torch.from_numpy(images[out]).float()[:, None] / 127.5 - 1
    return {
        "x0": CODEC.encode(pixels),
        "y": torch.from_numpy(labels[out]),
        "noise": torch.stack([item["noise"] for item in drawn]),
        "t": torch.stack([item["t"] for item in drawn]),
    }


@torch.no_grad()
def evaluate(trainer: Trainer, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Velocity loss of the EMA model on the held-out digits at ρ = 0, and the share of the cells kept."""
    model, objective = DCDiT(trainer.config.model).eval(), trainer.objective
    model.load_state_dict(trainer.ema.state_dict() | dict(trainer.net.named_buffers()))
    noisy = objective.add_noise(batch["x0"], batch["noise"], batch["t"])
    out, routing = model(noisy, batch["t"], batch["y"], return_routing=True)
    loss = objective.loss(out, batch["x0"], batch["noise"], batch["t"]).mean()
    return {"step": trainer.step, "loss": loss.item(), "kept": routing.boundary_mask.float().mean().item()}


def train_dcdit(folder: Path, name: str) -> None:
    """Train by configs/digits.yaml and RUNS; the held-out loss every 125 steps goes to FOLDER/NAME.json."""
    overrides = [f"output={folder / name}", *(override.format(folder=folder) for override in RUNS[name])]
    config, batch, curve = load_config("configs/digits.yaml", overrides), held_out(), []
    trainer = Upcycler(config) if config.upcycle.source else Trainer(config)
    for item in batches(trainer.stream, 0, config.steps):
        trainer.train_step(item)
        trainer.step += 1
        if trainer.step % 125 == 0:
            curve.append(evaluate(trainer, batch))
            print(curve[-1], file=sys.stderr, flush=True)
    trainer.close()
    (folder / f"{name}.json").write_text(json.dumps(curve))


def draw(folder: Path, file: Path) -> None:
    """The curves of FOLDER's runs, and when the upcycled model first reaches the others' best losses."""
    from matplotlib.figure import Figure

    runs = {name: json.loads((folder / f"{name}.json").read_text()) for name in RUNS}
    best = {name: min(point["loss"] for point in curve) for name, curve in runs.items()}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for name, curve in runs.items():
        axis.plot([point["step"] for point in curve], [point["loss"] for point in curve], label=name)
        last = curve[-1]
        reached = next((point["step"] for point in runs["upcycled"] if point["loss"] <= best[name]), None)
        print(f"{name}: {last['loss']:.4f} after {last['step']} steps, {last['kept']:.1%} kept;", end=" ")
        print(f"best {best[name]:.4f}, which the upcycled model reaches at {reached}")
    low = min(best.values())
    axis.set(xlabel="steps", ylabel="held-out velocity loss of the EMA model, ρ = 0", ylim=(0.98 * low, 1.4 * low))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["teacher", *RUNS, "draw"])
    parser.add_argument("--steps", type=int, default=11000, help="of the teacher; the shipped plain DiTs have 5000")
    parser.add_argument("--depth", type=int, default=CONFIG.depth, help="blocks of the teacher (those of the digits)")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        if args.stage == "teacher":
            train_teacher(args.folder, args.steps, args.depth)
        elif args.stage == "draw":
            draw(args.folder, Path("docs/images/upcycling.png"))
        else:
            train_dcdit(args.folder, args.stage)
    except (DCDiTError, OSError) as error:  # such as the file of a stage that has not run
        parser.error(str(error))


if __name__ == "__main__":
    main()
