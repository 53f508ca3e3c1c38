"""From images in [-1, 1] to files: uint8 conversion, grids, and output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from ..files import check_folder


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(N, 1 or 3, H, W) in about [-1, 1] → uint8 (N, H, W, 3); grey becomes three equal channels."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"pictures need shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def enlarge(images: np.ndarray, side: int = 96) -> np.ndarray:
    """Repeat the pixels of (N, H, W, 3) until H is about `side`; larger images stay as they are."""
    factor = max(1, side // images.shape[1])
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """One picture (rows·H, columns·W, 3) of images (N, H, W, 3) in reading order, `gap` pixels apart."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 40, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(file: Path, image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) as a PNG."""
    from PIL import Image

    Image.fromarray(image).save(file, "PNG")


def check_output(directory: str | Path) -> Path:
    """The folder as a Path, if it can be written; for use before hours of work. Raises DataError."""
    directory = Path(directory)
    parent = directory.absolute().parent
    if not parent.is_dir():
        found = f"{parent} is not a folder" if parent.exists() else f"there is no folder {parent}"
        raise DataError(f"cannot write {directory}: {found}")
    if directory.exists() and not directory.is_dir():
        raise DataError(f"cannot write {directory}: it is not a folder")
    return check_folder(directory)


@contextmanager
def output_folder(directory: str | Path) -> Iterator[Path]:
    """A folder to write into; at the end its files move into `directory`, after an error none do.

    Raises DataError where the disk does not take them.
    """
    directory = check_output(directory)
    stage = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.absolute().parent))
    try:
        yield stage
        stage.chmod(0o755)
        if directory.exists():
            for file in sorted(stage.iterdir()):
                os.replace(file, directory / file.name)
        else:
            os.rename(stage, directory)
    except OSError as error:
        raise DataError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
