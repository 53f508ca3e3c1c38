"""Triton's kernels against the reference in float64: in the interpreter here, on the device where there is a GPU."""

import math

import pytest
import torch

import dcdit_kernels as K
from bench.cases import Case
from bench.gate import check
from bench.measure import build
from dcdit_kernels import _library, _ops
from dcdit_kernels.testing import EXAMPLES, Scene, compare, evaluate, make_scene

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Aligned, ragged rows, ragged rows and width; then the shares that need a case of their own.
CASES = [((4, 8), 64, 0.25), ((5, 7), 64, 0.25), ((5, 7), 72, 0.25)]


CASES += [((5, 7), 40, share) for share in (0.0, 1.0, "one")] + [((1, 9), 40, 0.5)]


CASES += [((5, 7), 264, 0.25)]  # rows in pieces, the last one ragged


def make_plan(grid, share, **options):
    scene = make_scene(grid, 16, share, device=DEVICE, **options)
    return scene.prob, scene.plan


# In test_boundary_triton.py, test_group_norm.py and test_qk_norm_rope.py.
ELSEWHERE = {"boundary_cosine", "boundary_predictability", "group_norm_silu", "qk_norm_rope"}


def examples(grid, width, share):
    """name → example, of the operators that Triton has."""
    scene = make_scene(grid, width, share, device=DEVICE)
    with_triton = [name for name in EXAMPLES if "triton" in _ops.OPERATORS[name.split(",")[0]].backends]
    names = [name for name in with_triton if name not in ELSEWHERE]
    return {name: EXAMPLES[name](scene) for name in names}


def outputs_and_gradients(function, backend, tensors, dtype=None):
    return evaluate(lambda *leaves: function(backend, *leaves), tensors, dtype)


@pytest.mark.parametrize(
    ("dtype", "grid", "width", "share"),
    [
        *((torch.float32, *case) for case in CASES),
        *((half, *CASES[i]) for half in (torch.bfloat16, torch.float16) for i in (2, 5, 6)),
        (torch.bfloat16, *CASES[7]),
    ],
    ids=str,
)
def test_against_float64(dtype, grid, width, share, poisoned, launches, gpu_arithmetic):
    """Within twice the error of the reference in the same dtype plus rounding of the longest sum; no races."""
    for name, example in examples(grid, width, share).items():
        assert compare(example, "triton", dtype, math.prod(grid)) is None, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("group", ["chunk", "dechunk", "modulate"])
def test_half_precision_passes_the_gate(group, dtype, gpu_arithmetic):
    """As the benches hold it against float64, before they time it."""
    problem = build(Case(group, "digits", 14, 3, 0.25, backward=True, dtype=dtype), DEVICE)
    assert "triton" in problem.variants, problem.absent
    assert check(problem)["triton"] is None


@pytest.mark.parametrize(
    ("grid", "nearest"), [((20, 24), "2d"), ((1, 150), "2d"), ((150,), "previous"), ((3, 9, 10), "3d")], ids=str
)
def test_windows_of_every_grid(grid, nearest, launches):
    """Grids wider than the window of the smoothing, few tokens and many."""
    for share in (0.05, 0.5):
        prob, plan = make_plan(grid, share, batch=2, nearest=nearest)
        x = Scene(plan, prob, 16).packed()
        function = lambda b, *t, plan=plan: K.dechunk(*t, plan, None, 0.7, backend=b)  # noqa: E731
        want = outputs_and_gradients(function, "reference", (x, prob), torch.float64)
        got = outputs_and_gradients(function, "triton", (x, prob), torch.float32)
        for w, g in zip(want, got, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=3e-6, atol=3e-5)


def test_strides_change_nothing():
    for name, example in examples((5, 7), 24, 0.25).items():
        tensors = list(example.tensors.values())
        strided, contiguous = (
            outputs_and_gradients(example.function, "triton", ts) for ts in (tensors, [t.contiguous() for t in tensors])
        )
        assert any(not t.is_contiguous() for t in tensors), name
        for a, b in zip(strided, contiguous, strict=True):  # a GPU may add in another order
            assert a.dtype == b.dtype and (a - b).abs().max() <= 1e-5 * b.abs().max(), name


def test_runs_agree_bit_for_bit():
    for name, example in examples((5, 7), 24, 0.5).items():
        tensors = list(example.tensors.values())
        first, second = (outputs_and_gradients(example.function, "triton", tensors) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(backend):
    """Schemas and fakes describe the operators."""
    seen = set()

    def check(operator, backend, **inputs):
        op, tensors = operator.name, [inputs[t] for t in operator.tensors]
        plan = _library.flat_plan(inputs.get("plan"))
        args = (*tensors, *plan, *(inputs[c] for c in operator.constants), backend)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.dcdit, op).default, args, test_utils=tests)
        outs = getattr(torch.ops.dcdit, op)(*args)
        grads = [torch.ones_like(o) for o in (outs if isinstance(outs, tuple) else (outs,))]
        needs = [t is not None and t.is_floating_point() for t in tensors]
        backward = getattr(torch.ops.dcdit, f"{op}_backward").default
        torch.library.opcheck(backward, (*grads, needs, *args), test_utils=tests)
        seen.add(op)
        return outs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ops.Differentiable, "__call__", check)
        for example in examples((5, 6), 8, 0.5).values():
            example.function(backend, *(torch.nan_to_num(t) for t in example.tensors.values()))
    assert seen == {"chunk", "adaln_modulate", "gate_residual", "gate_residual_modulate", "ema_smooth", "dechunk"}


def test_compiles_without_a_break():
    """One graph forward and backward; one recompilation at most over varying T, an empty batch included."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(h, prob, residual, modulators):
        plan = K.plan_chunks(prob, (5, 7), 0.1)
        gate, shift, scale = modulators.chunk(3, 1)
        x = K.chunk(h, plan)
        x, normed = K.gate_residual_modulate(x, K.adaln_modulate(x, shift, scale, plan), gate, shift, scale, plan)
        x = K.gate_residual(x, K.ema_smooth(normed, prob, plan), gate, plan)
        return K.dechunk(x, prob, plan, residual)

    graph = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for share in (0.5, 0.3, 0.0, 0.8, 0.2):
        prob = torch.rand(2, 35)
        prob = torch.where(prob < share, 0.9 - 0.1 * prob, 0.1 + 0.1 * prob).to(DEVICE)
        tensors = [torch.randn(*s, device=DEVICE) for s in ((2, 35, 8), (2, 35, 8), (2, 24))]
        leaves = [t.requires_grad_() for t in (tensors[0], prob, tensors[1], tensors[2])]
        results = []
        for function in (graph, block):
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[-1] - frames[0] <= 1, f"graphs after each call: {frames}"


def test_backward_skips_what_nobody_asked_for():
    _, plan = make_plan((5, 6), 0.5)
    h, pos = torch.randn(3, 30, 8, device=DEVICE, requires_grad=True), torch.randn(30, 8, device=DEVICE)
    K.chunk(h, plan, pos, backend="triton").sum().backward()
    assert torch.equal(h.grad, plan.boundary_mask[..., None].expand_as(h).float())
    assert pos.grad is None


@pytest.mark.skipif(DEVICE == "cuda", reason="says why a CPU tensor cannot run; here it can")
def test_reasons(monkeypatch):
    prob, plan = make_plan((5, 6), 0.5)
    with pytest.raises(K.BackendError, match="bfloat16"):
        K.ema_smooth(torch.randn(plan.capacity, 8).bfloat16(), prob, plan, backend="triton")
    with pytest.raises(K.BackendError, match="float64"):
        K.ema_smooth(torch.randn(plan.capacity, 8).double(), prob, plan, backend="triton")
    monkeypatch.setattr("dcdit_kernels._triton_support._interpreted", lambda: False)
    monkeypatch.setattr(_ops, "_known", {})
    with pytest.raises(K.BackendError, match="need a GPU, got cpu"):
        K.ema_smooth(torch.randn(plan.capacity, 8), prob, plan, backend="triton")
    assert "ema_smooth: reference" in K.explain("ema_smooth", torch.randn(1))
