"""`dcdit sample` as a long run: pictures at once, going on after a kill, one run in a folder, memory that stays."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcdit.checkpoints.folder import load_checkpoint, save_checkpoint
from dcdit.cli import main
from dcdit.files import locked
from dcdit.interrupts import SIGNALS, Interrupted, held_back, raised
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.model.flops import dcdit_flops

TINY = DCDiTConfig(
    input_size=(6, 5), num_classes=4, hidden_size=32, depth=1, num_heads=1, encoder_width=32, learn_sigma=False
)
USE = {
    "objective": "flow",
    "codec": {"kind": "pixel_unshuffle", "factor": 2},
    "class_names": ["ant", "bee", "cat", "dog"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = DCDiT(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_checkpoint(folder, model, USE)
    return str(folder)


def words(checkpoint, out, *more):
    return ["sample", checkpoint, "--cpu", "--steps", "2", "--output", str(out), *map(str, more)]


def pictures(folder):
    return {file.name: file.read_bytes() for file in Path(folder).glob("*_class*.png")}


def environment():
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_ended_goes_on_to_the_same_pictures(number, checkpoint, tmp_path, capsys):
    options = ["--num", "40", "--batch-size", "4", "--format", "png", "npz"]
    command = [sys.executable, "-m", "dcdit.cli", *words(checkpoint, tmp_path / "a", *options)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not pictures(tmp_path / "a"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    before = pictures(tmp_path / "a")
    if process.returncode != 0:  # it may have been done
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert 0 < len(before) and not (tmp_path / "a" / "samples.npz").exists()
        assert number == signal.SIGKILL or "the same command goes on\ndcdit sample: interrupted" in errors
    for file in before:
        assert Image.open(tmp_path / "a" / file).size == (10, 12)
    assert main(words(checkpoint, tmp_path / "a", *options)) == 0
    assert main(words(checkpoint, tmp_path / "b", *options)) == 0
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b") and len(pictures(tmp_path / "a")) == 40
    one, two = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    assert np.array_equal(one["arr_0"], two["arr_0"]) and one["arr_1"].tolist() == [0, 1, 2, 3] * 10
    capsys.readouterr()
    assert main(words(checkpoint, tmp_path / "a", *options)) == 0
    assert "40 images are in" in capsys.readouterr().out


@pytest.fixture
def heard():
    """SIGHUP and Ctrl-C have an effect, also where nohup or a shell's background runs the tests."""
    effects = (signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)
    before = [signal.signal(number, effect) for number, effect in effects]
    yield
    for (number, _), handler in zip(effects, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_a_block_of_work_and_never_cut_it(number, heard):
    """Held back, the first signal waits for the end of the block and the second does not; handlers are put back."""
    before, done = [signal.getsignal(n) for n in SIGNALS], []
    with raised(), pytest.raises(Interrupted) as stop:
        with held_back():
            os.kill(os.getpid(), number)
            done.append("whole")
        done.append("too far")
    assert done == ["whole"] and stop.value.number == number
    with raised(), pytest.raises(Interrupted), held_back():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        done.append("too far")
    with raised(), held_back(ignore=True):
        os.kill(os.getpid(), number)
    with pytest.raises(Interrupted), raised():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert done == ["whole"] and [signal.getsignal(n) for n in SIGNALS] == before


def test_a_signal_in_a_destructor_is_not_lost(heard):
    """Python drops what a destructor raises, and the run would go on."""

    class Last:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted), raised():
        Last()
        time.sleep(10)


def test_a_picture_that_was_cut_off_is_drawn_again(checkpoint, tmp_path):
    assert main(words(checkpoint, tmp_path / "a", "--num", 3, "--format", "png")) == 0
    whole = pictures(tmp_path / "a")
    for name, size in zip(sorted(whole), (0, 40), strict=False):
        os.truncate(tmp_path / "a" / name, size)
    assert main(words(checkpoint, tmp_path / "a", "--num", 3, "--format", "png")) == 0
    assert pictures(tmp_path / "a") == whole


def test_an_output_under_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert main(words(checkpoint, tmp_path / "notes.txt" / "a")) == 2
    assert f"{tmp_path / 'notes.txt'} is not a folder" in capsys.readouterr().err


def test_npz_and_grid_are_the_pictures(checkpoint, tmp_path):
    assert (
        main(words(checkpoint, tmp_path, "--classes", "dog,ant", "--num", "5", "--format", "png", "npz", "grid")) == 0
    )
    saved = np.load(tmp_path / "samples.npz")
    assert saved["arr_1"].tolist() == [3, 0, 3, 0, 3] and saved["arr_0"].shape == (5, 12, 10, 3)
    for index, image in enumerate(saved["arr_0"]):
        label = (3, 0)[index % 2]
        np.testing.assert_array_equal(image, Image.open(tmp_path / f"{index:06d}_class{label}.png"))
    assert Image.open(tmp_path / "grid.png").size == (2 * (8 * 10 + 2) + 2, 3 * (8 * 12 + 2) + 2)


def test_pictures_of_another_size(checkpoint, tmp_path, capsys):
    assert main(words(checkpoint, tmp_path, "--format", "png", "--classes", "0-1", "--size", "16x6")) == 0
    assert "24 cells kept" in capsys.readouterr().out
    for file in tmp_path.glob("*.png"):
        assert Image.open(file).size == (6, 16)
    assert main(words(checkpoint, tmp_path, "--format", "png", "--classes", "0-1")) == 2
    assert "with size=[16, 6], this call asks for None" in capsys.readouterr().err
    assert main(words(checkpoint, tmp_path / "odd", "--size", "16x7")) == 2
    assert "pictures must have sides of a multiple of 2 pixels, got 16×7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(words(checkpoint, tmp_path / "odd", "--size", "16"))
    assert "expected height and width in pixels such as 192x320, got '16'" in capsys.readouterr().err
    assert not (tmp_path / "odd").exists()


def test_more_pictures_leave_the_first_as_they_are(checkpoint, tmp_path):
    assert main(words(checkpoint, tmp_path, "--num", "3", "--format", "png")) == 0
    first = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.png")}
    assert main(words(checkpoint, tmp_path, "--num", "6", "--format", "png")) == 0
    assert len(pictures(tmp_path)) == 6 and all(file.stat().st_mtime_ns == t for file, t in first.items())


def test_pictures_are_not_kept_in_memory(checkpoint, tmp_path, monkeypatch):
    """At the last batch no image of an earlier one is alive."""
    import weakref

    import dcdit.pictures.images

    convert, alive = dcdit.pictures.images.to_uint8, []

    def watched(images):
        result = convert(images)
        alive.append(weakref.ref(result.base if result.base is not None else result))
        return result

    monkeypatch.setattr(dcdit.pictures.images, "to_uint8", watched)
    assert main(words(checkpoint, tmp_path, "--num", "12", "--batch-size", "2", "--format", "npz")) == 0
    assert len(alive) >= 6 and sum(reference() is not None for reference in alive) <= 1


def test_the_launcher_asks_for_half_precision_by_an_option(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(words(checkpoint, tmp_path / "a")) == 2
    assert "asks for mixed_precision=bf16; dcdit sample takes --precision bfloat16" in capsys.readouterr().err
    assert main(words(checkpoint, tmp_path / "a", "--precision", "bfloat16")) == 0


def test_one_run_at_a_time(checkpoint, tmp_path, capsys):
    with locked(tmp_path):
        assert main(words(checkpoint, tmp_path)) == 2
    assert f"another run is writing to {tmp_path}" in capsys.readouterr().err
    assert main(words(checkpoint, tmp_path)) == 0


def test_a_model_that_never_ran_without_a_class_is_warned_of(checkpoint, tmp_path, capsys):
    model, use = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "model", model, {**use, "training": {"label_drop": 0}})
    assert main(words(str(tmp_path / "model"), tmp_path / "a")) == 0
    assert "guidance 2 needs the prediction without a class" in capsys.readouterr().err
    assert main(words(str(tmp_path / "model"), tmp_path / "b", "--guidance", "1")) == 0
    assert "warning" not in capsys.readouterr().err


def test_the_shipped_checkpoint_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for output in ([], ["--output", "~/here"]):
        assert main(["sample", "digits", "--cpu", "--steps", "1", "--classes", "3", *output]) == 0
    assert (tmp_path / "samples" / "grid.png").exists() and (tmp_path / "here" / "grid.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", ""], "expected a folder, got an empty name"),
        (["--guidance-interval", "9"], "expected two timesteps such as 100,900, got '9'"),
        (["--guidance-interval", "900,100"], "expected 0 ≤ low ≤ high ≤ 1000"),
        (["--classes", "cow"], "unknown class key 'cow'"),
        (["--seed", "4294967296"], "seed must be in [0, 2**32)"),
        (["--guidance-channels", "9"], "guidance_channels must be in [1, 4], got 9"),
        (["--eta", "0.5"], "is of the scheduler ddim"),
    ],
)
def test_options_are_checked_before_the_output_is_touched(more, message, checkpoint, tmp_path, capsys):
    try:
        status = main([*words(checkpoint, tmp_path / "out"), *more])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_size_far_beyond_the_models_own_is_said(checkpoint, tmp_path, capsys):
    options = ("--steps", "1", "--guidance", "1", "--num", "1", "--drop-fraction", "0.9")
    for size, words_of in (
        ("96x80", ""),
        ("120x80", "warning: 80 times the model's own cells; attention takes its square"),
    ):
        assert main(words(checkpoint, tmp_path / size, *options, "--size", size)) == 0
        assert capsys.readouterr().err.strip() == words_of


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("class_names", 3, "class_names must be a list of text, got 3"),
        ("class_names", [1, 2], "class_names must be a list of text"),
        ("class_names", ["a", "a"], "class_names must be 4 different names at most, got ['a', 'a']"),
        ("class_names", list("abcde"), "class_names must be 4 different names at most, got ['a', 'b',"),
        ("guidance_channels", "a", "guidance_channels must be an integer from 1 to 4, got 'a'"),
        ("guidance_channels", 0, "config.json: guidance_channels must be an integer from 1 to 4, got 0"),
        ("codec", None, "does not say the model's codec"),
        ("codec", "vae", """config.json: codec must be {"kind": …}, got 'vae'"""),
        ("objective", 3, """config.json: objective must be "flow" or "ddpm", got 3"""),
        ("policy", "rho=2", "config.json: policy 'rho=2': rho must be in [0, 1), got 2"),
        ("policy", "gates=0.5", "config.json: policy 'gates=0.5': gates are of a DyDiT, this model is a DCDiT"),
        ("policy", 2, "config.json: policy 2: a policy must be a Policy or text"),
        ("objective", "x", "config.json: unknown objective key 'x'"),
        ("codec", {"kind": "x"}, "config.json: unknown codec key 'x'"),
    ],
)
def test_what_a_checkpoint_says_of_its_use_is_checked(key, value, message, checkpoint, tmp_path, capsys):
    model, use = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "model", model, {**use, key: value})
    assert main(words(str(tmp_path / "model"), tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_codec_that_does_not_fit_is_found_first(checkpoint, tmp_path, capsys):
    model, use = load_checkpoint(checkpoint)
    for codec, message in (
        ({"kind": "pixel_unshuffle", "factor": 3}, "does not fit the model: latents of 4 channels"),
        ({}, "unknown codec"),
        (
            {"kind": "pixel_unshuffle", "factor": 2, "scale": 1},
            "unknown codec pixel_unshuffle key 'scale'; known: factor",
        ),
    ):
        save_checkpoint(tmp_path / "model", model, {**use, "codec": codec})
        assert main(words(str(tmp_path / "model"), tmp_path / "out")) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_cost_of_an_image_is_an_option(checkpoint, tmp_path, capsys):
    budget = 1.01 * 4 * dcdit_flops(TINY, 15)["total"]  # two steps, two halves
    out = tmp_path / "out"
    assert main(words(checkpoint, out, "--num", 2, "--format", "png", "--gflops-per-image", budget)) == 0
    said = capsys.readouterr().out
    spent = float(re.search(r"([\d.e-]+) GFLOP", said)[1])
    assert 0.99 * budget <= spent <= budget * 1.001
    assert main(words(checkpoint, out, "--num", 2, "--format", "png", "--gflops-per-image", 1.2 * budget)) == 2
    for more, message in (
        (["--drop-fraction", "0.2"], "a budget of tokens and a drop fraction exclude each other"),
        (["--gflops-per-image", "1e6"], r"no budget of tokens costs 1e\+06 GFLOP per image"),
    ):
        capsys.readouterr()
        assert main(words(checkpoint, tmp_path / "new", "--gflops-per-image", budget, *more)) == 2
        assert re.search(message, capsys.readouterr().err) and not (tmp_path / "new").exists()


def test_any_number_of_pictures_starts_at_once():
    from types import SimpleNamespace

    from dcdit.commands.sample import Rounds

    shares = [Rounds(SimpleNamespace(count=10**12, done=lambda index: index < 5), 4, 3, rank) for rank in range(3)]
    assert [len(share) for share in shares] == [-(-(10**12) // 12)] * 3
    assert [next(iter(share)) for share in shares] == [range(0), range(4, 8), range(8, 12)]
    last = [list(Rounds(SimpleNamespace(count=14, done=lambda index: False), 4, 3, rank))[-1] for rank in range(3)]
    assert last == [range(12, 13), range(13, 14), range(14, 14)]
