"""Packings: made from lengths, checked where made by hand, taken by the operators on packed rows."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dcdit_kernels as K
from dcdit_kernels import Packing, _library, _ops

LENGTHS = [[3, 0, 5, 1], [0, 0], [4], []]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton", *["native"] * (DEVICE == "cpu")]  # native adaLN is for CPUs


def fields(packing):
    return {field.name: getattr(packing, field.name) for field in dataclasses.fields(packing)}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Packing):
        return all(same(x, y) for x, y in zip(fields(a).values(), fields(b).values(), strict=True))
    return a == b


@pytest.mark.parametrize("lengths", LENGTHS)
def test_from_lengths_and_offsets(lengths):
    packing = Packing.from_lengths(lengths)
    assert packing.sample_index.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert packing.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert packing.lengths.tolist() == lengths and packing.exact
    assert (packing.batch_size, packing.capacity) == (len(lengths), sum(lengths))
    assert packing.max_seqlen == max(lengths, default=0)
    assert same(packing, Packing.from_lengths(torch.tensor(lengths, dtype=torch.int64)))
    assert same(packing, Packing.from_cu_seqlens(packing.cu_seqlens.long()))
    assert same(packing, Packing(**fields(packing)))
    spare = Packing.from_cu_seqlens(packing.cu_seqlens, 9, packing.capacity + 2)
    assert spare.sample_index.tolist() == [*packing.sample_index.tolist(), -1, -1]
    assert not spare.exact and spare.max_seqlen == 9 and same(spare, Packing(**fields(spare)))


@pytest.mark.parametrize("lengths", [5, [3, -1], [1.5], torch.tensor([2.5]), torch.tensor([[2]])])
def test_bad_lengths_are_named(lengths):
    with pytest.raises(ValueError, match="lengths must"):
        Packing.from_lengths(lengths)


def plan_of(seed, grid, nearest, capacity):
    prob = torch.rand(3, math.prod(grid), generator=torch.Generator().manual_seed(seed))
    prob[1] = 0.2  # an empty sample
    return K.plan_chunks(prob, grid, 0.2, nearest=nearest, capacity=capacity)


PLANS = [((4, 5), "2d"), ((20,), "previous"), ((1, 7), "1d"), ((2, 3, 4), "3d"), ((1, 1), "2d")]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_every_plan_is_valid_and_no_edit_of_one_number_is(data, seed):
    grid, nearest = data.draw(st.sampled_from(PLANS))
    plan = plan_of(seed, grid, nearest, data.draw(st.sampled_from([None, 4, 100])))
    assert same(plan, K.ChunkPlan(**fields(plan)))
    names = [name for name, tensor in fields(plan).items() if isinstance(tensor, torch.Tensor) and tensor.numel()]
    name = data.draw(st.sampled_from(sorted(set(names) - {"overflow"})))
    edited = getattr(plan, name).clone()
    place = data.draw(st.integers(0, edited.numel() - 1))
    value = data.draw(st.sampled_from([-(2**31), -2, -1, 0, 1, 2, 3, 59, 60, 100, 2**31 - 1]))
    if edited[place] == value:
        return
    if name == "token_index" and 0 <= value < plan.nearest.numel() and plan.nearest[value] == place:
        return  # the row may stand at any of the cells that it refills
    edited[place] = value
    with pytest.raises(ValueError, match=r"ChunkPlan: \w+\[\d+\] must be .*, got -?\d+$"):
        dataclasses.replace(plan, **{name: edited})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"capacity": 7}, r"sample_index must have shape \(7\)"),
        ({"batch_size": 2}, r"cu_seqlens must have shape \(3\)"),
        ({"max_seqlen": 1}, r"cu_seqlens\[1\] must be at most max_seqlen, 1, above the one before, got"),
        ({"grid": (2, 5)}, r"nearest must have shape \(30\)"),
        ({"nearest": torch.zeros(60)}, "nearest must be int32, got torch.float32"),
        ({"nearest": torch.zeros(120, dtype=torch.int32)[::2]}, r"nearest must be contiguous, got strides \(2,\)"),
        (
            {"nearest": torch.zeros(60, dtype=torch.int32, device="meta")},
            "nearest must be on .* as cu_seqlens is, got me",
        ),
        ({"overflow": torch.tensor(-1, dtype=torch.int32)}, r"overflow\[0\] must be 0 or more, got -1"),
    ],
)
def test_edits_are_named(edit, message):
    plan = plan_of(0, (4, 5), "2d", None)
    with pytest.raises((TypeError, ValueError), match=f"ChunkPlan: {message}"):
        dataclasses.replace(plan, **edit)


def test_exact_is_checked():
    with pytest.raises(
        ValueError, match=r"Packing: cu_seqlens\[2\] must be the capacity, 6, of an exact packing, got 5"
    ):
        dataclasses.replace(Packing.from_cu_seqlens(torch.tensor([0, 2, 5]), capacity=6, max_seqlen=3), exact=True)


def test_packings_move():
    plan = plan_of(0, (4, 5), "2d", None)
    assert same(plan.to("cpu"), plan)
    assert plan.to("meta").cu_seqlens.is_meta and plan.to("meta").grid == plan.grid
    if torch.cuda.is_available():
        pinned = plan.pin_memory()
        assert pinned.nearest.is_pinned() and same(pinned.to("cuda", non_blocking=True).to("cpu"), plan)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packing_made_without_gradients_serves_training(backend):
    with torch.inference_mode():
        packing = Packing.from_lengths([3, 0, 4], DEVICE)
        prob = torch.rand(2, 9, device=DEVICE)
        plan = K.plan_chunks(prob, (3, 3))
        moved = plan.to(DEVICE)
    x, shift = torch.randn(7, 8, device=DEVICE, requires_grad=True), torch.randn(3, 8, device=DEVICE)
    h = torch.randn(2, 9, 8, device=DEVICE, requires_grad=True)
    rows = torch.randn(plan.capacity, 8, device=DEVICE, requires_grad=True)
    with K.use_backend(backend):
        K.adaln_modulate(x, shift, shift, packing).sum().backward()
        for own in (plan, moved):
            K.chunk(h, own).sum().backward()
            K.pack_rows(h.flatten(0, 1), own.token_index).sum().backward()
            K.dechunk(rows, prob.clone(), own).sum().backward()


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_modulation_takes_any_packing(backend, lengths, spare):
    """Against the formula in float64, rows past the live ones poisoned."""
    packing = Packing.from_cu_seqlens(Packing.from_lengths(lengths, DEVICE).cu_seqlens, 9, sum(lengths) + spare)
    dtype = torch.float32 if backend == "triton" else torch.float64
    x, y = torch.randn(2, packing.capacity, 24, dtype=dtype, device=DEVICE)
    x[sum(lengths) :] = y[sum(lengths) :] = math.nan
    gate, shift, scale = torch.randn(3, len(lengths), 24, dtype=dtype, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, y, gate, shift, scale)]
    outs = K.gate_residual_modulate(*leaves, packing, backend=backend)
    weights = [torch.linspace(-1, 2, o.numel(), dtype=dtype, device=DEVICE).view(o.shape) for o in outs]
    grads = torch.autograd.grad(
        sum((o * w).sum() for o, w in zip(outs, weights, strict=True)),
        leaves,
        allow_unused=True,
        materialize_grads=True,
    )

    exact = [t.detach().double().requires_grad_() for t in leaves]
    parts, start = [], 0
    for b, length in enumerate(lengths):
        own = slice(start, start + length)
        total = exact[0][own] + exact[2][b] * exact[1][own]
        centred = total - total.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        parts.append(torch.stack([total, normed * (1 + exact[4][b]) + exact[3][b]]))
        start += length
    tail = torch.zeros(2, spare, 24, dtype=torch.float64, device=DEVICE)
    want = torch.cat([*parts, tail], dim=1)
    total = sum((o * w).sum() for o, w in zip(want, weights, strict=True))
    wanted = [torch.zeros_like(t) for t in exact]
    if total.requires_grad:
        wanted = torch.autograd.grad(total, exact, allow_unused=True, materialize_grads=True)
    tolerance = {"rtol": 1e-5, "atol": 3e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-11}
    for got, exact_value in zip((*outs, *grads), (*want, *wanted), strict=True):
        torch.testing.assert_close(got.double(), exact_value, **tolerance)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("lengths", [*LENGTHS, [70, 33]])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_smoothing_takes_any_packing(backend, lengths, spare):
    """A probability for each row: against the recurrence in float64, rows past the live ones poisoned."""
    live = sum(lengths)
    packing = Packing.from_cu_seqlens(Packing.from_lengths(lengths, DEVICE).cu_seqlens, 99, live + spare)
    dtype = torch.float32 if backend == "triton" else torch.float64
    x = torch.randn(packing.capacity, 40, dtype=dtype, device=DEVICE)
    prob = torch.rand(packing.capacity, dtype=dtype, device=DEVICE)
    prob[::5] = 1.0  # clamped, without a gradient
    x[live:] = prob[live:] = math.nan
    leaves, exact = ([t.to(kind).requires_grad_() for t in (x, prob)] for kind in (dtype, torch.float64))
    out = K.ema_smooth(*leaves, packing, backend=backend)
    weight = torch.linspace(-1, 2, out.numel(), dtype=dtype, device=DEVICE).view(out.shape)
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    rows, start = [], 0
    for length in lengths:
        for r in range(start, start + length):
            p = exact[1][r].clamp(1e-4, 1 - 1e-4)
            rows.append(exact[0][r] if r == start else p * exact[0][r] + (1 - p) * rows[-1])
        start += length
    want = torch.stack([*rows, *[torch.zeros_like(exact[0][0])] * spare]) if live + spare else exact[0]
    wanted = [torch.zeros_like(t) for t in exact]
    if live:
        wanted = torch.autograd.grad((want * weight.double()).sum(), exact)
    for got, exact_value in zip((out, *grads), (want, *wanted), strict=True):
        torch.testing.assert_close(got.double(), exact_value, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-11)
    with pytest.raises(ValueError, match=r"ema_smooth: boundary_prob must have shape \(\d+\), got \(1, \d+\)"):
        K.ema_smooth(x, prob[None], packing)


def test_attention_takes_any_packing():
    packing = Packing.from_lengths([3, 0, 4])
    q, k, v = torch.randn(3, 7, 2, 8, dtype=torch.float64)
    lengths = packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
    got = K.varlen_attention(q, k, v, *lengths, exact=packing.exact)
    for own in (slice(0, 3), slice(3, 7)):
        part = (t[own].transpose(0, 1) for t in (q, k, v))
        want = torch.nn.functional.scaled_dot_product_attention(*part).transpose(0, 1)
        torch.testing.assert_close(got[own], want)


def test_the_docstring_names_every_field():
    for kind in (Packing, K.ChunkPlan):
        own = [field.name for field in dataclasses.fields(kind) if field.name in kind.__annotations__]
        for name in set(own) - {"grid"}:
            assert re.search(rf"`{name}`", kind.__doc__), name


def modulate_and_smooth(x, y, prob, gate, shift, scale, cu_seqlens, backend=None):
    """Every operator that takes a packing without a plan."""
    packing = Packing.from_cu_seqlens(cu_seqlens, 9, x.shape[0])
    x, normed = K.gate_residual_modulate(x, y, gate, shift, scale, packing, backend=backend)
    normed = K.adaln_modulate(normed, shift, scale, packing, backend=backend)
    return K.gate_residual(x, K.ema_smooth(normed, prob, packing, backend=backend), gate, packing, backend=backend)


def rows_and_modulators(lengths, spare=2):
    packing = Packing.from_lengths(lengths, DEVICE)
    x, y = torch.randn(2, packing.capacity + spare, 8, device=DEVICE)
    modulators = torch.randn(3, len(lengths), 8, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, y, torch.rand(len(x), device=DEVICE), *modulators)]
    return leaves, packing.cu_seqlens


def test_packings_in_a_graph():
    """One graph for every number of rows and samples, an empty batch included."""
    torch._dynamo.reset()
    compiled = torch.compile(modulate_and_smooth, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([3, 0, 5], [2, 2, 2, 9], [0, 0]):
        leaves, cu_seqlens = rows_and_modulators(lengths)
        results = []
        for function in (compiled, modulate_and_smooth):
            out = function(*leaves, cu_seqlens)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_packings(backend, monkeypatch):
    """Schemas and fakes describe the operators on a packing that is no plan."""
    seen = set()

    def check(operator, _, **inputs):
        own = backend if backend in operator.backends else "reference"
        tensors = [inputs[name] for name in operator.tensors]
        plan = _library.flat_plan(inputs["plan"])
        args = (*tensors, *plan, *(inputs[name] for name in operator.constants), own)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.dcdit, operator.name).default, args, test_utils=tests)
        outs = getattr(torch.ops.dcdit, operator.name)(*args)
        grads = [torch.ones_like(out) for out in (outs if isinstance(outs, tuple) else (outs,))]
        needs = [tensor is not None for tensor in tensors]
        backward = getattr(torch.ops.dcdit, f"{operator.name}_backward").default
        torch.library.opcheck(backward, (*grads, needs, *args), test_utils=tests)
        seen.add(operator.name)
        return outs

    monkeypatch.setattr(_ops.Differentiable, "__call__", check)
    leaves, cu_seqlens = rows_and_modulators([3, 0, 5])
    modulate_and_smooth(*(leaf.detach() for leaf in leaves), cu_seqlens)
    assert seen == {"adaln_modulate", "gate_residual", "gate_residual_modulate", "ema_smooth"}
