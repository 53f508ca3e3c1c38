"""The parsers of foreign bytes, each as a function of bytes. It returns, or raises one of the project's own errors.

`seeds` gives good inputs; tests/data/fuzz/TARGET holds inputs of earlier failures.
"""

from __future__ import annotations

import functools
import io
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import yaml

from dcdit.checkpoints.folder import load_checkpoint, load_release
from dcdit.data.picture_files import read_square
from dcdit.data.sources import Latents
from dcdit.errors import DCDiTError
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.training.config import load_config
from dcdit_kernels import unpad_input

ROOT = Path(__file__).parent.parent
RELEASE = ROOT / "tests/data/dcdit_tiny_release.pt"
CORPUS = ROOT / "tests/data/fuzz"
SPLIT = b"\n---\n"  # between config.json and the header of the weights


def release(data: bytes) -> None:
    """The pickle of a `.pt`; the tensors' bytes are the golden file's."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(RELEASE) as old, zipfile.ZipFile(f"{folder}/x.pt", "w") as new:
            for entry in old.namelist():
                new.writestr(entry, data if entry.endswith("data.pkl") else old.read(entry))
        refuse_only(lambda: load_release(f"{folder}/x.pt"))


def checkpoint(data: bytes) -> None:
    """config.json, and the JSON header of model.safetensors. The weights are zeros, as many as in the good file."""
    config, _, header = data.partition(SPLIT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_bytes(config)
        weights = struct.pack("<Q", len(header)) + header + bytes(tiny()[1])
        (folder / "model.safetensors").write_bytes(weights)
        refuse_only(lambda: load_checkpoint(folder))


def config(data: bytes) -> None:
    """A YAML configuration."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.yaml").write_bytes(data)
        refuse_only(lambda: load_config(f"{folder}/x.yaml"))


def latents(data: bytes) -> None:
    """An .npy file of latents; its label has equal bytes."""
    with tempfile.TemporaryDirectory() as name:
        for part in ("features", "labels"):
            Path(name, f"x_{part}").mkdir()
            Path(name, f"x_{part}", "0.npy").write_bytes(data)
        refuse_only(lambda: Latents(name, (2, 3, 3)).load(0, flip=False))


def picture(data: bytes) -> None:
    """A picture file of any kind."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.png").write_bytes(data)
        refuse_only(lambda: read_square(Path(folder, "x.png"), 8))


def mask(data: bytes) -> None:
    """An attention mask: the first byte is its dtype, the second its width. The marked rows are taken, in order."""
    if len(data) < 3:
        return
    dtype = (torch.bool, torch.uint8, torch.int8, torch.float16, torch.float32, torch.float64)[data[0] % 6]
    body = data[2:]
    size = torch.empty((), dtype=dtype).element_size()
    body = body[: len(body) // size * size]
    if not body:
        return
    values = torch.frombuffer(bytearray(bytes(b & 1 for b in body) if dtype == torch.bool else body), dtype=dtype)
    width = data[1] % len(values) + 1
    values = values[: len(values) // width * width].view(-1, width)
    hidden = torch.arange(values.numel(), dtype=torch.float32).view(*values.shape, 1)
    marks = all(value in (0, 1) for value in values.flatten().tolist())
    try:
        taken = unpad_input(hidden, values)[0].flatten()
    except ValueError:
        assert not marks
        return
    assert marks and torch.equal(taken, hidden[values.bool()].flatten())


TARGETS = {f.__name__: f for f in (release, checkpoint, config, latents, picture, mask)}


def refuse_only(read) -> None:
    """Run a reader, which may raise the project's own errors only."""
    try:
        read()
    except DCDiTError as error:
        assert str(error)


@functools.cache
def tiny() -> tuple[bytes, int]:
    """(config.json and header of a tiny checkpoint, bytes of its weights)."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"input_size": 4, "num_classes": 2, "hidden_size": 32, "depth": 1, "num_heads": 1, "encoder_width": 32}
        model = DCDiT(DCDiTConfig(**sizes))
        model.use = {"objective": "ddpm", "codec": {"kind": "pixel_unshuffle", "factor": 2}}
        model.save_pretrained(Path(folder, "model"))
        weights = Path(folder, "model", "model.safetensors").read_bytes()
        size = struct.unpack("<Q", weights[:8])[0]
        text = Path(folder, "model", "config.json").read_bytes()
        return text + SPLIT + weights[8 : 8 + size], len(weights) - 8 - size


@functools.cache
def seeds(target: str) -> list[bytes]:
    """Good inputs, then inputs of earlier failures."""
    good: list[bytes] = []
    if target == "release":
        with zipfile.ZipFile(RELEASE) as file:
            good = [file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))]
    elif target == "checkpoint":
        good = [tiny()[0]]
    elif target == "config":
        everything = yaml.safe_dump(load_config(ROOT / "configs/digits.yaml").to_dict()).encode()
        good = [file.read_bytes() for file in sorted(ROOT.glob("configs/*.yaml"))] + [everything]
    elif target == "latents":
        for array in (np.ones((1, 2, 3, 3), np.float32), np.ones((2, 3, 3), np.float16), np.array([1])):
            stream = io.BytesIO()
            np.save(stream, array)
            good.append(stream.getvalue())
    elif target == "picture":
        good = list(_pictures())
    elif target == "mask":
        good = [bytes([kind, 3, *(i % 2 for i in range(24))]) for kind in range(6)]
    return good + [file.read_bytes() for file in sorted((CORPUS / target).glob("*"))]


def _pictures():
    from PIL import Image

    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    colour = np.random.default_rng(0).integers(0, 255, (8, 8, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for array, kind, options in (
        *((grey, kind, {}) for kind in ("png", "tiff")),
        (colour, "png", {}),
        *((colour[..., :3], kind, {"exif": exif}) for kind in ("jpeg", "webp", "png", "tiff")),
        *((colour[..., :3], kind, {}) for kind in ("bmp", "gif", "ppm", "jpeg2000", "tga")),
    ):
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, kind, **options)
        yield stream.getvalue()
