"""Pictures of one sampling run on disk: each is there as soon as it is finished, and a second call goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..files import read_json, replacing
from ..pictures.images import enlarge, grid, save_png

FORMATS = ("grid", "png", "npz")
SETTINGS = "sampling.json"
PNG_END = b"IEND\xaeB`\x82"
IN_GRID = 1024  # pictures that grid.png shows


class PictureRun:
    """`count` pictures of the classes `ids`, which take turns, in `folder`: NNNNNN_classC.png, or hidden without "png".

    `settings` decide the pictures: sampling.json keeps them, and a folder with pictures of other
    settings is refused with DataError, as a figure such as FID is taken over a folder.
    """

    def __init__(
        self, folder: Path, ids: Sequence[int], count: int, settings: dict[str, Any], formats: Sequence[str]
    ) -> None:
        self.folder, self.ids, self.count, self.settings, self.formats = folder, list(ids), count, settings, formats
        self.pictures = folder if "png" in formats else folder / ".pictures"
        self._check()

    def label(self, index: int) -> int:
        """The class of a picture. The first pictures do not change when more are asked for."""
        return self.ids[index % len(self.ids)]

    def file(self, index: int) -> Path:
        return self.pictures / f"{index:06d}_class{self.label(index)}.png"

    def done(self, index: int) -> bool:
        """Whether the picture is there to its end, which a loss of power can cut off."""
        try:
            with open(self.file(index), "rb") as stream:
                stream.seek(-len(PNG_END), os.SEEK_END)
                return stream.read() == PNG_END
        except OSError:
            return False

    @property
    def finished(self) -> bool:
        """Whether the outputs are there, also where the pictures behind them are gone."""
        known = self._stored() or {}
        outputs = {"grid": "grid.png", "npz": "samples.npz"}
        wanted = [self.folder / outputs[name] for name in self.formats if name != "png"]
        same = known.get("finished") == self.count and all(known.get(k) == v for k, v in self.settings.items())
        pictures = "png" not in self.formats or all(self.done(index) for index in range(self.count))
        return bool(same and pictures and all(file.exists() for file in wanted))

    def begin(self) -> None:
        """Write sampling.json. One process of a run."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        for half in self.pictures.glob(".*.png.tmp"):  # of a run that was killed
            half.unlink()
        self._write(self.settings)

    def save(self, index: int, image: np.ndarray) -> None:
        """Write one picture (H, W, 3), whole or not at all."""
        with self._writing(), replacing(self.file(index), durable=False) as temporary:
            save_png(temporary, image)

    def finish(self) -> None:
        """Make the other formats from the pictures, one picture in memory at a time. One process of a run."""
        with self._writing():
            if "grid" in self.formats:
                columns = len(self.ids) if len(self.ids) <= 32 else int(np.ceil(min(self.count, IN_GRID) ** 0.5))
                images = np.stack([self._read(index) for index in range(min(self.count, IN_GRID))])
                with replacing(self.folder / "grid.png") as temporary:
                    save_png(temporary, grid(enlarge(images), min(columns, len(images))))
            if "npz" in self.formats:
                with replacing(self.folder / "samples.npz") as temporary:
                    self._write_npz(temporary)
            self._write({**self.settings, "finished": self.count})
        if self.pictures != self.folder:
            shutil.rmtree(self.pictures, ignore_errors=True)

    def _check(self) -> None:
        others = [file.name for file in self._present() if self._is_foreign(file)]
        if others:
            raise DataError(f"cannot write {self.folder}: it holds images of another run, such as {min(others)}")
        known, present = self._stored(), list(self._present())
        if present and known is None:
            raise DataError(
                f"cannot write {self.folder}: it holds images and no {SETTINGS} that says how they were made"
            )
        for key, value in self.settings.items():
            if present and known.get(key) != value:
                found = f"with {key}={known[key]}" if key in known else f"whose {SETTINGS} does not say its {key}"
                raise DataError(
                    f"cannot write {self.folder}: it holds images of another run, {found}, "
                    f"this call asks for {value}; give another output or remove it"
                )
        more = sorted(file.name for file in present if int(file.name.partition("_")[0]) >= self.count)
        if more:
            raise DataError(
                f"cannot write {self.folder}: this call asks for {self.count} images, and it holds more of this run, "
                f"such as {more[0]}; give --num {int(more[-1].partition('_')[0]) + 1} or another output"
            )

    def _present(self) -> Iterator[Path]:
        yield from self.folder.glob("*_class*.png")
        yield from (self.folder / ".pictures").glob("*_class*.png")

    def _is_foreign(self, file: Path) -> bool:
        match = re.fullmatch(r"(\d{6,})_class(\d+)\.png", file.name)
        return match is None or int(match[2]) != self.label(int(match[1]))

    def _stored(self) -> dict[str, Any] | None:
        try:
            values = read_json(self.folder / SETTINGS)
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        if not isinstance(values, dict):
            return {}
        if "bf16" in values:  # as it was before there was --precision, and at first without CUDA graphs
            return {"precision": "bfloat16" if values["bf16"] else "float32", "cuda_graph": False, **values}
        return values

    def _write(self, values: dict[str, Any]) -> None:
        with self._writing(), replacing(self.folder / SETTINGS, durable=False) as temporary:
            temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _read(self, index: int) -> np.ndarray:
        from PIL import Image

        with Image.open(self.file(index)) as image:
            return np.asarray(image)

    def _write_npz(self, file: Path) -> None:
        """arr_0 (N, H, W, 3) and arr_1 (N,), as ADM's own scripts write them."""
        shape = (self.count, *self._read(0).shape)
        labels = np.resize(self.ids, self.count)
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for index in range(self.count):
                    stream.write(self._read(index).tobytes())
            with archive.open("arr_1.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, labels)

    def _writing(self):
        return _named(self.folder)


class _named:
    """A context that turns an OSError into a DataError with the folder's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, OSError):
            raise DataError(f"cannot write {self.folder}: {error}") from error
