"""Parquet samples for `dcdit upcycle --family`: nested lists and bytes of npy files, and files that are broken."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdit.data.conditioned import Conditioned
from dcdit.errors import ConfigError, DataError
from tests.test_conditioned import npy, sample

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ("latents", "text", "pooled")


def lists(depth, kind=pa.list_, leaf=None):
    leaf = leaf or pa.float32()
    for _ in range(depth):
        leaf = kind(leaf)
    return leaf


def table(samples, kind=pa.list_, leaf=None):
    columns = {name: pa.array([s[name].tolist() for s in samples], lists(d, kind, leaf)) for name, d in DEPTHS.items()}
    return pa.table(columns | {"caption": ["a seven"] * len(samples)})


DEPTHS = {"latents": 3, "text": 2, "pooled": 1}
FIVE = [sample(i) for i in range(5)]
LAYOUTS = {
    "lists": table(FIVE),
    "large lists": table(FIVE, pa.large_list),
    "half precision": table(FIVE, leaf=pa.float16()),
    "texts of a fixed size": table(FIVE).set_column(
        1, "text", pa.array([s["text"].tolist() for s in FIVE], pa.list_(pa.list_(pa.float32(), 5), 3))
    ),
    "npy": pa.table({name: [npy(s[name]) for s in FIVE] for name in NAMES}),
    "npy of large bytes": pa.table({name: pa.array([npy(s[name]) for s in FIVE], pa.large_binary()) for name in NAMES}),
}


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_samples_and_batches(layout, rows, tmp_path):
    for name, part in (("a", LAYOUTS[layout].slice(0, 3)), ("b", LAYOUTS[layout].slice(3))):
        pq.write_table(part, tmp_path / f"{name}.parquet", row_group_size=rows)
    data = Conditioned(str(tmp_path), pooled=True)
    assert len(data) == 5 and [sorted(places) for places in data.buckets.values()] == [[0, 2, 4], [1, 3]]
    assert data.files[4].name == f"{tmp_path}/b.parquet:1" and data.files[4].place == "b.parquet:1"
    precision = 1e-3 if layout == "half precision" else 0
    for i in (3, 0, 4, 1, 2):
        assert data[i].keys() == sample(i).keys()
        assert all(torch.allclose(v, sample(i)[n], precision, precision) for n, v in data[i].items())


def test_extension_types_are_their_storage(tmp_path):
    """datasets' Array3D is one, where datasets is imported."""

    class Array3D(pa.ExtensionType):
        def __init__(self):
            super().__init__(lists(3), "tests.Array3D")

        def __arrow_ext_serialize__(self):
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, serialized):
            return cls()

    pa.register_extension_type(Array3D())
    try:
        plain = table(FIVE)
        latents = pa.ExtensionArray.from_storage(Array3D(), plain["latents"].combine_chunks())
        pq.write_table(plain.set_column(0, "latents", latents), tmp_path / "0.parquet")
        assert torch.equal(Conditioned(str(tmp_path))[3]["latents"], sample(3)["latents"])
    finally:
        pa.unregister_extension_type("tests.Array3D")


def test_the_fingerprint_knows_the_groups(tmp_path):
    pq.write_table(LAYOUTS["npy"], tmp_path / "0.parquet")
    before = Conditioned(str(tmp_path)).fingerprint()
    pq.write_table(LAYOUTS["npy"].slice(0, 4), tmp_path / "0.parquet")
    assert Conditioned(str(tmp_path)).fingerprint() != before


def test_one_row_group_is_in_memory(tmp_path):
    """Reading 64 MB of samples takes no more of Arrow's memory than a few of their groups of 2 MB."""
    rng = np.random.default_rng(0)
    latents = [npy(torch.from_numpy(rng.standard_normal((16, 128, 128), dtype="float32"))) for _ in range(2)] * 32
    text = [npy(torch.ones(2, 3))] * 64
    options = {"row_group_size": 2, "use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table({"latents": latents, "text": text}), tmp_path / "0.parquet", **options)
    del latents
    before = pa.total_allocated_bytes()
    data = Conditioned(str(tmp_path))
    most = 0
    for i in (63, 0, 20, 40, 7):
        data[i]
        most = max(most, pa.total_allocated_bytes() - before)
    assert 1e6 < most < 8e6


def edited(name, column):
    whole = table(FIVE)
    return whole.set_column(whole.column_names.index(name), name, column)


EMPTY = [s["text"].tolist() for s in FIVE[:4]] + [[[1.0] * 5, [None] * 5]]
BROKEN = {
    r"0.parquet:0 must have pooled of 1 dimensions, got none": table(FIVE).drop_columns(["pooled"]),
    r"0.parquet:4 must have latents of 3 dimensions, got none": edited(
        "latents", pa.array([s["latents"].tolist() for s in FIVE[:4]] + [None], lists(3))
    ),
    r"0.parquet:0 must have latents of 3 dimensions, got \(3, 5\)": edited("latents", table(FIVE)["text"]),
    r"0.parquet:0 cannot be read: text must be nested lists of numbers or bytes of an npy file, got string": edited(
        "text", pa.array(["a seven"] * 5)
    ),
    r"0.parquet:0 cannot be read: text must be nested lists of numbers .* got string": edited(
        "text", pa.array([["a", "seven"]] * 5)
    ),
    r"0.parquet:2 cannot be read: the lists of text must be of one length, got \[5, 4\]": edited(
        "text", pa.array([[[1.0] * 5] * 3] * 2 + [[[1.0] * 5, [1.0] * 4]] * 3)
    ),
    r"0.parquet:4 cannot be read: text has 5 empty values": edited("text", pa.array(EMPTY)),
    r"0.parquet:0 must have text of floating-point numbers, no side of 0, got int64 \(3, 5\)": edited(
        "text", pa.array([torch.ones(3, 5).long().tolist()] * 5)
    ),
    r"0.parquet:0 must have text of floating-point numbers, no side of 0, got F64 \(0, 0\)": edited(
        "text", pa.array([[]] * 5, lists(2, leaf=pa.float64()))
    ),
    r"0.parquet:0 cannot be read: .*magic": edited("text", pa.array([b"no array"] * 5)),
    r"parquet files with latents, text, pooled; it has none": table(FIVE).slice(0, 0),
}


@pytest.mark.parametrize("message", BROKEN)
def test_bad_tables(message, tmp_path):
    pq.write_table(BROKEN[message], tmp_path / "0.parquet")
    with pytest.raises(DataError, match=message):
        Conditioned(str(tmp_path), pooled=True)


@pytest.mark.parametrize("layout", ["lists", "npy"])
def test_a_row_with_nan_is_named_when_it_is_read(layout, tmp_path):
    bad = [dict(s) for s in FIVE]
    bad[3]["text"] = bad[3]["text"] * float("nan")
    pq.write_table(
        table(bad) if layout == "lists" else pa.table({n: [npy(s[n]) for s in bad] for n in NAMES}),
        tmp_path / "0.parquet",
    )
    data = Conditioned(str(tmp_path))
    with pytest.raises(DataError, match=r"0\.parquet:3 must have finite text, got NaN or infinity"):
        data[3]


def test_an_npy_that_is_cut_off_is_named_when_it_is_read(tmp_path):
    cut = pa.array([npy(s["text"])[:-4] for s in FIVE])
    pq.write_table(edited("text", cut), tmp_path / "0.parquet")
    data = Conditioned(str(tmp_path))
    with pytest.raises(DataError, match=r"0\.parquet:1 cannot be read: "):
        data[1]


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_file(share, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    pq.write_table(LAYOUTS["lists"], folder / "0.parquet")
    data = (folder / "0.parquet").read_bytes()
    (folder / "0.parquet").write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=r"0\.parquet is not a parquet file that can be read: .+$"):
        Conditioned(str(folder))


@settings(max_examples=100, deadline=None)
@given(layout=st.sampled_from(["lists", "npy"]), share=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte(layout, share, value, tmp_path_factory):
    """Is read over, or refused in one line."""
    folder = tmp_path_factory.mktemp("changed")
    pq.write_table(LAYOUTS[layout], folder / "0.parquet", row_group_size=2)
    data = bytearray((folder / "0.parquet").read_bytes())
    data[int(share * len(data))] = value
    (folder / "0.parquet").write_bytes(data)
    try:
        samples = Conditioned(str(folder))
        assert all(samples[i] for i in range(len(samples)))
    except DataError as error:
        assert "\n" not in str(error)


def test_pyarrow_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "0.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"0\.parquet needs pyarrow: pip install dcdit\[parquet\]"):
        Conditioned(str(tmp_path))
