"""`predict_clean`: a model whose last layer makes clean latents, and which returns the velocity to them."""

import dataclasses

import pytest
import torch
from test_mixed_batch import CONFIG, make_batch, make_model

from dcdit.errors import ConfigError
from dcdit.model.clean_latents import clean_guess, velocity_to
from dcdit.model.dcdit import DCDiT
from dcdit.sampling.sampler import sample
from dcdit.training.config import load_config

CLEAN = {"predict_clean": True, "learn_sigma": False}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_clean_latents_give_the_true_velocity(dtype):
    """Above σ = 0.1. Below it a tenth of the velocity is what the output should differ by from x."""
    clean, noise = torch.randn(5, 3, 7, 9).double(), torch.randn(5, 3, 9, 7).transpose(2, 3).double()
    t = torch.tensor([1000.0, 700, 100, 99, 0], dtype=torch.float64)
    sigma = (t.double() / 1000).view(-1, 1, 1, 1)
    x, velocity = (1 - sigma) * clean + sigma * noise, noise - clean
    output = torch.where(sigma < 0.1, x - velocity / 10, clean)
    got = velocity_to(x.to(dtype), output.to(dtype), t)
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.3}[dtype]
    assert got.dtype == dtype and (got.double() - velocity).abs().max() < bound
    assert (clean_guess(x, velocity, t) - clean).abs().max() < 1e-6


@pytest.mark.parametrize("router", ["predictability", "guess"])
def test_a_model_returns_the_velocity_to_what_its_last_layer_makes(router):
    model, plain = (make_model(**{**CLEAN, "router": router, "predict_clean": on}) for on in (True, False))
    plain.load_state_dict(model.state_dict())
    x, (_, t, y) = torch.randn(7, 3, 8, 8).double(), make_batch()
    t[0] = 20.0
    got, routing = model(x, t, y, return_routing=True)
    sigma = (t / 1000).view(-1, 1, 1, 1)
    want = (x - plain(x, t, y, routing=routing)) / sigma.clamp(min=0.1)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    if router == "guess":  # the guess is what the last layer made on the regular grid
        c, outer = model.condition(t, y)
        guesses = [net.guess(x, t, net.encode(x, outer), c, outer) for net in (model, plain)]
        made = (x - guesses[1]) / sigma  # plain.guess took it for a velocity
        assert ((guesses[0] - made)[sigma.flatten() > 0.1]).abs().max() < 1e-4


def test_samples_of_different_sizes_as_each_alone():
    model = make_model(**CLEAN)
    xs, t, y = make_batch()
    for i, out in enumerate(model(xs, t, y)):
        assert (out - model(xs[i][None], t[i : i + 1], y[i : i + 1])[0]).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prediction_has_the_dtype_of_the_model(dtype):
    model = DCDiT(dataclasses.replace(CONFIG, **CLEAN)).to(dtype)
    x = torch.randn(2, 3, 8, 8).to(dtype)
    out = model(x, torch.tensor([50.0, 900.0]), torch.tensor([0, 5]))
    assert out.dtype == dtype and torch.equal(
        out.float(), (x.float() / torch.tensor([0.1, 0.9]).view(-1, 1, 1, 1)).to(dtype).float()
    )


def test_a_model_that_knows_the_picture_draws_it(monkeypatch):
    """One whose last layer gives the same picture whatever the noise."""
    model = DCDiT(dataclasses.replace(CONFIG, **CLEAN))
    picture = torch.randn(3, 8, 8)
    monkeypatch.setattr(model, "decode", lambda tokens, h, routing, outer: picture.expand(len(h), -1, -1, -1))
    drawn = sample(model, [0, 1], objective="flow", steps=5, guidance=1.0, seed=0).latents
    assert (drawn - picture).abs().max() < 1e-4


def test_it_is_for_flow_matching(tmp_path):
    with pytest.raises(ConfigError, match="predict_clean is for flow matching: set learn_sigma to false"):
        dataclasses.replace(CONFIG, predict_clean=True)
    (tmp_path / "a.yaml").write_text("objective: ddpm\nmodel: {preset: digits, predict_clean: true}\n")
    with pytest.raises(ConfigError, match="predict_clean is for objective: flow, got ddpm"):
        load_config(tmp_path / "a.yaml")
    model = DCDiT(dataclasses.replace(CONFIG, **CLEAN))
    with pytest.raises(ConfigError, match="a model with predict_clean has objective flow, got ddpm"):
        sample(model, [0], objective="ddpm", steps=2)
