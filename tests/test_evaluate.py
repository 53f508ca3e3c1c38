"""Distances of sets of pictures: two routes agree, and sets of every kind are read batch by batch."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg

from dcdit.cli import main
from dcdit.data import picture_sets
from dcdit.data.picture_sets import open_set
from dcdit.errors import DataError
from dcdit.pictures.conv_classifier import fit, to_tensor
from dcdit.pictures.evaluation import Features, agreement, compare, manifold
from dcdit.pictures.images import save_png


class Corners(torch.nn.Module):
    """Features that are known: four pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, :2, :2].flatten(1).float() / 255


def pictures(count, seed, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (count, 8, 8, 3)).astype(np.uint8)


def test_frechet_distance_by_two_routes():
    sets = pictures(60, 0), pictures(50, 1, 50, 200)
    a, b = (Corners()(to_tensor(images)).double().numpy() for images in sets)
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = np.real(linalg.sqrtm(covariances[0] @ covariances[1]))
    want = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    first, second = (Features(Corners(), np.array_split(images, 7)) for images in sets)
    got = compare(first, second)
    assert got["frechet"] == pytest.approx(want, rel=1e-4)
    same = compare(second, Features(Corners(), [sets[1]]))
    assert same["frechet"] == pytest.approx(0, abs=1e-5) and same["precision"] == same["coverage"] == 1
    assert got["kernel"] > same["kernel"]
    assert compare(second, second)["frechet"] == pytest.approx(0, abs=1e-5)  # a reference serves several sets


def test_manifold_by_hand():
    """On a line with one neighbour: balls of 0, 1 and 10 reach 1, 1 and 9, balls of 1.5, 30 and 31 28.5, 1 and 1."""
    real, samples = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[1.5], [30.0], [31.0]])
    got = manifold(samples, real, neighbours=1)
    assert got == pytest.approx({"precision": 1 / 3, "recall": 1, "density": 2 / 3, "coverage": 2 / 3})
    with pytest.raises(DataError, match="more than 5 pictures"):
        manifold(samples, real)


def test_the_classifier_learns_and_leaves_random_numbers_alone():
    images = np.concatenate([pictures(80, 0, 0, 100), pictures(80, 1, 150, 256)])
    labels = np.repeat([0, 1], 80)
    state = torch.get_rng_state()
    net = fit(images, labels, report=lambda _: None)
    assert torch.equal(torch.get_rng_state(), state)
    assert agreement(lambda x: net.out(net(x)).argmax(1), [images], labels) > 0.98


def folder_of(path, images, ids):
    path.mkdir()
    for i, (image, label) in enumerate(zip(images, ids, strict=True)):
        save_png(path / f"{i:06d}_class{label}.png", image)
    save_png(path / "grid.png", np.zeros((99, 99, 3), np.uint8))
    return path


def test_sets_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_sets, "BATCH", 3)
    images, ids = pictures(7, 0), np.arange(7) % 2
    np.savez(tmp_path / "set.npz", images, ids)
    (tmp_path / "classes").mkdir()
    for label in (0, 1):
        folder = tmp_path / "classes" / str(label)
        folder.mkdir()
        for i in np.flatnonzero(ids == label):
            save_png(folder / f"{i}.png", images[i])
    for path in (folder_of(tmp_path / "drawn", images, ids), tmp_path / "set.npz", tmp_path / "classes"):
        found = open_set(path, 8)
        parts = list(found.batches())
        order = np.argsort(ids, kind="stable") if path.name == "classes" else np.arange(7)
        assert len(parts) == 3 and found.count == 7
        np.testing.assert_array_equal(np.concatenate(parts), images[order])
        np.testing.assert_array_equal(found.labels, ids[order])


def test_what_is_wrong_is_said(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for name, found in (("nothing", "nothing there"), ("notes.txt", "a file")):
        with pytest.raises(DataError, match=f"expected a folder of pictures.*, found {found}$"):
            open_set(tmp_path / name)
    (tmp_path / "notes.txt").unlink()
    save_png(tmp_path / "grid.png", np.zeros((99, 99, 3), np.uint8))
    with pytest.raises(DataError, match=r"has no pictures of dcdit sample .* and is no folder of class folders: "):
        open_set(tmp_path)
    np.savez(tmp_path / "grey.npz", np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"expected arr_0 of uint8 \(N, H, W, 3\), found uint8 \(2, 8, 8\)"):
        open_set(tmp_path / "grey.npz")
    np.savez(tmp_path / "none.npz", np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"none\.npz: arr_0 holds no pictures"):
        open_set(tmp_path / "none.npz")
    (tmp_path / "real" / "cat").mkdir(parents=True)
    save_png(tmp_path / "real" / "cat" / "0.png", np.zeros((9, 8, 3), np.uint8))
    assert next(open_set(tmp_path / "real").batches()).shape == (1, 8, 8, 3)  # the lesser side of the first picture
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"broken\.npz is not an \.npz"):
        open_set(tmp_path / "broken.npz")
    drawn = folder_of(tmp_path / "drawn", pictures(2, 0), [0, 1])
    save_png(drawn / "000002_class0.png", np.zeros((9, 8, 3), np.uint8))
    with pytest.raises(DataError, match="expected 8×8 pixels as its neighbours have, found 9×8 pixels"):
        list(open_set(drawn).batches())


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda x: x[:, 0, :2, 0] * math.nan, "finite features, it gave NaN or infinity"),
        (lambda x: x, r"features \(N, F\) of N = 4 pictures, it gave \(4, 3, 8, 8\)"),
        (lambda x: (x, x), "it gave tuple"),
        (lambda x: x.flatten(1) @ torch.ones(3, 3), "cannot take pictures of 8×8 pixels: .*shapes|cannot take .*dtype"),
    ],
)
def test_features_that_are_none_are_refused(network, words):
    """NaN ends the process in the linear algebra of the Fréchet distance."""
    with pytest.raises(DataError, match=words):
        Features(network, [pictures(4, 0)])


def test_the_command(tmp_path, capsys):
    np.savez(tmp_path / "real.npz", pictures(40, 1), np.arange(40) % 2)
    drawn = folder_of(tmp_path / "drawn", pictures(20, 0), np.arange(20) % 2)
    torch.jit.trace(Corners(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).save(str(tmp_path / "corners.pt"))
    words = ["evaluate", str(drawn), "--reference", str(tmp_path / "real.npz")]
    assert main([*words, "--output", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {"frechet", "kernel", "precision", "recall", "density", "coverage", "recognised"} < set(numbers)
    assert main([*words, "--features", str(tmp_path / "corners.pt")]) == 0
    out = capsys.readouterr().out
    assert "samples   20 pictures" in out and out.count("frechet") == 2
    if Path("/dev/full").exists():
        assert main([*words, "--features", str(tmp_path / "corners.pt"), "--output", "/dev/full"]) == 2
        assert "/dev/full: No space left on device" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "none" / "numbers.json")]) == 2
    assert "--output must be a file in a folder that is there" in capsys.readouterr().err
    before = (tmp_path / "real.npz").stat().st_mtime_ns
    assert main([*words, "--output", str(tmp_path / "real.npz")]) == 2
    assert "real.npz: it is there and is no .json file; give another name" in capsys.readouterr().err
    assert (tmp_path / "real.npz").stat().st_mtime_ns == before
    assert main([*words, "--features", str(tmp_path / "real.npz")]) == 2
    assert "is not a TorchScript network" in capsys.readouterr().err
