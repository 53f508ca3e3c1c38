"""Boundary scores in Triton against the reference in float64: in the interpreter, or on a GPU where there is one."""

import math

import pytest
import torch

import dcdit_kernels as K

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CU = [0, 0, 9, 9, 10, 24, 24]  # empty samples at both ends and inside, and one of a single row


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rows(batch, cells, width, seed):
    """(B, L, D), every second row and column block of a larger buffer: no two axes can be merged."""
    return normal(batch, 2 * cells, 2 * width, seed=seed)[:, ::2, :width]


def features_of(layout, batch, channels, height, width):
    x = normal(batch, channels, height, 2 * width) * 2 + 5
    if layout == "strided":
        return x[..., ::2]  # one axis of H·W with steps of two
    return x[..., :width].contiguous(memory_format=layout) if layout else x[..., :width]


def cosine_cases():
    """name → (function of (backend, q, k, kernel), tensors)."""
    for grid, batch, width in (((7, 9), 3, 72), ((1, 11), 1, 24), ((5, 1), 3, 24)):
        q, k = (rows(batch, math.prod(grid), width, seed) for seed in (1, 2))
        kernel = (normal(width, 3, 3, seed=3) / 3).transpose(1, 2)
        yield f"2D {grid}", lambda b, *t, grid=grid: K.boundary_cosine(*t, grid, backend=b), (q, k, kernel)
    q, k = rows(3, 13, 72, 1), rows(3, 13, 72, 2)
    yield "1D", lambda b, *t: K.boundary_cosine(*t, backend=b), (q, k)
    q, k = rows(1, 1, 8, 1), rows(1, 1, 8, 2)
    yield "one cell", lambda b, *t: K.boundary_cosine(*t, backend=b), (q, k)
    cu = torch.tensor(CU, dtype=torch.int32, device=DEVICE)
    packed = [normal(29, 80, seed=seed)[:, :40] for seed in (1, 2)]
    for x in packed:
        x[CU[-1] :] = math.nan
    yield "packed", lambda b, *t: K.boundary_cosine(*t, cu_seqlens=cu, backend=b), packed
    many = torch.arange(0, 140, 2, dtype=torch.int32, device=DEVICE).clamp(max=130)
    yield (
        "packed pairs",
        lambda b, *t: K.boundary_cosine(*t, cu_seqlens=many, backend=b),
        (normal(130, 8), -normal(130, 8)),
    )
    yield "opposite", lambda b, *t: K.boundary_cosine(*t, backend=b), (normal(2, 9, 8), -normal(2, 9, 8).roll(-1, 1))


def predictability_cases():
    for layout in (None, torch.channels_last, "strided"):
        for (height, width), batch in (((7, 9), 3), ((1, 40), 1), ((5, 1), 3)):
            x = features_of(layout, batch, 24, height, width)
            parameters = [normal(24, seed=seed) for seed in (1, 2, 3)]
            name = f"{layout} {height}×{width}"
            yield name, lambda b, *t: K.boundary_predictability(*t, backend=b), (x, *parameters, normal(1, seed=4))
    x = features_of(None, 2, 70, 9, 8)[:, :, :, 1:7]
    tensors = (x, *(normal(70, seed=seed) for seed in (1, 2, 3)), normal(1).squeeze())
    yield "one group", lambda b, *t: K.boundary_predictability(*t, groups=1, eps=1e-2, backend=b), tensors


CASES = {name: case for name, *case in (*cosine_cases(), *predictability_cases())}


def value_and_gradients(function, backend, tensors, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(backend, *leaves)
    weight = torch.linspace(-1, 2, out.numel(), device=DEVICE).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.fixture
def poisoned(monkeypatch):
    """Buffers of the launchers hold NaN until they are written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, poisoned):
    """Scores and every gradient within twice the error of the float32 reference, plus rounding of the longest sum."""
    function, tensors = CASES[name]
    eager = value_and_gradients(function, "reference", tensors, torch.float32)
    want = value_and_gradients(function, "reference", tensors, torch.float64)
    got = value_and_gradients(function, "triton", tensors, torch.float32)
    terms = max(tensors[0][0].numel(), 16)
    for index, (w, e, g) in enumerate(zip(want, eager, got, strict=True)):
        budget = 2 * (e - w).abs().max() + w.abs().max().clamp(min=0.1) * math.sqrt(terms) * 2**-23
        assert (g - w).abs().max() <= budget, (index, (g - w).abs().max(), budget)
        assert g.dtype == torch.float32 and g.shape == w.shape


def test_runs_agree_bit_for_bit():
    for name in ("2D (7, 9)", "packed", "None 7×9"):
        function, tensors = CASES[name]
        first, second = (value_and_gradients(function, "triton", tensors, torch.float32) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name
