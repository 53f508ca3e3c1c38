"""The operators against formulas written out here in float64, on every CPU back-end, with poisoned tails."""

import functools
import math
import os
import subprocess
import sys

import pytest
import torch

import dcdit_kernels as K
from dcdit_kernels.__main__ import main as diagnose

GRIDS = [(7, 9), (1, 13), (5, 1)]
SHARES = ["all", "one", "quarter", "empty"]
BACKENDS = ["reference", "native"]


def make(grid, share, spare=0, batch=3):
    """(boundary_prob float64, plan) with one sample of another kind at the end; `spare` rows past the live ones."""
    gen = torch.Generator().manual_seed(SHARES.index(share))
    cells = math.prod(grid)
    prob = torch.rand(batch, cells, generator=gen, dtype=torch.float64)
    limit = {"all": 0.0, "quarter": 0.75}.get(share, 2.0)
    prob = torch.where(prob > limit, 0.55 + 0.4 * prob, 0.45 * prob)
    if share == "one":
        prob[:, cells // 2] = 0.9
    live = int((prob > 0.5).sum())
    return prob, K.plan_chunks(prob, grid, capacity=live + spare if spare else None, backend="reference")


def poisoned(rows, plan):
    """The rows with NaN past the last live row, as a view with other strides."""
    live = int(plan.cu_seqlens[-1])
    wide = torch.full((rows.shape[0], 2 * rows.shape[1]), math.nan, dtype=rows.dtype)
    wide[:live, ::2] = rows[:live]
    return wide[:, ::2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dechunk_of_cells_kept_at_any_probability(backend):
    """A kept cell's own weight may be 1e-4 and its neighbours', far away, 1e4 times as large."""
    prob = torch.rand(2, 63, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5
    prob[:, :8], prob[:, 30], prob[:, -3:] = 0.0, 0.0, 0.999
    keep = torch.zeros(2, 63, dtype=torch.bool)
    keep[:, [0, 5, 30]], keep[1, 40:] = True, True
    plan = K.plan_chunks(prob, (7, 9), keep=keep)
    x, residual = torch.randn(plan.capacity, 4, dtype=torch.float64), torch.randn(2, 63, 4, dtype=torch.float64)
    want = dechunk_by_cell(x, prob, plan, residual, 1.0)
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = K.dechunk(x.to(dtype), prob.to(dtype), plan, residual.to(dtype), backend=backend)
        torch.testing.assert_close(got.double(), want, rtol=error, atol=error)


def gradients(function, *tensors):
    """Output, and gradients of a weighted sum of it. Weights depend on the place, so that no error cancels."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    total = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outs)
    return [o.detach() for o in outs] + list(
        torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    )


def dechunk_by_cell(x, prob, plan, residual, sigma):
    """METHOD step 8, one cell at a time."""
    out, places = [], torch.cartesian_prod(*(torch.arange(n) for n in plan.grid)).view(plan.cells, -1).double()
    for b in range(plan.batch_size):
        start, end = plan.cu_seqlens[b], plan.cu_seqlens[b + 1]
        tokens = plan.token_index[start:end].long() - b * plan.cells
        p, u = prob[b, tokens].clamp(1e-4, 1 - 1e-4), places[tokens]
        for cell in range(plan.cells):
            value = torch.zeros(x.shape[1], dtype=x.dtype)
            if len(tokens):
                i = int((u - places[cell]).square().sum(1).argmin())  # argmin takes the first of equals
                w = p * torch.exp(-(u - u[i]).square().sum(1) / (2 * sigma**2))
                smoothed = (w[:, None] * x[start:end]).sum(0) / (w.sum() + 1e-8)
                value = p[i] * x[start + i] + (1 - p[i]) * smoothed
            s = torch.maximum(prob[b, cell], 1 - prob[b, cell])
            out.append(value * (1 + s - s.detach()) + residual[b, cell])
    return torch.stack(out).view(residual.shape)


@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dechunk(backend, grid, share, spare):
    prob, plan = make(grid, share, spare)
    x = torch.randn(plan.capacity, 6, dtype=torch.float64)
    residual = torch.randn(3, plan.cells, 6, dtype=torch.float64)
    want = gradients(lambda *a: dechunk_by_cell(a[0], a[1], plan, a[2], 1.3), x, prob, residual)
    got = gradients(
        lambda *a: K.dechunk(a[0], a[1], plan, a[2], 1.3, backend=backend), poisoned(x, plan), prob, residual
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def ema_by_token(x, prob, plan):
    rows = []
    for b in range(plan.batch_size):
        state = None
        for r in range(int(plan.cu_seqlens[b]), int(plan.cu_seqlens[b + 1])):
            p = prob.flatten()[plan.token_index[r].long()].clamp(1e-4, 1 - 1e-4)
            state = x[r] if state is None else p * x[r] + (1 - p) * state
            rows.append(state)
    rows += [torch.zeros_like(x[0])] * (plan.capacity - len(rows)) if plan.capacity else []
    return torch.stack(rows) if rows else x


def test_smoothing_leaves_a_row_on_its_own():
    """Out of reach of the others a row is its own average, to the bit, and its p has no part in it."""
    prob, plan = make((7, 9), "quarter")
    prob, x = prob.float(), 10 + torch.randn(plan.capacity, 384)
    alone, plain = (
        gradients(lambda x, p, s=s: K.dechunk(x, p, plan, sigma=0.05, smoothing=s, backend="native"), x, prob)
        for s in ("gaussian", None)
    )
    assert torch.equal(alone[0], plain[0])
    torch.testing.assert_close(alone[1:], plain[1:], rtol=3e-7, atol=0)


@pytest.mark.parametrize("share", SHARES)
def test_ema(share):
    prob, plan = make((7, 9), share, spare=4)
    x = torch.randn(plan.capacity, 5, dtype=torch.float64)
    want = gradients(lambda *a: ema_by_token(*a, plan), x, prob) if share != "empty" else [torch.zeros_like(x)] * 2
    got = gradients(lambda *a: K.ema_smooth(*a, plan), poisoned(x, plan), prob)
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_modulate_and_gate(backend, packed, share):
    _, plan = make((7, 9), share, spare=4)
    shape = (plan.capacity, 8) if packed else (3, 7, 8)
    x, y = torch.randn(2, *shape, dtype=torch.float64)
    modulators = torch.randn(3, 24, dtype=torch.float64)
    sample = plan.sample_index.long() if packed else None

    def by_hand(x, y, modulators):
        gate, shift, scale = (m[sample] if packed else m[:, None] for m in modulators.chunk(3, 1))
        live = (sample >= 0)[:, None] if packed else torch.ones(1, 1, 1, dtype=torch.bool)
        x = x + gate * y
        mean = x.mean(-1, keepdim=True)
        normed = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return torch.where(live, x, 0), torch.where(live, normed * (1 + scale) + shift, 0)

    def ours(x, y, modulators):
        gate, shift, scale = modulators.chunk(3, 1)  # strided views of one tensor
        return K.gate_residual_modulate(x, y, gate, shift, scale, plan if packed else None, backend=backend)

    want = gradients(by_hand, x, y, modulators)
    args = (poisoned(x, plan), poisoned(y, plan)) if packed else (x, y)
    for a, b in zip(gradients(ours, *args, modulators), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("width", [72, 1160])
def test_modulate_over_runs_and_threads(width, used):
    """Samples of several runs and of none, sums that need a tail, an output without gradient; threads change no bit."""
    lengths = torch.tensor([0, 4000 * 72 // width, 65, 0, 1])
    plan = K.plan_chunks((torch.arange(4200) < lengths[:, None]).double(), (42, 100))
    x, y = torch.randn(2, plan.capacity, width)
    gate, shift, scale = torch.randn(3, 5, width)

    def run(*args, backend="native"):
        outs = K.gate_residual_modulate(*args, plan, backend=backend)
        return tuple(outs[i] for i in used)

    args = x, y, gate, shift, scale
    want = gradients(functools.partial(run, backend="reference"), *(arg.double() for arg in args))
    runs, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(gradients(run, *args))
    finally:
        torch.set_num_threads(before)
    for one, three, exact in zip(*runs, want, strict=True):
        assert torch.equal(one, three)
        error = (one - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error < 1e-6, error


@pytest.mark.parametrize("backend", BACKENDS)
def test_varlen_attention(backend):
    """Different q and k lengths, an empty sample, a poisoned tail, and views of a fused qkv."""
    torch.manual_seed(0)
    cu_q, cu_k = torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.tensor([0, 2, 5, 11], dtype=torch.int32)
    q = torch.randn(12, 2, 8, dtype=torch.float64)
    k, v = torch.randn(13, 2, 2, 8, dtype=torch.float64).unbind(1)

    def by_hand(q, k, v):
        out = torch.zeros_like(q)
        for b in range(3):
            for i in range(cu_q[b], cu_q[b + 1]):
                own = slice(cu_k[b], cu_k[b + 1])
                weight = (torch.einsum("hd,jhd->hj", q[i], k[own]) / math.sqrt(8)).softmax(-1)
                out[i] = torch.einsum("hj,jhd->hd", weight, v[own])
        return out

    def bad(t, live):
        return torch.cat([t[:live], torch.full_like(t[live:], math.nan)])

    want = gradients(by_hand, q, k, v)
    attend = lambda *a: K.varlen_attention(*a, cu_q, cu_k, 5, 6, backend=backend)  # noqa: E731
    for a, b in zip(gradients(attend, bad(q, 9), bad(k, 11), bad(v, 11)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk(backend, share):
    _, plan = make((7, 9), share, spare=4)
    h, pos = torch.randn(3, 63, 8, dtype=torch.float64), torch.randn(63, 8, dtype=torch.float64)
    out, grad, grad_pos = gradients(lambda h, pos: K.chunk(h, plan, pos, backend=backend), h, pos)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    want, want_grad = torch.zeros_like(out), torch.zeros_like(h)
    for row, cell in enumerate(plan.token_index.tolist()):
        if cell >= 0:
            want[row] = h.view(-1, 8)[cell] + pos[cell % 63]
            want_grad.view(-1, 8)[cell] = weight[row]
    assert torch.equal(out, want) and torch.equal(grad, want_grad)
    torch.testing.assert_close(grad_pos, want_grad.sum(0), rtol=1e-13, atol=1e-13)
    assert torch.equal(K.chunk(h, plan, backend=backend), K.chunk(h, plan, torch.zeros_like(pos)))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("nearest", ["2d", "previous"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_means(backend, share, nearest):
    """Cell by cell; cells that no row refills hold NaN, and neither give nor get anything."""
    prob, plan = make((7, 9), share, spare=4)
    plan = K.plan_chunks(prob, (7, 9), nearest=nearest, capacity=plan.capacity, backend="reference")
    h, pos = torch.randn(3, 63, 8, dtype=torch.float64), torch.randn(63, 8, dtype=torch.float64)
    h.view(-1, 8)[plan.nearest < 0] = math.nan
    out, grad, grad_pos = gradients(lambda h, pos: K.chunk(h, plan, pos, "mean", backend=backend), h, pos)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    want, want_grad, want_pos = torch.zeros_like(out), torch.zeros_like(h), torch.zeros_like(pos)
    for row, cell in enumerate(plan.token_index.tolist()):
        if cell >= 0:
            members = (plan.nearest == row).nonzero()[:, 0].tolist()
            want[row] = sum(h.view(-1, 8)[member] for member in members) / len(members) + pos[cell % 63]
            want_grad.view(-1, 8)[members] = weight[row] / len(members)
            want_pos[cell % 63] += weight[row]
    for got, expected in zip((out, grad, grad_pos), (want, want_grad, want_pos), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_boundary_cosine_1d_and_packed():
    """p_t = (1 - cos(q_t, k_{t-1})) / 2, both ends 1; a packed batch gives the results of its samples alone."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    prob = K.boundary_cosine(q, k)
    for b in range(2):
        for t in range(1, 5):
            assert prob[b, t].item() == pytest.approx((1 - torch.cosine_similarity(q[b, t], k[b, t - 1], 0).item()) / 2)
    assert (prob[:, [0, -1]] == 1).all()
    tail = torch.full((3, 8), math.nan, dtype=q.dtype)
    cu = torch.tensor([0, 6, 6, 12], dtype=torch.int32)
    packed = K.boundary_cosine(*(torch.cat([x.flatten(0, 1), tail]) for x in (q, k)), cu_seqlens=cu)
    torch.testing.assert_close(packed, torch.cat([prob.flatten(), prob.new_zeros(3)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [4, 23])
def test_boundary_cosine_2d(width, backend):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 12, width, dtype=torch.float64)
    kernel = torch.rand(width, 3, 3, dtype=torch.float64)
    prob = K.boundary_cosine(q, k, kernel, (3, 4), backend=backend)
    assert (prob[:, [0, -1]] == 1).all()
    unit_q, unit_k = (x / x.norm(dim=-1, keepdim=True) for x in (q[0], k[0]))
    for cell in range(1, 11):
        row, column = divmod(cell, 4)
        mean = sum(
            kernel[:, i + 1, j + 1] * unit_k[(row + i) * 4 + column + j]
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if 0 <= row + i < 3 and 0 <= column + j < 4
        )
        want = min(max((1 - (unit_q[cell] * mean).sum().item()) / 2, 0), 1)
        assert prob[0, cell].item() == pytest.approx(want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_keeps_its_dtype(backend, dtype):
    """Accumulation is in float32: the error against float64 comes from rounding inputs and output once."""
    prob, plan = make((7, 9), "quarter")
    x, residual = torch.randn(plan.capacity, 72), torch.randn(3, 63, 72)
    want = K.dechunk(
        x.to(dtype).double(), prob.float().double(), plan, residual.to(dtype).double(), backend="reference"
    )
    got = K.dechunk(x.to(dtype), prob.float(), plan, residual.to(dtype), backend=backend)
    assert got.dtype == dtype
    budget = 2 * torch.finfo(dtype).eps + 4 * 2**-23  # √K of the sixteen or so tokens of a sum, in float32
    torch.testing.assert_close(got.double(), want, rtol=budget, atol=budget)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_the_accumulation(backend):
    prob, plan = make((7, 9), "quarter")
    x = torch.randn(plan.capacity, 72).bfloat16()
    want = K.dechunk(x, prob.float(), plan, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(K.dechunk(x, prob.float(), plan, backend=backend), want)


def test_backend_choice_is_explicit():
    prob, plan = make((7, 9), "quarter")
    x = torch.randn(plan.capacity, 8)
    with pytest.raises(K.BackendError, match="plan_chunks has no triton implementation"):
        K.plan_chunks(prob, (7, 9), backend="triton")
    with pytest.raises(K.BackendError, match="unknown backend 'cuda'"), K.use_backend("cuda"):
        pass
    assert K.explain("dechunk", x, prob, plan).startswith("dechunk: native (asked for: auto)")
    with K.use_backend("reference"):
        assert K.explain("dechunk", x, prob, plan).startswith("dechunk: reference (asked for: reference)")
    with K.use_backend("triton"):  # speaks to the operators that have Triton kernels
        assert K.plan_chunks(prob, (7, 9)).capacity == plan.capacity


def test_the_diagnosis_survives_what_it_diagnoses():
    command = [sys.executable, "-m", "dcdit_kernels"]
    done = subprocess.run(command, env={**os.environ, "DCDIT_BACKEND": "cuda"}, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr
    assert done.stdout.count("unknown backend 'cuda'; expected one of auto, native, triton, reference") == 1
    assert done.stdout.startswith("dcdit_kernels ")  # and more lines


def test_the_diagnosis_takes_no_options(capsys):
    with pytest.raises(SystemExit):
        diagnose(["--backend", "native"])
    assert "python -m dcdit_kernels: error: unrecognized arguments: --backend native" in capsys.readouterr().err


def test_operators_name_what_came():
    prob, plan = make((7, 9), "quarter")
    with pytest.raises(ValueError, match=r"chunk: h must have shape \(3, 63, any\), got \(3, 62, 8\)"):
        K.chunk(torch.zeros(3, 62, 8), plan)
    with pytest.raises(ValueError, match=r"chunk: reduce must be one of \('own', 'mean'\), got 'max'"):
        K.chunk(torch.zeros(3, 63, 8), plan, reduce="max")
    with pytest.raises(TypeError, match=r"dechunk: x must be float16.* got torch.int64"):
        K.dechunk(torch.zeros(plan.capacity, 8).long(), prob, plan)
    with pytest.raises(ValueError, match="nearest='3d' needs a 3d grid"):
        K.plan_chunks(prob, (7, 9), nearest="3d")
