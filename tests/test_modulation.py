"""adaLN and gates with either norm, with and without a weight, by sample and by segment, on every back-end."""

import math

import pytest
import torch

import dcdit_kernels as K
from dcdit_kernels import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton", *["native"] * (DEVICE == "cpu")]  # native adaLN is for CPUs
LENGTHS = [3, 0, 70, 1]
WIDTH = 72


def formula(x, y, gate, shift, scale, weight, norm, eps=1e-5):
    """Of the rows of one segment."""
    x = x + gate * y
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return x, normed * weight * (1 + scale) + shift


def by_hand(x, y, gate, shift, scale, weight, norm, lengths, dense):
    if dense:
        modulators = [m[:, None] for m in (gate, shift, scale)]
        return formula(x, y, *modulators, weight, norm)
    parts, start = [], 0
    for b, length in enumerate(lengths):
        own = slice(start, start + length)
        parts.append(torch.stack(formula(x[own], y[own], gate[b], shift[b], scale[b], weight, norm)))
        start += length
    return torch.cat([*parts, x.new_zeros(2, len(x) - start, x.shape[1])], dim=1).unbind()


def inputs(dense, dtype):
    """(x, y, gate, shift, scale, weight), modulators as views of one tensor, and NaN past the live rows."""
    batch, live = len(LENGTHS), sum(LENGTHS)
    shape = (batch, 5, WIDTH) if dense else (live + 3, WIDTH)
    x, y = torch.randn(2, *shape, device=DEVICE, dtype=torch.float64) + 0.5
    if not dense:
        x[live:] = y[live:] = math.nan
    modulators = torch.randn(batch, 3 * WIDTH, device=DEVICE, dtype=torch.float64)
    weight = torch.rand(WIDTH, device=DEVICE, dtype=torch.float64) + 0.5
    return [t.to(dtype) for t in (x, y, *modulators.chunk(3, 1), weight)]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms(backend, norm, weighted, dense):
    dtype = torch.float32 if backend == "triton" else torch.float64
    packing = Packing.from_cu_seqlens(Packing.from_lengths(LENGTHS, DEVICE).cu_seqlens, 70, sum(LENGTHS) + 3)
    plan = None if dense else packing
    given = inputs(dense, dtype)
    leaves, exact = ([t.detach().to(kind).requires_grad_() for t in given] for kind in (dtype, torch.float64))
    *rest, weight = leaves
    options = {"eps": 1e-5, "norm": norm, "norm_weight": weight if weighted else None, "backend": backend}
    outs = K.gate_residual_modulate(*rest, plan, **options)
    again = K.adaln_modulate(outs[0].detach(), *rest[3:], plan, **options)
    torch.testing.assert_close(again, outs[1], rtol=0, atol=0 if backend == "native" else 1e-5)
    want = by_hand(*exact[:5], exact[5] if weighted else torch.ones_like(exact[5]), norm, LENGTHS, dense)
    weights = [torch.linspace(-1, 2, o.numel(), dtype=torch.float64, device=DEVICE).view(o.shape) for o in want]
    got_grads, grads = (
        torch.autograd.grad(
            sum((o * w.to(o.dtype)).sum() for o, w in zip(found, weights, strict=True)), tensors, allow_unused=True
        )
        for found, tensors in ((outs, leaves), (want, exact))
    )
    assert (got_grads[5] is None) is not weighted
    tolerance = {"rtol": 2e-5, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-11}
    pairs = zip((*outs, *got_grads[: 5 + weighted]), (*want, *grads[: 5 + weighted]), strict=True)
    for got, wanted in pairs:
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_and_modulators_in_half_precision(backend, gpu_arithmetic):
    """Within one rounding of the formula in float64; every gradient in its own dtype."""
    packing = Packing.from_lengths(LENGTHS, DEVICE)
    x, y, gate, shift, scale, weight = inputs(False, torch.bfloat16)
    x, y = x[: sum(LENGTHS)], y[: sum(LENGTHS)]
    leaves = [t.detach().requires_grad_() for t in (x, y, gate, shift, scale.float(), weight.float())]
    outs = K.gate_residual_modulate(*leaves[:5], packing, 1e-5, "rms", leaves[5], backend=backend)
    total, normed = by_hand(*(t.double() for t in leaves), "rms", LENGTHS, False)
    torch.testing.assert_close(outs[0].double(), total, rtol=2**-8, atol=0)
    torch.testing.assert_close(outs[1].double(), normed, rtol=2**-7, atol=0.06)
    for leaf, grad in zip(leaves, torch.autograd.grad(sum(o.float().sum() for o in outs), leaves), strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape and grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_modulators_by_segment(backend):
    """Text and image rows of one sample, modulated each by its own: as the two streams alone."""
    text, cells = Packing.from_lengths([2, 0, 4], DEVICE), Packing.from_lengths([5, 3, 0], DEVICE)
    joined = text.join(cells)
    rows = [torch.randn(p.capacity, 16, device=DEVICE) for p in (text, cells)]
    modulators = torch.randn(2, 3, 2, 16, device=DEVICE, requires_grad=True)  # shift and scale, by sample and stream
    x = joined.cat(*rows)
    with K.use_backend(backend):
        out = K.adaln_modulate(x, *modulators.flatten(1, 2), joined.segments, norm="rms")
        alone = [
            K.adaln_modulate(r, *modulators[:, :, i], p, norm="rms")
            for i, (r, p) in enumerate(zip(rows, (text, cells), strict=True))
        ]
    weight = torch.randn_like(out)
    for got, want in zip(joined.split(out), alone, strict=True):
        torch.testing.assert_close(got, want)
    (got,) = torch.autograd.grad(out, modulators, weight)
    (want,) = torch.autograd.grad(alone, modulators, joined.split(weight))
    torch.testing.assert_close(got, want)


def test_options_that_do_not_fit_are_named():
    x, modulator = torch.randn(2, 5, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"adaln_modulate: norm must be one of \('layer', 'rms'\), got 'group'"):
        K.adaln_modulate(x, modulator, modulator, norm="group")
    with pytest.raises(ValueError, match=r"gate_residual_modulate: norm_weight must have shape \(8\), got \(2, 8\)"):
        K.gate_residual_modulate(x, x, *[modulator] * 3, norm_weight=modulator)
    with pytest.raises(TypeError, match=r"adaln_modulate: norm_weight must be float16.* got torch.int64"):
        K.adaln_modulate(x, modulator, modulator, norm_weight=torch.ones(8).long())
