"""A folder of pictures as latents on disk: the autoencoder then runs once, not in every epoch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..codecs import AutoencoderKL
from ..errors import DataError
from ..files import read_json, replacing
from ..model.mixed import by_size
from .image_folder import ImageFolder
from .sources import DATASET

PICTURES = "class_names", "pictures", "fingerprint"  # settings that tell one folder of pictures from another


def encode_folder(
    source: ImageFolder,
    target: Path,
    codec: AutoencoderKL,
    use: dict[str, Any],
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    skip_broken: bool = False,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """Write picture K of `source` as TARGET/latents_features/K.npy, float32 (C, H, W), and its class id beside.

    Where the source has buckets each latent has the size of its picture's bucket.

    `use` is the codec as `make_codec` takes it; TARGET/dataset.json keeps it with the names of the classes. A second
    call goes on where the first one ended. Returns a line for each unreadable picture, which `skip_broken` leaves out.
    Raises DataError, also where TARGET holds latents of other pictures or of another codec.
    """
    features, labels = target / "latents_features", target / "latents_labels"
    for folder in (features, labels):
        folder.mkdir(parents=True, exist_ok=True)
    settings = {"class_names": source.class_names, "codec": use, "size": source.size, "buckets": source.buckets}
    settings |= {"pictures": len(source), "fingerprint": source.fingerprint()}
    _begin(target / DATASET, settings)
    there = [{path.name for path in folder.iterdir()} for folder in (features, labels)]
    todo = [i for i in range(len(source)) if not all(f"{i}.npy" in names for names in there)]
    todo.sort(key=lambda i: source.shapes[i])  # full batches of each size
    progress(len(source) - len(todo))
    broken = []
    for first in range(0, len(todo), batch_size):
        part, pixels = [], []
        for index in todo[first : first + batch_size]:
            try:
                image, label = source.load(index, flip=False)
            except DataError as error:
                if not skip_broken:
                    raise
                broken.append(str(error))
                continue
            part.append((index, label))
            pixels.append(torch.from_numpy(np.ascontiguousarray(image)).to(device))
        if part:
            latents = [latent.float().cpu().numpy() for latent in by_size(codec.encode, pixels)]
            for (index, label), latent in zip(part, latents, strict=True):
                if not np.isfinite(latent).all():
                    raise DataError(
                        f"the codec must give finite latents, got NaN or infinity of {source.files[index][0]}"
                    )
                # The label last: an item counts as done when it is there.
                for folder, array in ((features, latent), (labels, np.array(label))):
                    with replacing(folder / f"{index}.npy", durable=False) as temporary, open(temporary, "wb") as file:
                        np.save(file, array)
        progress(min(batch_size, len(todo) - first))
    _write(target / DATASET, {**settings, "finished": True})
    return broken


def _begin(file: Path, settings: dict[str, Any]) -> None:
    if file.exists():
        try:
            before = dict(read_json(file))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file} is not what dcdit data encode writes: {error}") from error
        for key, value in settings.items():
            if before.get(key, 0) != value:  # 0: buckets, in files of older versions
                what = f"of other pictures: {key} " if key in PICTURES else f"with {key}="
                what += str(before.get(key))
                raise DataError(f"{file.parent} holds latents {what}, this call asks for {value}; give another folder")
    else:
        _write(file, {**settings, "finished": False})


def _write(file: Path, values: dict[str, Any]) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
