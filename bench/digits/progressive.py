"""python -m bench.digits.progressive: the shipped digits model taught a coarse grid, and policies that begin on it.

The model has seen one grid. A short training on pictures of 7×7 cells, every second step, continues its weights; the
router stays. The table is that of `bench.digits.policies`, its distances from the taught model's pictures without one.
--model and --data name another DC-DiT and its set, such as one of `bench.quality` and Fashion-MNIST's idx files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.arguments import known, positive
from bench.digits.policies import measure, print_rows
from bench.quality import judge
from dcdit import DCDiT
from dcdit.checkpoints.folder import locate
from dcdit.codecs import make_codec
from dcdit.data.idx import Idx
from dcdit.data.sources import Digits
from dcdit.pictures.conv_classifier import to_tensor
from dcdit.sampling.progressive import cosines
from dcdit.training.objectives import FlowMatching

POLICIES = ("grid=0.5:900", "grid=0.5:800", "grid=0.5:600", "grid=0.5:400", "grid=0.5:600 & teacache=0.1")


def shrink(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) → (B, C, h, w): the low frequencies, as bright."""
    (tall, wide), (rows, columns) = ((cosines(n).to(x) for n in sides) for sides in (x.shape[2:], size))
    low = (tall @ x @ wide.T)[..., : size[0], : size[1]]
    return rows.T @ (low * (size[0] * size[1] / x[0, 0].numel()) ** 0.5) @ columns


def teach(model: DCDiT, codec, data: Digits | Idx, steps: int, batch: int, lr: float) -> None:
    """Train in turn on the full and on half of the grid."""
    images, labels = torch.from_numpy(np.array(data.images)), torch.from_numpy(np.array(data.labels)).long()
    x0 = codec.encode(images.float()[:, None] / 127.5 - 1)
    rng, objective = np.random.default_rng(0), FlowMatching()
    torch.manual_seed(0)
    model.router.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    begin, full = time.monotonic(), tuple(x0.shape[2:])
    for step in range(steps):
        picked = torch.from_numpy(rng.integers(len(x0), size=batch))
        x, y = x0[picked], labels[picked].clone()
        x = x if step % 2 else shrink(x, (full[0] // 2, full[1] // 2))
        y[torch.from_numpy(rng.random(batch) < 0.1)] = model.config.num_classes
        t = torch.tensor([objective.draw_time(rng) for _ in range(batch)])
        noise = torch.randn_like(x)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        loss = objective.loss(model(objective.add_noise(x, noise, t), t, y), x, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 < 2:
            cells, seconds = f"{x.shape[2]}×{x.shape[3]}", time.monotonic() - begin
            print(f"step {step}, {cells}: loss {float(loss.detach()):.3f}, {seconds:.0f} s", flush=True)
    model.eval()


def recogniser(data: Path | None, runs: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A classifier of grey pictures uint8 (N, H, W): the digits', or that of `bench.quality.judge` for idx files."""
    if data is None:
        from dcdit.pictures.classifier import DigitClassifier

        return DigitClassifier()
    net = judge.classifier(data, runs)
    return torch.no_grad()(lambda grey: net.out(net(to_tensor(grey[..., None].repeat(3, 3)))).argmax(1).numpy())


def main() -> None:
    """Teach, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teach", type=int, default=400, metavar="STEPS")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--per-class", type=positive, default=3)
    parser.add_argument(
        "--model", type=known(locate), default="digits", help="a folder of a DC-DiT of 10 classes, in flow matching"
    )
    parser.add_argument("--data", type=Path, help="the folder of its idx files (the digits)")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of --data's classifier")
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args()
    model, classify = DCDiT.from_pretrained(args.model), recogniser(args.data, args.runs)
    codec = make_codec(**model.use["codec"])
    options = {"objective": "flow", "steps": 25, "guidance": args.guidance, "clip": True}
    classes = np.arange(10).repeat(args.per_class)
    rows = lambda: measure(model, codec.decode, classify, classes, POLICIES, **options)  # noqa: E731
    print(f"{len(classes)} pictures before")
    print_rows(rows())
    data = Idx(args.data / "train") if args.data else Digits()
    teach(model.train(), codec, data, args.teach, args.batch, args.lr)
    print("and after")
    print_rows(rows())


if __name__ == "__main__":
    main()
