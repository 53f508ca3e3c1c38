"""The golden file of the public release, and files made from it."""

import zipfile
from pathlib import Path

import torch

from dcdit.checkpoints.safe_pickle import read_pickle
from dcdit.model.config import DCDiTConfig

DATA = Path(__file__).parent / "data"
RELEASE = DATA / "dcdit_tiny_release.pt"
TINY = DCDiTConfig(input_size=(6, 6), num_classes=5, hidden_size=64, depth=2, num_heads=4, encoder_width=32, sigma=2.0)


def content(path=RELEASE):
    """The golden file as plain containers, to be bent and saved again."""
    values = read_pickle(path)
    return {"model": dict(values["model"]), "ema": dict(values["ema"])}


def save(tmp_path, values):
    torch.save(values, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def save_pickle(tmp_path, change):
    """The golden file with its pickle's bytes changed."""
    with zipfile.ZipFile(RELEASE) as old, zipfile.ZipFile(tmp_path / "bent.pt", "w", zipfile.ZIP_STORED) as new:
        for entry in old.namelist():
            data = old.read(entry)
            new.writestr(entry, change(data) if entry.endswith("data.pkl") else data)
    return tmp_path / "bent.pt"
