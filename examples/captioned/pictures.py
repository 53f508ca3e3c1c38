"""The sheet of pictures: the same captions and noise by the dense model and by the upcycled one, with chunk maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from dcdit.pictures.images import enlarge, to_uint8
from dcdit.pictures.trajectory import INK, MUTED, PAPER, cell_maps, chunk_map

from .compositions import NONE, SIZES, Captions, caption, caption_id
from .judging import sample, set_budget

WIDE, LONG, SHORT, TALL = SIZES
SHOWN = ((WIDE, 7, 2), (WIDE, 4, NONE), (LONG, 8, 3), (SHORT, 5, 9), (SHORT, 6, NONE), (TALL, 9, 4))
TIMES = (0.8, 0.4, 0.0)  # of the chunk maps


def draw(
    file: Path,
    models: dict[str, tuple[nn.Module, dict[str, Any]]],
    family: Any,
    captions: Captions,
    settings: dict[str, Any],
) -> None:
    """A column for each caption of SHOWN; for each model a row of pictures and, where it is chunked, of maps over the
    clean picture, one for each of TIMES."""
    columns: list[list[tuple[np.ndarray, str]]] = []
    labels: list[str] = []
    shown = [(size, first, second if settings["digits"] == 2 else NONE) for size, first, second in SHOWN]
    for number, (size, first, second) in enumerate(shown):
        digits = (torch.tensor([digit], device=captions.device) for digit in (first, second))
        which, column, labels = caption_id(*digits, size[0] > size[1]), [], []
        for name, (model, budget) in models.items():
            set_budget(model, budget)
            x, _, routings = sample(model, family, captions, which, size, 1000 + number, settings)
            image = to_uint8(x.cpu())
            column.append((enlarge(image, 192)[0], ""))
            labels.append(name)
            for t in TIMES if routings else ():
                step = min(len(routings) - 1, round((1 - t) * len(routings)))
                mask, source = (part[0] for part in cell_maps(routings[step]))
                column.append((chunk_map(image[0], mask, source, 192), f"{mask.mean():.0%}"))
                labels.append(f"t = {t:g}")
        columns.append(column)
    widths = [max(0.9, size[1] / size[0]) for size, *_ in SHOWN]
    figure = Figure(figsize=(0.85 * sum(widths) + 1.3, 0.98 * len(labels) + 0.4), facecolor=PAPER, layout="constrained")
    axes = figure.subplots(len(labels), len(SHOWN), width_ratios=widths, squeeze=False)
    for j, (column, (size, first, second)) in enumerate(zip(columns, shown, strict=True)):
        title = caption(first, second, size[0] > size[1]).replace(" next", "\nnext").replace(" above", "\nabove")
        axes[0, j].set_title(title, fontsize=8, color=INK)
        for i, (picture, share) in enumerate(column):
            axes[i, j].imshow(picture, interpolation="nearest")
            axes[i, j].set_xlabel(share, fontsize=7, color=MUTED, labelpad=1)
            axes[i, j].set(xticks=[], yticks=[])
            axes[i, j].spines[:].set_visible(False)
    for i, label in enumerate(labels):
        axes[i, 0].set_ylabel(label, fontsize=8, color=INK, rotation=0, ha="right", va="center")
    figure.savefig(file, dpi=110)
