"""The objectives against float64 formulas written out here, diffusers' schedulers, and the ratio loss's goldens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dcdit.training.objectives import DDPM, FlowMatching, make_objective, ratio_loss

SHAPE = (3, 4, 5)


def draws(t, dtype=torch.float64, seed=0):
    """x0 in [-1, 1] with exact ±1 among them, noise, prediction near the noise, v, all (B, *SHAPE)."""
    g = torch.Generator().manual_seed(seed)
    x0, noise, error, v = (torch.randn(len(t), *SHAPE, generator=g, dtype=torch.float64) for _ in range(4))
    x0 = x0.clamp(-1, 1)
    return [tensor.to(dtype) for tensor in (x0, noise, noise + 0.1 * error, 0.8 * v)]


def hybrid_by_hand(t, x0, noise, predicted, v):
    """Loss of one sample, from the definitions: both Gaussians of the step by mean and variance, and their KL."""
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    before = alpha_bar[t - 1] if t else 1.0
    beta_tilde = (1 - before) / (1 - alpha_bar[t]) * beta[t]
    lowest = beta_tilde if t else (1 - alpha_bar[0]) / (1 - alpha_bar[1]) * beta[1]
    x_t = math.sqrt(alpha_bar[t]) * x0 + math.sqrt(1 - alpha_bar[t]) * noise
    sigma2 = np.exp((v + 1) / 2 * math.log(beta[t]) + (1 - v) / 2 * math.log(lowest))
    mean = (x_t - beta[t] / math.sqrt(1 - alpha_bar[t]) * predicted) / math.sqrt(1 - beta[t])  # DDPM eq. 11
    if t == 0:
        cdf = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
        upper = np.where(x0 > 0.999, 1, cdf((x0 + 1 / 255 - mean) / np.sqrt(sigma2)))
        lower = np.where(x0 < -0.999, 0, cdf((x0 - 1 / 255 - mean) / np.sqrt(sigma2)))
        bound = -np.log(upper - lower)
    else:
        posterior = (x_t - beta[t] / math.sqrt(1 - alpha_bar[t]) * noise) / math.sqrt(1 - beta[t])
        bound = 0.5 * (np.log(sigma2 / beta_tilde) + (beta_tilde + (posterior - mean) ** 2) / sigma2 - 1)
    return np.mean((predicted - noise) ** 2) + np.mean(bound) / math.log(2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_hybrid_loss_matches_the_formulas(dtype, tolerance):
    """float32 loses digits in exp(log σ²) and, at t = 0, in the difference of two distribution functions."""
    t = torch.tensor([0, 1, 2, 10, 500, 998, 999])
    x0, noise, predicted, v = draws(t, dtype)
    objective = DDPM(learn_sigma=True)
    loss = objective.loss(torch.cat([predicted, v], 1), x0, noise, t.to(dtype))
    expected = [
        hybrid_by_hand(int(t[b]), *(d[b].double().numpy() for d in (x0, noise, predicted, v))) for b in range(7)
    ]
    np.testing.assert_allclose(loss.numpy(), expected, rtol=tolerance)


def test_the_bound_teaches_the_variance_only():
    t = torch.tensor([0, 3, 700])
    x0, noise, predicted, v = draws(t)
    predicted.requires_grad_()
    v.requires_grad_()
    objective = DDPM(learn_sigma=True)
    objective.loss(torch.cat([predicted, v], 1), x0, noise, t).sum().backward()
    torch.testing.assert_close(predicted.grad, 2 * (predicted - noise).detach() / math.prod(SHAPE))
    assert (v.grad.flatten(1).abs().sum(1) > 0).all()


def test_the_best_variance_is_the_posterior_s_where_the_mean_is_right():
    """With the true noise the KL vanishes at v = −1 (β̃) and is positive elsewhere."""
    t = torch.tensor([1, 10, 900])
    x0, noise, *_ = draws(t)
    objective = DDPM(learn_sigma=True)
    at = [objective.bound(noise, torch.full_like(x0, v), x0, noise, t) for v in (-1.0, 0.0, 1.0)]
    torch.testing.assert_close(at[0], torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (at[1] > 0).all() and (at[2] > at[1]).all()


def test_schedule_and_posterior_agree_with_diffusers():
    from diffusers import DDPMScheduler

    learned, fixed = (
        DDPMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, variance_type=variance)
        for variance in ("learned_range", "fixed_small")
    )
    objective, t = DDPM(learn_sigma=True), torch.tensor([1, 2, 100, 999])
    x0, noise, predicted, v = draws(t, torch.float32)
    x = objective.add_noise(x0, noise, t)
    torch.testing.assert_close(x, learned.add_noise(x0, noise, t))
    for b, step in enumerate(t.tolist()):
        log_sigma2 = (v[b] + 1) / 2 * objective.log_beta[step] + (1 - v[b]) / 2 * objective.log_variance[step]
        # Their tables are float32, where 1 − ᾱ has lost digits at small t.
        torch.testing.assert_close(log_sigma2.float(), learned._get_variance(step, v[b]), rtol=1e-3, atol=0)
        # Their sampling step less its random part is the posterior mean, given the predicted x_0.
        step_noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        result = fixed.step(predicted[b], step, x[b], generator=torch.Generator().manual_seed(1))
        mean = result.prev_sample - fixed._get_variance(step).sqrt() * step_noise
        posterior = objective.mean_x0[step] * result.pred_original_sample + objective.mean_xt[step] * x[b]
        torch.testing.assert_close(mean, posterior.float(), rtol=1e-3, atol=1e-4)


def test_plain_noise_prediction():
    t = torch.tensor([0, 500])
    x0, noise, predicted, _ = draws(t)
    loss = make_objective("ddpm", learn_sigma=False).loss(predicted, x0, noise, t)
    np.testing.assert_allclose(loss.numpy(), ((predicted - noise).numpy() ** 2).mean((1, 2, 3)))


def test_flow_matching_follows_diffusers_convention():
    from diffusers import FlowMatchEulerDiscreteScheduler

    objective = make_objective("flow", learn_sigma=False)
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    t = scheduler.timesteps[[0, 300, 999]]
    x0, noise, predicted, _ = draws(t, torch.float32)
    x = objective.add_noise(x0, noise, t)
    torch.testing.assert_close(x, scheduler.scale_noise(x0, t, noise))
    # Following the exact velocity from any σ to 0 leads to the data.
    sigma = (t / 1000)[:, None, None, None]
    torch.testing.assert_close(x - sigma * (noise - x0), x0)
    assert torch.equal(objective.loss(noise - x0, x0, noise, t), torch.zeros(3))
    expected = ((predicted - (noise - x0)).double().numpy() ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(objective.loss(predicted, x0, noise, t).numpy(), expected, rtol=1e-5)


def test_flow_times_are_logit_normal():
    rng = np.random.default_rng(0)
    draws = np.array([FlowMatching().draw_time(rng) for _ in range(4000)]) / 1000
    # Quantiles of sigmoid(normal) at −1, 0, 1 standard deviations; four standard errors.
    for sigma, share in ((0.26894, 0.15866), (0.5, 0.5), (0.73106, 0.84134)):
        assert abs((draws < sigma).mean() - share) < 4 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize("case", ["full", "drop30", "per_sample"])
def test_ratio_loss_matches_the_goldens(case):
    golden = load_file("tests/data/dcdit_tiny.safetensors")
    prob, mask = golden[f"{case}.boundary_prob"], golden[f"{case}.natural_mask"]
    loss = ratio_loss(prob, mask.bool(), 4.0, sub_batch=len(prob))
    torch.testing.assert_close(loss, golden[f"{case}.ratio_loss"].view(()), rtol=1e-6, atol=0)


@given(st.integers(1, 40), st.integers(1, 30), st.sampled_from([2.0, 4.0, 16.0]), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_ratio_loss_by_sub_batches(batch, cells, n, sub_batch, seed):
    prob = np.random.default_rng(seed).random((batch, cells))
    losses = []
    for first in range(0, batch, sub_batch):
        part = prob[first : first + sub_batch]
        f, g = (part > 0.5).mean(), part.mean()
        losses.append(n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g)))
    tensor = torch.from_numpy(prob).requires_grad_()
    loss = ratio_loss(tensor, tensor > 0.5, n, sub_batch)
    np.testing.assert_allclose(loss.item(), np.mean(losses))
    loss.backward()
    assert tensor.grad.isfinite().all()


def test_ratio_loss_leaves_padded_cells_out():
    """Each sub-batch has the loss of its own cells, and gradients reach no others."""
    prob = torch.rand(5, 12, dtype=torch.float64)
    valid = torch.rand(5, 12) < 0.6
    poisoned = torch.where(valid, prob, math.nan).requires_grad_()
    loss = ratio_loss(poisoned, prob > 0.5, 4.0, 2, valid)
    parts = [prob[first : first + 2][valid[first : first + 2]][None] for first in (0, 2, 4)]
    torch.testing.assert_close(loss, torch.stack([ratio_loss(part, part > 0.5, 4.0) for part in parts]).mean())
    loss.backward()
    assert torch.equal(poisoned.grad != 0, valid)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((3, 4), (12,)), ((12,), (12,))])
def test_ratio_loss_names_shapes_that_differ(shapes):
    prob, mask = torch.rand(shapes[0]), torch.ones(shapes[1], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"one shape \(B, L\), got \(\d+"):
        ratio_loss(prob, mask, 4.0)
    if len(shapes[0]) == 2:
        with pytest.raises(ValueError, match=r"one shape \(B, L\), got \(3, 4\), \(3, 4\)"):
            ratio_loss(prob, prob > 0.5, 4.0, valid=mask)


@pytest.mark.parametrize("n", [4, 16])
def test_ratio_loss_is_one_at_its_target_and_pushes_towards_it(n):
    def loss_and_slope(kept):
        mask = torch.zeros(16, 16 * 16, dtype=torch.bool)
        mask.view(-1)[: int(kept * mask.numel())] = True
        prob = torch.full(mask.shape, float(kept), dtype=torch.float64, requires_grad=True)
        loss = ratio_loss(prob, mask, n)
        loss.backward()
        return loss.item(), prob.grad.sum().item()

    value, slope = loss_and_slope(1 / n)
    assert value == pytest.approx(1) and slope == pytest.approx(0, abs=1e-12)
    assert loss_and_slope(2 / n)[1] > 0 > loss_and_slope(0.5 / n)[1]


def test_min_snr_weights_the_squared_error():
    """min(SNR, 5)/SNR of each step, in float64; the bound keeps its weight."""
    x0, noise, output = (torch.randn(4, 3, 2, 2, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.0, 100.0, 400.0, 999.0])
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t.long()]
    snr = alpha_bar / (1 - alpha_bar)
    squared = (output - noise).square().flatten(1).mean(1)
    loss = make_objective("ddpm", learn_sigma=False, min_snr=5.0).loss(output, x0, noise, t)
    torch.testing.assert_close(loss, squared * torch.minimum(snr, torch.tensor(5.0)) / snr)
    both = torch.cat([output, torch.randn_like(output)], dim=1)
    plain, weighted = (DDPM(True, gamma).loss(both, x0, noise, t) for gamma in (0.0, 5.0))
    torch.testing.assert_close(plain - weighted, squared - loss)


def test_the_time_shift_moves_every_draw():
    """Equal random numbers give σ' = sσ/(1 + (s − 1)σ)."""
    plain, shifted = (FlowMatching(shift) for shift in (1.0, 3.0))
    for seed in range(50):
        sigma = plain.draw_time(np.random.default_rng(seed)) / 1000
        moved = shifted.draw_time(np.random.default_rng(seed)) / 1000
        assert moved == pytest.approx(3 * sigma / (1 + 2 * sigma), rel=1e-12)
