"""python -m bench.digits.progressive: the shipped digits model taught a coarse grid, and policies that begin on it.

The model has seen one grid. A short training on digits of 7×7 cells, every second step, continues its weights; the
router stays. The table is that of `bench.digits.policies`, its distances from the taught model's pictures without one.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from bench.digits.policies import measure, print_rows
from dcdit import DCDiT
from dcdit.codecs import make_codec
from dcdit.data.sources import load_digits
from dcdit.sampling.progressive import cosines
from dcdit.training.objectives import FlowMatching

POLICIES = ("grid=0.5:900", "grid=0.5:800", "grid=0.5:600", "grid=0.5:400", "grid=0.5:600 & teacache=0.1")


def shrink(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) → (B, C, h, w): the low frequencies, as bright."""
    (tall, wide), (rows, columns) = ((cosines(n).to(x) for n in sides) for sides in (x.shape[2:], size))
    low = (tall @ x @ wide.T)[..., : size[0], : size[1]]
    return rows.T @ (low * (size[0] * size[1] / x[0, 0].numel()) ** 0.5) @ columns


def teach(model: DCDiT, codec, steps: int, batch: int, lr: float) -> None:
    """Train in turn on the full and on half of the grid."""
    images, labels, held_out = load_digits()
    images, labels = images[~held_out], torch.from_numpy(labels[~held_out]).long()
    x0 = codec.encode(torch.from_numpy(images).float()[:, None] / 127.5 - 1)
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


def main() -> None:
    """Teach, and print the table."""
    from dcdit.pictures.classifier import DigitClassifier

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teach", type=int, default=400, metavar="STEPS")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--per-class", type=int, default=3)
    args = parser.parse_args()
    model = DCDiT.from_pretrained("digits")
    codec = make_codec(**model.use["codec"])
    teach(model.train(), codec, args.teach, args.batch, args.lr)
    classes, options = np.arange(10).repeat(args.per_class), {"objective": "flow", "steps": 25, "guidance": 2.0}
    print_rows(measure(model, codec.decode, DigitClassifier(), classes, POLICIES, **options, clip=True))


if __name__ == "__main__":
    main()
