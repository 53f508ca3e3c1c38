"""Release files that are malicious or damaged: refused, whatever they hold."""

import argparse
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from release_files import RELEASE, content, save, save_pickle

from dcdit.checkpoints.folder import load_release
from dcdit.checkpoints.safe_pickle import read_pickle
from dcdit.errors import CheckpointError


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil_files(tmp_path):
    trace = tmp_path / "trace"
    yield "os.system", Evil(os.system, f"touch {trace}"), trace
    yield "builtins.open", Evil(open, str(trace), "w"), trace
    yield "pathlib.Path.touch", Evil(Path.touch, trace), trace
    yield "builtins.exec", Evil(exec, f"open({str(trace)!r}, 'w')"), trace
    yield "builtins.getattr", Evil(getattr, trace, "name"), trace


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("place", ["config", "ema"])
def test_malicious_pickle_is_refused(tmp_path, number, place):
    name, evil, trace = list(evil_files(tmp_path))[number]
    path = save(tmp_path, {**content(), place: evil})
    with pytest.raises(CheckpointError):
        load_release(path)
    assert not trace.exists(), name


def test_malicious_pickle_would_have_run(tmp_path):
    """Unpickling the file does create the trace: the test above proves something."""
    _, evil, trace = next(evil_files(tmp_path))
    torch.load(save(tmp_path, {"config": evil}), weights_only=False)
    assert trace.exists()


def test_the_error_names_what_was_asked_for(tmp_path):
    path = save(tmp_path, {"config": Evil(exec, "1")})
    with pytest.raises(CheckpointError, match=r"x.pt: the file asks to call builtins.exec; refused"):
        read_pickle(path)
    path = save(tmp_path, {"config": Evil(os.system, "true")})
    with pytest.raises(CheckpointError, match=r"unsupported GLOBAL \w+\.system whose module") as caught:
        read_pickle(path)
    assert "weights_only" not in str(caught.value)


def test_namespaces_of_other_trainers_become_records(tmp_path):
    path = save(tmp_path, {**content(), "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)})
    args = read_pickle(path)["args"]
    assert not isinstance(args, argparse.Namespace) and args.model == "DiT-XL/2"
    load_release(path, num_heads=4)


def test_inert_classes_are_forgotten_afterwards():
    before = set(torch.serialization.get_safe_globals())
    read_pickle(RELEASE)
    assert set(torch.serialization.get_safe_globals()) == before


def test_several_threads_may_read():
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(read_pickle, [RELEASE] * 40))


def bent(change):
    values = content()
    change(values["ema"])
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("x_embedder.proj.bias"), "missing keys in checkpoint: stem.bias"),
        (lambda s: s.pop("x_embedder.proj.weight"), "missing keys in checkpoint: stem.weight"),
        (lambda s: s.update(lm_head=torch.ones(1)), "unknown key 'lm_head'"),
        (
            lambda s: s.update({"hnet.residual_proj.weight": torch.ones(64, 63)}),
            r"residual_proj.weight: expected shape \(64, 64\), found \(64, 63\)",
        ),
        (lambda s: s.update(pos_embed=torch.ones(1, 63, 64)), "pos_embed: expected a square grid, found 63 cells"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.ones(3)}), "stem.weight: expected 4 axes, found"),
        (lambda s: s.update({"x_embedder.proj.bias": "hello"}), "'x_embedder.proj.bias' is str, expected a tensor"),
        (lambda s: s.update({3: torch.ones(1)}), "the key 3 is int, expected a name"),
        (lambda s: s.update({"module.pos_embed": s["pos_embed"]}), "'pos_embed' is there twice"),
        (lambda s: s.update(pos_embed=s["pos_embed"].repeat(2, 1, 1)), r"2 axes, found shape \(2, 64, 64\)"),
        (lambda s: s.update(pos_embed=torch.ones(64, 0)), r"'pos_embed': expected 4 bytes or more for \(64, 0\)"),
        (
            lambda s: s.update(pos_embed=torch.ones(1).expand(1, 2**28, 64)),
            r"'pos_embed': expected 68719476736 bytes or more for \(1, 268435456, 64\), found 4",
        ),
        (lambda s: s.update(pos_embed=s["pos_embed"].to("meta")), "torch.strided, on meta: expected a dense"),
        (lambda s: s.update(pos_embed=s["pos_embed"].to_sparse()), "torch.sparse_coo, on cpu: expected a dense"),
        (lambda s: s.update(pos_embed=s["pos_embed"].long()), "torch.int64, torch.strided, on cpu: expected a dense"),
    ],
)  # fmt: skip
def test_tampered_state(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_release(save(tmp_path, bent(change)))


def test_other_files(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_release(tmp_path / "none.pt")
    whole = RELEASE.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated, tampered with or not a checkpoint"):
            load_release(tmp_path / "cut.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_release(tmp_path / "plain.pt")
    torch.save({"ema": {}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"old\.pt is in the format of torch before 1\.6"):
        load_release(tmp_path / "old.pt")
    for broken in (b"\x80\x02a.", b"\x80\x02X\x00"):  # IndexError, struct.error
        with pytest.raises(CheckpointError, match="truncated, tampered with or not a checkpoint"):
            load_release(save_pickle(tmp_path, lambda _, broken=broken: broken))
    with pytest.raises(CheckpointError, match="holds list, expected a dict"):
        load_release(save(tmp_path, [1, 2]))
    with pytest.raises(CheckpointError, match="has no 'ema'; it holds weights, step"):
        load_release(save(tmp_path, {"weights": {}, "step": 1}))


def test_flipped_byte_in_the_pickle_is_an_error_or_harmless(tmp_path):
    """Whatever one changed byte makes of the pickle, the reader raises its own error or reads the file."""
    with zipfile.ZipFile(RELEASE) as archive:
        size = next(entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    for place in range(28359, size, 97):  # the configuration's part
        flip = lambda data, i=place: data[:i] + bytes([data[i] ^ 0x15]) + data[i + 1 :]  # noqa: E731
        try:
            read_pickle(save_pickle(tmp_path, flip))
        except CheckpointError:
            pass
