"""The reference's plan against loops."""

import math

import pytest
import torch

import dcdit_kernels as K
from dcdit_kernels import reference


def naive_mask(prob, rho):
    """Drop floor(n·ρ) boundaries one at a time: always the lowest p, of equals the last."""
    mask = prob > 0.5
    for b, share in enumerate(rho):
        for _ in range(int(torch.floor(mask[b].sum().float() * torch.tensor(share)))):
            low = min((prob[b, i].item(), -i) for i in range(prob.shape[1]) if mask[b, i])
            mask[b, -low[1]] = False
    return mask


def place(cell, grid, kind):
    """Where a cell is: on the grid, or for "1d" along the raster."""
    return torch.tensor([cell] if kind == "1d" else torch.unravel_index(torch.tensor(cell), grid))


@pytest.mark.parametrize("grid", [(7, 9), (1, 13), (5, 1), (2, 3, 4), (17,)])
def test_plan(grid):
    """Mask, packing, nearest, inverse: each against a loop; ties are frequent, one sample keeps nothing."""
    gen = torch.Generator().manual_seed(3)
    cells, rho = math.prod(grid), [0.0, 0.5, 0.9, 0.3]
    prob = torch.randint(0, 6, (4, cells), generator=gen) / 6
    prob[3] = 0.2
    for kind in {1: ["1d", "previous"], 2: ["2d", "1d", "previous"], 3: ["3d", "previous"]}[len(grid)]:
        plan = reference.plan_chunks(prob, grid, torch.tensor(rho), nearest=kind)
        mask = torch.stack([naive_mask(prob[b : b + 1], rho[b : b + 1])[0] for b in range(4)])
        assert torch.equal(plan.boundary_mask, mask)
        assert plan.token_index.tolist() == mask.flatten().nonzero().squeeze(1).tolist()
        assert plan.sample_index.tolist() == [c // cells for c in plan.token_index.tolist()]
        assert plan.lengths.tolist() == mask.sum(1).tolist() and plan.max_seqlen == mask.sum(1).max()
        for cell, row in enumerate(plan.nearest.tolist()):
            sample = cell // cells
            places = [(r, t) for r, t in enumerate(plan.token_index.tolist()) if t // cells == sample]
            if kind == "previous":
                places = [(r, t) for r, t in places if t <= cell][-1:]
            here = place(cell % cells, grid, kind)
            away = [((place(t % cells, grid, kind) - here).square().sum().item(), t, r) for r, t in places]
            best = min(away, default=(0, 0, -1))
            assert row == best[2], (kind, cell)
        for row in range(plan.capacity):
            members = plan.member_index[plan.member_offsets[row] : plan.member_offsets[row + 1]].tolist()
            assert members == [c for c, r in enumerate(plan.nearest.tolist()) if r == row]


def test_fixed_capacity():
    """Spare rows are -1; the least probable that do not fit go, of equals the later, and are counted."""
    prob = torch.full((2, 6), 0.9)
    plan = K.plan_chunks(prob, (2, 3), capacity=15)
    assert plan.capacity == 15 and plan.token_index.tolist() == [*range(12), -1, -1, -1] and plan.overflow == 0
    plan = K.plan_chunks(prob, (2, 3), capacity=8)
    assert plan.cu_seqlens.tolist() == [0, 6, 8] and plan.overflow == 4 and plan.max_seqlen == 6
    assert plan.nearest.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 6, 7, 7]
