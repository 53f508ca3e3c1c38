"""Samplers against their formulas, worked out by hand in float64."""

import itertools

import numpy as np
import pytest
import torch
from small_sampling import initial, predict, tiny

from dcdit.sampling.denoising import guide, image_generator
from dcdit.sampling.sampler import sample

ROUNDING = 1e-3  # of float32, which the first x_0 = (x − …)/√ᾱ magnifies by 160


@pytest.fixture(scope="module")
def ddpm():
    return tiny()


@pytest.fixture(scope="module")
def flow():
    return tiny(learn_sigma=False)


def test_flow_euler_and_lite_cfg_by_hand(flow):
    """x ← x − v/S on the grid t = 1000, …, 1000/S, the two halves run apart, each with its own ρ."""
    steps, guidance, y = 5, 3.0, torch.tensor([1, 3])
    x = initial(0, [0, 1])
    for i in range(steps):
        t = 1000 * (1 - i / steps)
        cond, uncond = predict(flow, x, t, y, 0.2), predict(flow, x, t, torch.tensor([4, 4]), 0.9)
        x = x - (uncond + guidance * (cond - uncond)) / steps
    options = {"steps": steps, "guidance": guidance, "drop_fraction": 0.2, "uncond_drop_fraction": 0.9}
    got = sample(flow, y, objective="flow", **options)
    torch.testing.assert_close(got.latents, x, rtol=1e-4, atol=1e-4)
    assert (got.trace.uncond_tokens < got.trace.tokens).all()


def spaced(steps):
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    times = [round(999 * i / (steps - 1)) for i in range(steps)][::-1]
    return times, [float(alpha_bar[t]) for t in times] + [1.0]


def test_ddpm_with_learned_variance_by_hand(ddpm):
    """Ancestral sampling in float64 from arXiv 2006.11239 eq. 7 and 2102.09672 eq. 15, S not a divisor of 1000.

    Guidance moves the noise of all channels; the variance is the conditional one.
    """
    y = torch.tensor([2, 0])
    generators = [image_generator(3, i) for i in range(2)]
    x = initial(3, None, generators).double()
    times, alpha_bar = spaced(7)
    for t, now, then in zip(times, alpha_bar[:-1], alpha_bar[1:], strict=True):
        cond = predict(ddpm, x.float(), t, y, 0.0).double()
        uncond = predict(ddpm, x.float(), t, torch.tensor([4, 4]), 0.0).double()
        eps, v = uncond[:, :3] + 2.5 * (cond[:, :3] - uncond[:, :3]), cond[:, 3:]
        beta = 1 - now / then
        x0 = ((x - (1 - now) ** 0.5 * eps) / now**0.5).clamp(-1, 1)
        mean = (then**0.5 * beta * x0 + (now / then) ** 0.5 * (1 - then) * x) / (1 - now)
        x = mean
        if then < 1:
            log_variance = (v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(beta * (1 - then) / (1 - now))
            x = mean + torch.exp(log_variance / 2) * initial(0, None, generators)
    got = sample(ddpm, y, objective="ddpm", steps=7, guidance=2.5, seed=3, clip=True).latents.double()
    torch.testing.assert_close(got, x, rtol=1e-4, atol=ROUNDING)


def test_ddim_by_hand(ddpm):
    y = torch.tensor([2, 0])
    x = initial(0, [0, 1]).double()
    times, alpha_bar = spaced(7)
    for t, now, then in zip(times, alpha_bar[:-1], alpha_bar[1:], strict=True):
        eps = predict(ddpm, x.float(), t, y, 0.0)[:, :3].double()
        x0 = ((x - (1 - now) ** 0.5 * eps) / now**0.5).clamp(-1, 1)
        x = then**0.5 * x0 + (1 - then) ** 0.5 * eps
    got = sample(ddpm, y, objective="ddpm", scheduler="ddim", steps=7, clip=True).latents.double()
    torch.testing.assert_close(got, x, rtol=1e-4, atol=ROUNDING)


def test_ddim_with_noise_by_hand(ddpm):
    """σ of arXiv 2010.02502 eq. 16, in float64; the noise of each image is its own."""
    y, eta = torch.tensor([2, 0]), 0.7
    generators = [image_generator(1, i) for i in range(2)]
    x = initial(1, None, generators).double()
    times, alpha_bar = spaced(5)
    for t, now, then in zip(times, alpha_bar[:-1], alpha_bar[1:], strict=True):
        eps = predict(ddpm, x.float(), t, y, 0.0)[:, :3].double()
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        x = then**0.5 * x0 + (1 - then - sigma**2) ** 0.5 * eps + sigma * initial(0, None, generators)
    options = {"scheduler": "ddim", "steps": 5, "eta": eta, "seed": 1}
    got = sample(ddpm, y, objective="ddpm", **options).latents.double()
    torch.testing.assert_close(got, x, rtol=1e-4, atol=ROUNDING * float(x.abs().max()))


def test_heun_and_the_shift_by_hand(flow):
    """The mean of the velocities at both ends of a step; the last step, to σ = 0, is Euler's."""
    steps, y, shift = 4, torch.tensor([1, 3]), 3.0
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigmas = [*(shift * even / (1 + (shift - 1) * even)).tolist(), 0.0]
    x, calls = initial(0, [0, 1]).double(), []

    def velocity(x, sigma):
        calls.append(1000 * sigma)
        return predict(flow, x.float(), 1000 * sigma, y, 0.2).double()

    for now, then in itertools.pairwise(sigmas):
        first = velocity(x, now)
        second = velocity(x + (then - now) * first, then) if then else first
        x = x + (then - now) * (first + second) / 2
    options = {"scheduler": "flow-heun", "steps": steps, "drop_fraction": 0.2, "shift": shift}
    got = sample(flow, y, objective="flow", **options)
    torch.testing.assert_close(got.latents.double(), x, rtol=1e-4, atol=1e-4)
    assert got.trace.timesteps.tolist() == pytest.approx(calls) and len(calls) == 2 * steps - 1
    euler = sample(flow, y, objective="flow", steps=steps, shift=shift).trace.timesteps
    assert euler.tolist() == pytest.approx([1000 * sigma for sigma in sigmas[:-1]])


def test_guidance_of_some_channels_in_an_interval_by_hand(flow):
    """Channels past the second are the conditional ones; outside the interval the unconditional half does not run."""
    steps, y = 5, torch.tensor([1, 3])
    x, null, rows = initial(0, [0, 1]), torch.tensor([4, 4]), []
    for i in range(steps):
        t = 1000 * (1 - i / steps)
        out = predict(flow, x, t, y, 0.0)
        if 300 <= t <= 800:
            uncond = predict(flow, x, t, null, 0.0)
            out = torch.cat([(uncond + 3 * (out - uncond))[:, :2], out[:, 2:]], dim=1)
        x = x - out / steps
    hook = flow.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    options = {"steps": steps, "guidance": 3.0, "guidance_channels": 2, "guidance_interval": (300, 800)}
    got = sample(flow, y, objective="flow", **options)
    hook.remove()
    torch.testing.assert_close(got.latents, x, rtol=1e-4, atol=1e-4)
    assert rows == [2, 4, 4, 4, 2]
    assert got.trace.uncond_tokens.isnan().any(1).tolist() == [True, False, False, False, True]
    both, one = got.trace.gflops(flow.config)[1:4], got.trace.gflops(flow.config)[4:]
    assert (both > one.max()).all() and got.trace.gflops(flow.config).isfinite().all()


def test_the_release_guides_three_channels(tmp_path):
    """`convert` says so, and `dcdit sample` obeys it: the fourth channel is the conditional one."""
    from dcdit.checkpoints.folder import read_release

    model, use = read_release("tests/data/dcdit_tiny_release.pt")
    assert use["guidance_channels"] == 3 and model.use == use
    x, t, y = torch.randn(2, 4, *model.config.input_size), torch.full((4,), 500.0), torch.tensor([0, 1, 5, 5])
    y[2:] = model.config.num_classes
    with torch.no_grad():
        out = model(torch.cat([x, x]), t, y)
    cond, uncond = out.chunk(2)
    guided = guide(out, 4.0, use["guidance_channels"])
    torch.testing.assert_close(guided[:, :3], uncond[:, :3] + 4 * (cond[:, :3] - uncond[:, :3]))
    assert torch.equal(guided[:, 3:], cond[:, 3:])


def test_another_size_by_hand(flow):
    """Two steps of Euler with guidance on an 8×4 grid, from each image's own noise."""
    options = {"objective": "flow", "steps": 2, "guidance": 3.0, "seed": 4}
    got = sample(flow, [1, 2], size=(8, 4), **options).latents
    x = torch.cat([torch.randn(1, 3, 8, 4, generator=image_generator(4, i)) for i in range(2)])
    y = torch.tensor([1, 2, 4, 4])
    for t in (1000.0, 500.0):
        with torch.no_grad():
            cond, uncond = flow(torch.cat([x, x]), torch.full((4,), t), y).chunk(2)
        x = x - 0.5 * (uncond + 3 * (cond - uncond))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)
    assert torch.equal(sample(flow, [1], size=(6, 5), **options).latents, sample(flow, [1], **options).latents)
