"""Paths that hold something else than was meant: the answer says what is there, and what is near."""

import json
import runpy
import shutil

import numpy as np
import pytest
from PIL import Image
from test_cli import EXTRA, TINY, rejected

from bench.count import main as count
from bench.serving import main as serve
from dcdit.checkpoints.folder import save_checkpoint
from dcdit.cli import main
from dcdit.errors import ConfigError
from dcdit.model.dcdit import DCDiT


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with two snapshots, each a checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "pets"
    for step in ("step-0000001", "step-0000002"):
        save_checkpoint(folder / "snapshots" / step, DCDiT(TINY), EXTRA)
    return folder


def test_a_folder_of_checkpoints_and_a_name_beside_them(runs, capsys):
    snapshots = runs / "snapshots"
    rejected(capsys, ["sample", snapshots, "--cpu"], f"config.json is missing; did you mean {snapshots}/step-0000001?")
    rejected(capsys, ["info", snapshots / "step-2"], f"no checkpoint at {snapshots}/step-2; did you mean {snapshots}/")
    rejected(capsys, ["info", runs / "snapshots" / "nothing"], "; digits ships with dcdit")


def test_files_in_place_of_a_checkpoint(runs, tmp_path, capsys):
    (tmp_path / "pets.yaml").write_text("steps: 1\n")
    (tmp_path / "pets.pt").write_bytes(b"x")
    weights = runs / "snapshots" / "step-0000001" / "model.safetensors"
    for file, hint in {
        tmp_path / "pets.yaml": "; dcdit train makes one from a configuration",
        tmp_path / "pets.pt": "; dcdit convert makes one of a .pt",
        weights: f"; give {weights.parent}",
    }.items():
        rejected(capsys, ["info", file], f"{file} is a file, expected a folder of config.json and ", hint)


def test_folders_that_diffusers_wrote(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    from dcdit.integrations.pipeline import DCDiTPipeline
    from dcdit.integrations.transformer import DCDiTTransformer2DModel

    transformer = DCDiTTransformer2DModel.from_dcdit(DCDiT(TINY))
    DCDiTPipeline(transformer, diffusers.FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    rejected(capsys, ["sample", tmp_path, "--cpu"], "config.json is missing, it holds a pipeline of diffusers")
    folder = tmp_path / "transformer"
    how = "DCDiTTransformer2DModel.from_pretrained(…).model.save_pretrained(…) writes one"
    rejected(capsys, ["sample", folder, "--cpu"], "of diffusers, expected a dcdit config", how)
    DCDiTTransformer2DModel.from_pretrained(folder).model.save_pretrained(tmp_path / "ours")
    assert main(["info", str(tmp_path / "ours")]) == 0
    config = {"_class_name": "FluxTransformer2DModel", "dynamic_chunking": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))  # as `dcdit upcycle --family` writes it
    rejected(
        capsys, ["sample", tmp_path, "--cpu"], "a FluxTransformer2DModel of diffusers", "load_dynamic_chunking reads"
    )


def test_a_preset_in_small_letters(capsys):
    rejected(capsys, ["info", "dc-dit-xl/n4"], "unknown preset name 'dc-dit-xl/n4'; did you mean 'DC-DiT-XL/N4'?")
    with pytest.raises(SystemExit):
        count(["DC-DiT-Z/N4"])
    assert "unknown preset name 'DC-DiT-Z/N4'; did you mean 'DC-DiT-S/N4'?" in capsys.readouterr().err


def test_benches_need_one_of_what_they_count(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["serving", "--requests", "0"])
    for start in (serve, lambda: count(["DC-DiT-S/N4", "--batch", "0"])):
        with pytest.raises(SystemExit):
            start()
        assert "expected an integer of at least 1, got '0'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dit_diffusers", "moving_digits", "pixart", "serve", "upcycle_flux", "video", "vit"])
def test_examples_without_options_refuse_some(name, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr("sys.argv", [name, "--port", "80"])
    with pytest.raises(SystemExit):
        runpy.run_path(f"examples/{name}.py", run_name="__main__")
    assert "error: unrecognized arguments: --port 80" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_data_that_is_no_folder(there, tmp_path, capsys):
    file, config = tmp_path / "pets.zip", tmp_path / "a.yaml"
    if there:
        file.write_bytes(b"PK")
    config.write_text("{steps: 1, batch_size: 16, codec: {kind: autoencoder_kl}}")
    what = f"{file} is {'a file' if there else 'not there'}, expected a folder with "
    rejected(capsys, ["data", "check", file], what + "a sub-folder of pictures per class")
    words = ["train", config, f"output={tmp_path / 'out'}", f"data.path={file}"]
    rejected(capsys, [*words, "data.kind=folder", "codec.kind=pixel_unshuffle"], what)
    rejected(capsys, [*words, "data.kind=latents"], what + "one folder *_features")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", [".", "cat", "cat/run"])
def test_a_run_is_written_outside_of_its_pictures(inside, tmp_path, capsys):
    """Its sheets of samples would be pictures of the next run."""
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "pets" / "cat" / "1.png")
    (tmp_path / "a.yaml").write_text("{steps: 1, batch_size: 16, data: {kind: folder, size: 16}}")
    words = [f"data.path={tmp_path / 'pets'}", f"output={tmp_path / 'pets' / inside}"]
    rejected(capsys, ["train", tmp_path / "a.yaml", *words], "it must be a folder outside of the data, ")
    assert len(list((tmp_path / "pets").rglob("*"))) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "model_index.json"])
def test_nothing_is_written_beside_a_checkpoint(name, tmp_path, capsys):
    """By a slip of `init=` or `--from`."""
    place, pets, config = tmp_path / "model", tmp_path / "pets", tmp_path / "a.yaml"
    for folder in (place, pets / "cat"):
        folder.mkdir(parents=True)
    (place / name).write_bytes(b"")
    Image.new("RGB", (16, 16)).save(pets / "cat" / "1.png")
    config.write_text("{steps: 1, batch_size: 16}")
    for words in (
        ["train", config, f"output={place}"],
        ["sample", "digits", "--cpu", "--output", place],
        ["data", "encode", pets, place, "--codec", tmp_path],
    ):
        rejected(capsys, words, f"cannot write {place}: it is a checkpoint's folder; give another output")
    assert [file.name for file in place.iterdir()] == [name]


@pytest.mark.parametrize(
    "more, what", [(["out"], "OUT"), (["--codec", "vae"], "--codec"), (["--batch-size", "4"], "--batch-size")]
)
def test_check_takes_no_options_of_encode(more, what, tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "cat" / "1.png")
    rejected(capsys, ["data", "check", tmp_path, *more], f"{what} is of dcdit data encode, check writes nothing")


def test_a_folder_of_another_class_of_diffusers(tmp_path):
    """diffusers makes a transformer with random weights of a VAE's folder."""
    diffusers = pytest.importorskip("diffusers")
    from dcdit.integrations.transformer import DCDiTTransformer2DModel

    diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "vae")
    for where in ((tmp_path / "vae", {}), (tmp_path, {"subfolder": "vae"})):
        with pytest.raises(ConfigError, match="vae must hold a DCDiTTransformer2DModel, got a AutoencoderKL"):
            DCDiTTransformer2DModel.from_pretrained(where[0], **where[1])


def test_weights_under_other_names_are_shown_beside_the_missing_ones(runs, tmp_path, capsys):
    """As DistributedDataParallel saves them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(runs / "snapshots" / "step-0000001", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({f"module.{key}": value for key, value in load_file(file).items()}, file)
    rejected(capsys, ["info", tmp_path / "model"], "missing keys in checkpoint: ", "; unexpected keys", ": module.")


def test_fewer_pictures_than_are_there(runs, tmp_path, capsys):
    words = ["sample", str(runs / "snapshots" / "step-0000001"), "--cpu", "--steps", "1", "--format", "png"]
    words += ["--output", str(tmp_path / "out"), "--num"]
    assert main([*words, "3"]) == 0
    capsys.readouterr()
    more = "it holds more of this run, such as 000002_class2.png; give --num 3 or another output"
    rejected(capsys, [*words, "2"], "cannot write", "this call asks for 2 images", more)
    rejected(capsys, [*words, "2", "--seed", "1"], "images of another run, with seed=0")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "out" / "000001_class3.png")
    rejected(capsys, [*words, "3"], "images of another run, such as 000001_class3.png")
    shutil.rmtree(tmp_path / "out")
