"""Configurations and runs that fail: one line each."""

import pytest
import yaml
from test_training import TINY, fails

from dcdit.cli import main


@pytest.fixture
def tiny(tmp_path):
    """A config file of a run of seconds."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return str(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.rl=1", "did you mean 'lr'"),
        ("step=1", "did you mean 'steps'"),
        ("model.preset=digit", "did you mean 'digits'"),
        ("model.hiden_size=32", "did you mean 'hidden_size'"),
        ("optim.lr=fast", "optim.lr must be a number, got 'fast'"),
        ("optim=3", "optim must be a group of keys, got 3"),
        ("steps=1.5", "steps must be an integer, got 1.5"),
        ("steps=true", "steps must be an integer, got True"),
        ("steps=0", "steps must be at least 1"),
        ("seed=-1", "seed must not be negative"),
        ("channels_last=3", "channels_last must be true or false, got 3"),
        ("objective=eps", "objective must be one of flow, ddpm, got 'eps'"),
        ("model.learn_sigma=true", "set model.learn_sigma=false"),
        ("drop_fractions=[0,1]", r"drop_fractions must lie in [0, 1), got 1.0"),
        ("drop_fractions=[]", "drop_fractions needs at least one value"),
        ("budgets=[0.5,0]", r"budgets are shares of the cells and must lie in (0, 1], got 0"),
        ("budgets=1.1", r"budgets are shares of the cells and must lie in (0, 1], got 1.1"),
        ("label_drop=1", "label_drop must be in [0, 1)"),
        ("steps", "expected key=value, got 'steps'"),
        ("output=pyproject.toml", "cannot write pyproject.toml: "),
        ("steps.x=1", "steps is not a group"),
        ("data.kind=folder", "data.kind=folder needs data.path"),
        ("data.kind=digit", "data.kind must be one of digits, folder, idx, latents"),
        ("codec.factor=3", "do not divide into 3×3"),
        ("codec.factor=2", "model takes (16, 7, 7)"),
        ("model.num_classes=9", "10 classes"),
    ],
)
def test_bad_configurations_are_one_line(override, message, tiny, tmp_path, capsys):
    assert message in fails(capsys, tiny, f"output={tmp_path / 'out'}", override)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overrides", ["optim.lr=1e30 optim.grad_clip=1e30", "optim.lr=1e39 save_every=1"])
def test_divergence_stops_with_one_line(overrides, tiny, tmp_path, capsys):
    """Past 1e38 the first update's weights are infinite, after a loss that is not."""
    assert main(["train", tiny, f"output={tmp_path}", *overrides.split()]) == 2
    assert "training diverged" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "model").exists()
