"""Arguments of `sample` and `dcdit sample`: classes, ρ, sizes; bad input; two processes."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_sampling import SIZES, tiny

from dcdit.checkpoints.folder import save_checkpoint
from dcdit.cli import main
from dcdit.commands.options import parse_classes, parse_drop_fraction
from dcdit.errors import ConfigError
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.sampling import Batcher
from dcdit.sampling.sampler import sample


@pytest.fixture(scope="module")
def flow():
    return tiny(learn_sigma=False)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"classes": [0, 4]}, r"class id 4 is outside \[0, 3\]"),
        ({"classes": [-1]}, r"class id -1 is outside \[0, 3\]"),
        ({"classes": []}, "list of class ids"),
        ({"classes": [0.5]}, "list of class ids"),
        ({"classes": ["1"]}, r"list of class ids, got \['1'\]"),
        ({"drop_fraction": 1.0}, r"must be in \[0, 1\), got 1"),
        ({"drop_fraction": float("nan")}, "got nan"),
        ({"guidance": 2, "uncond_drop_fraction": -0.1}, "got -0.1"),
        ({"drop_fraction": [0.1, 0.2, 0.3, 0.4]}, r"over 3 steps must be 1 to 3 numbers, got shape \(4,\)"),
        ({"drop_fraction": []}, "must be 1 to 3 numbers"),
        ({"drop_fraction": lambda t: t / 1000}, r"must be in \[0, 1\), got 1"),
        ({"drop_fraction": None}, "must be numbers, got None"),
        ({"drop_fraction": "0.5"}, "must be numbers, got '0.5'"),
        ({"drop_fraction": lambda t: torch.zeros(2)}, r"must be numbers, got \[tensor"),
        ({"drop_fraction": torch.zeros(3)}, "for each image needs 2 values, got 3"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"steps": 0}, r"steps must be in \[1, 1000\], got 0"),
        ({"steps": 4.0}, "steps must be an integer, got 4.0"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"seed": 2**32}, r"seed must be in \[0, 2\*\*32\), got 4294967296"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"guidance": [1.0, 2.0]}, r"guidance must be a number of at least 0, got \[1\.0, 2\.0\]"),
        ({"guidance_channels": 4}, r"guidance_channels must be in \[1, 3\], got 4"),
        ({"eta": 0.5}, "is of the scheduler ddim, got 0.5 and auto"),
        ({"eta": 2, "scheduler": "ddim"}, r"eta must be in \[0, 1\]"),
        ({"shift": 0}, "shift must be positive and finite, got 0"),
        ({"shift": 2, "objective": "ddpm"}, "shift is of flow matching, this model was trained by ddpm"),
        ({"scheduler": "ddim"}, "ddim integrates ddpm, this model was trained by flow: use flow-euler"),
        ({"scheduler": "ddimm"}, "did you mean 'ddim'"),
        ({"indices": [1]}, "one entry for each of the 2"),
        ({"indices": [0.5, 1.5]}, "indices must be integers"),
        ({"indices": "ab"}, "indices must be integers"),
        ({"batch_size": 1.5}, "batch_size must be an integer of at least 1, got 1.5"),
        ({"classes": [True, False]}, "list of class ids, got torch.bool"),
        ({"guidance_interval": 5}, r"guidance_interval must be timesteps \(low, high\)"),
        ({"guidance_interval": (800, 200)}, r"low <= high, got \(800, 200\)"),
        (
            {"guidance": 2, "guidance_interval": (10, 300)},
            r"one of the steps, at timesteps 1000 to 333.333, got \(10, 300\)",
        ),
        ({"shift": "2"}, "shift must be a number, got '2'"),
        ({"gflops_per_image": "2"}, "gflops_per_image must be a number, got '2'"),
        ({"budget_schedule": "linear"}, "budget_schedule linear is of gflops_per_image or seconds_per_image"),
        ({"uncond_drop_fraction": 0.5}, "uncond_drop_fraction is of guidance, and guidance 1 is none"),
        ({"guidance_interval": (200, 800)}, "guidance_interval, .* is of guidance, and guidance 1 is none"),
        ({"policy": "guidance=200:800"}, "a policy's guidance, is of guidance, and guidance 1 is none"),
        ({"seconds_per_image": -1.0}, "seconds_per_image must be positive and finite, got -1.0"),
        ({"callback": 3}, "callback must be a function of a Step, got 3"),
        ({"calibration": "file"}, "calibration is of seconds_per_image"),
    ],
)
def test_bad_input_is_named(flow, arguments, words):
    with pytest.raises(ConfigError, match=words):
        sample(flow, **{"classes": [0, 1], "objective": "flow", "steps": 3, **arguments})


def test_a_model_that_names_another_objective(flow):
    flow = copy.copy(flow)
    flow.use = {"objective": "ddpm"}
    message = "objective must be ddpm, in which the model was trained, got flow"
    with pytest.raises(ConfigError, match=message):
        sample(flow, [0], objective="flow", steps=1)
    with pytest.raises(ConfigError, match=message):
        Batcher(flow, objective="flow", steps=1).submit(0)
    flow.use = {}
    sample(flow, [0], objective="flow", steps=1)


def test_channels_that_the_checkpoint_names_may_be_idle(tmp_path, flow):
    codec = {"kind": "pixel_unshuffle", "factor": 1}
    save_checkpoint(tmp_path / "model", flow, {"objective": "flow", "codec": codec, "guidance_channels": 2})
    words = ["sample", str(tmp_path / "model"), "--cpu", "--steps", "1", "--guidance", "1"]
    assert main([*words, "--output", str(tmp_path / "a")]) == 0


def test_parse_classes():
    assert parse_classes("0-2, 7,9-9", 10) == [0, 1, 2, 7, 9]
    for text, words in (
        ("0-10", r"10 is outside \[0, 9\]"),
        ("3-1", "backwards"),
        ("a", "0-9 or 1,3"),
        ("1,,2", "0-9"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_classes(text, 10)


def test_classes_by_name():
    names = ["cat", "dog", "7", "big, red"]
    assert parse_classes("dog, cat,0-1", 4, names) == [1, 0, 0, 1]
    assert parse_classes("7", 4, names) == [2] and parse_classes("big, red", 4, names) == [3]
    with pytest.raises(
        ConfigError, match=r"unknown class key 'dgo'; did you mean 'dog'\? known: cat, dog, 7, big, red$"
    ):
        parse_classes("dgo", 4, names)
    with pytest.raises(ConfigError, match=r"unknown class key 'x'; known: class0, .*, class39 and 960 more$"):
        parse_classes("x", 1000, [f"class{i}" for i in range(1000)])
    with pytest.raises(ConfigError, match="must look like 0-9 or 1,3,5, got ''"):
        parse_classes("", 4)


def test_parse_drop_fraction():
    assert parse_drop_fraction("0.3") == 0.3 and parse_drop_fraction("0, .3,0.6") == [0.0, 0.3, 0.6]
    for text in ("", "a", "0.1,,0.2"):
        with pytest.raises(ConfigError, match=r"0\.3 or 0,0\.3,0\.6, got"):
            parse_drop_fraction(text)


def test_a_schedule_on_the_command_line(tmp_path, capsys):
    words = ["sample", "dcdit/assets/digits", "--classes", "3", "--steps", "4", "--guidance", "1", "--cpu", "--output"]
    shares = []
    for rho in ("0", "0,0.9", "0.9"):
        assert main([*words, str(tmp_path / rho), "--drop-fraction", rho]) == 0
        shares.append(float(capsys.readouterr().out.split("%")[0].split()[-1]))
    assert shares[0] > shares[1] > shares[2]


def sample_seven(folder, name, *launch):
    """`dcdit sample` of the model in `folder`, in one process or as `launch` says; the files are in folder/name."""
    words = ["sample", str(folder / "model"), "--num", "7", "--steps", "3", "--batch-size", "2"]
    words += ["--format", "npz", "png", "grid", "--output", str(folder / name)]
    command = [sys.executable, *launch, str(folder / "run.py"), *words]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, timeout=300)
    assert done.returncode == 0 and done.stdout.count("7 images in") == 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a model and one process's samples from it."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(**{**SIZES, "in_channels": 4}, encoder_width=32, learn_sigma=False))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    codec = {"kind": "pixel_unshuffle", "factor": 2}
    save_checkpoint(folder / "model", model, {"objective": "flow", "codec": codec})
    # A process that ends within its group is aborted at times.
    (folder / "run.py").write_text(
        "import sys, torch, dcdit.cli\ncode = dcdit.cli.main()\nsys.exit(code or torch.distributed.is_initialized())"
    )
    sample_seven(folder, "one")
    return folder


@pytest.mark.parametrize("kind", ["--cpu", "--multi_gpu"])
def test_two_processes_write_the_same_images(alone, kind):
    """`accelerate launch` shares the images out, without a GPU too; the files equal one process's."""
    launch = ["-m", "accelerate.commands.launch", kind, "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    launch += ["--main_process_port", "0"]
    sample_seven(alone, kind, *launch)
    one, two = (np.load(alone / name / "samples.npz") for name in ("one", kind))
    assert one["arr_0"].shape == (7, 12, 10, 3) and one["arr_0"].dtype == np.uint8
    assert one["arr_1"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    # A value on the edge between two levels may round either way.
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    names = [sorted(file.name for file in (alone / name).iterdir()) for name in ("one", kind)]
    assert names[0] == names[1] and len(names[0]) == 10


@pytest.mark.parametrize("size", [(8,), (8, 0), (8.0, 4), 8])
def test_sizes_that_cannot_be_are_named(flow, size):
    with pytest.raises(ConfigError, match=r"size must be two positive integers \(H, W\), got"):
        sample(flow, [1], objective="flow", size=size)
