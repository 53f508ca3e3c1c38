"""Diffusion objectives: DDPM noise prediction with a learned variance, flow matching, and the ratio loss.

An objective draws a time for one sample, makes the noisy sample, and gives the loss of each sample. Times are on
the model's scale, 0 (data) to 1000 (noise).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..errors import ConfigError, check_kind

SUB_BATCH = 16  # samples, of the ratio loss


class FlowMatching:
    """Velocity of the straight path x_t = (1−σ)·x_0 + σ·noise, t = 1000·σ (SiT, arXiv 2401.08740).

    σ is logit-normal (arXiv 2403.03206 eq. 19, location ln `shift`, scale 1) and every σ has weight 1. The location is
    that paper's shift of the times towards the noise, σ' = shift·σ / (1 + (shift − 1)·σ), its eq. 23.
    """

    def __init__(self, shift: float = 1.0) -> None:
        if not isinstance(shift, int | float) or not 0 < shift < math.inf:
            raise ConfigError(f"shift must be positive and finite, got {shift!r}")
        self.location = math.log(shift)

    def draw_time(self, rng: np.random.Generator) -> float:
        """One time in (0, 1000)."""
        return 1000 / (1 + math.exp(-rng.standard_normal() - self.location))

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t of x_0 and noise (B, C, H, W) at t (B,)."""
        sigma = _per_sample(t / 1000, x0)
        return (1 - sigma) * x0 + sigma * noise

    def loss(self, output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Squared error of the velocity noise − x_0, mean over each sample: (B,)."""
        return (output - (noise - x0)).square().flatten(1).mean(1)


class DDPM:
    """Noise prediction over a linear schedule of 1000 steps (arXiv 2006.11239), variance learned or not.

    With `learn_sigma` the second half of the output channels is v of arXiv 2102.09672 eq. 15,
    log σ² = (v+1)/2·log β_t + (1−v)/2·log β̃_t, and the loss is the hybrid of its eq. 16: squared error plus the
    variational bound of the step in bits per dimension, whose gradient reaches the variance only. The paper's
    λ = 0.001 times 1000 steps gives the bound of one drawn step the weight 1. `min_snr` γ weights the squared error by
    min(SNR, γ)/SNR, SNR = ᾱ/(1 − ᾱ) (arXiv 2303.09556 section 3.4, for noise prediction); 0: by 1.
    """

    steps = 1000

    def __init__(self, learn_sigma: bool, min_snr: float = 0.0) -> None:
        if not isinstance(min_snr, int | float) or not 0 <= min_snr < math.inf:
            raise ConfigError(f"min_snr must be finite and not negative, got {min_snr!r}")
        self.learn_sigma = learn_sigma
        beta = torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64)
        alpha_bar = (1 - beta).cumprod(0)
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        variance = beta * (1 - before) / (1 - alpha_bar)
        variance[0] = variance[1]  # β̃_0 = 0 has no logarithm; the first step is scored by its likelihood
        self.signal, self.noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        snr = alpha_bar / (1 - alpha_bar)
        self.weight = snr.clamp(max=min_snr) / snr if min_snr else torch.ones_like(snr)
        self.log_beta, self.log_variance = beta.log(), variance.log()
        # Posterior mean = mean_x0·x_0 + mean_xt·x_t.
        self.mean_x0 = before.sqrt() * beta / (1 - alpha_bar)
        self.mean_xt = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)
        self.noise_to_signal = self.noise / self.signal
        self._copies: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def draw_time(self, rng: np.random.Generator) -> float:
        """One integer step in [0, 1000), as a float."""
        return float(rng.integers(self.steps))

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t of x_0 and noise (B, C, H, W) at the steps t (B,)."""
        return self._at("signal", t, x0) * x0 + self._at("noise", t, x0) * noise

    def loss(self, output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Squared error of the noise, plus the bound with `learn_sigma`, mean over each sample: (B,)."""
        predicted = output[:, : noise.shape[1]]
        squared = self._at("weight", t, x0).flatten() * (predicted - noise).square().flatten(1).mean(1)
        if not self.learn_sigma:
            return squared
        return squared + self.bound(predicted.detach(), output[:, noise.shape[1] :], x0, noise, t)

    def bound(
        self, predicted: torch.Tensor, v: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Variational bound of step t, bits per dimension (B,): KL to the posterior, at t = 0 the likelihood."""
        log_beta, log_variance = self._at("log_beta", t, x0), self._at("log_variance", t, x0)
        log_sigma2 = (v + 1) / 2 * log_beta + (1 - v) / 2 * log_variance
        # x̂_0 − x_0, written with the noises: the difference of two large numbers would lose digits near t = 1000.
        error = self._at("noise_to_signal", t, x0) * (noise - predicted)
        shift = self._at("mean_x0", t, x0) * error
        ratio = log_variance - log_sigma2
        kl = 0.5 * (torch.expm1(ratio) - ratio + shift.square() * torch.exp(-log_sigma2))
        likelihood = _discretized_nll(x0, x0 + error, torch.exp(0.5 * log_sigma2))
        return torch.where(_per_sample(t == 0, x0), likelihood, kl).flatten(1).mean(1) / math.log(2)

    def _at(self, name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        # A table moves once: each move would be a wait of the host, which no CUDA graph can hold.
        key = (name, like.dtype, like.device)
        if key not in self._copies:
            self._copies[key] = getattr(self, name).to(like.dtype).to(like.device)  # cast first: MPS has no float64
        return _per_sample(self._copies[key][t.long()], like)


def make_objective(name: str, learn_sigma: bool, time_shift: float = 1.0, min_snr: float = 0.0) -> FlowMatching | DDPM:
    """The objective called "flow" (with `time_shift`) or "ddpm" (with `min_snr`)."""
    return DDPM(learn_sigma, min_snr) if name == "ddpm" else FlowMatching(time_shift)


def ratio_loss(
    boundary_prob: torch.Tensor,
    natural_mask: torch.Tensor,
    target_ratio: float,
    sub_batch: int = SUB_BATCH,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """N/(N−1)·((N−1)·F·G + (1−F)(1−G)), averaged over sub-batches: 1 when a share 1/N is kept (H-Net eq. 10).

    `boundary_prob` (B, L) float and `natural_mask` (B, L) bool; F is the mean of the mask, G of the probabilities, both
    over the cells that `valid` bool (B, L) marks, by default all. Each `sub_batch` samples in a row form one sub-batch;
    the last may be smaller. Returns a scalar. Raises ValueError for shapes that differ and an N of 1 or less.
    """
    given = (natural_mask,) if valid is None else (natural_mask, valid)
    for tensor in (boundary_prob, *given):
        check_kind(tensor, torch.Tensor, "each of ratio_loss's probabilities and masks")
    check_kind(target_ratio, (float, int), "target_ratio")
    if not target_ratio > 1:
        raise ConfigError(f"target_ratio N must be greater than 1, got {target_ratio}")
    if boundary_prob.dim() != 2 or any(mask.shape != boundary_prob.shape for mask in given):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (boundary_prob, *given))
        raise ValueError(f"ratio_loss: boundary_prob and its masks must have one shape (B, L), got {shapes}")
    losses = []
    parts = (tensor.split(sub_batch) for tensor in (boundary_prob, *given))
    for prob, mask, *cells in zip(*parts, strict=True):
        kept, mean = (_mean(values, *cells) for values in (mask.to(prob.dtype), prob))
        losses.append((target_ratio - 1) * kept * mean + (1 - kept) * (1 - mean))
    return target_ratio / (target_ratio - 1) * torch.stack(losses).mean()


def _mean(values: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    return values.mean() if valid is None else torch.where(valid, values, 0.0).sum() / valid.sum()


def _discretized_nll(x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """−log of a Gaussian's mass in the bin x ± 1/255, in nats; the bins at ±1 reach to infinity (2006.11239 eq. 13)."""
    upper = torch.special.ndtr((x - mean + 1 / 255) / scale)
    lower = torch.special.ndtr((x - mean - 1 / 255) / scale)
    upper = torch.where(x > 0.999, 1.0, upper)
    lower = torch.where(x < -0.999, 0.0, lower)
    return -(upper - lower).clamp(min=1e-12).log()


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
