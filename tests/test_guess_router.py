"""Routing by a guess: the order of the cells, where the guess comes from, and what training and sampling make of it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from graph_stand_in import run_again
from test_quality_rivals import TINY as RIVAL

from dcdit.errors import ConfigError
from dcdit.model.clean_latents import clean_guess
from dcdit.model.dcdit import DCDiT
from dcdit.model.graphs import Graphed
from dcdit.model.guess_router import GuessRouter
from dcdit.model.routing import Routing, regular_cells, route, rows_known
from dcdit.sampling.batcher import Batcher
from dcdit.sampling.sampler import sample
from dcdit.training.config import load_config

TINY = dataclasses.replace(RIVAL, depth=2, router="guess")


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = DCDiT(TINY)
    for parameter in net.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(rows=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, 6, 8, generator=generator)
    return x, torch.linspace(100, 900, rows), torch.arange(rows) % 4


def by_hand(picture):
    """The sum of absolute differences to each neighbour that there is, cell by cell, in float64."""
    height, width = picture.shape[1:]
    out = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            for i, j in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= i < height and 0 <= j < width:
                    out[row, column] += np.abs(picture[:, row, column] - picture[:, i, j]).sum()
    return out.ravel()


@pytest.mark.parametrize("grid", [(6, 8), (7, 9), (1, 11), (16, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cells_with_most_contrast_are_kept_in_their_order(grid, dtype):
    router = GuessRouter(TINY)
    guess = torch.randn(3, *grid[::-1], 4).permute(0, 3, 2, 1).to(dtype)  # not contiguous
    guess[1] = 0.5  # flat: any cells, but as many
    h = torch.zeros(3, math.prod(grid), 32, dtype=dtype)
    prob = router(h, guess=guess, grid=grid)
    kept = math.ceil(grid[0] / 2) * math.ceil(grid[1] / 2)
    assert prob.dtype == torch.promote_types(dtype, torch.float32)
    assert (prob > 0.5).sum(1).tolist() == [kept] * 3 and (((prob >= 0.99) & (prob <= 1)) | (prob <= 0.01)).all()
    for sample_prob, picture in zip(prob, guess, strict=True):
        score = by_hand(picture.double().numpy())[sample_prob.argsort(descending=True).numpy()]
        assert (np.diff(score) <= 1e-5).all()
    left = Routing.of(prob, grid, 0.5).boundary_mask[0]
    gone = (prob[0] > 0.5) & ~left
    assert not gone.any() or prob[0][left].sort(descending=True).values[: kept // 2].min() > prob[0][gone].max()


def test_a_kept_grid_counts():
    router = GuessRouter(dataclasses.replace(TINY, keep_grid=4))
    prob = router(torch.zeros(2, 48, 32), guess=torch.randn(2, 4, 6, 8))
    assert (prob > 0.5).sum(1).tolist() == [12, 12] and (prob[:, regular_cells((6, 8), 4, prob.device)] > 0.5).all()


@pytest.mark.parametrize("options", [{}, {"drop_fraction": 0.4}, {"budget_per_sample": 7}])
def test_without_a_guess_a_pass_on_the_grid_makes_one(model, options):
    x, t, y = inputs()
    with torch.no_grad():
        grid = Routing.of(regular_cells((6, 8), 2, x.device).float().expand(2, -1), (6, 8))
        velocity = model(x, t, y, routing=grid)
        guess = x - velocity * (t / 1000).view(-1, 1, 1, 1)
        want, routing = model(x, t, y, guess=guess, return_routing=True, **options)
        got, same = model(x, t, y, return_routing=True, **options)
    assert torch.equal(got, want) and torch.equal(same.boundary_prob, routing.boundary_prob)
    assert not torch.equal(routing.natural_mask, grid.natural_mask)


def test_under_a_budget_no_pass_waits_for_a_number_of_rows(model, monkeypatch):
    seen = []
    monkeypatch.setattr("dcdit.model.dcdit.route", lambda *a, **k: seen.append(rows_known(k)) or route(*a, **k))
    model(*inputs(), budget_per_sample=7)
    assert seen == [True, True]


def test_the_true_velocity_gives_the_clean_picture_back():
    clean, noise, t = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.tensor([300.0, 980.0])
    sigma = (t / 1000).view(-1, 1, 1, 1)
    assert (clean_guess((1 - sigma) * clean + sigma * noise, noise - clean, t) - clean).abs().max() < 1e-6


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_those_with_the_guess_given(model, bf16):
    """The first pass leaves no cast weights behind, which would have no gradient."""
    x, t, y = inputs()
    grads = []
    for guess in (None, "given"):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if guess:
                c, outer = model.condition(t, y)
                guess = model.guess(x, t, model.encode(x, outer), c, outer)
            model(x, t, y, guess=guess).float().square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(g.any() for g in grads[0])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_sampling_guesses_by_the_step_before(model, monkeypatch):
    """One pass more than steps; the halves of guidance have their own guess; an Euler loop by hand agrees."""
    passes = []
    monkeypatch.setattr(DCDiT, "guess", lambda self, *a, own=DCDiT.guess, **k: passes.append(1) or own(self, *a, **k))
    options = {"objective": "flow", "steps": 4, "seed": 3, "batch_size": 2}
    got = sample(model.eval(), [0, 1], guidance=2.0, **options).latents
    assert len(passes) == 1
    x = sample(model, [0, 1], guidance=2.0, callback=(seen := []).append, **options) and seen[0].x
    guess, y = None, torch.tensor([0, 1, 3, 3])
    sigmas = [step.timestep / 1000 for step in seen] + [0.0]
    with torch.no_grad():
        for now, after in itertools.pairwise(sigmas):
            t, both = torch.full((4,), 1000 * now), torch.cat([x, x])
            out = model(both, t, y, guess=guess)
            guess = both - now * out
            x = x + (after - now) * (out[2:] + 2.0 * (out[:2] - out[2:]))
    assert (x - got).abs().max() < 1e-4
    passes.clear()
    sample(model, [0, 1], guidance=2.0, guidance_interval=(300, 800), **options)
    assert len(passes) == 1


def test_a_batcher_agrees(model):
    """The third request begins where the second is on its way, and has no guess yet."""
    options = {"objective": "flow", "guidance": 1.5}
    steps = {0: 2, 1: 4, 2: 3}
    want = [sample(model.eval(), [i], seed=i, steps=steps[i], **options).latents[0] for i in steps]
    batcher = Batcher(model, max_requests=2, **options)
    requests = [batcher.submit(i, seed=i, steps=steps[i]) for i in steps]
    while batcher.step():
        pass
    for request, latent in zip(requests, want, strict=True):
        assert (request.latent - latent).abs().max() < 1e-5


@pytest.fixture
def passes(model):
    """Rows of each pass of the backbone."""
    rows = []
    model.main.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[2].batch_size))
    return rows


@pytest.mark.parametrize("interval", [None, (300, 800)])
def test_the_pipeline_agrees(model, passes, interval):
    """One pass a step, and one in front; without guidance the half that was not computed has the other's guess."""
    pytest.importorskip("diffusers")
    from diffusers import FlowMatchEulerDiscreteScheduler

    from dcdit.integrations.pipeline import DCDiTPipeline
    from dcdit.integrations.transformer import DCDiTTransformer2DModel

    start, options = [], {"callback": lambda step: start.append(step.x)}
    options |= {"guidance_interval": interval} if interval else {}
    want = sample(model.eval(), [0, 1], objective="flow", steps=5, guidance=2.0, **options)
    spent, passes[:] = [*passes], []
    pipe = DCDiTPipeline(DCDiTTransformer2DModel.from_dcdit(model), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    policy = interval and "guidance={}:{}".format(*interval)
    options = {"num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "latent", "policy": policy}
    got = pipe([0, 1], latents=start[0], **options).images
    assert (got - want.latents).abs().max() < 1e-5
    assert passes == spent and len(passes) == 6 and sorted(set(passes)) == ([2, 4] if interval else [4])


def test_a_graphed_model_agrees(model):
    """A graph with the guess and one without, for the first step."""
    options = {"objective": "flow", "steps": 4, "guidance": 2.0, "drop_fraction": 0.2, "batch_size": 2}
    want = sample(model.eval().requires_grad_(False), [0, 1, 2, 0], **options)
    graph = Graphed(model, capture=run_again)
    got = sample(graph, [0, 1, 2, 0], **options)
    assert (got.latents - want.latents).abs().max() < 1e-4 and torch.equal(got.trace.tokens, want.trace.tokens)
    assert (graph.captures, graph.replays, graph.eager) == (2, 6, {"first batch of its shape": 2}), graph.summary()
    x, t, y = inputs()
    graph(x, t, y, guess=None)
    assert graph.eager["a graph does not know guess"] == 1
    with pytest.raises(ValueError, match=r"guess must have x's shape .* got \(1, 4, 6, 8\)"):
        graph(x, t, y, capacity=30, guess=x[:1])


def test_caches_of_diffusers_are_refused(model):
    """A step without a guess runs the blocks twice, and a cache takes each run for a step."""
    diffusers = pytest.importorskip("diffusers")
    from dcdit.integrations.transformer import DCDiTTransformer2DModel

    with pytest.raises(ConfigError, match="router guess runs without a cache of diffusers, got FirstBlockCacheConfig"):
        DCDiTTransformer2DModel.from_dcdit(model).enable_cache(diffusers.FirstBlockCacheConfig())


def test_bad_input(model):
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"guess must have x's shape \(2, 4, 6, 8\), got \(1, 4, 6, 8\)"):
        model(x, t, y, guess=x[:1])
    with pytest.raises(ValueError, match=r"guess must have x's shape .* got a str"):
        model(x, t, y, guess="x")
    broken = x.clone()
    broken[1, 0, 2, 3] = float("inf")
    with pytest.raises(ValueError, match="boundary_prob has 48 NaN, the first in sample 1 at cell 0"):
        model(x, t, y, guess=broken)
    with pytest.raises(ValueError, match=r"samples of one size .* got a list"):
        model(list(x), t, y)
    with pytest.raises(ValueError, match="a guess is for router: guess, this model has a PredictabilityRouter"):
        DCDiT(dataclasses.replace(TINY, router="predictability"))(x, t, y, guess=x)
    with pytest.raises(ConfigError, match="router guess has objective flow, got ddpm"):
        sample(model, [0], objective="ddpm", steps=2)
    for policy in ("reuse=2", "teacache=0.1"):
        with pytest.raises(ConfigError, match=f"runs without gates, reuse and teacache, got {policy}"):
            sample(model, [0], objective="flow", steps=2, policy=policy)
    with pytest.raises(ConfigError, match="set learn_sigma to false"):
        dataclasses.replace(TINY, learn_sigma=True)
    with pytest.raises(ConfigError, match="N that is a square, got 5"):
        dataclasses.replace(TINY, target_ratio=5.0)
    with pytest.raises(ConfigError, match="is for objective: flow, got ddpm"):
        load_config("configs/digits.yaml", ["model.router=guess", "objective=ddpm"])
    for key in ("cuda_graph", "compile"):
        with pytest.raises(ConfigError, match=f"router guess and {key} exclude each other"):
            load_config("configs/digits.yaml", ["model.router=guess", f"{key}=true"])
