"""Sampling as a whole: noise, batches, budgets, precision, and data with a known answer."""

import copy
import types

import pytest
import torch
from small_sampling import SIZES, initial, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from dcdit.errors import DCDiTError
from dcdit.model.config import DCDiTConfig
from dcdit.model.precision import cast_weights
from dcdit.sampling.denoising import image_generator
from dcdit.sampling.drop_fraction import drop_table
from dcdit.sampling.sampler import sample
from dcdit.sampling.schedulers import SCHEDULERS, make_scheduler


@pytest.fixture(scope="module")
def ddpm():
    return tiny()


@pytest.fixture(scope="module")
def flow():
    return tiny(learn_sigma=False)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_noise_is_bit_equal_whatever_the_batch_and_order(flow, batch_size):
    order, seen = [4, 0, 7, 2, 5], {}

    def look(step):
        if step.number == 0:
            seen.update(zip(step.indices.tolist(), step.x, strict=True))

    options = {"objective": "flow", "steps": 1, "seed": 5, "callback": look}
    sample(flow, [0] * 5, indices=order, batch_size=batch_size, **options)
    for index in order:
        assert torch.equal(seen[index], initial(5, [index])[0])
    assert not torch.equal(seen[4], initial(6, [4])[0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_batch_size_and_order_do_not_change_the_images(ddpm, flow, scheduler):
    """Step noise included: "ddpm" draws some at every step."""
    objective = SCHEDULERS[scheduler]
    model = flow if objective == "flow" else ddpm
    options = {"objective": objective, "scheduler": scheduler, "steps": 6, "guidance": 1.5, "drop_fraction": 0.3}
    one = sample(model, [0, 1, 2, 3, 0], batch_size=5, **options).latents
    two = sample(model, [0, 3, 2, 1, 0], indices=[4, 3, 2, 1, 0], batch_size=2, **options).latents.flip(0)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_seeds_of_a_run_never_meet():
    seeds = {image_generator(seed, i).initial_seed() for seed in range(4) for i in range(10_000)}
    assert len(seeds) == 40_000


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_are_an_error(bad):
    """In the last step too, which no router sees."""
    model = Gaussian("flow", False)
    forward, calls = model.forward, []

    def poisoned(x, *args, **options):
        calls.append(1)
        out, routing = forward(x, *args, **options)
        return (out + bad if len(calls) == 3 else out), routing

    model.forward = poisoned
    with pytest.raises(DCDiTError, match="sampling diverged: latents that are not finite"):
        sample(model, [0], objective="flow", steps=3)


class Gaussian(torch.nn.Module):
    """The best possible prediction for data of N(0.5, 0.3²): every sampler must give that distribution back."""

    mean, std = 0.5, 0.3

    def __init__(self, objective, learn_sigma):
        super().__init__()
        self.objective, self.scale = objective, torch.nn.Parameter(torch.ones(()))
        self.config = DCDiTConfig(**SIZES, encoder_width=32, learn_sigma=learn_sigma)
        self.alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def forward(self, x, t, y, drop_fraction, return_routing):
        time = float(t[0])
        if self.objective == "flow":
            data, noise = 1 - time / 1000, time / 1000
        else:
            data, noise = float(self.alpha_bar[int(time)]) ** 0.5, float(1 - self.alpha_bar[int(time)]) ** 0.5
        centred = (x - data * self.mean) / (data**2 * self.std**2 + noise**2)
        out = noise * centred
        if self.objective == "flow":
            out = out - (self.mean + data * self.std**2 * centred)
        if self.config.learn_sigma:  # v = −1: the posterior variance
            out = torch.cat([out, -torch.ones_like(out)], dim=1)
        mask = torch.ones(len(x), 30, dtype=torch.bool)
        plan = types.SimpleNamespace(lengths=torch.full((len(x),), 30))
        return out, types.SimpleNamespace(boundary_prob=mask, boundary_mask=mask, natural_mask=mask, plan=plan)


@pytest.mark.parametrize("scheduler, learned", [*((s, False) for s in SCHEDULERS), ("ddpm", True)])
def test_known_data_comes_out(scheduler, learned):
    """Time scale, directions and step sizes: a wrong one moves the mean or the spread of Gaussian data."""
    objective = SCHEDULERS[scheduler]
    model = Gaussian(objective, learned)
    result = sample(model, [0] * 64, objective=objective, scheduler=scheduler, steps=300)
    if scheduler == "ddpm":
        assert float(result.latents.mean()) == pytest.approx(0.5, abs=0.02)  # 5760 draws: 4 standard errors are 0.016
        assert float(result.latents.std()) == pytest.approx(0.3, rel=0.05)
    else:  # the probability-flow ODE maps noise z to 0.5 + 0.3·z
        torch.testing.assert_close(result.latents, 0.5 + 0.3 * initial(0, range(64)), rtol=0, atol=0.02)


def test_budgets_as_number_tensor_list_and_function(flow):
    options = {"objective": "flow", "steps": 4, "guidance": 1.0}
    natural = []
    each = torch.tensor([0.0, 0.5, 0.9])

    def look(step):
        natural.append(step.routing.natural_mask.sum(1))

    trace = sample(flow, [0, 1, 2], drop_fraction=each, callback=look, **options).trace
    natural = torch.stack(natural)
    assert torch.equal(trace.tokens.long(), natural - (natural * each).floor().long())
    assert trace.uncond_tokens is None and trace.seconds.shape == (4,)
    ramp = sample(flow, [0, 1], drop_fraction=lambda t: 0.9 * (1 - t / 1000), **options)
    listed = sample(flow, [0, 1], drop_fraction=[0.0, 0.225, 0.45, 0.675], **options)
    torch.testing.assert_close(ramp.latents, listed.latents)
    assert (ramp.trace.tokens[0] > ramp.trace.tokens[-1]).all()


def half(model, dtype):
    return model if dtype is None else cast_weights(copy.deepcopy(model), dtype)


def test_half_precision_casts_no_weight_while_it_samples(flow):
    """Router and residual path stay in float32, with their own weights."""

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                seen.append(args[0].data_ptr())
            return function(*args, **(kwargs or {}))

    model = half(flow, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.router.parameters(), flow.router.parameters(), strict=True))
    assert {p.dtype for p in model.residual_proj.parameters()} == {torch.float32}
    assert model.pos_embed.dtype == model.main.blocks[0].qkv.weight.dtype == torch.bfloat16
    seen, weights = [], {p.data_ptr() for p in model.parameters() if p.dim() > 1}
    with Casts():
        got = sample(model, [0, 1, 2], objective="flow", steps=3, batch_size=2).latents
    want = sample(flow, [0, 1, 2], objective="flow", steps=3, batch_size=2).latents
    assert not seen and got.dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()


def test_products_in_float32_may_be_tf32_beside_half_precision(flow):
    seen = []
    hook = flow.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    for precision in (None, torch.bfloat16, torch.float16):
        sample(half(flow, precision), [0], objective="flow", steps=1)
    hook.remove()
    assert seen == ["highest", "high", "high"] and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_tf32_may_be_asked_for_by_its_newer_name(flow, precision):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        sample(half(flow, precision), [0], objective="flow", steps=1)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_a_short_list_gives_each_number_an_equal_share_of_the_steps():
    timesteps = torch.linspace(1000, 100, 5)
    table = drop_table([0.6, 0.0], timesteps, 2)
    torch.testing.assert_close(table, torch.tensor([0.6, 0.6, 0.6, 0.0, 0.0])[:, None].expand(5, 2))
    torch.testing.assert_close(drop_table(0.3, timesteps, 2), torch.full((5, 2), 0.3))


def test_guidance_1_runs_one_half(flow):
    rows = []
    hook = flow.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    sample(flow, [0, 1], objective="flow", steps=1)
    sample(flow, [0, 1], objective="flow", steps=1, guidance=2)
    hook.remove()
    assert rows == [2, 4]


def test_one_step_starts_from_pure_noise():
    for objective, top in (("flow", 1000), ("ddpm", 999)):
        assert make_scheduler("auto", objective, 1)[1].tolist() == [top]
