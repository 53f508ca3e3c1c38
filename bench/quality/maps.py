"""python -m bench.quality.maps VARIANT…: pictures and the cells that routers keep, as docs/images/NAME.png.

At the top held-out pictures, and the cells that each learned router among the variants keeps of them at time TIME;
below, pictures that each variant draws of equal noise and equal classes.
"""

from __future__ import annotations

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from dcdit.codecs import make_codec
from dcdit.pictures.conv_classifier import to_tensor
from dcdit.pictures.images import enlarge, grid
from dcdit.pictures.trajectory import cell_maps, chunk_map

from .pictures import IMAGES
from .sets import is_folder, open_half
from .study import SAMPLES, VARIANTS, arguments, configuration, pictures, trained

TIME, COUNT, SIDE = 0.1, 10, 64  # from data (0) to noise (1); pictures in a row, and about their pixels


def main() -> None:
    """See the module."""
    parser = arguments(__doc__)
    parser.add_argument("--name", default="quality-maps", help="of the picture")
    args = parser.parse_args()
    args.samples = COUNT
    real, labels = spread(args)
    rows = {"held out": enlarge(real, SIDE)}
    for name in args.variants:
        if VARIANTS[name][0] == "learned":
            rows[f"{name} keeps"] = kept(name, real, labels, args)
    for name in args.variants:
        rows[name] = enlarge(pictures(trained(name, args), configuration(name, args), args, **SAMPLES)[0], SIDE)
    sheet, pitch = grid(np.concatenate(list(rows.values())), COUNT, gap=4), len(rows["held out"][0]) + 4
    figure, axis = plt.subplots(figsize=(8, 7 * sheet.shape[0] / sheet.shape[1]))
    axis.imshow(sheet, interpolation="nearest")
    axis.set_yticks([2 + pitch * (i + 0.5) for i in range(len(rows))], list(rows))
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.tight_layout()
    figure.savefig(IMAGES / f"{args.name}.png", dpi=120, bbox_inches="tight")


def spread(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Held-out pictures uint8 (COUNT, H, W, 3) from all over the set, and their classes."""
    half = open_half(args.data, "test")
    rows = np.linspace(0, half.count - 1, COUNT + 2).astype(int)[1:-1]
    return np.concatenate(list(half.batches()))[rows], np.asarray(half.labels)[rows]


@torch.no_grad()
def kept(name: str, real: np.ndarray, labels: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """The chunk maps of `real` with noise, over the pictures without it."""
    images = to_tensor(real)[:, : 3 if is_folder(args.data) else 1].float() / 127.5 - 1
    latents = make_codec(**configuration(name, args).codec.options()).encode(images)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(args.seed))
    noisy, times = (1 - TIME) * latents + TIME * noise, torch.full((len(real),), 1000 * TIME)
    inputs = (part.to(args.device) for part in (noisy, times, torch.as_tensor(labels).long()))
    masks, sources = cell_maps(trained(name, args)(*inputs, return_routing=True)[1])
    return np.stack([chunk_map(*parts, side=SIDE) for parts in zip(real, masks, sources, strict=True)])


if __name__ == "__main__":
    main()
