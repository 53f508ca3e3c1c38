"""Samples for `dcdit upcycle --family`: safetensors and npz files, and tar shards of either or of npy members."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from dcdit.data.conditioned import Conditioned
from dcdit.errors import DataError


def sample(number):
    generator = torch.Generator().manual_seed(number)
    sides = {"latents": (2, 4, 6 + 2 * (number % 2)), "text": (3, 5), "pooled": (4,)}
    return {name: torch.randn(sides[name], generator=generator) for name in sides}


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values.numpy())
    return stream.getvalue()


def npz(tensors):
    stream = io.BytesIO()
    np.savez_compressed(stream, **{name: values.numpy() for name, values in tensors.items()})
    return stream.getvalue()


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def shard(file, members):
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            add(tar, name, data)


def in_parts(number, names=("latents", "text", "pooled")):
    return {f"train/{number:04}.{name}.npy": npy(sample(number)[name]) for name in names}


LAYOUTS = {
    "safetensors": lambda folder: [save_file(sample(i), folder / f"{i}.safetensors") for i in range(4)],
    "npz": lambda folder: [(folder / f"{i}.npz").write_bytes(npz(sample(i))) for i in range(4)],
    "npy in shards": lambda folder: [
        shard(folder / f"{i}.tar", in_parts(2 * i) | {f"train/{2 * i:04}.json": b"{}"} | in_parts(2 * i + 1))
        for i in range(2)
    ],
    "files in shards": lambda folder: shard(
        folder / "all.tar",
        {f"{i}.safetensors": save(sample(i)) for i in range(2)} | {f"{i}.npz": npz(sample(i)) for i in (2, 3)},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_samples_and_batches(layout, tmp_path):
    LAYOUTS[layout](tmp_path)
    data = Conditioned(str(tmp_path), pooled=True)
    assert len(data) == 4 and len(data.buckets) == 2 and data.batches(2) == 2
    for i in range(4):
        assert data[i].keys() == sample(i).keys()
        assert all(torch.equal(values, sample(i)[name]) for name, values in data[i].items())
    order = [batch.tolist() for batch in data.epoch(2, np.random.default_rng(0))]
    assert sorted(sorted(batch) for batch in order) == [[0, 2], [1, 3]]


def test_the_fingerprint_knows_a_shard_s_members(tmp_path):
    shard(tmp_path / "a.tar", in_parts(0) | in_parts(1))
    before = Conditioned(str(tmp_path)).fingerprint()
    (tmp_path / "a.tar").rename(tmp_path / "b.tar")
    assert Conditioned(str(tmp_path)).fingerprint() != before
    (tmp_path / "b.tar").unlink()
    shard(tmp_path / "a.tar", in_parts(0) | in_parts(2))
    assert Conditioned(str(tmp_path)).fingerprint() != before


def test_texts_of_several_lengths(tmp_path):
    """Share batches in a family that takes them, and have batches of their own in another."""
    for i, length in enumerate((3, 7)):
        save_file({"latents": torch.ones(2, 4, 4), "text": torch.ones(length, 5)}, tmp_path / f"{i}.safetensors")
    assert len(Conditioned(str(tmp_path), ragged=True).buckets) == 1
    assert len(Conditioned(str(tmp_path)).buckets) == 2


BROKEN = {
    r"0.tar:train/0001 must have text of 2 dimensions, got none": in_parts(0) | in_parts(1, ("latents", "pooled")),
    r"0.tar:a must have latents of 3 dimensions, got none": {"a.text.npy": npy(torch.ones(3, 5))},
    r"0.tar:a must have text of floating-point numbers, no side of 0, got int64 \(3, 5\)": {
        "a.latents.npy": npy(torch.ones(2, 4, 4)),
        "a.text.npy": npy(torch.ones(3, 5).long()),
    },
    r"0.tar:a cannot be read: .*magic": {"a.latents.npy": b"no array at all"},
    r"0.tar:a cannot be read: it is no safetensors file": {"a.safetensors": b"\xff" * 20},
    r"0.tar:a cannot be read: File is not a zip file": {"a.npz": b"PK"},
    r"must be a folder of safetensors, npz, tar or parquet files with latents, text; it has none": {
        "a.jpg": b"",
        "a.txt": b"",
    },
}


@pytest.mark.parametrize("message", BROKEN)
def test_bad_shards(message, tmp_path):
    shard(tmp_path / "0.tar", BROKEN[message])
    with pytest.raises(DataError, match=message):
        Conditioned(str(tmp_path))


def test_a_truncated_shard(tmp_path):
    shard(tmp_path / "0.tar", in_parts(0) | in_parts(1))
    data = (tmp_path / "0.tar").read_bytes()
    for length in (700, 100, data.index(b"train/0001") + 100):
        (tmp_path / "0.tar").write_bytes(data[:length])
        with pytest.raises(DataError, match=r"0\.tar is not a tar that can be read"):
            Conditioned(str(tmp_path))


@pytest.mark.parametrize("layout", ["npy", "npz", "parquet"])
def test_a_header_may_ask_for_any_amount_of_memory(layout, tmp_path):
    plain = npy(torch.ones(3, 5))
    huge = plain.replace(b"(3, 5), }           ", b"(99999999999999, 5)}")
    assert huge != plain and len(huge) == len(plain)
    members = {"latents": npy(torch.ones(2, 4, 4)), "text": huge}
    if layout == "npy":
        shard(tmp_path / "0.tar", {f"a.{name}.npy": data for name, data in members.items()})
    elif layout == "npz":
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for name, data in members.items():
                archive.writestr(f"{name}.npy", data)
    else:
        pa, pq = (pytest.importorskip(f"pyarrow{part}") for part in ("", ".parquet"))
        pq.write_table(pa.table({name: [data] for name, data in members.items()}), tmp_path / "0.parquet")
    data = Conditioned(str(tmp_path))
    with pytest.raises(DataError, match=r"a? cannot be read: Unable to allocate"):
        data[0]


@pytest.mark.parametrize("shape", [b"(-3, 5),}", b"(-3,-5),}"])
def test_an_npy_of_a_negative_side(shape, tmp_path):
    text = npy(torch.ones(3, 5)).replace(b"(3, 5), }"[: len(shape)], shape)
    shard(tmp_path / "0.tar", {"a.latents.npy": npy(torch.ones(2, 4, 4)), "a.text.npy": text})
    with pytest.raises(DataError, match=r"0\.tar:a cannot be read: its npy header is broken: it has the shape \(-3, "):
        Conditioned(str(tmp_path))


def test_numbers_of_the_other_byte_order(tmp_path):
    swapped = {name: values.numpy().astype(">f4") for name, values in sample(0).items()}
    np.savez(tmp_path / "0.npz", **swapped)
    data = Conditioned(str(tmp_path))
    assert all(torch.equal(data[0][name], sample(0)[name]) for name in ("latents", "text"))


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "0.npz").symlink_to(tmp_path / "nothing.npz")
    with pytest.raises(DataError, match=r"0\.npz cannot be read: it is a link to nothing"):
        Conditioned(str(tmp_path))


def test_an_npy_whose_header_has_no_end(tmp_path):
    broken = npy(torch.ones(3, 5)).replace(b"}", b" ")
    shard(tmp_path / "0.tar", {"a.latents.npy": broken})
    with pytest.raises(DataError, match=r"0\.tar:a cannot be read: its npy header is broken"):
        Conditioned(str(tmp_path))


def test_linked_folders_are_read_once_and_hidden_files_not(tmp_path):
    """A disk of samples may be linked into the folder; macOS leaves ._NAME beside a NAME on other systems' disks."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        save_file({"latents": torch.zeros(2, 4, 4), "text": torch.zeros(3, 5)}, folder / "0.safetensors")
    (here / "._0.safetensors").write_bytes(b"")
    for link in ("more", "more again"):
        (here / link).symlink_to(there, target_is_directory=True)
    (there / "back").symlink_to(here, target_is_directory=True)
    assert [file.place for file in Conditioned(str(here)).files] == ["0.safetensors", "more/0.safetensors"]
