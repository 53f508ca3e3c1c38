"""Pictures in idx files: the format's fields, and a file's fault in one line."""

import gzip
import importlib.util
import io
import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from dcdit.data.idx import IMAGES, LABELS, Idx
from dcdit.data.sources import make_source
from dcdit.errors import DataError
from dcdit.model.config import preset
from dcdit.training.config import DataConfig

PICTURES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4) * 10


def content(array, kind=8):
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


def write(folder, labels=(7, 3), pictures=PICTURES):
    (folder / f"train{IMAGES}.gz").write_bytes(gzip.compress(content(pictures)))
    (folder / f"train{LABELS}").write_bytes(content(np.array(labels, dtype=np.uint8)))
    return f"{folder}/train"


def test_pictures_and_labels(tmp_path):
    source = make_source(DataConfig(kind="idx", path=write(tmp_path)), preset("digits"))
    assert (len(source), source.classes) == (2, 8)
    for flip in (False, True):
        image, label = source.load(1, flip)
        want = PICTURES[1].astype(np.float64) / 127.5 - 1
        np.testing.assert_allclose(image, (want[:, ::-1] if flip else want)[None], atol=1e-6)
        assert label == 3 and image.dtype == np.float32
    before = source.fingerprint()
    write(tmp_path, labels=(7, 4))
    assert Idx(f"{tmp_path}/train").fingerprint() != before


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        (f"train{IMAGES}.gz", gzip.compress(content(PICTURES))[:-9], "cannot be read"),
        (f"train{IMAGES}.gz", b"plain", "cannot be read"),
        (f"train{IMAGES}.gz", gzip.compress(content(PICTURES)[:-1]), "expected 2×3×4 bytes after the head, found 23"),
        (f"train{IMAGES}.gz", gzip.compress(content(PICTURES, 13)), r"begin with 0, 0, 8, 3.*found \[0, 0, 13, 3\]"),
        (f"train{LABELS}", content(PICTURES), r"must begin with 0, 0, 8, 1"),
        (f"train{LABELS}", b"", r"found \[\]"),
        (f"train{LABELS}", content(np.zeros(3, dtype=np.uint8)), "found 2 pictures and 3 labels"),
    ],
    # gzip's bytes hold the time: as names they would differ between the processes that collect.
    ids=("cut gzip", "no gzip", "too short", "floats", "pictures as labels", "empty", "three labels"),
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, name, data, complaint):
    path = write(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=complaint):
        Idx(path)


def test_missing(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*train-images-idx3-ubyte or .*\.gz"):
        Idx(tmp_path / "train")


def example():
    spec = importlib.util.spec_from_file_location("datasets_example", "examples/datasets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folders_of_emoji(tmp_path, monkeypatch):
    """One code point each, by Unicode's groups, on white; lines of other kinds are left out."""
    module = example()
    lines = ["# group: Animals & Nature", "1F412 ; fully-qualified # a", "2618 FE0F ; fully-qualified # b"]
    lines += [
        "2618 ; unqualified # b",
        "1F44B 1F3FB ; fully-qualified # c",
        "1F413 ; fully-qualified # not in the font",
    ]
    (tmp_path / "emoji.txt").write_text("\n".join(lines))
    glyph = io.BytesIO()
    Image.new("RGBA", (6, 4), (255, 0, 0, 0)).save(glyph, "PNG")
    table = SimpleNamespace(strikeData=[{"a": SimpleNamespace(imageData=glyph.getvalue())}])
    font = SimpleNamespace(getBestCmap=lambda: {0x1F412: "a", 0x2618: "a", 0x1F44B: "a"})
    fake = type("Font", (), {"getBestCmap": lambda self: font.getBestCmap(), "__getitem__": lambda self, name: table})
    monkeypatch.setitem(sys.modules, "fontTools.ttLib", SimpleNamespace(TTFont=lambda path: fake()))
    monkeypatch.setattr(module, "EMOJI", tmp_path / "emoji.txt")
    module.main("emoji", tmp_path / "out")
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png"))
    assert [str(file) for file in files] == [
        f"{name}.png" for name in ("test/animals-nature/2618", "train/animals-nature/1f412")
    ]
    assert np.asarray(Image.open(tmp_path / "out" / files[0])).tolist() == np.full((6, 6, 3), 255).tolist()
    assert "Open Font License" in (tmp_path / "out" / "LICENCE.txt").read_text()


def test_folders_of_materials(tmp_path, monkeypatch):
    """Disjoint crops by material, a quarter of them for tests; logo, white square and characters are left out."""
    module = example()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no wheel of miniworld"):
        module.main("materials", tmp_path / "out")
    pixels = np.zeros((512, 600, 3), np.uint8)
    pixels[...] = np.add.outer(np.arange(512) // 64 * 16, np.arange(600) // 64)[..., None]
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "PNG")
    with zipfile.ZipFile(tmp_path / "miniworld-2.1.0-py3-none-any.whl", "w") as wheel:
        for name in ("grass_1", "grass_12", "rock", "logo_mila_1", "white_1", "chars/a_1"):
            wheel.writestr(f"miniworld/textures/{name}.png", picture.getvalue())
        wheel.writestr("miniworld/meshes/barrel.png", b"")
    module.main("materials", tmp_path / "out", "32")
    files = {half: sorted((tmp_path / "out" / half).rglob("*.png")) for half in ("train", "test")}
    assert {file.parent.name for file in files["test"]} == {"grass", "rock"}
    assert len(files["test"]) == 3 * 18 and len(files["train"]) == 3 * (72 - 18)
    places = set()
    for file in files["train"] + files["test"]:
        crop = np.asarray(Image.open(file))
        row, column = map(int, file.stem.split("-")[1:])
        assert crop.shape == (32, 32, 3) and (crop == row * 16 + column).all()
        places.add((file.stem, crop[0, 0, 0]))
    assert len(places) == 3 * 72


def test_folders_of_glyphs(tmp_path, monkeypatch):
    """62 characters of each open font that has them all; a family's fonts are all for training or all for tests."""
    module, file = example(), Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no wheel of augly"):
        module.main("glyphs", tmp_path / "out")
    changed = TTFont(file)
    changed["name"].setName("Under the SIL Open Font License, Version 1.1.", 13, 3, 1, 0x409)
    changed.save(tmp_path / "open.ttf")
    for table in changed["cmap"].tables:
        table.cmap.pop(ord("q"), None)
    changed.save(tmp_path / "lacking.ttf")
    with zipfile.ZipFile(tmp_path / "augly-1.0.0-py3-none-any.whl", "w") as wheel:
        for name in ("Montserrat-Bold", "MontserratThin", "Quicksand", "modernpics"):
            wheel.write(tmp_path / "open.ttf", f"augly/assets/fonts/{name}.ttf")
        wheel.write(tmp_path / "lacking.ttf", "augly/assets/fonts/Lacking.ttf")
        wheel.write(file, "augly/assets/fonts/Bitstream.ttf")
        wheel.writestr("augly/assets/fonts/Quicksand.pkl", b"")
    module.main("glyphs", tmp_path / "out", "64")
    files = {half: list((tmp_path / "out" / half).rglob("*.png")) for half in ("train", "test")}
    assert {path.stem for path in files["train"]} == {"Montserrat-Bold", "MontserratThin"} and len(
        files["train"]
    ) == 124
    assert {path.stem for path in files["test"]} == {"Quicksand"} and len(files["test"]) == 62
    assert len({path.parent.name.lower() for path in files["test"]}) == 62
    ink = {path.parent.name: 255 - np.asarray(Image.open(path).convert("L")).astype(int) for path in files["test"]}
    assert all(picture.max() > 200 for picture in ink.values())
    edges = [np.concatenate([picture[[0, -1]].ravel(), picture[:, [0, -1]].ravel()]).max() for picture in ink.values()]
    assert max(edges) == 0
    assert ink["upper-c"].sum() > ink["lower-c"].sum() and ink["lower-g"][50:].any() and not ink["upper-h"][50:].any()
