"""Checkpoints of the public release: read, and converted both ways without losing a bit."""

import builtins
import dataclasses
import resource
import sys
from pathlib import Path

import pytest
import torch
from release_files import DATA, RELEASE, TINY, content, save
from safetensors.torch import load_file

from dcdit.checkpoints.folder import load_checkpoint, load_release, save_checkpoint, save_release
from dcdit.checkpoints.release_keys import RELEASE_USE, from_release, infer_heads, release_content, to_release
from dcdit.checkpoints.safe_pickle import Record, read_pickle
from dcdit.cli import main
from dcdit.errors import CheckpointError, ConfigError
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.model.dydit_main import DyDCDiT
from dcdit.model.plain_dit import PlainDiT


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


def test_keys_map_one_to_one(tmp_path):
    state = DCDiT(TINY).state_dict()
    assert list(from_release(to_release(state))) == list(state)
    theirs = content()["model"]
    assert to_release(from_release(theirs)).keys() == theirs.keys()
    with pytest.raises(CheckpointError, match=r"the public release has no place for cond_norm\.weight"):
        to_release({"cond_norm.weight": torch.ones(1)})
    for model in (DyDCDiT(TINY), PlainDiT(TINY)):
        with pytest.raises(CheckpointError, match=f"no place for a {type(model).__name__}, expected a DC-DiT"):
            save_release(tmp_path / "out.pt", model)
    own = "weights of dcdit, which are read as a folder"
    for key, system in {
        "blocks.0.attn_rate.router.weight": "DyDiT",
        "x_embedder.proj.weight": "a plain DiT",
        next(key for key in state if key.startswith("class_embed")): own,
    }.items():
        with pytest.raises(
            CheckpointError, match=f"expected DC-DiT's public release, these weights look like {system}"
        ):
            from_release({key: torch.ones(1)})


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
    """A file without a use means the release's."""
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


def test_targets_of_the_wrong_kind(tmp_path, capsys):
    save_checkpoint(tmp_path / "a", DCDiT(TINY))
    (tmp_path / "file").touch()
    for words, message in (
        (["a", "a"], "is a folder, expected the name of a .pt file"),
        (["a", "/"], "is a folder, expected the name of a .pt file"),
        (["a", "file"], "it is there and is no .pt or .pth file; give another name"),
        (["a", "b.safetensors"], "what is written is a .pt or .pth file; give another name"),
        (["a", "b.pt", "--sigma=3"], "--sigma is of a .pt, and "),
        (["a", "b.pt", "--which=model"], "a checkpoint's folder: leave it out"),
        ([RELEASE, "file"], "is a file, expected a folder for config.json and model.safetensors"),
    ):
        words = [word if str(word).startswith("--") else str(tmp_path / word) for word in words]
        assert main(["convert", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_grid_that_the_release_cannot_tell(tmp_path, capsys):
    save_checkpoint(tmp_path / "a", DCDiT(dataclasses.replace(TINY, input_size=(4, 16))))
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b.pt")]) == 2
    assert "square grids only, this model's is 4×16" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("router", ["guess", "cosine"])
def test_a_router_that_the_release_has_not(router, tmp_path, capsys):
    save_checkpoint(tmp_path / "a", DCDiT(dataclasses.replace(TINY, router=router, learn_sigma=False)))
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b.pt")]) == 2
    message = f"the public release has router predictability only, this model's is {router}"
    assert message in capsys.readouterr().err and not (tmp_path / "b.pt").exists()


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


@pytest.mark.parametrize(
    ("name", "value"),
    [("norm_groups", 8), ("segment_mean", True), ("keep_grid", 4), ("encoder_stride", 2), ("predict_clean", True)],
)
def test_what_the_release_does_not_compute_is_refused(name, value):
    """Its loader would take the weights and compute another model."""
    sizes = {"input_size": (4, 4), "hidden_size": 32, "num_heads": 1, "encoder_width": 32, "learn_sigma": False}
    config = DCDiTConfig(**{**sizes, name: value})
    with pytest.raises(CheckpointError, match=f"the public release has {name} .* only, this model's is {value}"):
        release_content({}, config, {})


def test_convert_knows_the_shipped_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "digits", "digits.pt"]) == 0
    assert load_release("digits.pt", num_heads=3).config.hidden_size == 96


def test_a_folder_is_no_release(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder, expected a \.pt file"):
        load_release(tmp_path)
