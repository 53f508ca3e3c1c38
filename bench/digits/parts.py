"""The parts of `bench.digits.rivals`: what is trained, and by which policies digits are drawn from it."""

from __future__ import annotations

import argparse
import io
import json
import lzma
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcdit import DCDiT
from dcdit.checkpoints.dit import load_dit, to_dit
from dcdit.codecs import make_codec
from dcdit.errors import ConfigError
from dcdit.model import DyDCDiT, DyDiT, PatchDiT, PlainDiT, SparseDiT, preset
from dcdit.model.config import DCDiTConfig
from dcdit.model.flops import dcdit_flops
from dcdit.model.patch_dit import resized_filters, resized_rows
from dcdit.model.rival_macs import dydit_on, patch_on, sparse_on
from dcdit.pictures.images import to_uint8
from dcdit.sampling import sample
from dcdit.sampling.calibration import calibrate
from dcdit.training.batches import batches
from dcdit.training.config import TrainConfig, load_config
from dcdit.training.gated import GatedMainTrainer
from dcdit.training.run_output import average
from dcdit.training.systems import DyTrainer, PatchTrainer, SparseTrainer, SystemTrainer, fresh
from dcdit.training.trainer import Trainer

from .. import machine
from ..euler import stand_in

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
SHARED = ("optim.warmup_steps=50", "optim.ema_decay=0.995", "drop_warmup=0", "log_every=50", "save_every=1000000")
PICTURES = [{"id": lzma.FILTER_LZMA2, "preset": 4, "lc": 4, "lp": 0, "pb": 0}]  # for single bytes
PROBE = 40  # steps, of which the second half tells how many a part has time for


class PlainTrainer(SystemTrainer):
    """The plain DiT, from a DiT or from fresh weights."""

    def blank(self) -> Any:
        patch = self.config.spend.patch
        return PlainDiT(dydit_on(self.config.model, patch), patch)

    def make_net(self) -> Any:
        source = self.config.upcycle.source
        return load_dit(source, self.config.model) if source else fresh(self.blank())

    def parts(self, inputs, diffusion) -> dict[str, torch.Tensor]:
        loss = diffusion(self.model(*inputs))
        return {"loss": loss, "diffusion_loss": loss, "kept": torch.ones_like(loss)}


Runs = tuple[tuple[str, int], ...]  # policies and numbers of steps


@dataclass(frozen=True)
class Part:
    """What is trained by which changes of the configuration, and drawn by which runs."""

    trainer: type[Trainer] | None
    changes: tuple[str, ...]
    runs: Runs


def at(*policies: str) -> Runs:
    """Runs of 50 steps."""
    return tuple((policy, 50) for policy in policies)


TEACACHE = ("teacache=0.05", "teacache=0.1", "teacache=0.2", "teacache=0.3")
FEWER = (("", 25), ("", 15), ("", 10))
# A plain DiT has the configuration of a PatchDiT, which knows the patch.
PLAIN_DIT = "kind=patches"
SPARSE = ("kind=sparse", "from={dit}", "spend.least=0.7", "spend.most=0.82")  # a quarter of the tokens over t
PARTS = {
    "base": Part(PlainTrainer, (PLAIN_DIT, "optim.lr=2e-3"), ()),
    "plain": Part(None, (), at("", *TEACACHE) + FEWER),
    "dcdit": Part(None, (), at("", "rho=0.3", "rho=0.5", *TEACACHE, "rho=0.3 & teacache=0.1") + FEWER),
    "plain-longer": Part(PlainTrainer, (PLAIN_DIT, "from={dit}"), at("")),
    "dcdit-longer": Part(Trainer, ("init=digits",), at("", "rho=0.3", "rho=0.5", "teacache=0.1")),
    "sparse": Part(
        SparseTrainer,
        SPARSE,
        at("density=0.7:0.82", "density=0.75", "density=0.82", "density=0.7:0.82 & teacache=0.1"),
    ),
    "dydit": Part(
        DyTrainer, ("kind=dydit", "from={dit}", "spend.rate=0.5"), at("", "teacache=0.1", "teacache=0.2") + FEWER[:1]
    ),
    "dydcdit": Part(
        GatedMainTrainer,
        ("kind=dydit", "init=digits", "spend.rate=0.5"),
        at("", "rho=0.3", "rho=0.5", "teacache=0.1", "teacache=0.2", "rho=0.3 & teacache=0.1"),
    ),
    "patches": Part(
        PatchTrainer,
        # A coarse scale sees the means of its patches at first: at 1e-3 it has learned little more in 650 steps.
        ("kind=patches", "from={fine}", "spend.patch=1", "spend.scales=[1,2]", "optim.lr=8e-3"),
        at("patches=0", "patches=0 & teacache=0.1") + FEWER[:1],
    ),
}
SPEEDS = (2.0, 3.0, 1.5)  # of PatchDiT, whose τ is calibrated on ten images
CALIBRATION = 15  # seconds that one of them may take on a GPU


# The models of the parts whose weights come back, in bfloat16, for timing elsewhere.
MADE: dict[str, Callable[[DCDiTConfig], Any]] = {
    "sparse": lambda config: SparseDiT(sparse_on(config)),
    "dydit": lambda config: DyDiT(dydit_on(config)),
    "dydcdit": DyDCDiT,
    "patches": lambda config: PatchDiT(patch_on(config, 1, (1, 2))),
}


def load(name: str, folder: Path, dit: Path) -> Any:
    """The model of a part in eval mode: the plain DiT, the shipped DC-DiT, or one trained, from FOLDER/NAME.pt.xz."""
    if name not in MADE:
        return load_dit(dit, preset("digits")) if name == "plain" else DCDiT.from_pretrained("digits")
    model = MADE[name](preset("digits"))
    content = io.BytesIO(lzma.decompress((folder / f"{name}.pt.xz").read_bytes()))
    model.load_state_dict(torch.load(content, "cpu", weights_only=True))
    return model.eval()


@torch.no_grad()
def finer(dit: PlainDiT) -> PlainDiT:
    """A DiT on single cells with the blocks and embedders of one on patches, whose ends are resized: near it only."""
    model = PlainDiT(dydit_on(dit.config, 1), 1)
    state = {**dit.state_dict(), "pos_embed": model.pos_embed, "stem.weight": resized_filters(dit.stem.weight, 1)}
    for name, part in (("head.weight", dit.head.weight), ("head.bias", dit.head.bias)):
        state[name] = resized_rows(part.unflatten(0, (-1, dit.patch**2)), 1)
    model.load_state_dict(state)
    return model


def load_pictures(file: Path) -> np.ndarray:
    """uint8 (N, 28, 28)."""
    return np.load(io.BytesIO(lzma.decompress(file.read_bytes())))


def configured(changes: Sequence[str], args: argparse.Namespace, folder: Path, steps: int) -> TrainConfig:
    """configs/digits.yaml with the changes of a part, of all parts and of the command."""
    places = {"dit": args.dit, "fine": args.out / "fine.pt"}
    data = ("data.kind=idx", f"data.path={args.data}/train") if args.data else ()
    warmup = (f"spend.warmup={2 * steps // 5}",) if "kind=dydit" in changes else ()
    own = (f"output={folder}", f"steps={steps}", *warmup, *data)
    return load_config(CONFIG, [change.format(**places) for change in (*SHARED, *changes, *own, *args.set)])


def train(kind: type[Trainer], changes: Sequence[str], args: argparse.Namespace, name: str, until: float) -> Any:
    """(the averaged model, facts of its training): as many steps as there is time for until then, at most --steps."""
    begin, folder = time.time(), args.out / "runs"
    shutil.rmtree(folder / name, ignore_errors=True)  # of a part that failed
    trainer = kind(configured(changes, args, folder / f"{name}-probe", PROBE))
    times = []
    for batch in batches(trainer.stream, 0, min(PROBE, args.steps)):
        trainer.train_step(batch)
        trainer.step += 1
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.time())
    trainer.close()
    half = len(times) // 2
    rate = (len(times) - 1 - half) / max(times[-1] - times[half], 1e-6)
    steps = max(1, min(args.steps, int(0.9 * rate * (until - time.time()))))
    guard = f"max_minutes={max(until - time.time(), 1) / 60}"  # others may slow the steps down
    trainer = kind(configured((*changes, guard), args, folder / name, steps))
    trainer.run()
    trainer.close()
    metrics = machine.read_lines(folder / name / "metrics.jsonl")
    late = [line for line in metrics if line["step"] > 0.8 * trainer.step]
    facts: dict[str, Any] = {"trained": trainer.step, "of": steps, "train_seconds": round(time.time() - begin, 1)}
    for key in ("diffusion_loss", "complete_loss", "rate", "kept"):
        values = [line[key] for line in late if key in line]
        facts |= {key: float(np.mean(values))} if values else {}
    return average(trainer, trainer.emas[0]).to(trainer.device).eval(), facts


def gflop(model: Any, trace: Any) -> float:
    """GFLOP of an image, mean: everything that the model computes."""
    if isinstance(model, DCDiT):
        halves = [half for half in (trace.tokens, trace.uncond_tokens) if half is not None]
        forwards = sum(float((half > 0).sum()) for half in halves) / trace.tokens.shape[1]
        outside = dcdit_flops(model.config, 1)["uncounted"]
        return float(trace.gflops(model.config).sum()) + forwards * outside
    config = patch_on(model.config, model.patch, (1,)) if type(model) is PlainDiT else model.config
    return float(trace.gflops(config).sum())


def draw(model: Any, policy: str, steps: int, args: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """Facts of a run, and its digits, uint8 (N, 28, 28)."""
    classes = torch.arange(10).repeat_interleave(args.per_class)
    steps = max(1, round(steps * args.sampling_steps / 50))
    options = {"objective": "flow", "steps": steps, "guidance": args.guidance, "batch_size": args.batch}
    run = sample(model, classes, policy=policy or None, seed=args.seed, **options)
    pictures = to_uint8(make_codec("pixel_unshuffle", factor=2).decode(run.latents))[..., 0]
    trace = run.trace
    facts = {"policy": policy, "steps": steps, "gflop": gflop(model, trace), "tokens": float(trace.tokens.mean())}
    return facts | {"computed": float((trace.tokens > 0).float().mean())}, pictures


def work(name: str, args: argparse.Namespace) -> None:
    """One part: train until --drawing seconds before --end, draw, write."""
    torch.set_num_threads(1)
    stand_in()
    part, device = PARTS[name], torch.device(args.device)
    share, facts = args.end - args.drawing, dict[str, Any]()
    if name == "patches":
        share -= CALIBRATION
        middle = time.time() + 0.55 * (share - time.time())
        start = args.out / "start.pt"
        torch.save({"ema": to_dit(finer(load_dit(args.dit, preset("digits"))))}, start)
        changes = PLAIN_DIT, f"from={start}", "spend.patch=1"
        fine, facts["fine"] = train(PlainTrainer, changes, args, "fine", middle)
        torch.save({"ema": to_dit(fine)}, args.out / "fine.pt")
    if part.trainer is not None:
        model, trained = train(part.trainer, part.changes, args, name, share)
        facts |= trained
        if name in MADE:
            with lzma.open(args.out / f"{name}.pt.xz", "wb", preset=2) as packed:
                torch.save({key: value.bfloat16() for key, value in model.state_dict().items()}, packed)
    else:
        model = load(name, args.out, args.dit).to(device)
    if name == "base":
        torch.save({"ema": to_dit(model)}, args.dit)
    shared = {"part": name, **facts, **machine_facts(args.device)}
    write(part.runs, model, shared, args)
    if isinstance(model, PatchDiT):
        options = {"objective": "flow", "steps": args.sampling_steps, "guidance": args.guidance}
        for speed in SPEEDS:
            if time.time() > args.end - CALIBRATION:
                break
            try:
                tau, _ = calibrate(model, list(range(10)), speed, **options)
            except ConfigError as error:  # of a rehearsal with few steps
                print(error, flush=True)
                continue
            write(at(f"patches={tau:.4g}"), model, shared | {"speed": speed}, args)


def write(runs: Runs, model: Any, shared: dict[str, Any], args: argparse.Namespace) -> None:
    """Draw by each of `runs`; a line each in lines.jsonl, and the pictures."""
    for policy, steps in runs:
        if time.time() > args.end:
            print("no time for", policy, steps, flush=True)
            continue
        line, pictures = draw(model, policy, steps, args)
        line["pictures"] = "-".join([shared["part"], str(steps), policy.replace(" & ", "-") or "none"]) + ".npy.xz"
        with lzma.open(args.out / line["pictures"], "wb", filters=PICTURES) as packed:
            np.save(packed, pictures)
        with open(args.out / "lines.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(shared | line) + "\n")
        print(json.dumps(line), flush=True)


def machine_facts(device: str) -> dict[str, Any]:
    """Of the machine and the code."""
    facts = machine.describe(device)
    backend = os.environ.get("DCDIT_BACKEND") or "auto"
    return {**{key: facts[key] for key in ("machine", "commit", "date", "torch")}, "backend": backend}
