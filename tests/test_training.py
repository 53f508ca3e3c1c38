"""Training: a step's loss, and runs that resume exactly after a kill, spread over processes, and fail cleanly."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType

from dcdit.checkpoints.folder import load_checkpoint
from dcdit.cli import main
from dcdit.data.sources import Digits
from dcdit.model.dcdit import DCDiT
from dcdit.training.batches import TrainingStream, batches, draw_drop_fraction
from dcdit.training.config import learning_rate, load_config
from dcdit.training.objectives import FlowMatching, ratio_loss
from dcdit.training.run import train

TINY = {
    "model": {"preset": "digits", "input_size": 7, "in_channels": 16, "hidden_size": 32, "depth": 1, "num_heads": 1}
    | {"target_ratio": 1.5},  # a fresh router then keeps most cells, so that ρ and ragged lengths matter
    "codec": {"factor": 4},
    "steps": 8,
    "batch_size": 32,
    "optim": {"lr": 3e-4, "warmup_steps": 2, "ema_decay": 0.9},
    "drop_warmup": 2,
    "log_every": 1,
    "save_every": 3,
}
METRICS = ["step", "loss", "diffusion_loss", "ratio_loss", "kept", "drop_fraction", "grad_norm", "lr", "images_per_s"]


@pytest.fixture
def tiny(tmp_path):
    """A config file of a run of seconds."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return str(file)


def run(config, output, *overrides):
    train(load_config(config, [f"output={output}", *overrides]))
    return metrics(output)


def metrics(output):
    """The lines of metrics.jsonl without the value that time decides."""
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def subprocess_environment():
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its directory."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    AcceleratorState._reset_state(reset_partial_state=True)
    run(str(directory / "tiny.yaml"), directory)
    return directory


def test_first_step_computes_the_stated_loss(whole):
    """Step 1 of the run, recomputed in float64 from the seed: flow matching + 0.03 · ratio loss over 16s."""
    config = load_config(whole / "tiny.yaml")
    torch.manual_seed(0)
    model = DCDiT(config.model).double()
    stream = TrainingStream(Digits(), FlowMatching(), (16, 7, 7), 10, seed=0, batch_size=32, label_drop=0.1)
    batch = next(batches(stream, 0, 1))
    x0 = torch.nn.functional.pixel_unshuffle(batch["image"], 4).double()
    noise, sigma = batch["noise"].double(), (batch["t"].double() / 1000).view(-1, 1, 1, 1)
    output, routing = model((1 - sigma) * x0 + sigma * noise, batch["t"], batch["y"], return_routing=True)
    diffusion = (output - (noise - x0)).square().mean()
    ratios = []
    for half in (slice(0, 16), slice(16, 32)):
        f, g = routing.natural_mask[half].double().mean(), routing.boundary_prob[half].mean()
        ratios.append(3 * (0.5 * f * g + (1 - f) * (1 - g)))  # N = 1.5
    ratio = sum(ratios) / 2
    loss = diffusion + 0.03 * ratio
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    first = metrics(whole)[0]
    for key, value in (("loss", loss), ("diffusion_loss", diffusion), ("ratio_loss", ratio), ("grad_norm", norm)):
        assert first[key] == pytest.approx(value.item(), rel=1e-5), key
    assert first["kept"] == pytest.approx(routing.plan.lengths.double().mean().item() / 49)


def test_a_budget_is_drawn_in_place_of_rho(tiny, tmp_path):
    """After the warm-up a step keeps exactly a drawn share of its batch's cells."""
    shares = [0.2, 0.5, 0.8]
    lines = run(tiny, tmp_path / "run", f"budgets={shares}", "steps=5", "drop_warmup=2")
    for line in lines:
        assert line["budget"] == draw_drop_fraction(0, line["step"] - 1, shares, 2)
        assert "drop_fraction" not in line
        if line["step"] > 2:
            assert line["kept"] == pytest.approx(round(line["budget"] * 49) / 49)
    assert load_checkpoint(tmp_path / "run" / "model")[1]["training"]["budgets"] == shares


def test_metrics_and_checkpoint_of_a_run(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9)) and list(lines[0]) == METRICS
    config = load_config(whole / "tiny.yaml")
    for line in lines:
        assert line["drop_fraction"] == draw_drop_fraction(0, line["step"] - 1, config.drop_fractions, 2)
        assert line["lr"] == learning_rate(config.optim, line["step"] - 1, 8)
        assert 0 < line["kept"] <= 1 and line["images_per_s"] > 0
    model, extra = load_checkpoint(whole / "model")
    assert model.config == config.model
    assert extra["objective"] == "flow" and extra["codec"] == {"kind": "pixel_unshuffle", "factor": 4}
    assert extra["data"]["kind"] == "digits" and extra["step"] == 8 and extra["training"]["steps"] == 8
    assert sorted(file.name for file in whole.iterdir()) == ["last.safetensors", "metrics.jsonl", "model", "tiny.yaml"]


def test_training_learns_to_read_its_input(tiny, tmp_path):
    """Whatever ignores x_t cannot guess the noise: its error stays above the noise's variance of 1."""
    model = ["model.in_channels=4", "model.input_size=14", "model.target_ratio=4", "codec.factor=2"]
    lines = run(tiny, tmp_path, "steps=120", "batch_size=16", "optim.lr=2e-2", "optim.cosine=false", *model)
    assert lines[0]["diffusion_loss"] > 1.5
    assert sum(line["diffusion_loss"] for line in lines[-10:]) / 10 < 0.97


def test_a_killed_run_resumes_to_the_same_losses(whole, tiny, tmp_path):
    command = [sys.executable, "-m", "dcdit.cli", "train", tiny, f"output={tmp_path}"]
    process = subprocess.Popen(command, env=subprocess_environment(), stderr=subprocess.DEVNULL)
    lines, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 4):  # past the save at step 3
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # As a kill in the middle of a line and of a save would leave them.
    with open(lines, "a") as stream:
        stream.write('{"step": 9')
    (tmp_path / ".last.safetensors.tmp").write_bytes(b"half")
    for name in (".model.x8k2", ".model.x8k2.old"):
        shutil.copytree(tmp_path / "model", tmp_path / name)
    assert run(tiny, tmp_path) == metrics(whole)
    assert not list(tmp_path.glob(".model.*"))
    for key, value in load_checkpoint(whole / "model")[0].state_dict().items():
        assert torch.equal(value, load_checkpoint(tmp_path / "model")[0].state_dict()[key]), key


def test_stopping_by_the_clock_resumes_to_the_same_losses(whole, tiny, tmp_path):
    assert [line["step"] for line in run(tiny, tmp_path, "max_minutes=1e-9")] == [1]
    assert load_checkpoint(tmp_path / "model")[1]["step"] == 1
    assert run(tiny, tmp_path, "log_every=2") == [line for line in metrics(whole) if line["step"] in (1, 2, 4, 6, 8)]


def test_resuming_keeps_the_memory_format(tiny, tmp_path):
    """AdamW's moments must come back in the layout of their parameters, or its fused step mixes up their entries."""
    options = ["channels_last=true", "optim.lr=1e-2"]
    plain = run(tiny, tmp_path / "plain", *options)
    run(tiny, tmp_path / "resumed", *options, "save_every=1", "max_minutes=1e-9")
    assert run(tiny, tmp_path / "resumed", *options) == plain


def test_two_processes_give_the_losses_of_one(whole, tiny, tmp_path):
    """Rounding apart: 1e-7 is measured."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command = [*launcher, "--main_process_port=0", "-m", "dcdit.cli", "train", tiny, f"output={tmp_path}"]
    done = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path)) == 8
    for line, alone in zip(metrics(tmp_path), metrics(whole), strict=True):
        for key in ("loss", "diffusion_loss", "ratio_loss", "kept", "drop_fraction", "grad_norm", "lr"):
            assert line[key] == pytest.approx(alone[key], rel=1e-5), (line["step"], key)


def test_bf16_channels_last_and_tracing_change_rounding_only(tiny, tmp_path, monkeypatch):
    """The compiler's back-end takes minutes on a CPU, so torch.compile only traces here."""
    plain = run(tiny, tmp_path / "plain", "steps=3")
    compiler, products = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiler(model, backend="eager", **options))

    def watched(*args):
        products.append(torch.get_float32_matmul_precision())
        return ratio_loss(*args)

    monkeypatch.setattr("dcdit.training.trainer.ratio_loss", watched)
    half = "precision=bf16"
    runs = (([half, "channels_last=true"], 0.02), (["compile=true", half], 0.02), (["compile=true"], 1e-6))
    for options, tolerance in runs:
        AcceleratorState._reset_state(reset_partial_state=True)
        output = tmp_path / "-".join(options)
        for line, expected in zip(run(tiny, output, "steps=3", *options), plain, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert all(v.dtype == torch.float32 for v in load_checkpoint(output / "model")[0].state_dict().values())
    assert products == ["high"] * 6 + ["highest"] * 3  # TF32 beside bfloat16 alone


def test_ddpm_with_learned_variance_trains(tiny, tmp_path):
    lines = run(tiny, tmp_path, "objective=ddpm", "model.learn_sigma=true", "model.target_ratio=16", "steps=3")
    assert all(math.isfinite(line["loss"]) for line in lines) and lines[0]["diffusion_loss"] > 0.9
    assert load_checkpoint(tmp_path / "model")[1]["objective"] == "ddpm"


def test_latents_train_without_a_codec(tmp_path):
    import numpy as np

    for kind in ("features", "labels"):
        (tmp_path / f"imagenet256_{kind}").mkdir()
    for i in range(5):
        np.save(tmp_path / "imagenet256_features" / f"{i}.npy", np.random.default_rng(i).normal(size=(1, 4, 6, 6)))
        np.save(tmp_path / "imagenet256_labels" / f"{i}.npy", np.array([i]))
    values = {**TINY, "model": {**TINY["model"], "input_size": 6, "in_channels": 4}, "steps": 2}
    values |= {"data": {"kind": "latents", "path": str(tmp_path)}, "codec": {"kind": "autoencoder_kl"}}
    (tmp_path / "latents.yaml").write_text(yaml.safe_dump(values))
    assert len(run(tmp_path / "latents.yaml", tmp_path / "out")) == 2
    codec = load_checkpoint(tmp_path / "out" / "model")[1]["codec"]
    assert codec["kind"] == "autoencoder_kl" and "pretrained" in codec


def full_disk(monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    return lambda: None


def file_limit(monkeypatch):
    """The operating system's own refusal, in the middle of a write: files may not grow past 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("broken", [full_disk, file_limit])
def test_a_full_disk_leaves_the_last_checkpoint_whole(broken, whole, tiny, tmp_path, monkeypatch, capsys):
    run(tiny, tmp_path, "max_minutes=1e-9")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    assert len(before) == 2
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    restore = broken(monkeypatch)
    try:
        status = main(["train", tiny, f"output={tmp_path}"])
    finally:
        restore()
        monkeypatch.undo()
    assert status == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("dcdit train: ") and ("No space" in message or "too large" in message)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")} == before
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run(tiny, tmp_path) == metrics(whole)


def fails(capsys, *arguments):
    """The line by which the command refuses."""
    assert main(["train", *map(str, arguments)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("dcdit train: ") and text.count("\n") == 1
    return text


def test_bad_config_files_and_checkpoints_are_one_line(whole, tmp_path, capsys):
    assert "no config file" in fails(capsys, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
    assert "is not YAML" in fails(capsys, tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert "must hold a mapping of keys, found list" in fails(capsys, tmp_path / "list.yaml")

    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    tiny, output = copy / "tiny.yaml", f"output={copy}"
    assert "optim.lr=0.0003, this run asks for 1.0; give another output, or go on with --allow optim.lr" in fails(
        capsys, tiny, output, "optim.lr=1"
    )
    data = (copy / "last.safetensors").read_bytes()
    (copy / "last.safetensors").write_bytes(data[: len(data) // 2])
    assert "truncated or not a training checkpoint" in fails(capsys, tiny, output)
    shutil.copy(copy / "model" / "model.safetensors", copy / "last.safetensors")
    assert "truncated or not a training checkpoint" in fails(capsys, tiny, output)
    (copy / "last.safetensors").unlink()
    (copy / "model" / "samples").mkdir()
    assert "model holds more than a checkpoint (samples)" in fails(capsys, tiny, output)  # and no line of progress


def test_trackers_of_accelerate_get_the_metrics(tiny, tmp_path, monkeypatch, capsys):
    assert "log_with must be among aim, tensorboard, wandb" in fails(
        capsys, tiny, f"output={tmp_path / 'a'}", "log_with=tensorbord"
    )
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    assert "pip install wandb" in fails(capsys, tiny, f"output={tmp_path / 'a'}", "log_with=wandb")
    monkeypatch.undo()
    written = {}

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            assert purge_step == 1 and directory == str(tmp_path / "b" / "tensorboard" / "dcdit")

        def add_scalar(self, key, value, global_step):
            written.setdefault(global_step, {})[key] = value

        def add_hparams(self, values, metric_dict):
            written["steps"] = values["steps"]

        def flush(self):
            pass

        def close(self):
            written["closed"] = True

    board = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(torch.utils, "tensorboard", board, raising=False)
    for module in ("accelerate.tracking", "accelerate.accelerator"):
        monkeypatch.setattr(f"{module}.is_tensorboard_available", lambda: True, raising=False)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    lines = run(tiny, tmp_path / "b", "log_with=tensorboard", "steps=2")
    assert written.pop("closed") and written.pop("steps") == 2
    assert sorted(written) == [1, 2] and written[2]["loss"] == lines[1]["loss"]


def test_gradients_clipped_at_zero_are_not_clipped(tiny, tmp_path):
    free = run(tiny, tmp_path / "free", "optim.grad_clip=1e9", "steps=3")
    assert run(tiny, tmp_path / "off", "optim.grad_clip=0", "steps=3") == free
    assert run(tiny, tmp_path / "clipped", "optim.grad_clip=1e-4", "steps=3")[1:] != free[1:]
