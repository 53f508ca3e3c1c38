"""Checkpoints of the public release: read safely, converted both ways without losing a bit."""

import argparse
import builtins
import dataclasses
import json
import os
import pickle
import resource
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcdit.checkpoints.folder import load_checkpoint, load_release, save_checkpoint, save_release
from dcdit.checkpoints.release_keys import RELEASE_USE, from_release, infer_heads, release_content, to_release
from dcdit.checkpoints.safe_pickle import Record, read_pickle
from dcdit.cli import main
from dcdit.errors import CheckpointError, ConfigError
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT

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


@pytest.mark.parametrize("case", ["full", "drop30", "per_sample"])
def test_release_reproduces_its_golden(case):
    golden = load_file(DATA / "dcdit_tiny.safetensors")
    model = load_release(RELEASE, which="model")
    assert (model.config.num_heads, model.config.sigma, model.config.target_ratio) == (4, 1.0, 4.0)
    rho = golden[f"{case}.drop_fraction"]
    out = model(golden["in.x"], golden["in.t"], golden["in.y"], drop_fraction=rho if rho.dim() else float(rho))
    error = (out - golden[f"{case}.out"]).abs().max() / golden[f"{case}.out"].abs().max()
    assert error < 1e-5


def test_ema_is_what_loads_by_default(tmp_path):
    values = content()
    values["ema"]["x_embedder.proj.bias"] = torch.arange(32.0)
    path = save(tmp_path, values)
    assert torch.equal(load_release(path).stem.bias, torch.arange(32.0))
    assert torch.equal(load_release(path, which="model").stem.bias, values["model"]["x_embedder.proj.bias"])


def test_stored_config_is_read_and_its_class_is_not_looked_for(monkeypatch):
    imported = []
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: (imported.append(name), real(name, *a, **k))[1])
    config = read_pickle(RELEASE)["config"]
    assert isinstance(config, Record) and type(config).__name__ == "config.Config"
    assert config.model.hnet.num_heads == [4, 4] and config.model.hnet.arch_layout == ["c2", ["D2"], "c2"]
    assert "config" not in imported and "config" not in sys.modules


def test_arguments_win_over_the_stored_config():
    config = load_release(RELEASE, num_heads=2, sigma=2.0).config
    assert (config.num_heads, config.sigma) == (2, 2.0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_bare_and_prefixed_state_dicts(tmp_path, prefix):
    state = content()["model"]
    path = save(tmp_path, {prefix + key: value for key, value in state.items()})
    model = load_release(path, num_heads=4)
    assert torch.equal(model.state_dict()["main.blocks.1.fc2.bias"], from_release(state)["main.blocks.1.fc2.bias"])


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_presets(width, heads):
    assert infer_heads(width) == heads


def test_heads_that_cannot_be_told(tmp_path):
    with pytest.raises(CheckpointError, match="cannot tell the number of heads of width 100: give num_heads"):
        infer_heads(100)
    assert load_release(save(tmp_path, content())).config.num_heads == 1  # 64 channels are one head
    for given, message in (
        ({"num_heads": 5}, "hidden_size 64 is not a multiple of num_heads 5"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"sigma": 0}, "sigma must be positive and finite, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_release(RELEASE, **given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.hnet.num_heads", 0, "a positive int, found 0"),
        ("model.hnet.num_heads", True, "a positive int, found True"),
        ("model.hnet.num_heads", 4.0, "a positive int, found 4.0"),
        ("model.hnet.dechunk_kernel_sigma", "x", "a positive float, found str"),
        ("model.hnet.dechunk_kernel_sigma", {}, "a positive float, found dict"),
        ("model.hnet.dechunk_kernel_sigma", float("nan"), "a positive float, found nan"),
        ("training.downsample_factor", [[1]], "a positive float, found list"),
        pytest.param("training.downsample_factor", 2**1100, "a positive float, found 1", id="no float"),
        ("use", {"objective": "flow"}, "a JSON object, found {'objective': 'flow'}"),
        ("use", "[]", r"a JSON object, found '\[\]'"),
        ("use", "{", "a JSON object, found '{'"),
    ],
)
def test_stored_values_that_are_none(tmp_path, name, value, message):
    config = value
    for part in reversed(name.split(".")):
        config = {part: config}
    with pytest.raises(CheckpointError, match=f"stored {name}: expected {message}"):
        load_release(save(tmp_path, {**content(), "config": config}))


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
    """The same file does create the trace when it is unpickled: the test above proves something."""
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


def test_keys_map_one_to_one():
    state = DCDiT(TINY).state_dict()
    assert list(from_release(to_release(state))) == list(state)
    theirs = content()["model"]
    assert to_release(from_release(theirs)).keys() == theirs.keys()
    with pytest.raises(CheckpointError, match=r"the public release has no place for cond_norm\.weight"):
        to_release({"cond_norm.weight": torch.ones(1)})


def test_convert_both_ways_is_bit_exact(tmp_path, capsys):
    torch.manual_seed(0)
    model = DCDiT(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    save_checkpoint(tmp_path / "a", model)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b.pt")]) == 0
    assert main(["convert", str(tmp_path / "b.pt"), str(tmp_path / "c")]) == 0
    again, extra = load_checkpoint(tmp_path / "c")
    assert again.config == TINY and extra == {}  # unknown stays unknown
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "c/model.safetensors").read_bytes()
    assert main(["convert", str(RELEASE), str(tmp_path / "d"), "--which", "model"]) == 0
    assert main(["convert", str(tmp_path / "d"), str(tmp_path / "e.pt")]) == 0
    first, second = content()["model"], read_pickle(tmp_path / "e.pt")["model"]
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "f")]) == 2
    assert "no checkpoint file" in capsys.readouterr().err and not (tmp_path / "f").exists()


@pytest.mark.parametrize("use", [RELEASE_USE, {"objective": "flow", "codec": {"kind": "pixel_unshuffle", "factor": 2}}])
def test_convert_keeps_what_the_model_is_used_by(tmp_path, use):
    """The release's own is what a file without it means."""
    save_checkpoint(tmp_path / "a", DCDiT(TINY), {**use, "step": 3})
    for name in ("one", "two"):
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / name / "b.pt")]) == 0
        assert main(["convert", str(tmp_path / name / "b.pt"), str(tmp_path / "a")]) == 0
        assert load_checkpoint(tmp_path / "a")[1] == use
        assert ("use" in read_pickle(tmp_path / name / "b.pt")["config"]) == (use != RELEASE_USE)
    assert (tmp_path / "one/b.pt").read_bytes() == (tmp_path / "two/b.pt").read_bytes()


def test_a_model_carries_its_use_along(tmp_path, capsys):
    """from_pretrained → save_release and load_release → save_pretrained; nothing is guessed."""
    from dcdit.checkpoints.folder import ASSETS, read_release

    digits = DCDiT.from_pretrained("digits")
    assert digits.use["objective"] == "flow"
    digits.use["class_names"] = list("0123456789")
    save_release(tmp_path / "digits.pt", digits)
    use = read_release(tmp_path / "digits.pt")[1]
    assert use == {key: digits.use[key] for key in ("objective", "codec", "class_names")}
    load_release(tmp_path / "digits.pt").save_pretrained(tmp_path / "again")
    assert load_checkpoint(tmp_path / "again")[1] == use
    load_release(RELEASE).save_pretrained(tmp_path / "release")
    assert load_checkpoint(tmp_path / "release")[1] == RELEASE_USE
    save_release(tmp_path / "fresh.pt", DCDiT(TINY))
    assert read_release(tmp_path / "fresh.pt")[1] == {}
    assert main(["convert", str(tmp_path / "fresh.pt"), str(tmp_path / "fresh")]) == 0
    assert "objective unknown, codec unknown" in capsys.readouterr().out
    assert main(["sample", str(tmp_path / "fresh"), "--cpu", "--output", str(tmp_path / "out")]) == 2
    assert "does not say the model's objective" in capsys.readouterr().err
    assert (ASSETS / "digits").is_dir()


def test_options_that_no_download_has(tmp_path):
    DCDiT(TINY).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"no option torch_dtype; the model is float32: cast it with \.to"):
        DCDiT.from_pretrained(tmp_path / "a", torch_dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"no option nonsense$"):
        DCDiT.from_pretrained(tmp_path / "a", nonsense=1)
    assert DCDiT.from_pretrained(tmp_path / "a", revision="main").config == TINY


def test_names_that_are_no_repository_are_not_looked_for(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("digit", "runs/t", "./a/b", "/a/b", "a/b/c", ""):
        if name:
            with pytest.raises(CheckpointError, match=f"no checkpoint at {name}; digits ships with dcdit"):
                DCDiT.from_pretrained(name)
    DCDiT(TINY).save_pretrained(tmp_path / "runs/t/model")
    with pytest.raises(CheckpointError, match="did you mean runs/t/model"):
        DCDiT.from_pretrained("runs/t")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DCDiT.from_pretrained("~/runs/t/model").config == TINY


def test_a_description_beside_the_weights_stays(tmp_path):
    model = DCDiT(TINY)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "a")
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (tmp_path / "a" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 10**9}, "config.json says depth 1000000000, the weights have 2 blocks"),
        ({"depth": 1}, "config.json says depth 1, the weights have 2 blocks"),
        ({"hidden_size": 2**40, "num_heads": 1}, "hidden_size must be less than 2"),
        ({"hidden_size": 2**30, "num_heads": 1}, "sizes make no model|expected shape"),
        ({"num_classes": 10**9}, "class_embed.weight: expected shape"),
        ({"input_size": [2**20, 2**20]}, "pos_embed: expected shape"),
        ({"in_channels": 2**30}, "sizes make no model|expected shape"),
    ],
)
def test_sizes_are_compared_before_anything_is_allocated(sizes, message, tmp_path):
    DCDiT(TINY).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["model"] |= sizes
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a")


def test_a_table_of_another_grid_is_named(tmp_path):
    """Grids of as many cells have tables of one shape."""
    DCDiT(dataclasses.replace(TINY, input_size=(4, 9))).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    load_checkpoint(tmp_path / "a")
    config["model"]["input_size"] = [6, 6]
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a grid of 6×6, the position table is that of 4×9"):
        load_checkpoint(tmp_path / "a")


def test_targets_of_the_wrong_kind(tmp_path, capsys):
    save_checkpoint(tmp_path / "a", DCDiT(TINY))
    (tmp_path / "file").touch()
    for words, message in (
        (["a", "a"], "is a folder, expected the name of a .pt file"),
        (["a", "/"], "is a folder, expected the name of a .pt file"),
        ([RELEASE, "file"], "is a file, expected a folder for config.json and model.safetensors"),
    ):
        assert main(["convert", *(str(tmp_path / word) for word in words)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_are_floating_point(dtype, tmp_path):
    from safetensors.torch import save_file

    DCDiT(TINY).save_pretrained(tmp_path / "a")
    state = load_file(tmp_path / "a/model.safetensors")
    save_file(state | {"stem.bias": state["stem.bias"].to(dtype)}, tmp_path / "a/model.safetensors")
    with pytest.raises(CheckpointError, match=r"stem\.bias: expected floating-point weights, found"):
        load_checkpoint(tmp_path / "a")


def test_deep_json_is_no_traceback(tmp_path):
    DCDiT(TINY).save_pretrained(tmp_path / "a")
    (tmp_path / "a/config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"config\.json is not a dcdit config"):
        load_checkpoint(tmp_path / "a")


def test_a_grid_that_the_release_cannot_tell(tmp_path, capsys):
    save_checkpoint(tmp_path / "a", DCDiT(dataclasses.replace(TINY, input_size=(4, 16))))
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b.pt")]) == 2
    assert "square grids only, this model's is 4×16" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"old")
    monkeypatch.setattr(torch, "save", lambda content, path: Path(path).write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_release(tmp_path / "a.pt", DCDiT(TINY))
    assert (tmp_path / "a.pt").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_line(tmp_path, capsys):
    """A limit on the size of files fails a write as a full disk does; torch's writer calls it something else."""
    save_checkpoint(tmp_path / "a", DCDiT(TINY))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b.pt")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert "b.pt, is the disk full?" in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_pretrained_round_trip(tmp_path):
    model = DCDiT(TINY)
    model.save_pretrained(tmp_path / "a")
    again = DCDiT.from_pretrained(tmp_path / "a")
    assert again.config == TINY and not again.training
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_pretrained_from_the_hub_cache(tmp_path):
    """A repository id, resolved by huggingface_hub itself from a cache that was filled before."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    DCDiT(TINY).save_pretrained(repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    model = DCDiT.from_pretrained("someone/tiny", cache_dir=tmp_path / "hub", local_files_only=True)
    assert model.config == TINY
    with pytest.raises(CheckpointError, match="someone/other is neither a directory nor a repository"):
        DCDiT.from_pretrained("someone/other", cache_dir=tmp_path / "hub", local_files_only=True)


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds more than a checkpoint \(thesis.tex\)"):
        DCDiT(TINY).save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "value"), [("norm_groups", 8), ("segment_mean", True), ("keep_grid", 4), ("encoder_stride", 2)]
)
def test_what_the_release_does_not_compute_is_refused(name, value):
    """Its loader would take the weights and compute another model."""
    config = DCDiTConfig(**{"input_size": (4, 4), "hidden_size": 32, "num_heads": 1, "encoder_width": 32, name: value})
    with pytest.raises(CheckpointError, match=f"the public release has {name} .* only, this model's is {value}"):
        release_content({}, config, {})
