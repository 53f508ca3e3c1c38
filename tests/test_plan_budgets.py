"""Plans with masks, budgets and bounds: which cells stay, against loops."""

import math
import time

import pytest
import torch
from test_plan import assert_same

import dcdit_kernels as K
from dcdit_kernels import extension


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("capacity", [None, 36, 5])
def test_rows_past_max_seqlen_are_the_least_probable_of_a_sample(capacity, backend):
    prob = torch.rand(3, 12).sort(descending=True)[0][:, torch.randperm(12)]
    prob[2] = 0.4
    plan = K.plan_chunks(prob, (3, 4), capacity=capacity, max_seqlen=3, backend=backend)
    most = prob.topk(3)[0].amin(1, keepdim=True)
    want = (prob >= most) & (prob > 0.5)
    live = min(int(want.sum()), capacity or 36)
    want = want & (prob >= prob[want].topk(live)[0][-1])
    assert torch.equal(plan.boundary_mask, want)
    assert int(plan.overflow) == int((prob > 0.5).sum()) - live
    assert plan.max_seqlen == 3 and int(plan.lengths.max()) <= 3 and plan.exact == (capacity is None)


def test_max_seqlen_is_a_number_of_rows():
    for bound in (-1, 2.0, "3"):
        with pytest.raises(ValueError, match="max_seqlen must be a number of rows, 0 or more, got"):
            K.plan_chunks(torch.rand(2, 12), (3, 4), max_seqlen=bound)


def kept_by_hand(prob, rho, keep, ban):
    """The cells of one sample that stay, by sorting: all kept ones, then the most probable of the router's others."""
    cells = [i for i in range(len(prob)) if not ban[i] and (keep[i] or prob[i] > 0.5)]
    cells.sort(key=lambda i: (not keep[i], -prob[i], i))
    dropped = math.floor(torch.tensor(len(cells), dtype=torch.float32) * torch.tensor(rho))
    return sorted(cells[: max(len(cells) - dropped, sum(keep))])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("rho", [0.0, 0.4, 0.9])
def test_kept_cells_stay_and_banned_ones_go(rho, backend):
    gen = torch.Generator().manual_seed(3)
    prob = torch.randint(0, 9, (6, 35), generator=gen) / 8
    ban = torch.rand(6, 35, generator=gen) < 0.3
    keep = (torch.rand(6, 35, generator=gen) < 0.2) & ~ban
    keep[0], ban[1], keep[1] = False, True, False
    prob[ban] = math.nan  # nobody looks at them
    plan = K.plan_chunks(prob, (5, 7), rho, keep=keep, ban=ban, backend=backend)
    want = [kept_by_hand(*rows) for rows in zip(prob.tolist(), [rho] * 6, keep.tolist(), ban.tolist(), strict=True)]
    assert [sample.nonzero().flatten().tolist() for sample in plan.boundary_mask] == want
    assert plan.lengths[1] == 0 and plan.boundary_mask[keep].all()
    short = K.plan_chunks(prob, (5, 7), rho, max_seqlen=3, keep=keep, ban=ban, backend=backend)
    assert int(short.overflow) == sum(max(len(cells) - 3, 0) for cells in want)
    for sample, kept in enumerate(keep.tolist()):  # kept cells are the last to go, the later first
        first = [cell for cell in range(35) if kept[cell]][:3]
        assert short.boundary_mask[sample, first].all() and short.lengths[sample] <= 3


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_masks_are_named(backend):
    prob, keep, ban = torch.rand(2, 12), torch.zeros(2, 12, dtype=torch.bool), torch.zeros(2, 12, dtype=torch.bool)
    keep[1, 5] = ban[1, 5] = True
    both = "plan_chunks: a cell must be kept or banned, got both in sample 1 at cell 5"
    for capacity in (None, 24):
        with pytest.raises(ValueError, match=both):
            K.plan_chunks(prob, (3, 4), capacity=capacity, keep=keep, ban=ban, backend=backend)
        with pytest.raises(ValueError, match=both):
            K.plan_chunks(prob, (3, 4), capacity=capacity, keep=keep, valid=~ban, backend=backend)
    for name in ("keep", "ban"):
        with pytest.raises(ValueError, match=rf"plan_chunks: {name} must have shape \(2, 12\), got \(2, 3, 4\)"):
            K.plan_chunks(prob, (3, 4), backend=backend, **{name: keep.view(2, 3, 4)})
        with pytest.raises(TypeError, match=f"plan_chunks: {name} must be bool, got torch.float32"):
            K.plan_chunks(prob, (3, 4), backend=backend, **{name: keep.float()})
        with pytest.raises(ValueError, match=f"plan_chunks: {name} must be on cpu, as boundary_prob is, got meta"):
            K.plan_chunks(prob, (3, 4), backend=backend, **{name: keep.to("meta")})


def by_hand(cells, most):
    """The `most` cells (sample, cell, p, forced) that stay: forced ones first, then by p; of equals the earlier."""
    return {(b, i) for b, i, _, _ in sorted(cells, key=lambda cell: (-2 if cell[3] else -cell[2], cell[:2]))[:most]}


def stays(plan):
    return set(map(tuple, plan.boundary_mask.nonzero().tolist()))


@pytest.fixture
def levels():
    """Probabilities of few levels, 1 among them, with first and last cells forced, kept and banned cells."""
    gen = torch.Generator().manual_seed(5)
    prob = torch.randint(0, 6, (7, 30), generator=gen) / 5
    prob[:, [0, -1]] = 1.0
    ban = torch.rand(7, 30, generator=gen) < 0.2
    ban[:, [0, -1]] = False
    keep = (torch.rand(7, 30, generator=gen) < 0.1) & ~ban
    ends = torch.zeros(7, 30, dtype=torch.bool)
    ends[:, [0, -1]] = True
    table = [
        (b, i, prob[b, i].item(), bool(keep[b, i] or ends[b, i])) for b in range(7) for i in range(30) if not ban[b, i]
    ]
    return prob, keep, ban, table


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_budget_of_the_batch(levels, backend):
    """Exactly so many cells, the most probable of the batch, below the threshold too."""
    prob, keep, ban, table = levels
    forced = sum(cell[3] for cell in table)
    for budget in (forced, 80, len(table), 210):
        plan = K.plan_chunks(prob, (5, 6), budget=budget, keep=keep, ban=ban, backend=backend)
        assert stays(plan) == by_hand(table, budget)
        assert (plan.capacity, int(plan.overflow), plan.exact) == (budget, 0, False)  # banned cells may be too many
        K.ChunkPlan(**vars(plan))
    free = K.plan_chunks(prob, (5, 6), budget=80, backend=backend)
    assert free.exact and free.lengths.sum() == 80 == free.capacity and free.boundary_mask[:, [0, -1]].all()
    narrow = K.plan_chunks(prob, (5, 6), budget=80, capacity=60, backend=backend)
    assert int(narrow.overflow) == 20 and narrow.lengths.sum() == 60 and stays(narrow) < stays(free)


@pytest.mark.parametrize("block", [1, 64])
@pytest.mark.parametrize(
    "batch, side, dtype", [(64, 64, torch.float32), (64, 32, torch.float64), (1, 32, torch.float32)]
)
@pytest.mark.parametrize("levels", [1, 7, 10**6])
def test_a_budget_of_a_large_batch(batch, side, levels, dtype, block):
    """Blocks of many samples select together, among equals too: against one sort of the batch."""
    gen = torch.Generator().manual_seed(levels)
    prob = torch.randint(0, levels, (batch, side**2), generator=gen).to(dtype) / levels
    ban = torch.zeros(batch, side**2, dtype=torch.bool)
    ban[1::3] = True  # samples without a candidate
    order = torch.where(ban, -1.0, prob).flatten().argsort(descending=True, stable=True)
    free = int((~ban).sum())
    for budget in {0, min(free, 1), free // 4, max(free - 1, 0), free, batch * side**2}:
        limits = None, None, ban, budget, None
        plan = extension.plan_chunks(prob, (side, side), 0.0, 0.5, "previous", budget, *limits, block=block)
        want = torch.zeros(batch * side**2, dtype=torch.bool)
        want[order[: min(budget, free)]] = True
        assert torch.equal(plan.boundary_mask.flatten(), want) and plan.overflow == 0
        assert torch.equal(plan.lengths, want.view(batch, side**2).sum(1))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_budget_of_each_sample(levels, backend):
    prob, keep, ban, table = levels
    each = torch.tensor([12, 9, 30, 20, 10, 9, 25])
    plan = K.plan_chunks(prob, (5, 6), budget_per_sample=each, keep=keep, ban=ban, backend=backend)
    for budget in (each, each.int(), each.view(7, 1)[:, 0]):
        assert_same(K.plan_chunks(prob, (5, 6), budget_per_sample=budget, keep=keep, ban=ban, backend=backend), plan)
    assert stays(plan) == set().union(
        *(by_hand([c for c in table if c[0] == b], n) for b, n in enumerate(each.tolist()))
    )
    same = K.plan_chunks(prob, (5, 6), budget_per_sample=11, backend=backend)
    assert same.exact and same.lengths.tolist() == [11] * 7 and (same.capacity, same.max_seqlen) == (77, 11)
    assert K.plan_chunks(prob, (5, 6), budget_per_sample=torch.tensor(11), backend=backend).max_seqlen == 11
    short = K.plan_chunks(prob, (5, 6), budget_per_sample=11, max_seqlen=8, backend=backend)
    assert not short.exact and short.lengths.tolist() == [8] * 7 and int(short.overflow) == 21


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_has_no_room_is_the_least_probable(backend):
    prob = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    keep = torch.zeros(5, 40, dtype=torch.bool)
    keep[4, -3:] = True
    table = [
        (b, i, prob[b, i].item(), bool(keep[b, i]))
        for b in range(5)
        for i in range(40)
        if keep[b, i] or prob[b, i] > 0.5
    ]
    for capacity in (0, 1, 50, len(table), 200):
        for kind in ("2d", "previous"):
            plan = K.plan_chunks(prob, (5, 8), nearest=kind, capacity=capacity, keep=keep, backend=backend)
            assert stays(plan) == by_hand(table, capacity)
            assert int(plan.overflow) == max(len(table) - capacity, 0) and plan.capacity == capacity
            K.ChunkPlan(**vars(plan))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_budgets_are_named(levels, backend):
    prob, keep, _, _ = levels
    each = torch.full((7,), 12)
    cases = [
        ({"budget": 13}, "budget must be at least the 14 forced cells, got 13"),
        ({"budget": 15, "keep": keep}, r"budget must be at least the \d+ forced cells, got 15"),
        ({"budget": 211}, "budget must be from 0 to all 210 cells of the batch, got 211"),
        ({"budget": -1}, "budget must be from 0 to all 210 cells of the batch, got -1"),
        ({"budget": 50.0}, "budget must be an integer, got 50.0"),
        ({"budget": True}, "budget must be an integer, got True"),
        ({"budget": each}, "budget must be an integer, got tensor"),
        ({"budget_per_sample": 1}, "budget_per_sample must be from the 2 forced cells of sample 0 to all 30, got 1"),
        ({"budget_per_sample": 31}, "budget_per_sample must be from 0 to all 30 cells of a sample, got 31"),
        ({"budget_per_sample": 3.5}, "budget_per_sample must be an integer, got 3.5"),
        ({"budget_per_sample": each[:6]}, r"budget_per_sample must have shape \(7\), got \(6,\)"),
        ({"budget_per_sample": each.index_fill(0, torch.tensor(2), 31)}, "of sample 2 to all 30, got 31"),
        ({"budget_per_sample": each.index_fill(0, torch.tensor(3), -1)}, "of sample 3 to all 30, got -1"),
        ({"budget": 50, "budget_per_sample": 4}, "exclude each other, got budget and budget_per_sample"),
        ({"budget": 50, "drop_fraction": 0.2}, "exclude each other, got drop_fraction and budget"),
        ({"budget": 50, "drop_fraction": torch.zeros(7)}, "exclude each other, got drop_fraction and budget"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            K.plan_chunks(prob, (5, 6), backend=backend, **options)
    with pytest.raises(TypeError, match=r"budget_per_sample must be int32 or int64, got torch\.float32"):
        K.plan_chunks(prob, (5, 6), budget_per_sample=each.float(), backend=backend)


def test_a_batch_budget_costs_at_most_half_more_than_rho():
    """B = 64, L = 1024: processor time of one thread, the least of turns. Other work only adds to a turn."""
    prob = torch.rand(64, 1024, generator=torch.Generator().manual_seed(2))
    half = K.plan_chunks(prob, (32, 32), 0.5, backend="native").capacity
    calls = {"rho": {"drop_fraction": 0.5}, "budget": {"budget": half}}
    least, threads = dict.fromkeys(calls, math.inf), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(30):
            for name, options in calls.items():
                begin = time.thread_time()
                K.plan_chunks(prob, (32, 32), backend="native", **options)
                least[name] = min(least[name], time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    assert least["budget"] <= 1.5 * least["rho"], least
