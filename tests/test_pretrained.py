"""save_pretrained and from_pretrained: folders, the Hub's cache, weights that do not fit."""

import dataclasses
import json

import pytest
import torch
from release_files import TINY
from safetensors.torch import load_file, save_file

from dcdit.checkpoints.folder import load_checkpoint, save_checkpoint
from dcdit.checkpoints.safe_pickle import read_pickle
from dcdit.errors import CheckpointError, DataError
from dcdit.model.dcdit import DCDiT
from dcdit.model.precision import cast_weights


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
    for name in ("digit", "runs/t", "./a/b", "/a/b", "a/b/c"):
        with pytest.raises(CheckpointError, match=f"no checkpoint at {name}; digits ships with dcdit"):
            DCDiT.from_pretrained(name)
    with pytest.raises(CheckpointError, match=r"a checkpoint must be a folder, .*, got an empty name"):
        DCDiT.from_pretrained("")
    DCDiT(TINY).save_pretrained(tmp_path / "runs/t/model")
    with pytest.raises(CheckpointError, match="did you mean runs/t/model"):
        DCDiT.from_pretrained("runs/t")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DCDiT.from_pretrained("~/runs/t/model").config == TINY


def test_folders_that_hold_something_else_are_named(tmp_path):
    DCDiT(TINY).save_pretrained(tmp_path / "a")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
    (tmp_path / "a" / "model.safetensors").write_text(pointer)
    (tmp_path / "a.pt").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"a/model.safetensors is a pointer of Git LFS .*: git lfs pull fetches"):
        DCDiT.from_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"a.pt is a pointer of Git LFS"):
        read_pickle(tmp_path / "a.pt")
    (tmp_path / "a" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is that of a AutoencoderKL of diffusers, expected a dcdit config"):
        DCDiT.from_pretrained(tmp_path / "a")
    with pytest.raises(DataError, match="must be given by its name, got a dict"):
        DCDiT.from_pretrained({"a": torch.zeros(2)})
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")  # without a suffix
    with pytest.raises(CheckpointError, match=r"weights is a safetensors file, expected a .pt"):
        read_pickle(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="a checkpoint is of a model such as a DCDiT, got a OrderedDict"):
        save_checkpoint(tmp_path / "b", DCDiT(TINY).state_dict())


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
        ({"hidden_size": 96, "num_heads": 1}, r"expected shape \(.*96.*\), found \("),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_of_another_grid_is_named(dtype, tmp_path):
    """Grids of as many cells have tables of one shape. A model that samples in bfloat16 can be saved."""
    cast_weights(DCDiT(dataclasses.replace(TINY, input_size=(4, 9))), dtype).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    load_checkpoint(tmp_path / "a")
    config["model"]["input_size"] = [6, 6]
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a grid of 6×6, the position table is that of 4×9"):
        load_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
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
    (tmp_path / "a/config.json").write_text("{}", encoding="utf-16")
    with pytest.raises(CheckpointError, match=r"not a dcdit config: 'utf-8' codec can't decode byte 0xff in pos"):
        load_checkpoint(tmp_path / "a")


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


@pytest.mark.parametrize("name", [".", ""])
def test_the_working_directory_is_left_alone(name, tmp_path, monkeypatch):
    """It would be renamed, and the shell be left in a folder that is not there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="cannot be the working directory: give another"):
        DCDiT(TINY).save_pretrained(name)
    assert [file.name for file in tmp_path.rglob("*")] == ["here"]
