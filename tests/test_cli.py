"""Bad input on the command line: one clear line, exit status 2, nothing written."""

import dataclasses
import json
import pickle
import resource
import shutil
import sys

import pytest
import torch

from dcdit.checkpoints.folder import load_checkpoint, save_checkpoint
from dcdit.cli import main
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.pictures.images import output_folder

TINY = DCDiTConfig(
    input_size=(6, 5), num_classes=4, hidden_size=32, depth=1, num_heads=1, encoder_width=32, learn_sigma=False
)
EXTRA = {"objective": "flow", "codec": {"kind": "pixel_unshuffle", "factor": 2}}
CONFIG = """
output: {out}
steps: 1
batch_size: 2
model: {{preset: digits, hidden_size: 32, depth: 1, num_heads: 1}}
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("good") / "model"
    save_checkpoint(folder, DCDiT(TINY), EXTRA)
    return folder


@pytest.fixture
def checkpoint(good, tmp_path):
    """A copy to spoil, in a fresh folder."""
    return shutil.copytree(good, tmp_path / "checkpoint")


def rejected(capsys, words, *mentions):
    """The command fails with status 2 and one line that has all `mentions`."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2, error
    assert len(error.splitlines()) == 1 and error.startswith("dcdit"), error
    for mention in mentions:
        assert mention in error


def test_unknown_commands_and_options(capsys):
    rejected(capsys, ["smaple"], "smaple", "sample")
    rejected(capsys, [], "COMMAND")
    rejected(capsys, ["sample", "x", "--steps", "many"], "--steps", "many")
    rejected(capsys, ["sample", "x", "--format", "gif"], "gif", "png")
    rejected(capsys, ["sample", "x", "--classes", "3", "7", "9"], "arguments: 7 9: lists are written as 1,3,5; see")
    rejected(capsys, ["sample", "x", "--drop-fraction", "0", ".5"], "arguments: .5: lists are written as 1,3,5; see")
    as_words = ": a configuration is a file and keys, such as my.yaml steps=1000;"
    rejected(capsys, ["train", "x.yaml", "--steps=3"], "--steps=3" + as_words)
    rejected(capsys, ["train", "--config", "x.yaml"], "--config: give its value alone, without --config;")
    rejected(capsys, ["data", "check", "--folder", "x"], "--folder: give its value alone, without --folder;")
    rejected(capsys, ["train", "x.yaml", "--resume"], "--resume: the same command again goes on where it ended;")
    rejected(capsys, ["sample", "x", "--cfg", "3"], "unrecognized arguments: --cfg 3; see dcdit sample --help")


def test_a_package_that_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "config.yaml").touch()
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert "yaml" in error and "pip install '.[demo]'" in error and error.count("\n") == 1


def test_positionals_on_both_sides_of_an_option(good, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(out=tmp_path / "out"))
    rejected(capsys, ["upcycle", config, "seed=1", "--from", "dit.pt", "steps=few"], "steps must be an integer")
    out = ["--output", tmp_path / "out"]
    rejected(capsys, ["visualize", good, *out, tmp_path / "none"], f"no checkpoint at {tmp_path}/none")


def test_unknown_preset_names_the_nearest(capsys):
    for name in ("DC-DiT-XS/N4", "DC-DiT-S/2", "DC-DiT-S"):
        rejected(capsys, ["info", name], f"unknown preset name {name!r}", "did you mean 'DC-DiT-S/N4'")
    rejected(capsys, ["calibrate", "DC-DiT-S/N5"], "did you mean 'DC-DiT-S/N4'")


@pytest.mark.parametrize("name", ["DiT-XL/2", "SiT-xl/2", "DCDiT-XL/N4", "SparseDiT-XL"])
def test_names_of_sizes_are_no_repositories(name, capsys, monkeypatch):
    """Without asking the Hub."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    rejected(capsys, ["info", name], f"{name} is no preset; dcdit info DC-DiT-XL/N4 has a plain DiT")
    rejected(capsys, ["sample", name, "--cpu"], f"{name} names a size, which has no weights; digits ships with dcdit")


@pytest.mark.parametrize(
    "override, mentions",
    [
        ("batchsize=4", ["batchsize", "'batch_size'"]),
        ("model.hiden_size=64", ["hiden_size", "'hidden_size'"]),
        ("objective=flo", ["objective", "flow", "ddpm"]),
        ("drop_fractions=[0,1.0]", ["[0, 1)", "1.0"]),
        ("steps=few", ["steps", "integer", "few"]),
    ],
)
def test_train_refuses_keys_and_values(tmp_path, capsys, override, mentions):
    out, config = tmp_path / "out", tmp_path / "config.yaml"
    config.write_text(CONFIG.format(out=out))
    rejected(capsys, ["train", config, override], *mentions)
    assert not out.exists()


def test_train_refuses_an_empty_data_folder(tmp_path, capsys):
    out, config, data = tmp_path / "out", tmp_path / "config.yaml", tmp_path / "data"
    data.mkdir()
    config.write_text(CONFIG.format(out=out))
    rejected(capsys, ["train", config, "data.kind=folder", f"data.path={data}"], str(data), "no images")
    rejected(capsys, ["train", config, "data.kind=folder", f"data.path={data}/none"], f"{data}/none")
    rejected(capsys, ["train", tmp_path / "none.yaml"], "none.yaml")
    assert not (out / "model").exists()


@pytest.mark.parametrize(
    ("function", "kept"), [("dcdit.training.trainer.Trainer._report", 2), ("dcdit.training.state.EMA.update", None)]
)
def test_interrupted_training_saves_whole_steps(function, kept, tmp_path, monkeypatch, capsys):
    """In the report of step 2 it is done; between the update of its weights and of their average it is not."""
    out, config, calls = tmp_path / "out", tmp_path / "config.yaml", []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupted)
    config.write_text(CONFIG.format(out=out))
    assert main(["train", str(config), "steps=9", "log_every=1"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "dcdit train: interrupted"
    assert (out / "last.safetensors").exists() == (out / "model").exists() == bool(kept)
    assert not kept or load_checkpoint(out / "model")[1]["step"] == kept


def missing(folder):
    shutil.rmtree(folder)


def half(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": print}))


def other_keys(folder):
    from safetensors.torch import save_file

    save_file({"unet.weight": torch.zeros(2)}, folder / "model.safetensors")


def other_size(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["num_classes"] = 5
    (folder / "config.json").write_text(json.dumps(config))


def no_json(folder):
    (folder / "config.json").write_text("not json")


def no_objective(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["objective"]
    (folder / "config.json").write_text(json.dumps(config))


def not_finite(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file({key: torch.full_like(value, torch.nan) for key, value in state.items()}, folder / "model.safetensors")


def other_codec(folder):
    config = json.loads((folder / "config.json").read_text())
    config["codec"]["kind"] = "pixel_unshufle"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "spoil, mentions",
    [
        (missing, ["no checkpoint at"]),
        (half, ["model.safetensors is missing"]),
        (truncated, ["truncated"]),
        (pickled, ["not a safetensors file"]),
        (other_keys, ["missing keys", "class_embed.weight"]),
        (other_size, ["class_embed.weight: expected shape (6, 32), found (5, 32)"]),
        (no_json, ["config.json"]),
        (no_objective, ["config.json", "objective"]),
        (not_finite, ["sampling diverged", "NaN", "t = 1000", "guidance 2"]),
        (other_codec, ["pixel_unshufle", "'pixel_unshuffle'"]),
    ],
)
@pytest.mark.parametrize("command", ["sample", "visualize"])
def test_checkpoints_that_cannot_be_used(checkpoint, tmp_path, capsys, command, spoil, mentions):
    spoil(checkpoint)
    rejected(capsys, [command, checkpoint, "--cpu", "--output", tmp_path / "out"], *mentions)
    assert {file.name for file in tmp_path.iterdir()} <= {"checkpoint"}


@pytest.mark.parametrize("command", ["sample", "visualize"])
@pytest.mark.parametrize(
    "words, mentions",
    [
        (["--classes", "0-4"], ["class id 4", "[0, 3]"]),
        (["--classes", "one"], ["0-9 or 1,3,5", "one"]),
        (["--drop-fraction", "1"], ["[0, 1)", "got 1"]),
        (["--drop-fraction", "nan"], ["[0, 1)", "got nan"]),
        (["--uncond-drop-fraction", "-0.5"], ["[0, 1)", "got -0.5"]),
        (["--guidance", "inf"], ["guidance", "inf"]),
        (["--guidance", "1", "--uncond-drop-fraction", "0"], ["--uncond-drop-fraction is of guidance", "1 is none"]),
        (["--guidance", "1", "--guidance-channels", "2"], ["--guidance-channels is of guidance", "1 is none"]),
        (["--guidance", "1", "--guidance-interval", "0,1000"], ["--guidance-interval is of guidance", "1 is none"]),
        (["--steps", "0"], ["[1, 1000]", "got 0"]),
        (["--num", "0"], ["at least one", "0"]),
        (["--scheduler", "ddim"], ["ddim", "flow", "use flow-euler"]),
        (["--scheduler", "euler"], ["euler", "did you mean 'flow-euler'"]),
        (["--output", "{tmp}/none/out"], ["there is no folder", "none"]),
        (["--output", "{tmp}/file"], ["file", "not a folder"]),
    ],
)
def test_options_that_cannot_be_used(good, tmp_path, capsys, command, words, mentions):
    (tmp_path / "file").write_text("kept")
    words = [word.format(tmp=tmp_path) for word in words]
    output = [] if "--output" in words else ["--output", tmp_path / "out"]
    rejected(capsys, [command, good, "--cpu", "--steps", "2", *output, *words], *mentions)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_a_backend_that_is_none(good, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dcdit_kernels._dispatch.ENVIRONMENT", "cuda")  # DCDIT_BACKEND
    rejected(capsys, ["sample", good, "--cpu", "--output", tmp_path / "out"], "unknown backend 'cuda'", "native")


def test_sample_refuses_what_only_it_takes(good, tmp_path, capsys):
    cases = {"--batch-size 0": "batch size", "--per-class 0": "one image", "--per-class 3 --num 3": "not allowed with"}
    cases["--per-class 1 --num 3"] = "not allowed with"  # also the default
    for words, mention in cases.items():
        rejected(capsys, ["sample", good, "--cpu", "--output", tmp_path / "out", *words.split()], mention)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sample", "visualize"])
def test_a_checkpoints_folder_is_no_output(good, capsys, command):
    rejected(capsys, [command, good, "--cpu", "--output", good], "cannot write", "is a checkpoint's folder")
    assert sorted(file.name for file in good.iterdir()) == ["config.json", "model.safetensors"]


def test_a_full_disk_keeps_what_is_finished(good, tmp_path, capsys):
    """A limit on the size of files fails a write as a full disk does; the command called again goes on."""
    out = tmp_path / "out"
    words = ["sample", good, "--cpu", "--steps", "1", "--num", "200", "--format", "grid", "npz", "--output", out]
    out.mkdir()
    (out / "grid.png").write_bytes(b"older")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        rejected(capsys, words, "cannot write", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (out / "grid.png").read_bytes() == b"older" and len(list(out.glob(".pictures/*.png"))) == 200
    assert main([str(word) for word in words]) == 0
    assert "200 images in" in capsys.readouterr().out and not list(out.glob(".*"))
    assert sorted(file.name for file in out.iterdir()) == ["grid.png", "samples.npz", "sampling.json"]


def test_output_folder_appears_whole_and_keeps_what_is_there(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), output_folder(out) as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with output_folder(out) as folder:
            (folder / text).write_text(text)
            (folder / "same").write_text(text)
            assert not (out / text).exists()
    assert {file.name: file.read_text() for file in out.iterdir()} == {"one": "one", "two": "two", "same": "two"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_sample_and_visualize_write(good, tmp_path, capsys):
    words = ["--cpu", "--steps", "2", "--classes", "1,3", "--output"]
    assert main(["sample", str(good), "--per-class", "2", "--format", "png", "grid", *words, str(tmp_path / "s")]) == 0
    names = sorted(file.name for file in (tmp_path / "s").iterdir())
    assert names == [*(f"00000{i}_class{c}.png" for i, c in enumerate((1, 3, 1, 3))), "grid.png", "sampling.json"]
    assert "of 30 cells kept" in capsys.readouterr().out
    # Budgets of all steps, which two steps that warm up must not take for theirs.
    words[words.index("2")] = "3"
    for budget in (["--gflops-per-image", "0.03", "--budget-schedule", "linear"], ["--drop-fraction", "0.6,0.3,0"]):
        assert main(["visualize", str(good), "--num", "2", "--times", "2", *budget, *words, str(tmp_path / "v")]) == 0
    assert {file.name for file in (tmp_path / "v").iterdir()} == {"curves.png", f"chunks-{good.parent.name}.png"}


def test_visualize_tells_checkpoints_apart(good, tmp_path):
    """Folders of one name get longer names, so that each has its picture; 'model' is no name."""
    paths = [shutil.copytree(good, tmp_path / name) for name in ("e1/digits", "e2/digits/model")]
    words = ["--cpu", "--steps", "1", "--num", "1", "--output", str(tmp_path / "out")]
    assert main(["visualize", *map(str, paths), *words]) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"curves.png", "chunks-e1-digits.png", "chunks-e2-digits.png"}


def test_visualize_compares_one_size(good, tmp_path, capsys):
    save_checkpoint(tmp_path / "other", DCDiT(dataclasses.replace(TINY, input_size=(4, 4))), EXTRA)
    words = ["--cpu", "--steps", "1", "--output", tmp_path / "out"]
    rejected(capsys, ["visualize", good, tmp_path / "other", *words], "one input_size", "(6, 5)", "'other': (4, 4)")
    rejected(capsys, ["visualize", good, good, *words], "different checkpoints", str(good))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("before, status", [("4", 0), ("3", 0), ("5", 2)])
def test_images_of_two_runs_are_not_mixed(good, tmp_path, capsys, before, status):
    """Files that the run writes again are no mixture."""
    words = [
        "sample",
        str(good),
        "--cpu",
        "--steps",
        "1",
        "--output",
        str(tmp_path / "out"),
        "--format",
        "png",
        "--num",
    ]
    assert main([*words, before]) == 0
    capsys.readouterr()
    if status == 0:
        assert main([*words, "4"]) == 0
    else:
        rejected(capsys, [*words, "4"], "cannot write", f"{tmp_path}/out", "000004_class0.png")
    assert len(list((tmp_path / "out").glob("*.png"))) == max(int(before), 4)
    most = str(max(int(before), 4))
    rejected(capsys, [*words, most, "--seed", "1"], "images of another run, with seed=0, this call asks for 1")
    file = tmp_path / "out" / "sampling.json"
    settings = json.loads(file.read_text())
    older = {key: value for key, value in settings.items() if key not in ("precision", "cuda_graph", "policy", "size")}
    file.write_text(json.dumps({**older, "bf16": False}))
    assert main([*words, most]) == 0
    file.write_text(json.dumps({**older, "bf16": True}))
    rejected(capsys, [*words, most], "another run, with precision=bfloat16, this call asks for float32")
    file.write_text(json.dumps(older))
    rejected(capsys, [*words, most], "another run, whose sampling.json does not say its precision, this call asks for")
    file.unlink()
    rejected(capsys, [*words, most], "holds images and no sampling.json")
