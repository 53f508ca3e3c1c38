"""Boundary scores in Triton against the reference in float64: in the interpreter, or on a GPU where there is one."""

import math

import pytest
import torch

import dcdit_kernels as K
from dcdit_kernels import _ops

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
    for grid, batch, width in (((7, 9), 1, 72), ((1, 11), 1, 24), ((5, 1), 3, 32), ((2, 3), 1, 1)):
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
    many = torch.arange(0, 132, 2, dtype=torch.int32, device=DEVICE)
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
    # More channels than one block, of different levels.
    x = (features_of(None, 2, 70, 9, 8) + torch.arange(70, device=DEVICE).view(-1, 1, 1) / 8)[:, :, :, 1:7]
    tensors = (x, *(normal(70, seed=seed) for seed in (1, 2, 3)), normal(1).squeeze())
    yield "one group", lambda b, *t: K.boundary_predictability(*t, groups=1, eps=1e-2, backend=b), tensors


CASES = {name: case for name, *case in (*cosine_cases(), *predictability_cases())}


def value_and_gradients(function, backend, tensors, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(backend, *leaves)
    weight = torch.linspace(-1, 2, out.numel(), device=DEVICE).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((torch.float32, name) for name in CASES),
        *(
            (half, name)
            for half in (torch.bfloat16, torch.float16)
            for name in ("2D (1, 11)", "packed", "None 5×1", "one group")
        ),
    ],
    ids=str,
)
def test_against_float64(dtype, name, poisoned, launches, gpu_arithmetic):
    """Scores and every gradient within twice the error of the reference in the same dtype, plus rounding of the longest
    sum; no races."""
    function, tensors = CASES[name]
    drawn = [t.to(dtype) for t in tensors]
    eager, got = (value_and_gradients(function, backend, drawn) for backend in ("reference", "triton"))
    want = value_and_gradients(function, "reference", drawn, torch.float64)
    terms = max(tensors[0][0].numel(), 16)
    largest = max(w.abs().max().item() for w in want)
    for index, (w, e, g) in enumerate(zip(want, eager, got, strict=True)):
        # A gradient that is zero in truth, as at D = 1, has the rounding of the terms that cancel (a GPU's: 2e-7).
        scale = w.abs().max().clamp(min=0.1) if w.any() else largest
        budget = 2 * (e - w).abs().max() + scale * math.sqrt(terms) * 2**-23
        assert (g - w).abs().max() <= budget, (index, (g - w).abs().max(), budget)
        assert g.dtype == e.dtype and g.shape == w.shape
    assert got[0].dtype == torch.float32


def test_runs_agree_bit_for_bit():
    for name in ("2D (5, 1)", "packed", "None 7×9"):
        function, tensors = CASES[name]
        first, second = (value_and_gradients(function, "triton", tensors, torch.float32) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


def test_large_grids_take_larger_tiles(monkeypatch, launches):
    """Many cells: tiles of 16 cells, several tiles summed by each program of the backward."""
    monkeypatch.setattr("dcdit_kernels.triton.boundary_cosine.FILL", 4)
    for name in ("2D (7, 9)", "2D (5, 1)", "1D", "packed"):
        function, tensors = CASES[name]
        want = value_and_gradients(function, "reference", tensors, torch.float64)
        got = value_and_gradients(function, "triton", tensors, torch.float32)
        for w, g in zip(want, got, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=2e-6, atol=2e-6)


def test_zero_rows_and_clamped_scores():
    """Normalising a zero row divides by 1e-12 as F.normalize does; a clamped score passes no gradient."""
    q, k = normal(2, 12, 16, seed=1), normal(2, 12, 16, seed=2)
    q[0, 3] = k[0, 6] = 0
    kernel = torch.full((16, 3, 3), 2.0, device=DEVICE)
    function = lambda b, *t: K.boundary_cosine(*t, (3, 4), backend=b)  # noqa: E731
    want = value_and_gradients(function, "reference", (q, k, kernel), torch.float64)
    got = value_and_gradients(function, "triton", (q, k, kernel), torch.float32)
    assert ((want[0] == 0) | (want[0] == 1)).sum() > 4  # more than the ends
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=3e-6, atol=3e-6)


def test_empty_batch():
    q = torch.zeros(0, 6, 8, device=DEVICE, requires_grad=True)
    features = torch.zeros(0, 8, 2, 3, device=DEVICE, requires_grad=True)
    ones = [torch.ones(8, device=DEVICE, requires_grad=True) for _ in range(3)]
    for out in (
        K.boundary_cosine(q, q, backend="triton"),
        K.boundary_predictability(features, *ones, ones[0][:1], backend="triton"),
    ):
        assert out.shape == (0, 6)
        out.sum().backward()
    assert q.grad.shape == q.shape and ones[0].grad.count_nonzero() == 0


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["2D (5, 1)", "packed", "None 5×1"])
def test_opcheck(name, backend, monkeypatch):
    """Schemas and fakes describe the operators."""

    def check(operator, backend, **inputs):
        op, tests = operator.name, ("test_schema", "test_faketensor")
        tensors = [inputs[t] for t in operator.tensors]
        args = (*tensors, [], [], *(inputs[c] for c in operator.constants), backend)
        operator = getattr(torch.ops.dcdit, op).default
        torch.library.opcheck(operator, args, test_utils=tests)
        needs = [t is not None and t.is_floating_point() for t in tensors]
        # The schema test runs below autograd, by which the reference makes its gradients.
        backward = getattr(torch.ops.dcdit, f"{op}_backward").default
        grad = torch.ones_like(operator(*args))
        torch.library.opcheck(backward, (grad, needs, *args), test_utils=tests[backend == "reference" :])
        seen.append(op)

    seen = []
    monkeypatch.setattr(_ops.Differentiable, "__call__", check)
    function, tensors = CASES[name]
    function(backend, *(torch.nan_to_num(t) for t in tensors))
    assert len(seen) == 1


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_without_a_break(backend):
    """One graph, forward and backward, and no more than one recompilation over batch sizes, an empty batch included."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def scores(q, k, kernel, features, parameters, bias):
        p = K.boundary_cosine(q, k, kernel, (2, 3), backend=backend)
        return p * K.boundary_predictability(features, *parameters.unbind(), bias, groups=2, backend=backend)

    graph = torch.compile(scores, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for batch in (5, 7, 0):
        tensors = (normal(batch, 6, 8), normal(batch, 6, 8, seed=1), normal(8, 3, 3), normal(batch, 4, 2, 3))
        leaves = [t.requires_grad_() for t in (*tensors, normal(3, 4), normal(1))]
        results = []
        for function in (graph, scores):
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        frames.append(counter.frame_count)
    assert frames[-1] - frames[0] <= 1, f"graphs after each call: {frames}"
