"""The rivals of the study of quality: they keep as many cells, learn, and are sampled as DC-DiT is."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.euler import make_euler
from bench.quality.rivals import GridRouter, RandomRouter, make_rival
from dcdit.model.config import DCDiTConfig
from dcdit.model.routing import Routing
from dcdit.sampling import trajectory
from dcdit.sampling.sampler import sample

# With a channel to a group nothing in front of a GroupNorm has a gradient: it subtracts what the conditioning adds.
TINY = DCDiTConfig(
    input_size=(6, 8),
    num_classes=3,
    hidden_size=32,
    depth=1,
    num_heads=1,
    encoder_width=32,
    norm_groups=8,
    learn_sigma=False,
)


@pytest.mark.parametrize("kind", ["random", "grid", "latents", "plain", "plain-guess"])
def test_rivals_keep_as_many_and_learn(kind, monkeypatch):
    """1/N of the cells for each sample; an output of zero at first, gradients everywhere once that has moved."""
    net = make_rival(TINY, kind)
    x, t, y = torch.randn(2, 4, 6, 8), torch.tensor([100.0, 900.0]), torch.tensor([0, 3])
    out, routing = net(x, t, y, return_routing=True)
    assert routing.plan.lengths.tolist() == [12, 12] and not out.any()
    torch.nn.init.normal_(net.head.weight if kind.startswith("plain") else net.final.linear.weight)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    net(x, t, y).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    torch.manual_seed(0)
    known = sample(net, [0, 1, 2], objective="flow", steps=3, guidance=2.0, seed=5, batch_size=2)
    torch.manual_seed(0)
    monkeypatch.setattr(trajectory, "make_scheduler", make_euler)  # as without diffusers
    drawn = sample(net, torch.arange(3), objective="flow", steps=3, guidance=2.0, seed=5, batch_size=2)
    latents, kept = drawn.latents, (drawn.trace.tokens.mean(1) / TINY.cells).tolist()
    assert kept == [0.25] * 3 and (latents - known.latents).abs().max() < 1e-5 * latents.abs().max()


def test_a_plain_dit_reads_its_guess():
    """What it reads is the guess alone; in sampling that of the step before, after one more pass at the start."""
    net, passes = make_rival(TINY, "plain-guess").eval(), []
    for weight in (net.head.weight, net.told.weight):
        torch.nn.init.normal_(weight, std=0.1)
    x, t, y = torch.randn(2, 4, 6, 8), torch.tensor([100.0, 900.0]), torch.tensor([0, 3])
    guess = x - t.view(-1, 1, 1, 1) / 1000 * net(x, t, y, guess=torch.zeros_like(x))
    assert torch.equal(net(x, t, y), net(x, t, y, guess=guess)) and net.seen is None
    net.stem.register_forward_hook(lambda *_: passes.append(1))
    sample(net, [0, 1], objective="flow", steps=4, guidance=2.0, batch_size=2)
    assert len(passes) == 5


def test_the_plain_dit_keeps_its_own_tokens():
    net = make_rival(dataclasses.replace(TINY, target_ratio=16.0), "plain")
    routing = net(torch.randn(2, 4, 6, 8), torch.zeros(2), torch.zeros(2).long(), return_routing=True)[1]
    assert routing.plan.lengths.tolist() == [12, 12]


def test_boundaries():
    h = torch.randn(3, 48, 32)
    prob = GridRouter(TINY)(h, None).view(3, 6, 8)
    assert prob[:, ::2, ::2].all() and prob.sum() == 3 * 12
    first, second = (RandomRouter(TINY)(h, None) for _ in range(2))
    assert (first.sum(1) == 12).all() and not torch.equal(first, second) and not torch.equal(first[0], first[1])
    covering = RandomRouter(dataclasses.replace(TINY, keep_grid=4))(h, None)
    assert (covering.sum(1) == 12).all() and covering.view(3, 6, 8)[:, ::4, ::4].all()


def test_latents_read_all_cells_and_all_cells_read_them():
    """The products are as many as the router says; the order of the latents is nothing, where cells lie something."""
    net = make_rival(TINY, "latents")
    h, prob = torch.randn(2, 48, 32), net.router(torch.randn(2, 48, 32), None)
    routing, outer = Routing.of(prob, (6, 8)), torch.randn(2, 32)
    torch.nn.init.normal_(net.final.linear.weight)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tokens = net.gather(h, routing)
        net.write(h, tokens.unflatten(0, (2, 12)))
    assert counter.get_total_flops() == 2 * 2 * net.router.macs(48)
    out = net.decode(tokens, h, routing, outer)
    order = torch.randperm(12)
    shuffled = net.decode(tokens.unflatten(0, (2, 12))[:, order].flatten(0, 1), h, routing, outer)
    assert (out - shuffled).abs().max() < 1e-4 * out.abs().max()
    assert (net.gather(h.flip(1), routing) - tokens).abs().max() > 1e-3
