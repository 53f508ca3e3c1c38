"""Tokens of a trajectory: as asked for, or as many as a number of FLOPs per image pays for."""

import pytest
import torch

from dcdit.errors import ConfigError
from dcdit.model.config import DCDiTConfig, preset
from dcdit.model.dcdit import DCDiT
from dcdit.model.flops import dcdit_flops
from dcdit.sampling import sample
from dcdit.sampling.token_budget import token_table, tokens_for_gflops

CONFIG = DCDiTConfig(
    input_size=(6, 5), num_classes=5, hidden_size=64, depth=2, num_heads=2, encoder_width=32, learn_sigma=False
)
OPTIONS = {"objective": "flow", "steps": 5, "guidance": 2.0, "seed": 3}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DCDiT(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def cost(config, tokens, halves):
    return sum(half * dcdit_flops(config, n)["total"] for n, half in zip(tokens, halves, strict=True))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("size", ["digits", "DC-DiT-XL/N4"])
@pytest.mark.parametrize("halves", [[1] * 50, [2] * 250, [2] * 7 + [1] * 20])
def test_a_trajectory_costs_what_was_asked(size, schedule, halves):
    """Within 1 %, and not more, from the least to the most; no step has less than one before it."""
    config = preset(size)
    least, most = (cost(config, [n] * len(halves), halves) for n in (2, config.cells))
    for share in (0.0, 0.01, 0.3, 0.77, 1.0):
        asked = least + share * (most - least)
        tokens = tokens_for_gflops(config, asked, halves, schedule)
        assert 0.99 * asked <= cost(config, tokens, halves) <= asked * (1 + 1e-6)
        assert tokens == sorted(tokens) and tokens[0] >= 2 and tokens[-1] <= config.cells
        assert schedule != "constant" or tokens[-1] - tokens[0] <= 1
        if schedule == "linear" and share == 0.3:
            assert tokens[-1] / tokens[0] == pytest.approx(2, rel=0.05)
    for asked in (0.99 * least, 1.01 * most):
        with pytest.raises(ConfigError, match=rf"no budget of tokens costs .*: {len(halves)} forwards of 2 to"):
            tokens_for_gflops(config, asked, halves, schedule)
    with pytest.raises(ConfigError, match="schedule must be one of constant, linear, got 'cosine'"):
        tokens_for_gflops(config, least, halves, "cosine")


def test_sampling_by_tokens_and_by_flops(model):
    samples = sample(model, [0, 1, 2], tokens=[20, 8], **OPTIONS)
    assert samples.trace.tokens.tolist() == [[20] * 3] * 3 + [[8] * 3] * 2
    assert torch.equal(samples.trace.tokens, samples.trace.uncond_tokens)
    each = sample(model, [0, 1, 2], tokens=torch.tensor([20, 30, 5]), **OPTIONS).trace.tokens
    assert each.tolist() == [[20, 30, 5]] * 5
    total = 1.3 * 10 * dcdit_flops(CONFIG, 2)["total"]
    for schedule in ("constant", "linear"):
        trace = sample(model, [0, 1], gflops_per_image=total, budget_schedule=schedule, **OPTIONS).trace
        assert 0.98 * total <= float(trace.gflops(CONFIG).sum()) <= total * (1 + 1e-6)


def test_all_cells_are_the_model_without_a_budget(model):
    want = sample(model, [0, 1], drop_fraction=0.0, **{**OPTIONS, "guidance": 1.0})
    model_keeps = want.trace.tokens.clone()
    table = sample(model, [0, 1], tokens=30, **{**OPTIONS, "guidance": 1.0})
    assert table.trace.tokens.eq(30).all() and table.trace.uncond_tokens is None
    if model_keeps.eq(30).all():
        torch.testing.assert_close(table.latents, want.latents)


def test_bad_budgets(model):
    cases = [
        ({"tokens": 1}, "tokens of a step must be whole numbers from 2 to 30, got 1"),
        ({"tokens": 31}, "tokens of a step must be whole numbers from 2 to 30, got 31"),
        ({"tokens": [4.5]}, "tokens of a step must be whole numbers from 2 to 30, got 4.5"),
        ({"tokens": "many"}, "tokens must be numbers, got 'many'"),
        ({"tokens": torch.tensor([4, 5, 6])}, "tokens: one for each image needs 1 values, got 3"),
        ({"tokens": 9, "drop_fraction": 0.2}, "exclude each other"),
        ({"tokens": 9, "uncond_drop_fraction": [0.2]}, "exclude each other"),
        ({"tokens": 9, "gflops_per_image": 1.0}, "tokens and gflops_per_image exclude each other"),
        ({"gflops_per_image": 1.0, "seconds_per_image": 1.0}, "gflops_per_image and seconds_per_image exclude"),
        ({"gflops_per_image": 1.0, "budget_schedule": "router"}, "does not say its router's tokens over t"),
        ({"gflops_per_image": 1e9}, "no budget of tokens costs 1e\\+09 GFLOP per image"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            sample(model, [0], **OPTIONS, **options)
    assert token_table(7, torch.arange(3.0), 2, CONFIG).tolist() == [[7, 7]] * 3
