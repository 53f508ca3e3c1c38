"""Peak memory that is known beforehand, beside what PyTorch's allocator counts; `dcdit info --budget`."""

import dataclasses
import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dcdit.cli import main
from dcdit.model.config import DCDiTConfig, preset
from dcdit.model.dcdit import DCDiT
from dcdit.model.memory import peak_bytes

WIDE = DCDiTConfig(input_size=(16, 16), hidden_size=192, depth=4, num_heads=3, encoder_width=96, learn_sigma=True)
GUESS = dataclasses.replace(preset("digits"), router="guess")


def counted(config, batch, tokens, training):
    """Bytes at the most of the allocator in a second call."""
    model = DCDiT(config)
    x, t = torch.randn(batch, config.in_channels, *config.input_size), torch.full((batch,), 500.0)
    y = torch.zeros(batch, dtype=torch.long)

    def run():
        with torch.set_grad_enabled(training):
            out = model(x, t, y, budget=batch * tokens)
            if training:
                out.square().mean().backward()

    run()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    moves = (event.nbytes() for event in prof.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(moves, initial=0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("config", "batch", "tokens"), [(preset("digits"), 6, 50), (WIDE, 3, 200), (WIDE, 1, 20), (GUESS, 6, 50)]
)
def test_the_peak_is_within_a_tenth_of_the_allocators(config, batch, tokens, training):
    assert peak_bytes(config, batch, tokens, training) == pytest.approx(
        counted(config, batch, tokens, training), rel=0.1
    )


def test_info_prints_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["info", "DC-DiT-S/N4", "--budget", "256", "--batch-size", "8"]) == 0
    said = capsys.readouterr().out
    assert "8 × 256 tokens of 1024 cells, forward, float32" in said
    assert f"{peak_bytes(preset('DC-DiT-S/N4'), 8, 256) / 1e6:,.1f} MB" in said
    assert "no step was measured for model" in said
    assert main(["info", "digits", "--budget", "50", "--training"]) == 0
    assert "float32, training: dcdit calibrate --training measures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "1"], "--budget must be from 2 to all 1024 cells of an image, got 1"),
        (["--budget", "2000"], "--budget must be from 2 to all 1024 cells of an image, got 2000"),
        (["--budget", "9", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--training"], "--batch-size and --training are of --budget"),
    ],
)
def test_bad_budgets_are_named(words, message, capsys):
    assert main(["info", "DC-DiT-S/N4", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
