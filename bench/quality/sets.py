"""The sets of `bench.quality`: idx files as Fashion-MNIST's, or a folder as examples/datasets.py writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dcdit.data.picture_sets import PictureSet, open_set

FASHION = Path("/usr/share/datasets/fashion-mnist")
SCALE = {"ratio": 4, "cell": 2}  # N and the pixels of a cell's side, where a run's line does not say them


def path_of(data: Path, half: str) -> Path:
    """Where `half`, train or test, of the set is: `data`/train and `data`/test, or idx files of MNIST's names."""
    return data / ("t10k" if half == "test" and not is_folder(data) else half)


def is_folder(data: Path) -> bool:
    """Whether the set is a folder of coloured pictures with a sub-folder for each class."""
    return (data / "test").is_dir()


def open_half(data: Path, half: str) -> PictureSet:
    """The pictures of `half`, train or test."""
    return open_set(path_of(data, half))


def scale(run: dict) -> str:
    """What the name of a run says of its N and cells: nothing where they are SCALE."""
    own = {key: run.get(key, usual) for key, usual in SCALE.items()}
    return "" if own == SCALE else "-n{ratio}-c{cell}".format(**own)


def changes(data: Path, cell: int) -> list[str]:
    """The changes to bench/quality/study.yaml that train on the set, with cells of `cell` pixels a side.

    Coloured sets and cells of one pixel have batches of 16, for a CPU's time.
    """
    test = open_half(data, "test")
    side, colours, classes = len(next(test.batches())[0]), 3 if is_folder(data) else 1, len(set(test.labels))
    paths = [f"data.path={path_of(data, 'train')}", f"validation.path={path_of(data, 'test')}"]
    model = [f"in_channels={colours * cell**2}", f"input_size={side // cell}", f"num_classes={classes}"]
    kind = ["data.kind=folder", f"data.size={side}"] if is_folder(data) else []
    batch = ["batch_size=16"] if is_folder(data) or cell == 1 else []
    return [*paths, *kind, *batch, f"codec.factor={cell}", *(f"model.{change}" for change in model)]


def classes_to_draw(data: Path, count: int) -> np.ndarray:
    """The classes (count,) of pictures to draw, as frequent as in the held-out half: in turn where all are alike."""
    labels = np.asarray(open_half(data, "test").labels)
    sizes = np.bincount(labels)
    if (sizes == sizes[0]).all():
        return np.arange(count) % len(sizes)
    return np.resize(np.random.default_rng(0).permutation(labels), count)
