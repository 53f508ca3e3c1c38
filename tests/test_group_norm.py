"""GroupNorm–SiLU against the reference in float64: C++, and Triton in its interpreter or on a GPU if there is one."""

import math

import pytest
import torch
import torch.nn.functional as F

import dcdit_kernels as K
from dcdit_kernels.testing import complaint, evaluate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ["triton"] if DEVICE == "cuda" else ["native", "triton"]
BACKENDS = ["reference", *KERNELS]
# (B, C, H, W), groups: groups of one, three, nine and 36 channels; one group; widths of no multiple of eight.
CASES = [
    ((2, 32, 5, 7), 32),
    ((2, 96, 7, 9), 32),
    ((1, 288, 1, 40), 32),
    ((1, 144, 5, 7), 4),
    ((3, 70, 9, 8), 1),
    ((1, 72, 9, 1), 8),
    ((2, 264, 3, 3), 2),
    ((2, 1, 3, 3), 1),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def inputs(shape, cond=True):
    """x far from zero and of a level for each channel; cond with rows apart, as one of several modulators; a bias."""
    batch, channels = shape[:2]
    level = torch.arange(channels, device=DEVICE).view(-1, 1, 1) / channels
    x = (normal(*shape) * 2 + 5 + level).contiguous(memory_format=torch.channels_last)
    tensors = x, 1 + normal(channels, seed=1) / 2, normal(channels, seed=2)
    added = normal(batch, 2 * channels, seed=3)[:, ::2], normal(channels, seed=4)
    return (*tensors, *added) if cond else tensors


def value_and_gradients(backend, groups, tensors, dtype=None, eps=1e-5):
    call = lambda x, weight, bias, *cond: K.group_norm_silu(  # noqa: E731
        x, weight, bias, groups, *cond, eps=eps, backend=backend
    )
    return evaluate(call, tensors, dtype)


def assert_within_budget(tensors, groups, dtype=torch.float32, backend="triton"):
    """Within twice the reference's own error in the same dtype plus rounding of the longest sum."""
    drawn = [t.to(dtype) for t in tensors]
    want = value_and_gradients("reference", groups, drawn, torch.float64)
    eager, got = (value_and_gradients(name, groups, drawn) for name in ("reference", backend))
    assert complaint(got, want, eager, tensors[0][:, : tensors[0].shape[1] // groups].numel()) is None
    assert all(g.dtype == e.dtype == dtype for g, e in zip(got, eager, strict=True))
    for features in got[:2]:
        assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("cond", [True, False], ids=["cond", "plain"])
@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        *((torch.float32, case) for case in CASES),
        *((half, CASES[i]) for half in (torch.bfloat16, torch.float16) for i in (1, 3, 4)),
    ],
    ids=str,
)
def test_against_float64(dtype, case, cond, backend, poisoned, launches, gpu_arithmetic):
    """No races; every element is written."""
    shape, groups = case
    assert_within_budget(inputs(shape, cond), groups, dtype, backend)


@pytest.mark.skipif("native" not in KERNELS, reason="for tensors on a CPU")
def test_pieces_and_threads(poisoned):
    """C++ takes these channels in two pieces, and the cells in two runs; how many threads share them changes no bit."""
    tensors, runs, threads = inputs((3, 384, 17, 17)), [], torch.get_num_threads()
    assert_within_budget(tensors, 32, backend="native")
    for count in (1, 3):
        torch.set_num_threads(count)
        runs.append(value_and_gradients("native", 32, tensors))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.fixture
def small_tiles(monkeypatch):
    """Grids of several tiles, slabs of several tiles, and steps inside a tile."""
    for name, cells in (("CELLS", 32), ("STEP", 16)):
        monkeypatch.setattr(f"dcdit_kernels.triton.group_norm.{name}", cells)


@pytest.mark.parametrize("cond", [True, False], ids=["cond", "plain"])
def test_slabs(cond, poisoned, launches, small_tiles):
    """306 cells are four slabs of two tiles and one of 50 cells; 48 channels are two tiles, and the second is short."""
    assert_within_budget(inputs((2, 48, 17, 18), cond), 16)
    if launches is not None:
        by_slab = "group_norm_moments", "group_norm_sums", "group_norm_silu_backward"
        moments, sums, backward = ((name, 2 * 2 * 5) for name in by_slab)
        assert launches == [moments, ("group_norm_silu_forward", 2 * 2 * 10), moments, sums, backward]


def test_a_sample_gets_the_same_bits_in_any_batch(small_tiles, monkeypatch):
    """Whether a program of the backward has one of its slabs or all three."""
    monkeypatch.setattr("dcdit_kernels.triton.group_norm.FILL", 6)
    x, weight, bias, cond, x_bias = inputs((3, 48, 9, 10))
    runs = []
    for samples in (slice(1, 2), slice(0, 3)):
        leaves = [t.detach().requires_grad_() for t in (x[samples], cond[samples])]
        out = K.group_norm_silu(leaves[0], weight, bias, 16, leaves[1], x_bias, backend="triton")
        grads = torch.autograd.grad((out * (x[samples] - 5)).sum(), leaves)
        runs.append([t[len(t) // 2] for t in (out, *grads)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_deviation_far_below_the_mean(backend):
    """Statistics do not cancel: a mean of 1000 deviations costs three digits of x and no more."""
    x, *rest = inputs((1, 32, 6, 6))
    x = x.sub(x.mean()) + 1000
    want = value_and_gradients("reference", 4, (x, *rest), torch.float64)
    got = value_and_gradients(backend, 4, (x, *rest))
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=2e-4, atol=2e-4 * float(w.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sample_and_group(backend):
    x, *rest = inputs((3, 24, 4, 5))
    clean = K.group_norm_silu(x, *rest[:2], 8, *rest[2:], backend=backend)
    x[1, 4, 2, 2] = math.nan
    got = K.group_norm_silu(x, *rest[:2], 8, *rest[2:], backend=backend)
    bad = torch.zeros_like(x, dtype=torch.bool)
    bad[1, 3:6] = True
    assert got[bad].isnan().all() and torch.equal(got[~bad], clean[~bad])


@pytest.mark.parametrize("backend", KERNELS)
def test_runs_agree_bit_for_bit_and_strides_change_nothing(backend):
    tensors = inputs((2, 96, 7, 9))
    strided = normal(2, 96, 7, 18)[..., ::2].copy_(tensors[0])
    runs = [value_and_gradients(backend, 32, ts) for ts in (tensors, tensors, (strided, *tensors[1:]))]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_layout_and_value_of_every_back_end(backend):
    """channels-last out of any layout; PyTorch's own GroupNorm and SiLU."""
    x, weight, bias, cond, x_bias = inputs((2, 12, 3, 5))
    want = F.silu(F.group_norm(x + (cond + x_bias)[:, :, None, None], 4, weight, bias))
    for features in (x, x.contiguous()):
        got = K.group_norm_silu(features, weight, bias, 4, cond, x_bias, backend=backend)
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_features(backend):
    """Parameters learn where the features need no gradient."""
    x, *rest = inputs((2, 12, 3, 5))
    want = value_and_gradients(backend, 4, (x, *rest))[2:]
    leaves = [t.clone().requires_grad_() for t in rest]
    out = K.group_norm_silu(x, *leaves[:2], 4, *leaves[2:], backend=backend)
    grad = torch.linspace(-1, 2, out.numel(), device=DEVICE).bfloat16().to(out.dtype).view(out.shape)
    for got, w in zip(torch.autograd.grad((out * grad).sum(), leaves), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x = torch.zeros(0, 8, 2, 3, device=DEVICE, requires_grad=True)
    weight, cond = torch.ones(8, device=DEVICE, requires_grad=True), torch.zeros(0, 8, device=DEVICE)
    out = K.group_norm_silu(x, weight, weight, 4, cond, backend=backend)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape and weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("cond", [True, False], ids=["cond", "plain"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, cond):
    """Schemas and fakes describe the operator and its backward, the layout of the features included."""
    tensors = inputs((2, 12, 3, 5), cond)
    args = (*tensors, *[None] * (0 if cond else 2), [], [], 4, 1e-5, backend)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dcdit.group_norm_silu.default, args, test_utils=tests)
    needs, grad = [True, True, True, cond, cond], torch.ones_like(tensors[0])
    # The schema test runs below autograd, by which the reference makes its gradients.
    backward = torch.ops.dcdit.group_norm_silu_backward.default
    torch.library.opcheck(backward, (grad, needs, *args), test_utils=tests[backend == "reference" :])
    assert backward(grad, needs, *args)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend):
    """One graph forward and backward, for every batch, the empty one included."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(x, weight, bias, cond):
        return K.group_norm_silu(x, weight, bias, 4, cond, backend=backend)

    graph = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for batch in (4, 2, 0):
        leaves = [t.detach().requires_grad_() for t in inputs((batch, 12, 3, 5), cond=False)]
        leaves.append(normal(batch, 12).requires_grad_())
        results = []
        for function in (graph, block):
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[-1] - frames[0] <= 1, f"graphs after each call: {frames}"


def test_says_what_does_not_fit():
    x, weight, bias, cond, x_bias = inputs((2, 12, 3, 5))
    for error, words, call in (
        (ValueError, "12 channels do not fit 5 groups", lambda: K.group_norm_silu(x, weight, bias, 5)),
        (ValueError, r"x must have shape \(any, any, any, any\), got \(2, 12, 15\)",
         lambda: K.group_norm_silu(x.flatten(2), weight, bias, 4)),
        (ValueError, r"weight must have shape \(12\), got \(3,\)", lambda: K.group_norm_silu(x, weight[:3], bias, 4)),
        (ValueError, r"cond must have shape \(2, 12\), got \(1, 12\)",
         lambda: K.group_norm_silu(x, weight, bias, 4, cond[:1])),
        (ValueError, r"x_bias must have shape \(12\), got \(2,\)",
         lambda: K.group_norm_silu(x, weight, bias, 4, cond, x_bias[:2])),
        (ValueError, "eps must not be negative", lambda: K.group_norm_silu(x, weight, bias, 4, eps=-1)),
        (TypeError, "x must be float16", lambda: K.group_norm_silu(x.long(), weight, bias, 4)),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()
