"""DynamicChunking against a per-cell loop in float64, on sequences, images and video; examples/video.py."""

import copy
import io
import itertools
import runpy

import pytest
import torch
from torch import nn

import dcdit
from dcdit.errors import ConfigError
from dcdit.training.objectives import ratio_loss
from dcdit_kernels import varlen_attention

GRIDS = [(9,), (4, 5), (2, 3, 4)]


class Attend(nn.Module):
    """A residual block on packed tokens, scaled by a value for each sample."""

    def __init__(self, width, heads=2):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)

    def forward(self, x, plan, scale):
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        out = varlen_attention(q, k, v, plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen)
        return x + scale[plan.sample_index][:, None] * out.flatten(1)

    def dense(self, x, scale):
        """By hand on one sample's tokens (M, D)."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        weight = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
        return x + scale * (weight @ v).transpose(0, 1).flatten(1)


class Fixed(nn.Module):
    """A router that records its arguments."""

    def __init__(self, boundary_prob):
        super().__init__()
        self.boundary_prob = boundary_prob

    def forward(self, h):
        return self.boundary_prob


def build(grid, width=32, depth=2, **options):
    torch.manual_seed(0)
    blocks = [Attend(width) for _ in range(depth)]
    return dcdit.DynamicChunking(blocks, width, grid, **options).double()


def batch(grid, size=3, width=32):
    torch.manual_seed(1)
    cells = torch.Size(grid).numel()
    return torch.randn(size, cells, width).double(), torch.rand(size).double() + 0.5, torch.rand(size, cells).double()


@pytest.mark.parametrize("grid", GRIDS)
def test_a_fresh_router_keeps_all_tokens_and_the_stack_computes_what_it_did(grid):
    chunking, (h, scale, _) = build(grid), batch(grid)
    out = chunking(h, scale)
    expected = h
    for block in chunking.blocks:
        expected = torch.stack([block.dense(x, s) for x, s in zip(expected, scale, strict=True)])
    assert bool(chunking.routing.boundary_mask.all())
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_each_cell_takes_the_change_of_its_nearest_retained_one(grid, rho):
    h, scale, prob = batch(grid)
    chunking = build(grid, router=Fixed(prob))
    chunking.drop_fraction = rho
    out = chunking(h, scale)
    places = torch.tensor(list(itertools.product(*map(range, grid))))
    for b in range(len(h)):
        kept = (prob[b] > 0.5).nonzero().flatten()
        drop = int(len(kept) * rho)
        kept = kept[prob[b, kept].argsort(descending=True)[: len(kept) - drop]].sort().values
        x = h[b, kept]
        for block in chunking.blocks:
            x = block.dense(x, scale[b])
        change = x - h[b, kept]
        distance = (places[:, None] - places[kept]).square().sum(2)
        torch.testing.assert_close(out[b], h[b] + change[distance.argmin(1)], rtol=0, atol=1e-12)
        assert chunking.routing.plan.lengths[b] == len(kept)


def test_sigma_smooths_the_change():
    h, scale, prob = batch((4, 5))
    router = Fixed(prob)
    plain, smooth = (build((4, 5), router=router, sigma=sigma)(h, scale) for sigma in (None, 1.0))
    tiny = build((4, 5), router=router, sigma=1e-3)(h, scale)
    assert (smooth - plain).abs().max() > 1e-3
    torch.testing.assert_close(tiny, plain, rtol=0, atol=1e-6)  # the clamp of p and the 1e-8 under the fraction


def test_a_budget_for_each_sample():
    h, scale, _ = batch((4, 5))
    chunking = build((4, 5))
    chunking.drop_fraction = torch.tensor([0.0, 0.5, 0.75])
    chunking(h, scale)
    assert chunking.routing.plan.lengths.tolist() == [20, 10, 5]


def test_gradients_reach_blocks_and_router():
    h, scale, _ = batch((2, 3, 4))
    chunking = build((2, 3, 4))
    chunking.drop_fraction = 0.5
    out = chunking(h, scale)
    ratio = ratio_loss(chunking.routing.boundary_prob, chunking.routing.natural_mask, 4.0)
    (out.square().mean() + ratio).backward()
    for name, parameter in chunking.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_video_frames_are_planes_of_their_own_to_the_router():
    chunking, (h, scale, _) = build((2, 3, 4)), batch((2, 3, 4))
    chunking(h, scale)
    before = chunking.routing.boundary_prob.clone()
    h[:, 12:] = torch.randn(3, 12, 32).double()
    chunking(h, scale)
    assert torch.equal(chunking.routing.boundary_prob[:, :12], before[:, :12])
    assert not torch.allclose(chunking.routing.boundary_prob[:, 13:23], before[:, 13:23])


def test_under_autocast_the_router_stays_in_float32():
    chunking, (h, scale, _) = build((4, 5)).float(), batch((4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = chunking(h.float(), scale.float())
    assert out.dtype == torch.float32 and chunking.routing.boundary_prob.dtype == torch.float32


@pytest.mark.parametrize("grid", [(), (0, 4), (2, 2, 2, 2)])
def test_a_grid_that_is_none(grid):
    with pytest.raises(ValueError, match=r"grid must be \(L,\), \(H, W\) or \(F, H, W\)"):
        build(grid)


def test_a_width_that_the_router_cannot_have():
    with pytest.raises(ConfigError, match="width must be a multiple of 32 where no router is given, got 36"):
        build((4, 5), width=36)
    build((4, 5), width=36, router=Fixed(torch.ones(2, 20).double()))


def test_an_input_of_another_shape():
    with pytest.raises(ValueError, match=r"h must have shape \(B, 20, D\).*got \(2, 19, 32\)"):
        build((4, 5))(torch.zeros(2, 19, 32).double(), torch.ones(2).double())
    with pytest.raises(ValueError, match=r"got \(20, 32\)"):
        build((4, 5))(torch.zeros(20, 32).double(), torch.ones(2).double())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"router": Fixed(torch.zeros(20, 2))}, r"router must return boundary_prob of shape \(2, 20\), got \(20, 2\)"),
        ({"router": Fixed(torch.zeros(2, 19))}, r"of shape \(2, 20\), got \(2, 19\)"),
        ({"run": lambda blocks, x, plan: x[:, :1]}, r"run must return tokens of shape \(40, 32\), got \(40, 1\)"),
    ],
    ids=["turned router", "short router", "narrow run"],
)
def test_parts_that_return_another_shape(options, words):
    with pytest.raises(ValueError, match=words):
        build((4, 5), **options)(torch.randn(2, 20, 32).double())


def save_and_load(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, save_and_load])
def test_a_copy_after_a_training_forward_computes_the_same_and_has_no_routing(copied):
    chunking, (h, scale, _) = build((4, 5)), batch((4, 5))
    out = chunking(h, scale)
    again = copied(chunking)
    assert again.routing is None and chunking.routing.boundary_prob.requires_grad
    assert torch.equal(again(h, scale), out)


def test_video_example(capsys):
    module = runpy.run_path("examples/video.py")
    before, after, kept = module["main"](steps=30)
    assert after < 0.7 * before and kept < 0.3
