"""Routers without parameters: where their tokens go, alone and in diffusers' video transformers."""

import pytest
import torch

from dcdit.errors import ConfigError
from dcdit.model.dynamic_chunking import DynamicChunking
from dcdit.model.untrained_routers import DifferenceRouter, MapRouter, MotionRouter, spread

GRID = (3, 2, 4)


def test_motion_keeps_a_still_cell_once():
    """A cell is kept in the first frame and where it changed; the most changed first."""
    h = torch.randn(1, *GRID[1:], 8).repeat(3, 1, 1, 1)
    h[1, 1, 2] += 1
    h[2, 1, 2] += 1
    h[2, 0, 3] += 0.1
    prob = MotionRouter()(h.reshape(1, -1, 8), grid=GRID).view(GRID)
    want = torch.zeros(GRID)
    want[0], want[1, 1, 2], want[2, 0, 3] = 1, 1, 0.1
    torch.testing.assert_close(2 * prob - 1, want, rtol=0, atol=1e-6)
    one = MotionRouter()(torch.randn(2, 8, 8), grid=(1, 2, 4))
    assert torch.equal(one, torch.ones(2, 8))


def test_a_spread_budget_leaves_no_hole():
    """Whatever the share, no cell of a large grid is farther from a kept one than twice the spacing."""
    side = 24
    score = spread((side, side), torch.device("cpu")).view(side, side)
    assert 0 < score.min() and score.max() == 1
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    for share in (0.5, 0.25, 0.1):
        kept = places[(score > 1 - share).flatten()]
        assert abs(len(kept) / side**2 - share) < 0.03
        assert torch.cdist(places, kept).amin(1).max() < 2 * share**-0.5


@pytest.mark.parametrize(
    "shape", [(4, 8), (1, 4, 8), (2, 4, 8), (8, 16), (2, 1, 4, 8)], ids=lambda shape: "x".join(map(str, shape))
)
def test_a_map_of_any_size(shape):
    """A cell takes the highest value in it; 0 is not kept."""
    given = torch.zeros(shape)
    given[..., shape[-2] // 2, -1] = 3
    given[..., 0, 0] = 1.5
    grid = shape[1:] if len(shape) == 4 else (4, 8)
    prob = MapRouter(given)(torch.zeros(2, 32, 8), grid=grid).view(2, 4, 8)
    want = torch.full((2, 4, 8), 0.5)
    want[:, 2, -1], want[:, 0, 0] = 1, 0.75
    assert torch.equal(prob, want)


class Denoiser(torch.nn.Module):
    """Gives back what is asked of it."""

    def forward(self, x, timestep):
        return (x,)


def steps(router, pictures, times):
    """The routing after a model predicted each picture at each time, for the next time."""
    model = Denoiser()
    router.watch(model)
    for picture, time in zip(pictures, times, strict=False):
        model(picture, timestep=time)
    router._before(model, (), {"x": pictures[0], "timestep": times[-1]})
    return router(torch.zeros(len(pictures[0]), 24, 8), grid=(4, 6))


@pytest.mark.parametrize("as_tokens", [False, True])
def test_difference_follows_the_last_two_predictions(as_tokens):
    """Where the prediction changed most; evenly before there are two, and where a sample's time turns back."""
    first, second = torch.zeros(2, 3, 8, 12), torch.zeros(2, 3, 8, 12)
    second[0, :, 2:4, 4:6], second[0, 1, 0, 0], second[1, :, 6, 2] = 4.0, 1.0, 2.0
    even = 0.5 + 0.5 * spread((4, 6), torch.device("cpu")).float()
    want = torch.full((2, 24), 0.5)
    want[0, 8], want[1, 19] = 1, 1
    want[0, 0] += 0.5 * (1 / 12) ** 0.5 / 4
    if as_tokens:  # one cell a token
        first, second = (x.unflatten(3, (6, 2)).unflatten(2, (4, 2)).permute(0, 2, 4, 1, 3, 5) for x in (first, second))
        first, second = (x.reshape(2, 24, 12) for x in (first, second))
    down = [torch.tensor([t, t]) for t in (0.9, 0.8, 0.7)]
    torch.testing.assert_close(steps(DifferenceRouter(), [first, second], down), want)
    torch.testing.assert_close(steps(DifferenceRouter(), [first], down[:2]), even.expand(2, -1))
    turned = [*down[:2], torch.tensor([0.7, 0.85])]
    got = steps(DifferenceRouter(), [first, second], turned)
    torch.testing.assert_close(got, torch.stack([want[0], even]))
    torch.testing.assert_close(steps(DifferenceRouter(), [first[:1], second[:1]], down)[0], want[0])


def test_each_pass_has_a_history():
    router = DifferenceRouter()
    picture = torch.zeros(1, 3, 4, 6)
    for passing, value in (("cond", 1.0), ("uncond", 2.0)):
        router.passing = passing
        changed = picture.clone()
        changed[..., 2, int(value)] = value
        prob = steps(router, [picture, changed], [torch.tensor([t]) for t in (3, 2, 1)])
        assert int(prob.argmax()) == 12 + value and prob.min() == 0.5
    assert len(router.history) == 2


def test_bad_input():
    h = torch.zeros(2, 12, 8)
    with pytest.raises(ConfigError, match=r"needs a grid \(F, H, W\), got \(3, 4\)"):
        MotionRouter()(h, grid=(3, 4))
    with pytest.raises(ConfigError, match=r"set chunking\.router\.map, got None"):
        MapRouter()(h, grid=(3, 4))
    with pytest.raises(ConfigError, match=r"axes of the grid \(3, 4\), got shape \(3, 3, 4\)"):
        MapRouter(torch.zeros(3, 3, 4))(h, grid=(3, 4))
    for given in ([[1.0]], torch.ones(0, 4)):
        with pytest.raises(ConfigError, match="map must be a tensor of one value or more, got"):
            MapRouter(given)(h, grid=(3, 4))
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"map must be 0 or more and finite, got {value:g} to {value:g}"):
            MapRouter(torch.full((3, 4), value))(h, grid=(3, 4))


def test_a_given_map_in_dynamic_chunking():
    """Its cells alone go through the blocks, and the others take their change."""
    edit = torch.zeros(4, 6)
    edit[1:3, 2:4] = 1
    chunking = DynamicChunking([torch.nn.Identity()], 32, (4, 6), run=lambda _, x, plan: x + 1, router=MapRouter(edit))
    h = torch.randn(2, 24, 32)
    torch.testing.assert_close(chunking(h), h + 1)
    kept = chunking.routing.boundary_mask.view(2, 4, 6)
    assert torch.equal(kept, edit.bool().expand(2, -1, -1))
    chunking.router.map = 0 * edit
    assert torch.equal(chunking(h), h)
