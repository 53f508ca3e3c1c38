"""Where a run of `bench.quality` spends its tokens, and where it errs: python -m bench.quality_where VARIANT…

For times from data to noise a line: the loss, and for foreground and background cells of the test pictures the share
that is kept and the loss. A cell with a pixel of at least 5 % of white is foreground.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import load_file

from dcdit.data.picture_sets import open_set

from .quality import VARIANTS, arguments, configuration, folder_of
from .rivals import make_rival

TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)


def load(name: str, args: argparse.Namespace) -> torch.nn.Module:
    """The averaged model of a finished run."""
    model = make_rival(configuration(name, args).model, VARIANTS[name][0])
    model.load_state_dict(load_file(folder_of(name, args) / "model" / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def lines(model: torch.nn.Module, pictures: torch.Tensor, classes: torch.Tensor) -> list[list[float]]:
    """t, loss, shares kept of foreground and background, losses of both, for each time; pictures (n, 1, H, W) in ±1."""
    latents = torch.nn.functional.pixel_unshuffle(pictures, 2)
    front = latents.amax(1).flatten(1) > -0.9
    generator, out = torch.Generator().manual_seed(0), []
    for t in TIMES:
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.full((len(latents),), 1000 * t)
        velocity, routing = model((1 - t) * latents + t * noise, times, classes, return_routing=True)
        error = (velocity - (noise - latents)).square().mean(1).flatten(1)
        kept = routing.boundary_mask.float()
        parts = [part[where].mean() for part in (kept, error) for where in (front, ~front)]
        out.append([t, *(float(number) for number in (error.mean(), *parts))])
    return out


def main() -> None:
    """See the module."""
    args = arguments(__doc__).parse_args(namespace=argparse.Namespace(device="cpu"))
    test = open_set(args.data / "t10k")
    pictures = next(iter(test.batches()))
    classes = torch.as_tensor(test.labels[: len(pictures)]).long()
    pixels = torch.from_numpy(pictures[..., :1]).float().movedim(-1, 1) / 127.5 - 1
    for name in args.variants:
        print(f"\n| {name}: t | loss | kept of foreground | of background | loss of foreground | of background |")
        print("|---|---|---|---|---|---|")
        for t, loss, front, back, front_loss, back_loss in lines(load(name, args), pixels, classes):
            print(f"| {t} | {loss:.4f} | {front:.1%} | {back:.1%} | {front_loss:.4f} | {back_loss:.4f} |")


if __name__ == "__main__":
    main()
