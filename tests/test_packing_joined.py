"""Packings joined segment by segment, and tables looked up by their rows."""

import dataclasses
import math

import pytest
import torch
from test_packing import fields, plan_of, same

import dcdit_kernels as K
from dcdit_kernels import Packing


def joined_by_hand(packings, streams):
    """Sample by sample: the first's rows, then the second's."""
    parts = []
    for b in range(packings[0].batch_size):
        for packing, rows in zip(packings, streams, strict=True):
            parts.append(rows[packing.cu_seqlens[b] : packing.cu_seqlens[b + 1]])
    return torch.cat([streams[0][:0], *parts])


PAIRS = [([3, 0, 5, 1], [2, 4, 0, 1]), ([0, 0], [0, 3]), ([4], [1]), ([0, 2], [0, 0]), ([], [])]


@pytest.mark.parametrize("spare", [(0, 0), (2, 0), (3, 2)])
@pytest.mark.parametrize("lengths", PAIRS)
def test_two_streams_as_one(lengths, spare):
    packings = [
        Packing.from_cu_seqlens(Packing.from_lengths(n).cu_seqlens, 9, sum(n) + s, exact=s == 0)
        for n, s in zip(lengths, spare, strict=True)
    ]
    joined, live = packings[0].join(packings[1]), sum(map(sum, lengths))
    assert same(joined, type(joined)(**fields(joined)))  # valid
    assert joined.lengths.tolist() == [a + b for a, b in zip(*lengths, strict=True)]
    assert joined.capacity == live + sum(spare) and joined.exact == (spare == (0, 0)) and joined.max_seqlen <= 18
    assert joined.segments.lengths.tolist() == [n for pair in zip(*lengths, strict=True) for n in pair]
    streams = [torch.randn(p.capacity, 3, 2, dtype=torch.float64) for p in packings]
    for stream, packing in zip(streams, packings, strict=True):
        stream[int(packing.cu_seqlens[-1]) :] = math.nan
        stream.requires_grad_()
    rows = joined.cat(*streams)
    assert torch.equal(rows[:live], joined_by_hand(packings, streams)) and not rows[live:].any()
    back = joined.split(torch.cat([rows[:live], torch.full_like(rows[live:], math.nan)]))
    for part, stream, packing in zip(back, streams, packings, strict=True):
        assert torch.equal(part, torch.where(packing.live[:, None, None], stream, 0.0))
    weight = torch.randn_like(rows)
    weight[live:] = math.nan
    grads = torch.autograd.grad(rows, streams, weight)
    for got, want in zip(grads, joined.split(weight), strict=True):
        assert torch.equal(got, want)
    assert torch.autograd.gradcheck(joined.cat, [s.detach().nan_to_num().requires_grad_() for s in streams])
    assert torch.autograd.gradcheck(joined.split, rows.detach().requires_grad_())
    assert torch.autograd.gradgradcheck(
        lambda r: joined.cat(*(p.sin() for p in joined.split(r))), rows.detach().requires_grad_()
    )


def test_a_joined_packing_edited_by_hand_is_checked():
    joined = Packing.from_lengths([3, 0, 5]).join(Packing.from_lengths([1, 2, 0]))
    for name in ("first_row", "second_row", "cu_seqlens", "sample_index"):
        tensor = getattr(joined, name)
        for place in range(len(tensor)):
            edited = tensor.clone()
            edited[place] += 1
            with pytest.raises(ValueError, match=r"JoinedPacking: \w+\[\d+\] must be .*, got \d+"):
                dataclasses.replace(joined, **{name: edited})
    other = Packing.from_lengths([3, 1, 0, 1, 5, 1])
    with pytest.raises(ValueError, match="JoinedPacking: "):
        dataclasses.replace(joined, segments=other)
    assert same(joined.to("cpu"), joined) and joined.to("meta").segments.cu_seqlens.is_meta


def test_streams_that_do_not_fit_are_named():
    joined = Packing.from_lengths([3, 1]).join(Packing.from_lengths([1, 2]))
    with pytest.raises(ValueError, match="join: both packings must have one number of samples, got 2 and 1"):
        Packing.from_lengths([3, 1]).join(Packing.from_lengths([4]))
    with pytest.raises(ValueError, match=r"cat: second must have 3 rows, got \(4, 8\)"):
        joined.cat(torch.randn(4, 8), torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"one shape and dtype, got \(\(8,\), torch.float32\) and \(\(9,\), torch.f"):
        joined.cat(torch.randn(4, 8), torch.randn(3, 9))
    with pytest.raises(ValueError, match=r"split: rows must be 7 in number, got \(6, 8\)"):
        joined.split(torch.randn(6, 8))


@pytest.mark.parametrize("capacity", [None, 100])
def test_tables_by_cell_by_sample_and_by_both(capacity):
    plan = plan_of(3, (4, 5), "2d", capacity)
    live = int(plan.cu_seqlens[-1])
    cells = [token % 20 for token in plan.token_index.tolist()[:live]]
    assert plan.cell_index.tolist() == cells + [-1] * (plan.capacity - live) and plan.cell_index.dtype == torch.int32
    samples = plan.sample_index.tolist()[:live]
    each, cell, sample = torch.randn(3, 20, 2, 4), torch.randn(20, 6, dtype=torch.complex64), torch.arange(3) * 7
    for table, want in (
        (each, [each[b, c] for b, c in zip(samples, cells, strict=True)]),
        (cell, [cell[c] for c in cells]),
        (sample, [sample[b] for b in samples]),
    ):
        rows = plan.rows(table)
        assert torch.equal(rows[:live], torch.stack(want)) and not rows[live:].any() and rows.dtype == table.dtype
    assert torch.equal(plan.rows(each, per="sample")[:live], each[samples])  # (B, …), although L comes next
    for table in (each, cell, each[:, 0, 0]):
        leaf = table.clone().requires_grad_()
        weight = torch.randn_like(plan.rows(leaf))
        torch.autograd.grad(plan.rows(leaf), leaf, weight)
        (got,) = torch.autograd.grad(plan.rows(leaf), leaf, weight)
        want = torch.zeros_like(table)
        for r in range(live):
            where = (samples[r], cells[r]) if table is each else cells[r] if table is cell else samples[r]
            want[where] += weight[r]
        torch.testing.assert_close(got, want)


def test_tables_that_do_not_fit_or_fit_twice_are_named():
    plan = K.plan_chunks(torch.rand(4, 4), (2, 2))
    for table in (torch.zeros(4, 4, 3), torch.zeros(4, 7)):
        with pytest.raises(ValueError, match="rows: with B = L = 4, say per="):
            plan.rows(table)
    assert torch.equal(plan.rows(torch.arange(4), per="cell"), plan.cell_index)
    assert torch.equal(plan.rows(torch.arange(4), per="sample"), plan.sample_index)
    for table, per in (
        (torch.zeros(5, 4), None),
        (torch.zeros(()), None),
        (torch.zeros(4), "token"),
        (torch.zeros(4), "x"),
    ):
        with pytest.raises(ValueError, match=r"rows: table must be \(B, L, …\), \(L, …\) or \(B, …\) with B = 4"):
            plan.rows(table, per)
