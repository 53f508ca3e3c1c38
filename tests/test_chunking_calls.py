"""Arguments of a call of DynamicChunking: a grid, a budget, a routing, arguments for run and router; and blocks that
work in place."""

import pytest
import torch
from test_chunking import Attend, Fixed, batch, build
from torch import nn

import dcdit
from dcdit.model.dynamic_chunking import run_in_turn

GRID = (4, 5)


class InPlace(nn.Module):
    """A residual block that overwrites its input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x, plan):
        x += self.linear(x)
        return x


class OutOfPlace(InPlace):
    def forward(self, x, plan):
        return x + self.linear(x)


def wrap(kind, grid=GRID):
    torch.manual_seed(0)
    chunking = dcdit.DynamicChunking([kind(), kind()], 32, grid).double()
    chunking.drop_fraction = 0.5
    return chunking


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_blocks_that_work_in_place(mode):
    h = batch(GRID)[0]
    with mode():
        out, want = (wrap(kind)(h) for kind in (InPlace, OutOfPlace))
        assert torch.equal(out, want) and not torch.allclose(out, h)


class Shift(nn.Module):
    """In place where autograd allows it: nothing of the input is needed for a gradient."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(32))

    def forward(self, x, plan):
        return x.add_(self.bias)


def test_gradients_through_blocks_that_work_in_place():
    h, chunking = batch(GRID)[0], wrap(Shift)
    out = chunking(h)
    torch.testing.assert_close(out, h + chunking.blocks[0].bias + chunking.blocks[1].bias)
    (grad,) = torch.autograd.grad(out.sum(), chunking.blocks[0].bias)
    torch.testing.assert_close(grad, torch.full_like(grad, 60))  # each of 3·20 cells takes one token's change


def test_compiled_blocks_that_work_in_place():
    torch._dynamo.reset()
    chunking, h = wrap(InPlace), batch(GRID)[0]
    compiled = torch.compile(chunking, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(h), wrap(OutOfPlace)(h))


def test_the_grid_of_a_call():
    """Equal to a stack made for that grid, router included; the attribute serves calls that name none."""
    h, scale, _ = batch((2, 10))
    chunking, other = build(GRID), build((2, 10))
    for stack in (chunking, other):
        stack.drop_fraction = 0.5
    want = other(h, scale)
    assert torch.equal(chunking(h, scale, grid=(2, 10)), want) and chunking.routing.plan.grid == (2, 10)
    assert not torch.allclose(chunking(h, scale), want)
    chunking.grid = [2, 10]
    assert torch.equal(chunking(h, scale), want)
    with pytest.raises(ValueError, match=r"h must have shape \(B, 21, D\) for grid \(3, 7\)"):
        chunking(h, scale, grid=(3, 7))
    with pytest.raises(ValueError, match=r"grid must be \(L,\), \(H, W\) or \(F, H, W\), got \(20, 0\)"):
        chunking.grid = (20, 0)


def test_a_budget_by_attribute_or_by_call():
    h, scale, _ = batch(GRID)
    chunking = build(GRID)
    want = chunking(h, scale)
    assert torch.equal(chunking(h, scale, drop_fraction=0.5), build_dropped(h, scale))
    assert chunking.routing.plan.lengths.tolist() == [10] * 3
    chunking.capacity = 70
    torch.testing.assert_close(chunking(h, scale), want)
    assert chunking.routing.plan.capacity == 70 and not chunking.routing.plan.exact
    chunking(h, scale, capacity=60, max_seqlen=4)
    assert chunking.routing.plan.capacity == 60 and chunking.routing.plan.lengths.max() <= 4
    chunking.capacity, chunking.ban = None, torch.arange(20).repeat(3, 1) % 4 == 0
    chunking(h, scale, drop_fraction=0.5)
    assert chunking.routing.plan.lengths.tolist() == [8] * 3  # of 15, 7 are dropped
    chunking(h, scale, drop_fraction=0.5, ban=None, keep=chunking.ban)
    assert chunking.routing.boundary_mask[chunking.ban].all()
    chunking.ban, chunking.drop_fraction = None, 0.5
    chunking(h, scale, budget=20)
    assert chunking.routing.plan.lengths.sum() == chunking.routing.plan.capacity == 20
    chunking.drop_fraction, chunking.budget_per_sample = 0.0, 7
    chunking(h, scale)
    assert chunking.routing.plan.exact and chunking.routing.plan.lengths.tolist() == [7] * 3
    chunking(h, scale, drop_fraction=0.5)
    assert chunking.routing.plan.lengths.tolist() == [10] * 3


def build_dropped(h, scale):
    chunking = build(GRID)
    chunking.drop_fraction = 0.5
    return chunking(h, scale)


def test_a_routing_is_used_again():
    h, scale, prob = batch(GRID)
    chunking = build(GRID, router=Fixed(prob))
    want = chunking(h, scale)
    routing = chunking.routing
    chunking.router.boundary_prob = torch.rand_like(prob)
    assert not torch.allclose(chunking(h, scale), want)
    assert torch.equal(chunking(h, scale, routing=routing), want) and chunking.routing is routing
    with pytest.raises(ValueError, match="routing must be for 2 samples"):
        chunking(h[:2], scale[:2], routing=routing)
    with pytest.raises(ValueError, match="capacity must be left out beside a routing"):
        chunking(h, scale, routing=routing, capacity=9)


def test_run_may_return_more_than_tokens():
    def run(blocks, tokens, plan, scale):
        seen = []
        for block in blocks:
            tokens = block(tokens, plan, scale)
            seen.append(tokens)
        return tokens, seen, "done"

    h, scale, _ = batch(GRID)
    out, seen, word = build(GRID, run=run)(h, scale)
    assert torch.equal(out, build(GRID)(h, scale)) and word == "done"
    assert [tuple(tokens.shape) for tokens in seen] == [(60, 32)] * 2


class Telling(nn.Module):
    """A router that keeps its arguments."""

    def forward(self, h, scale, *, grid, bias=0.0):
        self.given = scale, grid, bias
        return torch.sigmoid(h.mean(2) + bias)


class Greedy(nn.Module):
    def forward(self, h, *args, **kwargs):
        self.given = args, kwargs
        return torch.ones(h.shape[:2], dtype=h.dtype)


def run_with_bias(blocks, tokens, plan, scale, **kwargs):
    return run_in_turn(blocks, tokens, plan, scale)


def test_arguments_of_forward_reach_the_router():
    h, scale, prob = batch(GRID)
    chunking = build(GRID, router=Telling(), run=run_with_bias)
    chunking(h, scale, bias=1.0, other=2)
    assert chunking.router.given == (scale, GRID, 1.0)
    chunking.router = Greedy()  # in the place of the first, with another signature
    chunking(h, scale, bias=1.0)
    assert chunking.router.given == ((scale,), {"bias": 1.0, "grid": GRID})
    chunking.router = Fixed(prob)
    chunking(h, scale, bias=1.0)


def test_weights_keep_their_names():
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([Attend(32), Attend(32)])
    names, weights = list(model.state_dict()), [p.clone() for p in model.parameters()]
    original = list(model.blocks)
    model.blocks = dcdit.DynamicChunking(model.blocks, 32, GRID)
    assert [name for name in model.state_dict() if not name.startswith("blocks.router.")] == names
    model.blocks = model.blocks.unwrap()
    assert list(model.state_dict()) == names and list(model.blocks) == original
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), weights, strict=True))
