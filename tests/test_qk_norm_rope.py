"""qk_norm_rope against its formula in float64, written out by stream and row: on every back-end, joined or not."""

import math

import pytest
import torch

import dcdit_kernels as K
from dcdit_kernels import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [(norm, pairing) for norm in ("rms", "layer", "none") for pairing in ("interleaved", "half")]


def by_hand(x, weight, norm, eps, pairing, cos, sin, position):
    """One row's heads (heads, head_dim), the rotation as a complex product."""
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if norm != "none":
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        x = x if weight is None else x * weight
    if cos is None or position < 0:
        return x
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if pairing == "interleaved" else x.unflatten(-1, (2, half)).mT
    turned = torch.complex(pairs[..., 0], pairs[..., 1]) * torch.complex(cos[position], sin[position])
    pairs = torch.view_as_real(turned)
    return (pairs if pairing == "interleaved" else pairs.mT).flatten(-2)


def draw(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make(lengths, spare, heads, kv_heads, width, norm, dtype, weighted=True):
    """Packings, (q, k) as views of a fused tensor with NaN in spare rows, and weights, of as many streams."""
    streams = []
    for i, (rows, more) in enumerate(zip(lengths, spare, strict=True)):
        packing = Packing.from_cu_seqlens(Packing.from_lengths(rows, DEVICE).cu_seqlens, max(rows), sum(rows) + more)
        fused = draw(packing.capacity, heads + 2 * kv_heads, width, dtype=dtype, seed=i) + 0.3
        fused[sum(rows) :] = math.nan
        q, k, _ = fused.split([heads, kv_heads, kv_heads], 1)
        pair = [draw(width, dtype=dtype, seed=10 + 2 * i + j) for j in range(2)] if norm != "none" else []
        streams.append((packing, [q, k, *pair] if weighted else [q, k, None, None]))
    return streams


def run(streams, tables, norm, pairing, backend, dtype, eps=1e-5):
    """Outputs and the gradients of all tensors."""
    leaves = [[None if t is None else t.detach().to(dtype).requires_grad_() for t in ts] for _, ts in streams]
    cos, sin, position = tables
    (q, k, *weights), plan = leaves[0], streams[0][0]
    second = None
    if len(streams) == 2:
        plan, second = plan.join(streams[1][0]), leaves[1]
    weights = weights or [None, None]
    outs = K.qk_norm_rope(
        q, k, cos, sin, position, *weights, plan, second, norm=norm, eps=eps, pairing=pairing, backend=backend
    )
    flat = [t for ts in leaves for t in ts if t is not None]
    grads = [torch.linspace(-1, 2, o.numel(), device=DEVICE).bfloat16().to(o.dtype).view(o.shape) for o in outs]
    return [*outs, *torch.autograd.grad(outs, flat, grads)]


def expected(streams, tables, norm, pairing, eps=1e-5):
    """By `by_hand`, in float64."""
    leaves = [[None if t is None else t.detach().double().requires_grad_() for t in ts] for _, ts in streams]
    cos, sin, position = tables
    cos, sin = (None, None) if cos is None else (cos.double(), sin.double())
    outs = []
    for which in range(2):
        rows, starts = [], [0] * len(streams)
        for b in range(streams[0][0].batch_size):
            for s, (packing, _) in enumerate(streams):
                weight = leaves[s][2 + which] if len(leaves[s]) > 2 else None
                for _ in range(int(packing.lengths[b])):
                    p = len(rows) if position is None else int(position[len(rows)])
                    rows.append(by_hand(leaves[s][which][starts[s]], weight, norm, eps, pairing, cos, sin, p))
                    starts[s] += 1
        capacity, like = sum(p.capacity for p, _ in streams), leaves[0][which]
        live = torch.stack(rows) if rows else like[:0]
        outs.append(torch.cat([live, like.new_zeros(capacity - len(rows), *like.shape[1:])]))
    flat = [t for ts in leaves for t in ts if t is not None]
    grads = [torch.linspace(-1, 2, o.numel(), device=DEVICE).bfloat16().to(o.dtype).view(o.shape) for o in outs]
    return [*outs, *torch.autograd.grad(outs, flat, grads, allow_unused=True, materialize_grads=True)]


def tables(rows, width, entries=40):
    """cos and sin of no angle in particular, so that a rotation by another is seen; and a position for each row."""
    place = torch.randint(-1, entries, (rows,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return *(draw(entries, width // 2, dtype=torch.float32, seed=20 + i) for i in range(2)), place


CASES = [  # lengths and spare rows of each stream, heads, heads of k, head_dim
    ([[3, 0, 4]], [0], 3, 3, 16),
    ([[3, 0, 4], [5, 2, 0]], [0, 0], 2, 2, 72),
    ([[2, 4], [9, 1]], [3, 2], 4, 2, 12),
    ([[1], [1]], [0, 0], 1, 1, 2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("norm", "pairing"), OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_against_float64(backend, norm, pairing, case, poisoned, launches, gpu_arithmetic):
    """The reference in float64 to its last digits, Triton in float32; spare rows hold NaN and come out zero."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    lengths, spare, *sizes = case
    streams = make(lengths, spare, *sizes, norm, torch.float32)
    given = tables(sum(p.capacity for p, _ in streams), sizes[2])
    got = run(streams, given, norm, pairing, backend, dtype)
    for g, want in zip(got, expected(streams, given, norm, pairing), strict=True):
        assert g.dtype == dtype
        scale = want.abs().max().clamp(min=1)
        assert (g - want).abs().max() <= scale * (1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_half_precision(backend, half, launches, gpu_arithmetic):
    """One rounding of each output and gradient; statistics and rotation are float32."""
    streams = make([[3, 0, 9], [5, 6, 1]], [0, 0], 2, 2, 64, "rms", half)
    given = tables(24, 64)
    got = run(streams, given, "rms", "interleaved", backend, half)
    for g, want in zip(got, expected(streams, given, "rms", "interleaved"), strict=True):
        assert g.dtype == half
        torch.testing.assert_close(g.double(), want, rtol=2**-7, atol=2**-8 * float(want.detach().abs().max()))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_parts_left_out(backend):
    """No weights, no rotation, no packing; without positions a row's number counts."""
    for norm in ("rms", "layer"):
        streams = make([[4, 2]], [0], 2, 1, 8, norm, torch.float32, weighted=False)
        for given in ((None, None, None), (*tables(6, 8)[:2], None)):
            dtype = torch.float32 if backend == "triton" else torch.float64
            got = run(streams, given, norm, "half", backend, dtype)
            for g, want in zip(got, expected(streams, given, norm, "half"), strict=True):
                torch.testing.assert_close(g.double(), want, rtol=2e-6, atol=2e-6)
    q, k = streams[0][1][:2]
    outs = [K.qk_norm_rope(q, k, plan=plan, backend=backend) for plan in (None, streams[0][0])]
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_a_sample_gets_the_same_bits_in_any_batch():
    streams = make([[3, 5, 4], [2, 30, 6]], [0, 0], 3, 3, 16, "rms", torch.float32)
    cos, sin, place = tables(50, 16)
    whole = run(streams, (cos, sin, place), "rms", "half", "triton", torch.float32)
    alone = [
        (Packing.from_lengths([5], DEVICE), [t[3:8] for t in streams[0][1][:2]] + streams[0][1][2:]),
        (Packing.from_lengths([30], DEVICE), [t[2:32] for t in streams[1][1][:2]] + streams[1][1][2:]),
    ]
    leaves = [(p, [t.clone() for t in ts]) for p, ts in alone]
    got = run(leaves, (cos, sin, place[5:40]), "rms", "half", "triton", torch.float32)
    for index in range(2):
        assert torch.equal(got[index], whole[index][5:40])


def test_one_launch_forward_and_one_backward(launches):
    if launches is None:
        pytest.skip("launches are counted in the interpreter")
    streams = make([[3, 5], [2, 30]], [0, 0], 3, 3, 16, "rms", torch.float32)
    run(streams, tables(40, 16), "rms", "half", "triton", torch.float32)
    assert [name for name, _ in launches] == ["qk_norm_rope_forward", "qk_norm_rope_backward"]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nan_stays_in_its_head(backend):
    (_, (q, k, *weights)), *_ = make([[4, 2]], [0], 2, 2, 8, "rms", torch.float32)
    clean = K.qk_norm_rope(q, k, None, None, None, *weights, backend=backend)
    q = q.clone()
    q[2, 1, 3] = math.nan
    got = K.qk_norm_rope(q, k, None, None, None, *weights, backend=backend)
    bad = torch.zeros(6, 2, dtype=torch.bool, device=DEVICE)
    bad[2, 1] = True
    assert got[0][bad].isnan().all() and torch.equal(got[0][~bad], clean[0][~bad]) and torch.equal(got[1], clean[1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_rows(backend):
    streams = make([[0, 0], [0, 0]], [0, 0], 2, 2, 8, "rms", torch.float32)
    got = run(streams, tables(0, 8), "rms", "half", backend, torch.float32)
    assert got[0].shape == (0, 2, 8) and all(g.count_nonzero() == 0 for g in got)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("streams", [1, 2])
def test_opcheck(backend, streams):
    """Schemas and fakes describe the operator and its backward."""
    made = make([[3, 1], [2, 5]][:streams], [0] * streams, 2, 1, 8, "rms", torch.float32)
    plan = made[0][0] if streams == 1 else made[0][0].join(made[1][0])
    (q, k, *weights), second = made[0][1], made[1][1] if streams == 2 else [None] * 4
    cos, sin, place = tables(plan.capacity, 8)
    source = plan.source if streams == 2 else None
    tensors = (q, k, *second[:2], *weights, *second[2:], cos, sin, place, source)
    packed = [plan.cu_seqlens, plan.sample_index], [plan.max_seqlen]
    args = (*tensors, *packed, 1e-5, "rms", "interleaved", backend)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dcdit.qk_norm_rope.default, args, test_utils=tests)
    needs = [t is not None for t in tensors[:8]] + [False] * 4
    grads = [torch.ones_like(o) for o in torch.ops.dcdit.qk_norm_rope(*args)]
    backward = torch.ops.dcdit.qk_norm_rope_backward.default
    torch.library.opcheck(backward, (*grads, needs, *args), test_utils=tests[backend == "reference" :])


def test_compiles_without_a_break():
    """One graph for all numbers of rows, the joined packing made inside."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(first, second, weight, cos, sin, place, cu, other_cu):
        packings = [
            Packing.from_cu_seqlens(ends, 40, rows.shape[0]) for ends, rows in ((cu, first), (other_cu, second))
        ]
        joined = packings[0].join(packings[1])
        other = second, second, weight, weight
        return K.qk_norm_rope(first, first, cos, sin, place, weight, weight, joined, other, backend="triton")

    graph = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for lengths in ([[3, 2], [5, 4]], [[1, 7], [2, 3]], [[4, 6], [30, 9]]):
        ends = [Packing.from_lengths(rows, DEVICE).cu_seqlens for rows in lengths]
        leaves = [draw(sum(rows), 2, 8, dtype=torch.float32, seed=1).requires_grad_() for rows in lengths]
        leaves.append(draw(8, dtype=torch.float32, seed=2).requires_grad_())
        rest = (*tables(sum(map(sum, lengths)), 8), *ends)
        results = []
        for function in (graph, block):
            outs = function(*leaves, *rest)
            results.append([*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), leaves)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[-1] - frames[0] <= 1, f"graphs after each call: {frames}"


def test_source_is_the_order_of_cat():
    """Of exact packings and of packings with spare rows."""
    for spare in (0, 3):
        first, second = (
            Packing.from_cu_seqlens(Packing.from_lengths(rows).cu_seqlens, 9, sum(rows) + spare)
            for rows in ([3, 0, 2], [1, 4, 0])
        )
        joined = first.join(second)
        rows = torch.arange(joined.capacity) + 1
        live = joined.cu_seqlens[-1]
        want = joined.cat(*rows.split([first.capacity, second.capacity]))
        assert torch.equal(rows[joined.source][:live], want[:live])
        assert joined.source.sort().values.tolist() == list(range(joined.capacity))


def test_says_what_does_not_fit():
    (packing, (q, k, w, _)), (other, rest) = make([[4, 2], [3, 3]], [0, 0], 2, 2, 8, "rms", torch.float32)
    joined = packing.join(other)
    cos, sin, place = tables(6, 8)
    for error, words, args, options in (
        (ValueError, "head_dim must be even, got 7", (q[..., :7], k[..., :7]), {}),
        (ValueError, r"k must have shape \(6, any, 8\), got \(5, 2, 8\)", (q, k[:5]), {}),
        (ValueError, r"q must have shape \(6, any, any\), got \(5, 2, 8\)", (q[:5], k[:5]), {"plan": packing}),
        (ValueError, "cos and sin must be given together", (q, k, cos), {}),
        (ValueError, r"cos must have shape \(any, 4\), got \(40, 3\)", (q, k, cos[:, :3], sin[:, :3], place), {}),
        (ValueError, "cos must be contiguous, got strides", (q, k, cos.t().contiguous().t(), sin, place), {}),
        (ValueError, "cos must have a row for each of 6 rows, got 3", (q, k, cos[:3], sin[:3]), {}),
        (TypeError, "cos must be float32 or float64, got torch.bfloat16", (q, k, cos.bfloat16(), sin, place), {}),
        (TypeError, "position must be int32 or int64, got torch.float32", (q, k, cos, sin, place.float()), {}),
        (ValueError, r"position must have shape \(6\), got \(5,\)", (q, k, cos, sin, place[:5]), {}),
        (ValueError, "cos gets no gradient", (q, k, cos.clone().requires_grad_(), sin, place), {}),
        (ValueError, r"q_weight must have shape \(8\), got \(4,\)", (q, k, None, None, None, w[:4]), {}),
        (ValueError, "q_weight needs a norm, got norm='none'", (q, k, None, None, None, w), {"norm": "none"}),
        (ValueError, r"norm must be one of .*, got 'group'", (q, k), {"norm": "group"}),
        (ValueError, r"pairing must be one of .*, got 'odd'", (q, k), {"pairing": "odd"}),
        (ValueError, "second needs a JoinedPacking as plan, got Packing", (q, k), {"plan": packing, "second": rest}),
        (ValueError, "q must have 12 rows, or second be given", (q, k), {"plan": joined}),
        (ValueError, "second must hold q and k", (q, k), {"plan": joined, "second": rest[:1]}),
        (ValueError, "second_k must be torch.float32", (q, k), {"plan": joined, "second": (rest[0], rest[1].half())}),
        (TypeError, "q must be float16", (q.long(), k), {}),
    ):  # fmt: skip
        with pytest.raises(error, match=f"qk_norm_rope: {words}"):
            K.qk_norm_rope(*args, **options)
