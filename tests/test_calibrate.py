"""Budgets in seconds: the table of a machine, what it costs by it, the router's own schedule; `dcdit calibrate`."""

import json

import numpy as np
import pytest
import torch

from dcdit.checkpoints.folder import load_checkpoint, save_checkpoint
from dcdit.cli import main
from dcdit.errors import ConfigError, DataError
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.sampling import sample
from dcdit.sampling.step_times import StepTimes, load_times, name_of, router_shape
from dcdit.sampling.trajectory import plan_trajectory

TINY = DCDiTConfig(
    input_size=(6, 5), num_classes=4, hidden_size=32, depth=1, num_heads=1, encoder_width=32, learn_sigma=False
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DCDiT(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def file(tmp_path):
    """Seconds that are 1 + rows·(0.5 + tokens/100), but for one that was measured too small."""
    rows, tokens = [1, 2, 4], [2, 16, 30]
    seconds = [[1 + r * (0.5 + n / 100) for n in tokens] for r in rows]
    seconds[2][1] = 0.01
    table = StepTimes(name_of(TINY, CPU, torch.float32), rows, tokens, seconds)
    table.save(tmp_path / "table.json")
    return tmp_path / "table.json"


def test_a_table_between_and_past_what_was_measured(file):
    table = load_times(TINY, CPU, torch.float32, file)
    np.testing.assert_allclose(table.at(2, [2, 9, 30]), [2.04, 2.18, 2.6])
    np.testing.assert_allclose(table.at(3, [2, 30]), [2.56, 3.4])
    np.testing.assert_allclose(table.at(8, [2, 30]), [2 * 3.08, 2 * 4.2])
    assert (np.diff(table.at(4, np.arange(31))) >= 0).all()


@pytest.mark.parametrize("schedule", ["constant", "linear", "router"])
def test_a_trajectory_takes_what_was_asked_by_the_table(model, file, schedule):
    """Within 1 % and not more; guidance in a part of the steps makes those dearer."""
    model.use = {"router_tokens": [0.2, 0.1, 0.4]}
    table = load_times(TINY, CPU, torch.float32, file)
    options = {"objective": "flow", "steps": 20, "guidance": 2.0, "guidance_interval": (500, 1000)}
    least, most = (sum(table.at(2 * half, n) / 2 for half in [2] * 11 + [1] * 9) for n in (2, 30))
    for share in (0.1, 0.4, 0.7):
        asked = float(least + share * (most - least))
        way = plan_trajectory(
            model, 2, batch_size=2, seconds_per_image=asked, calibration=file, budget_schedule=schedule, **options
        )
        tokens = way.budgets[0][:, 0]
        spent = sum(table.at(2 * (1 if g == 1 else 2), n) / 2 for g, n in zip(way.guidances, tokens, strict=True))
        assert 0.99 * asked <= spent <= asked * (1 + 1e-6)
        if schedule == "router" and share == 0.1:  # a quarter at t = 500 of what t = 1000 gets
            assert tokens[0] == tokens.max() and tokens[10] == tokens.min() and tokens[-1] > tokens[10]
    with pytest.raises(ConfigError, match=r"no budget of tokens costs 1000 s per image: 20 forwards of 2 to 30"):
        sample(model, [0], seconds_per_image=1000.0, calibration=file, **options)


def test_the_routers_shape():
    shape = router_shape({"router_tokens": [0.1, 0.3]}, torch.tensor([1000.0, 500.0, 0.0]))
    torch.testing.assert_close(shape, torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64))
    for bad in ("a", [0.1], [0.1, 0.0], [0.1, None]):
        with pytest.raises(ConfigError, match="router_tokens must be positive numbers from t = 0 to 1000, got"):
            router_shape({"router_tokens": bad}, torch.ones(1))


def test_a_table_of_something_else_is_named(model, file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"objective": "flow", "steps": 2, "seconds_per_image": 1.0}
    with pytest.raises(DataError, match=r"no step was measured for model .*float32: dcdit calibrate measures"):
        sample(model, [0], **options)
    for none in (tmp_path / "none", str(tmp_path / "none")):
        with pytest.raises(DataError, match=r"calibration must be a table of dcdit calibrate, there is no file .*none"):
            sample(model, [0], calibration=none, **options)
    half = json.loads(file.read_text())
    for values, reason in (
        ([], ""),
        ({"model": {}}, ": it has no 'of'"),
        ({**half, "seconds": half["seconds"][1:]}, ": it must have positive seconds for each of rows and tokens"),
        ({**half, "rows": [], "seconds": []}, ": it must have positive seconds"),
        ({**half, "seconds": "fast"}, ": could not convert"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match=rf"bad.json is no table of dcdit calibrate{reason}"):
            sample(model, [0], calibration=tmp_path / "bad.json", **options)
    file.write_text(json.dumps({**half, "of": half["of"].replace("float32", "bfloat16")}))
    with pytest.raises(DataError, match=r"table.json must be for model .*float32, got one for model .*bfloat16"):
        sample(model, [0], calibration=file, **options)


def test_the_command_and_a_run_by_its_table(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = tmp_path / "model"
    save_checkpoint(checkpoint, model, {"objective": "flow", "codec": {"kind": "pixel_unshuffle", "factor": 2}})
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert main(["calibrate", str(checkpoint), "--batch-sizes", "1,2", "--rounds", "1", "--cpu"]) == 0
    said = capsys.readouterr().out
    assert "milliseconds of a step" in said and "at t = 1000" in said
    assert (checkpoint / "model.safetensors").read_bytes() == weights
    use = load_checkpoint(checkpoint)[1]
    assert len(use["router_tokens"]) == 21 and use["objective"] == "flow"
    table = load_times(TINY, CPU, torch.float32)
    assert table.rows == [1, 2, 4] and table.tokens[0] == 2 and table.tokens[-1] == 30
    asked = float(3 * (table.at(4, 2) + table.at(4, 30)) / 4)  # two images at a time, both halves
    out = tmp_path / "out"
    words = ["sample", str(checkpoint), "--cpu", "--steps", "3", "--num", "3", "--batch-size", "2"]
    words += ["--seconds-per-image", repr(asked), "--budget-schedule", "router", "--output", str(out)]
    assert main(words) == 0
    tokens = json.loads((out / "sampling.json").read_text())["tokens"]
    assert 0.95 * asked <= float(table.at(4, tokens).sum()) / 2 <= asked * (1 + 1e-6)
    assert main([*words, "--gflops-per-image", "1"]) == 2
    assert "gflops_per_image and seconds_per_image exclude each other" in capsys.readouterr().err


def test_training_has_a_table_of_its_own(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = tmp_path / "model"
    save_checkpoint(checkpoint, model, {"objective": "flow", "codec": {"kind": "pixel_unshuffle", "factor": 2}})
    known = ["info", str(checkpoint), "--budget", "16", "--batch-size", "2"]
    assert main(["calibrate", str(checkpoint), "--batch-sizes", "2", "--rounds", "1", "--cpu", "--training"]) == 0
    assert "float32, training" in capsys.readouterr().out and "router_tokens" not in load_checkpoint(checkpoint)[1]
    table = load_times(TINY, CPU, torch.float32, training=True)
    assert table.rows == [2] and min(table.seconds[0]) > 0
    assert main([*known, "--training"]) == 0
    assert f"{1e3 * float(table.at(2, 16)):,.1f} ms, as dcdit calibrate measured" in capsys.readouterr().out
    assert main(known) == 0
    assert "float32: dcdit calibrate measures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--training", "--precision", "bfloat16"], "--training is in float32: leave --precision bfloat16 out"),
        (["--batch-sizes", "1,0"], "expected batch sizes such as 1,8,64, at most 1048576, got '1,0'"),
        (["--batch-sizes", "100000000"], "at most 1048576, got '100000000'"),
        (["--output", "."], "--output must be a file, got the folder ."),
        (["--output", "README.md"], "cannot write README.md: it is there and is no .json file; give another name"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
    ],
)
def test_bad_calls_are_named(more, message, capsys):
    try:
        status = main(["calibrate", "digits", *more])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1
