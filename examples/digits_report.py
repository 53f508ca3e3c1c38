"""The figures of docs/digits.md: curves of a training run, and where the time of a training step goes.

    python examples/digits_report.py runs/digits docs/images

Draws OUTPUT/digits_curves.png from RUN/metrics.jsonl and prints the training step of the digits model, part by part,
next to the plain DiT of the same backbone on as many tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from dcdit.checkpoints import load_checkpoint
from dcdit.diffusion import FlowMatching, ratio_loss
from dcdit.plain_dit import PlainDiT
from dcdit_kernels import chunk, dechunk, plan_chunks


def draw_curves(metrics: Path, picture: Path, window: int = 25) -> None:
    """Loss, share of cells kept and speed over the images seen, as running means of `window` logged steps."""
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    titles = {
        "diffusion_loss": "velocity loss",
        "kept": "share of cells kept (after the drop)",
        "images_per_s": "images/s",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        values = torch.tensor([row[key] for row in rows])
        means = values.unfold(0, window, 1).mean(1) if len(values) >= window else values
        steps = [row["step"] for row in rows][-len(means) :]
        axis.plot(steps, means, linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, 0.5)
    figure.savefig(picture, dpi=110)


def seconds(function, rounds: int = 15) -> float:
    """Median time of a call after two to warm up."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def training_step(model, batch: int, dynamic: bool):
    """A function that runs one forward and backward of the flow-matching loss on random latents."""
    torch.manual_seed(0)
    config, flow = model.config, FlowMatching()
    x0, noise = torch.randn(2, batch, config.in_channels, *config.input_size)
    t, y = torch.rand(batch) * 1000, torch.randint(config.num_classes, (batch,))

    def step() -> None:
        x = flow.add_noise(x0, noise, t)
        if dynamic:
            out, routing = model(x, t, y, return_routing=True)
            extra = 0.03 * ratio_loss(routing.boundary_prob, routing.natural_mask, config.target_ratio)
        else:
            out, extra = model(x, t, y), 0.0
        (flow.loss(out, x0, noise, t).mean() + extra).backward()

    return step


class FixedShare(torch.nn.Module):
    """The trained router with its probabilities replaced by random ones, `share` of them above one half."""

    def __init__(self, router, share: float) -> None:
        super().__init__()
        self.router, self.share = router, share

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        prob = self.router(h)
        chosen = torch.rand_like(prob) < self.share
        return torch.where(chosen, 0.75, 0.25) + 0 * prob  # the router still runs, forward and backward


def parts_of_a_step(model, batch: int) -> dict[str, float]:
    """Seconds of forward and backward of each part, run alone on inputs of its shape."""
    config = model.config
    width, grid = config.hidden_size, config.input_size
    c = torch.randn(batch, width, requires_grad=True)
    x = torch.randn(batch, config.in_channels, *grid)
    h = torch.randn(batch, grid[0] * grid[1], width, requires_grad=True)
    prob = torch.where(torch.rand(h.shape[:2]) < 1 / config.target_ratio, 0.75, 0.25).requires_grad_()
    plan = plan_chunks(prob, grid)
    tokens = torch.randn(plan.capacity, width, requires_grad=True)
    image = h.transpose(1, 2).unflatten(2, grid)
    runs = {
        "stem and encoder": lambda: model.encoder(model.stem(x), c),
        "router": lambda: model.router.router(h),
        "residual projection": lambda: model.residual_proj(h),
        "plan": lambda: plan_chunks(prob, grid),
        "chunk": lambda: chunk(h, plan, model.pos_embed),
        "main network": lambda: model.main(tokens, c, plan),
        "dechunk": lambda: dechunk(tokens, prob, plan, h, config.sigma),
        "decoder and output": lambda: model.final(model.decoder(image, c), c),
    }

    def timed(run) -> float:
        def call() -> None:
            out = run()
            if isinstance(out, torch.Tensor):
                out.sum().backward(retain_graph=True)

        return seconds(call)

    return {name: timed(run) for name, run in runs.items()}


def main() -> None:
    """Draw the curves, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    draw_curves(args.run / "metrics.jsonl", args.output / "digits_curves.png")
    model = load_checkpoint(args.run / "model")[0].train()
    model.router = FixedShare(model.router, 1 / model.config.target_ratio)
    plain = PlainDiT(model.config)
    plain.config = model.config
    ours, theirs = (seconds(training_step(m, args.batch, m is model)) for m in (model, plain))
    print(f"batch {args.batch}, {torch.get_num_threads()} threads, forward and backward")
    rate, plain_rate = args.batch / ours, args.batch / theirs
    print(f"DC-DiT {rate:8.1f} images/s   plain DiT {plain_rate:8.1f} images/s   {rate / plain_rate:.2f}×")
    parts = parts_of_a_step(model, args.batch)
    for name, time_ in parts.items():
        print(f"  {name:<22}{1e3 * time_:8.1f} ms  {time_ / ours:6.1%} of the step")
    print(f"  {'plain DiT, whole':<22}{1e3 * theirs:8.1f} ms")


if __name__ == "__main__":
    main()
