"""Runs that go on: permitted changes, starting from weights, snapshots, averages, validation, signals, the launcher."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from dcdit.checkpoints.folder import load_checkpoint, load_release, save_checkpoint
from dcdit.cli import main
from dcdit.data.sources import Digits
from dcdit.errors import ConfigError
from dcdit.files import locked
from dcdit.model.config import PRESETS, DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.training.batches import TrainingStream
from dcdit.training.config import TrainConfig, load_config
from dcdit.training.objectives import FlowMatching
from dcdit.training.resume import SHAPING, compare
from dcdit.training.trainer import Trainer
from dcdit.training.unused import unused

TINY = {
    "model": {"preset": "digits", "input_size": 7, "in_channels": 16, "hidden_size": 32, "depth": 1, "num_heads": 1},
    "codec": {"factor": 4},
    "steps": 4,
    "batch_size": 16,
    "optim": {"lr": 3e-4, "cosine": False, "ema_decay": 0.9},
    "drop_warmup": 0,
    "log_every": 1,
    "save_every": 2,
}


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return str(file)


def run(config, output, *words):
    """The exit status of `dcdit train`, and the losses by step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    status = main(["train", str(config), f"output={output}", *words])
    file = Path(output) / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return status, {line["step"]: line["loss"] for line in lines if "loss" in line}


def pets(root, names=("cat", "dog"), count=3):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 255, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


PETS = ["data.kind=folder", "data.size=12", "codec.factor=2", "model.input_size=6", "model.in_channels=12"]


def test_what_changes_no_step_of_the_past_is_free(tiny, tmp_path):
    """Moved data, more steps at a constant rate, other logging: the losses of one run."""
    root = pets(tmp_path / "pets")
    _, whole = run(tiny, tmp_path / "a", *PETS, f"data.path={root}", "steps=6")
    run(tiny, tmp_path / "b", *PETS, f"data.path={root}")
    root.rename(tmp_path / "moved")
    (tmp_path / "b").rename(tmp_path / "c")
    words = [f"data.path={tmp_path / 'moved'}", "steps=6", "save_every=5", "data.skip_broken=true", "snapshot_every=3"]
    status, losses = run(tiny, tmp_path / "c", *PETS, *words)
    assert status == 0 and losses == whole and len(losses) == 6


def test_other_data_is_refused_and_allowed(tiny, tmp_path, capsys):
    root = pets(tmp_path / "pets")
    words = [*PETS, f"data.path={root}"]
    run(tiny, tmp_path / "a", *words)
    (root / "bat").mkdir()
    shutil.copy(root / "cat" / "0.png", root / "bat")
    assert run(tiny, tmp_path / "a", *words, "steps=5")[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "data=class_names ['cat', 'dog'], this run asks for class_names ['bat', 'cat', 'dog']" in error
    assert error.endswith("go on with --allow data")
    assert run(tiny, tmp_path / "a", *words, "steps=5", "--allow", "data")[0] == 0
    assert load_checkpoint(tmp_path / "a" / "model")[1]["changes"][0]["key"] == "data"


def test_init_of_a_run_that_has_begun(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "a")
    assert run(tiny, tmp_path / "a", "init=digits")[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "trained with init='', this run asks for digits; give another output" in error
    assert error.endswith("go on with --allow init (init is read where a run begins, and not again)")


@pytest.mark.parametrize("key", ["init", "upcycle.source", "codec.pretrained"])
def test_a_folder_of_weights_may_have_another_name(key, tmp_path, monkeypatch):
    """Relative, absolute, by a link; other folders and none are another's."""

    def config(place):
        group, _, name = key.rpartition(".")
        values = TrainConfig().to_dict()
        (values[group] if group else values)[name] = place
        return values

    (tmp_path / "weights").mkdir()
    (tmp_path / "link").symlink_to("weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("./weights", "link", "~/weights", str(tmp_path / "link" / "..") + "/weights"):
        assert not compare(1, config("weights"), config(name), (), None, None, TrainConfig)
        assert not compare(1, config(name), config("weights"), (), None, None, TrainConfig)
    for other in ("", "weights2", "../weights"):
        with pytest.raises(ConfigError, match=key):
            compare(1, config("weights"), config(other), (), None, None, TrainConfig)
    with pytest.raises(ConfigError, match=key):
        compare(1, config(""), config("."), (), None, None, TrainConfig)


def test_allowed_changes_are_recorded_with_their_step(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "a")
    words = ["optim.lr=1e-5", "precision=bf16", "steps=6"]
    assert run(tiny, tmp_path / "a", *words)[0] == 2
    error = capsys.readouterr().err
    assert "optim.lr=0.0003, this run asks for 1e-05, precision=no, this run asks for bf16" in error
    assert "the run at step 4" in error and "--allow optim.lr,precision" in error
    assert run(tiny, tmp_path / "a", *words, "--allow", "optim.lr")[0] == 2
    assert "--allow precision" in capsys.readouterr().err
    assert run(tiny, tmp_path / "new", "--allow", "optim.rl")[0] == 2 and not (tmp_path / "new").exists()
    assert run(tiny, tmp_path / "a", *words, "--allow", "optim", "--allow", "precision")[0] == 0
    out = capsys.readouterr().out
    assert "resuming at step 4 of 6" in out and "changed optim.lr from 0.0003 to 1e-05 at step 4" in out
    changes = load_checkpoint(tmp_path / "a" / "model")[1]["changes"]
    assert [(c["step"], c["key"], c["to"]) for c in changes] == [(4, "optim.lr", 1e-5), (4, "precision", "bf16")]
    assert run(tiny, tmp_path / "a", *words, "steps=7")[0] == 0  # the change is now the run's own
    assert load_checkpoint(tmp_path / "a" / "model")[1]["changes"] == changes
    assert run(tiny, tmp_path / "a", *words, "--allow", "optim.rl")[0] == 2
    assert "--allow optim.rl: there is no such key; did you mean optim.lr?" in capsys.readouterr().err
    assert run(tiny, tmp_path / "a", *words, "--allow", "lr")[0] == 2
    assert "--allow lr: there is no such key; did you mean optim.lr?" in capsys.readouterr().err


def test_keys_that_shape_weights_are_refused_at_once(tiny, tmp_path, capsys, monkeypatch):
    """Whatever is allowed, and before a model is made; of the keys of a model the others may be allowed."""
    run(tiny, tmp_path / "a", "steps=1")
    assert run(tiny, tmp_path / "a", "model.target_ratio=5", "model.sigma=2", "--allow", "model", "steps=2")[0] == 0
    monkeypatch.setattr(Trainer, "make_net", None)
    capsys.readouterr()
    for key, value in (("model.depth", "2"), ("model.hidden_size", "64"), ("kind", "dydit")):
        assert run(tiny, tmp_path / "a", f"{key}={value}", "--allow", key.split(".")[0])[0] == 2
        error = capsys.readouterr().err
        assert f"the run at step 2 has weights for {key}=" in error and f"this run asks for {value}; give" in error
        assert error.count("\n") == 1


def test_keys_that_shape_weights():
    """Of the model's keys exactly those that change a shape, and num_heads, of which the weights' meaning depends."""
    values = {"input_size": 28, "in_channels": 3, "num_classes": 5, "hidden_size": 192, "depth": 2, "num_heads": 4}
    values |= {"encoder_width": 64, "encoder_stride": 2, "norm_groups": 16, "mlp_ratio": 2.0, "target_ratio": 5.0}
    values |= {"router": "cosine", "sigma": 2.0, "learn_sigma": True, "cond_norm": True, "segment_mean": True}
    values |= {"mean_positions": True, "keep_grid": 2, "direct_init": True, "predict_clean": True}
    base = PRESETS["digits"]
    assert values.keys() == base.to_dict().keys()

    def shapes(config):
        with torch.device("meta"):
            return {name: p.shape for name, p in DCDiT(config).named_parameters()}

    def alone(key):
        return {key: values[key]} | ({"segment_mean": True} if key == "mean_positions" else {})  # which it needs

    changed = {key for key in values if shapes(dataclasses.replace(base, **alone(key))) != shapes(base)}
    assert {f"model.{key}" for key in changed | {"num_heads"}} == {key for key in SHAPING if key.startswith("model.")}


def test_steps_are_free_at_a_constant_rate_only(tiny):
    old = load_config(tiny).to_dict()
    assert compare(4, old, load_config(tiny, ["steps=9"]).to_dict(), []) == []
    cosine = load_config(tiny, ["optim.cosine=true"]).to_dict()
    with pytest.raises(ValueError, match="steps=4, this run asks for 9"):
        compare(4, cosine, load_config(tiny, ["optim.cosine=true", "steps=9"]).to_dict(), [])
    del old["validation"], old["init"]  # as a version without these keys wrote it
    old["optim"]["ema_decay"], old["tensorboard"] = 0.9, False
    assert compare(4, old, load_config(tiny).to_dict(), []) == []


def test_a_run_that_diverged_goes_on_at_a_smaller_rate(tiny, tmp_path, capsys):
    words = ["optim.grad_clip=1e30", "save_every=100"]
    run(tiny, tmp_path / "a", *words, "steps=2")
    assert run(tiny, tmp_path / "a", *words, "steps=9", "optim.lr=1e30", "--allow", "optim.lr")[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "training diverged" in error and "step 2 is saved: resume with a smaller optim.lr and --allow" in error
    status, losses = run(tiny, tmp_path / "a", *words, "steps=5", "optim.lr=1e-4", "--allow", "optim.lr")
    assert status == 0 and sorted(losses) == [1, 2, 3, 4, 5]


def test_a_signal_saves_the_step_it_falls_into(tiny, tmp_path, monkeypatch, capsys):
    report = Trainer._report

    def ended(self, *args):
        report(self, *args)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_report", ended)
    status, losses = run(tiny, tmp_path / "a", "save_every=100")
    assert status == 128 + signal.SIGTERM and sorted(losses) == [1, 2, 3]
    assert load_checkpoint(tmp_path / "a" / "model")[1]["step"] == 3
    says = [f"step 3 is saved in {tmp_path / 'a'}, where the same command goes on", "dcdit train: interrupted"]
    assert capsys.readouterr().err.splitlines()[-2:] == says
    monkeypatch.undo()
    assert run(tiny, tmp_path / "a", "save_every=100") == run(tiny, tmp_path / "b")


def test_models_that_lack_files_are_written_again(tiny, tmp_path):
    words = ["steps=2", "optim.ema_decay=[0.9,0.99]"]
    run(tiny, tmp_path / "a", *words)
    for name in ("model/config.json", "model-0.99/model.safetensors"):
        (tmp_path / "a" / name).unlink()
        assert run(tiny, tmp_path / "a", *words)[0] == 0 and (tmp_path / "a" / name).exists()


def test_one_run_in_an_output(tiny, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a"):
        assert run(tiny, tmp_path / "a")[0] == 2
    assert "another run is writing to" in capsys.readouterr().err
    assert run(tiny, tmp_path / "a")[0] == 0


def test_snapshots_and_several_averages(tiny, tmp_path):
    """An average of decay 0 is the weights themselves; a snapshot is the first average of its step."""
    run(tiny, tmp_path / "a", "optim.ema_decay=[0.9,0]", "snapshot_every=2", "steps=4")
    last = load_file(tmp_path / "a" / "last.safetensors")
    for folder, key in (("model", "ema"), ("model-0", "model"), ("snapshots/step-0000004", "ema")):
        model, use = load_checkpoint(tmp_path / "a" / folder)
        assert use["step"] == 4
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, last[f"{key}.{name}"])
    assert sorted(f.name for f in (tmp_path / "a" / "snapshots").iterdir()) == ["step-0000002", "step-0000004"]
    assert run(tiny, tmp_path / "a", "optim.ema_decay=[0.9,0]", "steps=5")[0] == 0


def test_validation_is_the_held_out_loss_and_changes_no_step(tiny, tmp_path):
    words = ["validation.every=2", "validation.items=70", "validation.samples=3", "validation.steps=2"]
    _, losses = run(tiny, tmp_path / "a", *words)
    assert losses == run(tiny, tmp_path / "b")[1]
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "validation_loss" in line}
    assert sorted(found) == [2, 4] and sorted(f.name for f in (tmp_path / "a" / "samples").iterdir()) == [
        "step-0000002.png",
        "step-0000004.png",
    ]
    model = load_checkpoint(tmp_path / "a" / "model")[0].double().requires_grad_(False)
    stream = TrainingStream(Digits(held_out=True), FlowMatching(), (16, 7, 7), 10, seed=0, batch_size=500)
    image, noise, t, y = (torch.stack([stream[i][key] for i in range(70)]) for key in ("image", "noise", "t", "y"))
    x0, noise = torch.nn.functional.pixel_unshuffle(image, 4).double(), noise.double()
    sigma = (t.double() / 1000).view(-1, 1, 1, 1)
    out, routing = model((1 - sigma) * x0 + sigma * noise, t, y, return_routing=True)
    assert found[4]["validation_loss"] == pytest.approx(float((out - (noise - x0)).square().mean()), rel=1e-5)
    assert found[4]["validation_kept"] == pytest.approx(float(routing.plan.lengths.double().mean()) / 49)


def test_validation_of_a_folder(tiny, tmp_path, capsys):
    train, held_out = pets(tmp_path / "train"), pets(tmp_path / "val", count=1)
    words = [*PETS, f"data.path={train}", "validation.every=4"]
    assert run(tiny, tmp_path / "a", *words)[0] == 2
    assert "needs validation.path" in capsys.readouterr().err
    assert run(tiny, tmp_path / "a", *words, f"validation.path={pets(tmp_path / 'x', ('cow',))}")[0] == 2
    assert "are not those of the training data: ['cow']" in capsys.readouterr().err
    assert run(tiny, tmp_path / "a", *words, f"validation.path={held_out}")[0] == 0
    assert "validation_loss" in (tmp_path / "a" / "metrics.jsonl").read_text()


def first_weights(config, *words):
    """The weights before the first step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(load_config(config, list(words)))
    trainer.close()
    return trainer.net.state_dict(), trainer.started


def test_init_takes_what_fits(tiny, tmp_path):
    root, wider = pets(tmp_path / "pets", ("ant", "cat", "dog")), pets(tmp_path / "wider", ("bee", "cat"))
    words = [*PETS, f"data.path={root}", "model.num_classes=3"]
    run(tiny, tmp_path / "a", *words)
    source, use = load_checkpoint(tmp_path / "a" / "model")
    assert use["class_names"] == ["ant", "cat", "dog"]
    state = source.state_dict()

    same, line = first_weights(tiny, *words, f"output={tmp_path / 'b'}", f"init={tmp_path / 'a' / 'model'}")
    assert all(torch.equal(same[key], state[key]) for key in state) and line.endswith("3 of 3 classes by name")

    other = [*PETS, f"data.path={wider}", "model.num_classes=2", "model.depth=2", f"output={tmp_path / 'c'}"]
    mixed, line = first_weights(tiny, *other, f"init={tmp_path / 'a' / 'model'}")
    assert "1 of 2 classes by name; fresh: main.blocks.1." in line and "more" in line
    table = mixed["class_embed.weight"]
    assert torch.equal(table[1], state["class_embed.weight"][1]) and torch.equal(
        table[2], state["class_embed.weight"][3]
    )
    assert not torch.equal(table[0], state["class_embed.weight"][0])
    assert torch.equal(mixed["main.blocks.0.qkv.weight"], state["main.blocks.0.qkv.weight"])

    save_checkpoint(tmp_path / "nameless", source, {"objective": "ddpm"})
    other[-2:] = [f"output={tmp_path / 'd'}", "model.num_classes=4"]
    table, line = first_weights(tiny, *other, f"init={tmp_path / 'nameless'}")
    assert "none of 4 classes, as 3 have no names" in line and "trained with objective ddpm, not flow" in line
    assert torch.equal(table["class_embed.weight"][4], state["class_embed.weight"][3])


def test_init_from_a_release_and_from_nothing_that_fits(tiny, tmp_path, capsys):
    release = str(Path(__file__).parent / "data" / "dcdit_tiny_release.pt")
    wide = ["model.hidden_size=64", "model.num_heads=4", "model.depth=2"]
    taken, line = first_weights(tiny, f"output={tmp_path / 'a'}", f"init={release}", *wide)
    theirs = load_release(release).state_dict()
    assert torch.equal(taken["main.blocks.1.qkv.weight"], theirs["main.blocks.1.qkv.weight"])
    assert "it was trained with objective ddpm, not flow" in line
    sizes = {"input_size": (4, 4), "hidden_size": 64, "depth": 1, "num_heads": 1, "encoder_width": 64}
    save_checkpoint(tmp_path / "big", DCDiT(DCDiTConfig(**sizes, num_classes=3)), {})
    assert run(tiny, tmp_path / "b", f"init={tmp_path / 'big'}")[0] == 2
    assert "does not fit this model" in capsys.readouterr().err
    assert run(tiny, tmp_path / "c", f"init={tmp_path / 'none'}")[0] == 2
    assert "no checkpoint at" in capsys.readouterr().err


def test_the_head_of_a_run(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "a", "data.size=16")
    out = capsys.readouterr().out
    for part in (
        "data    4500 MNIST digits",
        "7×7 = 49 cells",
        "device  cpu (",
        "batch 16",
        "from step 0 of 4, fresh weights\n",
        "unused  data.size is of data.kind=folder\n",
    ):
        assert part in out
    assert load_checkpoint(tmp_path / "a" / "model")[1]["class_names"] == list("0123456789")
    assert "classes" not in out.split("model   ")[1].splitlines()[0]
    run(tiny, tmp_path / "a", "data.size=16", "steps=2", "--allow", "steps")
    assert "at step 4 already, past the 2 that are asked for\n" in capsys.readouterr().out
    run(tiny, tmp_path / "b", "model.num_classes=12", "steps=1")
    assert "; the data has 10 of its 12 classes\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("codec.pretrained=stabilityai/sd-vae-ft-ema", "codec.pretrained is of codec.kind=autoencoder_kl"),
        ("spend.least=0.5", "spend.least is of kind=sparse"),
        ("min_snr=0", "min_snr is of objective=ddpm"),
        ("validation.steps=5", "validation.steps is of validation.every"),  # once, though two keys would read it
        ("validation.every=0", None),  # it turns validation off
        ("data.kind=digits", None),
    ],
)
def test_a_given_default_that_nothing_reads_is_named(override, line, tiny):
    assert unused(load_config(tiny, [override])) == ([line] if line else [])


@pytest.mark.parametrize(
    ("name", "value", "words", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", [], "mixed_precision=bf16, the configuration has precision=no"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", ["precision=bf16"], "mixed_precision=fp16"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", ["precision=bf16"], None),
        ("ACCELERATE_MIXED_PRECISION", "no", ["precision=bf16"], None),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            [],
            "gradient_accumulation_steps=4, the configuration has accum",
        ),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", ["accumulate=2", "batch_size=32"], None),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", [], "dynamo_backend=inductor, the configuration has compile=False"),
        ("ACCELERATE_USE_FSDP", "true", [], "asks for FSDP, which dcdit train does not support"),
        ("ACCELERATE_USE_DEEPSPEED", "true", [], "asks for DeepSpeed"),
    ],
)
def test_the_launcher_is_obeyed_or_refused(name, value, words, message, tiny, tmp_path, monkeypatch, capsys):
    plain = run(tiny, tmp_path / "plain", "steps=2", *words)[1] if message is None else {}
    monkeypatch.setenv(name, value)
    status, losses = run(tiny, tmp_path / "a", "steps=2", *words)
    if message is None:
        assert status == 0 and losses == plain and os.environ[name] == value
    else:
        assert status == 2 and message in capsys.readouterr().err and not (tmp_path / "a").exists()
