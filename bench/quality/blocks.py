"""What choosing could be worth, without a model: python -m bench.quality.blocks --data FOLDER [--sides N…]

Pictures are put together of L/N constant pieces: of a regular grid of √N×√N blocks, of the cells nearest to L/N random
ones, and of the squares of a tree that splits where the error is largest. The share of the variance that each leaves
is printed for each side and N, a mean over held-out pictures. Sides are in cells, of a pixel each, and powers of two:
pictures are made larger or smaller.
"""

from __future__ import annotations

import argparse
import heapq
from pathlib import Path

import numpy as np
import torch

from dcdit.pictures.conv_classifier import to_tensor

from .sets import FASHION, is_folder, open_half

RATIOS = (4, 16, 64)


def regular(picture: np.ndarray, count: int) -> float:
    """The squared error of `count` equal blocks; picture (S, S, C)."""
    side = len(picture)
    block = round(side / count**0.5)
    pieces = picture.reshape(side // block, block, side // block, block, -1)
    return float(np.square(pieces - pieces.mean((1, 3), keepdims=True)).sum())


def nearest(picture: np.ndarray, count: int, rng: np.random.Generator) -> float:
    """The squared error of the cells nearest to each of `count` random ones; picture (S, S, C)."""
    from scipy.spatial import cKDTree

    side, colours = len(picture), picture.shape[2]
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), 2).reshape(-1, 2)
    owner = cKDTree(places[rng.choice(side**2, count, replace=False)]).query(places)[1]
    values = picture.reshape(-1, colours)
    size = np.bincount(owner, minlength=count)
    sums = np.stack([np.bincount(owner, values[:, i], count) for i in range(colours)], 1)
    return float(np.square(values).sum() - (np.square(sums) / size[:, None]).sum())


def split(picture: np.ndarray, count: int) -> float:
    """The squared error of at most `count` squares, each split in four while its error is the largest."""

    def piece(row: int, column: int, side: int) -> tuple[float, int, int, int]:
        part = picture[row : row + side, column : column + side]
        return -float(np.square(part - part.mean((0, 1))).sum()), row, column, side

    heap = [piece(0, 0, len(picture))]
    while len(heap) + 3 <= count and heap[0][0] < 0:
        _, row, column, side = heapq.heappop(heap)
        half = side // 2
        for down, right in ((0, 0), (0, half), (half, 0), (half, half)):
            heapq.heappush(heap, piece(row + down, column + right, half))
    return -sum(error for error, *_ in heap)


def main() -> None:
    """Print a row for each side and N."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FASHION, help="idx files, or a folder of classes")
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--count", type=int, default=100, help="pictures")
    args = parser.parse_args()
    test, rng = open_half(args.data, "test"), np.random.default_rng(0)
    rows = np.linspace(0, test.count - 1, min(args.count, test.count)).astype(int)
    pictures = to_tensor(np.concatenate(list(test.batches()))[rows])[:, : 3 if is_folder(args.data) else 1].float()
    print("| cells a side | N | regular | random | chosen | regular / chosen |\n|---|---|---|---|---|---|")
    for side in args.sides:
        sized = torch.nn.functional.interpolate(pictures, size=side, mode="bilinear", antialias=True)
        cells = sized.permute(0, 2, 3, 1).double().numpy()
        whole = np.square(cells - cells.mean((1, 2), keepdims=True)).sum()
        for ratio in RATIOS:
            count = side**2 // ratio
            left = [sum(regular(picture, count) for picture in cells) / whole]
            left.append(sum(nearest(picture, count, rng) for picture in cells) / whole)
            left.append(sum(split(picture, count) for picture in cells) / whole)
            print(f"| {side} | {ratio} | " + " | ".join(f"{v:.2%}" for v in left) + f" | {left[0] / left[2]:.1f} |")


if __name__ == "__main__":
    main()
