"""plan_chunks in C++ against the reference, bit for bit: as the CPU runs it, and as a block of CUDA threads would."""

import dataclasses
import importlib.util
import math
import re
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dcdit_kernels as K
from dcdit_kernels import extension, reference
from dcdit_kernels._plan_input import forced_cells

pytestmark = pytest.mark.skipif(extension.load_error is not None, reason=f"_C is not built: {extension.load_error}")
BLOCKS = [1, 64]  # threads of a sample's block: the CPU's, and many as on CUDA
GRIDS = [(7, 9), (1, 13), (5, 1), (8, 8), (3, 70), (2, 3, 4), (5, 1, 6), (3, 4, 5), (17,), (1,), (1, 1)]
KINDS = {1: ("1d", "previous"), 2: ("2d", "1d", "previous"), 3: ("3d", "1d", "previous")}


def assert_same(got, want):
    for field in dataclasses.fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), (field.name, a, b)
        else:
            assert a == b and type(a) is type(b), (field.name, a, b)


def masks(grid, batch, gen):
    """Samples (batch, L) of probabilities: each mask as empty, full, ... once, and random ones of any share."""
    cells = math.prod(grid)
    place = torch.stack(torch.unravel_index(torch.arange(cells), grid))
    share = torch.rand(batch, 1, generator=gen)
    kept = torch.rand(batch, cells, generator=gen) < share
    shapes = [
        torch.zeros(cells, dtype=torch.bool),
        torch.ones(cells, dtype=torch.bool),
        torch.arange(cells) == cells // 2,
        torch.arange(cells) % max(cells - 1, 1) == 0,  # both ends
        place.sum(0) % 2 == 0,  # a checkerboard: every refilled cell ties
        place[-1] % 3 == 0,  # stripes
        place[0] % 3 == 1,
    ]
    return torch.cat([torch.stack(shapes), kept])


@settings(max_examples=120, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_bit_identical_to_the_reference(data, seed):
    gen = torch.Generator().manual_seed(seed)
    grid = data.draw(st.one_of(st.sampled_from(GRIDS), st.tuples(st.integers(1, 20), st.integers(1, 20))))
    cells, batch = math.prod(grid), data.draw(st.integers(0, 5))
    kept = masks(grid, batch, gen)
    batch = kept.shape[0]
    levels = data.draw(st.sampled_from([1, 3, 1000]))  # few levels: the drop ends among equals
    value = torch.randint(0, levels, kept.shape, generator=gen) / levels
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    threshold = data.draw(st.sampled_from([0.5, 0.7, 0.0]))
    high = threshold + (1 - threshold) * (0.1 + 0.9 * value)
    prob = torch.where(kept, high, threshold * value).to(dtype)
    drop = data.draw(st.sampled_from([0.0, 0.3, 0.999]))
    if data.draw(st.booleans()):
        drop = torch.rand(batch, generator=gen, dtype=torch.float64) * 0.9999
    capacity = data.draw(st.one_of(st.none(), st.integers(0, batch * cells + 5)))
    longest = data.draw(st.one_of(st.none(), st.integers(0, cells + 2)))
    kind = data.draw(st.sampled_from(KINDS[len(grid)]))
    keep, ban = data.draw(st.sampled_from([(0, 0), (0.2, 0), (0, 0.3), (0.9, 0.5)]))
    ban = torch.rand(kept.shape, generator=gen) < ban if ban else None
    keep = torch.rand(kept.shape, generator=gen) < keep if keep else None
    keep = keep if keep is None or ban is None else keep & ~ban
    budget, rows = data.draw(st.sampled_from([(None, None), (1.0, None), (0.4, None), (None, 0.3), (None, "each")]))
    prob[:, [0, -1]] = data.draw(st.sampled_from([1.0, 0.6]))  # as a router forces them, or not
    forced = forced_cells(prob, keep, ban, True).sum(1)
    if budget is not None:
        budget = max(int(budget * batch * cells), int(forced.sum()))
        capacity = budget if capacity is None else capacity
    if rows == "each":
        rows = torch.randint(0, cells + 1, (batch,), generator=gen).maximum(forced)
    elif rows is not None:
        rows = max(int(rows * cells), int(forced.max()))
    args = (prob, grid, drop, threshold, kind, capacity, longest, keep, ban, budget, rows)
    want = reference.plan_chunks(*args)
    for block in BLOCKS:
        assert_same(extension.plan_chunks(*args, block=block), want)


@pytest.mark.parametrize("block", BLOCKS)
def test_probabilities_of_any_size(block):
    """Selection orders floats by their bits: both zeros, the smallest numbers, and neighbours."""
    edge = [-0.0, 0.0, 1e-45, 3e-45, 1e-40, 1.2e-38, 0.3, 0.3 + 2**-25, 0.5, 1 - 2**-24, 1.0]
    for dtype in (torch.float32, torch.float64):
        gen = torch.Generator().manual_seed(1)
        prob = torch.tensor(edge, dtype=dtype)[torch.randint(0, len(edge), (40, 60), generator=gen)]
        drop = torch.linspace(0, 0.95, 40)
        got = extension.plan_chunks(prob, (60,), drop, 0.0, "1d", block=block)
        assert_same(got, reference.plan_chunks(prob, (60,), drop, 0.0, "1d"))


@pytest.mark.parametrize("value", [-1e-6, 1 + 2**-23, 3.0, -math.inf, math.inf])
@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_logits_are_refused(backend, capacity, value):
    prob = torch.full((3, 6), 0.7)
    prob[1, 4] = prob[2, 0] = value
    message = re.escape(f"boundary_prob must be in [0, 1], got {prob[1, 4].item()} in sample 1 at cell 4")
    with pytest.raises(ValueError, match=message):
        K.plan_chunks(prob, (2, 3), capacity=capacity, backend=backend)
    for threshold in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"threshold must be in \[0, 1\], got {threshold}"):
            K.plan_chunks(torch.rand(3, 6), (2, 3), threshold=threshold, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_padded_cells_are_no_boundaries(backend):
    """Whatever is in them; a sample's drop counts its own cells alone."""
    prob, valid = torch.rand(3, 30), torch.rand(3, 30) < 0.6
    valid[2] = False
    want = K.plan_chunks(torch.where(valid, prob, 0.0), (5, 6), 0.4, backend=backend)
    assert not want.boundary_mask[~valid].any() and want.lengths[0] < (valid & (prob > 0.5))[0].sum()
    padded = torch.where(valid, prob, torch.tensor([math.nan, math.inf, 1.0])[:, None])
    assert_same(K.plan_chunks(padded, (5, 6), 0.4, valid=valid, backend=backend), want)
    for bad in (valid.float(), valid[:2], valid[:, :3]):
        with pytest.raises((TypeError, ValueError), match=r"plan_chunks: valid must (be bool|have shape \(3, 30\))"):
            K.plan_chunks(prob, (5, 6), valid=bad, backend=backend)


def test_large_grids():
    """65 536 cells in a grid and in a line, where squared distances pass 32 bits; many samples."""
    gen = torch.Generator().manual_seed(0)
    cases = [((256, 256), 1, 0.005), ((1, 65536), 1, 0.002), ((2, 70000), 1, 0.0), ((4, 4), 3000, 0.2)]
    for grid, batch, share in cases:
        value = torch.rand(batch, math.prod(grid), generator=gen)
        prob = torch.where(value < share, 0.5 + value / max(share, 1e-9) / 3, 0.4)
        prob[:, [0, grid[1] - 1]] = 0.9  # as far apart as a line is long
        want = reference.plan_chunks(prob, grid, 0.25)
        assert_same(extension.plan_chunks(prob, grid, 0.25), want)
        if batch == 1 and share:
            assert_same(extension.plan_chunks(prob, grid, 0.25, block=64), want)


def test_threads_do_not_change_a_bit():
    prob = torch.rand(32, 48 * 48, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        plans = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            plans.append(K.plan_chunks(prob, (48, 48), 0.4, backend="native"))
    finally:
        torch.set_num_threads(before)
    for plan in plans[1:]:
        assert_same(plan, plans[0])


def test_strided_input_and_no_samples():
    wide = torch.rand(24, 3, generator=torch.Generator().manual_seed(0))
    prob = wide.T  # (3, 24), cells apart
    assert_same(extension.plan_chunks(prob, (4, 6), 0.1), reference.plan_chunks(prob.contiguous(), (4, 6), 0.1))
    for capacity in (None, 4):
        want = reference.plan_chunks(torch.empty(0, 6), (2, 3), capacity=capacity)
        for block in BLOCKS:
            assert_same(extension.plan_chunks(torch.empty(0, 6), (2, 3), capacity=capacity, block=block), want)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("capacity", [None, 9])
def test_bad_input_is_named(backend, capacity):
    prob = torch.full((3, 6), 0.7)
    prob[1, 4] = prob[2, 0] = math.nan
    with pytest.raises(ValueError, match="boundary_prob has 2 NaN, the first in sample 1 at cell 4"):
        K.plan_chunks(prob, (2, 3), capacity=capacity, backend=backend)
    for drop in (1.0, -0.1, math.nan, torch.tensor([0.0, 0.5, 1.0])):
        with pytest.raises(ValueError, match=r"drop_fraction must be in \[0, 1\), got (1.0|-0.1|nan|tensor)"):
            K.plan_chunks(torch.rand(3, 6), (2, 3), drop, backend=backend)
    for drop in ([0.0, 0.5, 0.9], "0.5", None):
        with pytest.raises(ValueError, match=r"drop_fraction must be a number or a tensor, got (\[0.0, |'0.5'|None)"):
            K.plan_chunks(torch.rand(3, 6), (2, 3), drop, backend=backend)
    with pytest.raises(ValueError, match=r"grid must be \(L,\), \(H, W\) or \(F, H, W\), got \(2.0, 3.0\)"):
        K.plan_chunks(torch.rand(3, 6), (4 / 2, 6 / 2), backend=backend)


def test_a_missing_extension_says_what_to_do(monkeypatch):
    """The reference runs, and asking for the extension gives the load error and the remedy."""
    monkeypatch.setattr("dcdit_kernels._ops._known", {})
    monkeypatch.setattr(extension, "_C", None)
    monkeypatch.setattr(extension, "load_error", "no such file")
    assert K.plan_chunks(torch.rand(1, 6), (2, 3)).batch_size == 1
    with pytest.raises(K.BackendError, match=r"plan_chunks: backend 'native' cannot run.*no such file.*pip install"):
        K.plan_chunks(torch.rand(1, 6), (2, 3), backend="native")


def test_a_build_of_other_sources_is_not_called(monkeypatch):
    monkeypatch.setitem(sys.modules, "dcdit_kernels._C", types.SimpleNamespace(plan_count=None))
    spec = importlib.util.spec_from_file_location("dcdit_kernels.other", extension.__file__)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other._C is None and extension._C is not None
    assert "is not built (it was built from other sources); `pip install .`" in other.missing(torch.device("cpu"))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_exact_says_that_no_row_is_spare(backend):
    prob = torch.rand(2, 12)
    assert K.plan_chunks(prob, (3, 4), backend=backend).exact
    assert not K.plan_chunks(prob, (3, 4), capacity=24, backend=backend).exact


@pytest.mark.parametrize(
    ("archs", "versions", "gpu", "reason"),
    [
        ("", (), (9, 0), r"built without CUDA; put nvcc on PATH and run `pip install .` again"),
        ("80,90", (13000, 12080), (9, 0), r"built with CUDA 13.0 and the driver knows CUDA 12.8; .* older nvcc"),
        ("80,90", (13000, 0), (9, 0), r"the driver knows CUDA none"),
        ("80,90", (12080, 13000), (7, 5), r"for sm_80 and newer, got sm_75; set DCDIT_CUDA_ARCHS"),
        ("80,90", (12080, 12040), (12, 0), None),
    ],
)
def test_a_gpu_that_the_extension_cannot_use_is_explained(monkeypatch, archs, versions, gpu, reason):
    monkeypatch.setattr(extension, "_C", types.SimpleNamespace(cuda_archs=archs, cuda_versions=lambda: versions))
    monkeypatch.setattr(extension, "capability", lambda index: gpu)
    said = extension.missing(torch.device("cuda", 0))
    assert (said is None) if reason is None else re.search(reason, said)
