"""DyDiT's gates in DC-DiT's main network: open they change nothing, by a table they skip the rows that masks zero."""

import pytest
import torch

from dcdit.model import DCDiT, preset
from dcdit.model.dydit_main import DyDCDiT
from dcdit.model.flops import dcdit_flops
from dcdit.model.gated_macs import gated_tokens, main_rates
from dcdit.sampling import sample


@pytest.fixture(scope="module")
def digits():
    return DCDiT.from_pretrained("digits")


def inputs(batch=3):
    torch.manual_seed(5)
    return torch.randn(batch, 4, 14, 14), torch.full((batch,), 400.0), torch.arange(batch)


def closing(model):
    """The model with routers that close some of everything."""
    torch.manual_seed(4)
    for block in model.main.blocks:
        for layer in (block.routers.heads, block.routers.groups, block.routers.tokens[2]):
            torch.nn.init.normal_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return model


@torch.no_grad()
def test_open_gates_are_the_dcdit(digits):
    net = DyDCDiT.from_dcdit(digits).eval()
    want = digits(*inputs(), 0.3)
    assert torch.equal(net(*inputs(), 0.3, complete=True), want)
    assert torch.equal(net(*inputs(), 0.3), want) and all(part.all() for gates in net.main.decided for part in gates)
    assert torch.allclose(net.tabulate([400.0])(*inputs(), 0.3), want, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("limits", [{}, {"capacity": 3 * 196, "max_seqlen": 196}], ids=["exact", "spare rows"])
def test_tabulated_is_the_masked(digits, limits):
    net = closing(DyDCDiT.from_dcdit(digits).eval())
    want = net(*inputs(), 0.2, **limits)
    masked = net.main.decided
    out, routing = net.tabulate([400.0, 900.0])(*inputs(), 0.2, return_routing=True, **limits)
    assert torch.allclose(out, want, atol=1e-4)
    live = routing.plan.live
    for have, gates in zip(net.main.decided, masked, strict=True):
        assert torch.equal(have.tokens[live], gates.tokens[live, 0]) and torch.equal(have.heads, gates.heads[0])
        assert not have.tokens[~live].any()
    kept = torch.cat([gates.tokens[live] for gates in masked]).mean()
    assert 0.02 < kept < 0.98 and not torch.allclose(want, digits(*inputs(), 0.2), atol=1e-2)


def test_gradients_reach_all_routers(digits):
    net = closing(DyDCDiT.from_dcdit(digits)).train()
    net(*inputs(), 0.0).square().mean().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if "main.blocks" in name and "routers" in name}
    assert len(grads) == 6 * 8 and all(grad is not None for grad in grads.values())


@torch.no_grad()
def test_cost(digits):
    """The rate against the products of the sliced weights that ran; `gated_tokens` cost these and the routers."""
    net = closing(DyDCDiT.from_dcdit(digits).eval())
    config, table = net.config, net.tabulate([400.0])
    _, routing = table(*inputs(), 0.2, return_routing=True)
    lengths = routing.plan.lengths.double()
    rates = main_rates(net.main.decided, routing.plan, config)
    spent, routers = torch.zeros(3).double(), torch.zeros(3).double()
    for name, gates, block in zip(table.table.names[400.0], net.main.decided, net.main.blocks, strict=True):
        slim, parts = table.table.narrow[name], gates.tokens.split(routing.plan.lengths.tolist())
        linears = slim.qkv.weight.numel() + slim.proj.weight.numel()
        spent += lengths * linears + 2 * lengths**2 * slim.proj.weight.shape[1]
        mlp = slim.fc1.weight.numel() + slim.fc2.weight.numel()
        spent += mlp * torch.stack([part.sum() for part in parts]).double()
        token, width = block.routers.tokens, [block.routers.heads.weight, block.routers.groups.weight]
        routers += lengths * (token[0].weight.numel() + token[2].weight.numel()) + sum(w.numel() for w in width)
    whole = 6 * (12 * lengths * 96**2 + 2 * lengths**2 * 96)
    assert torch.allclose(rates.double(), spent / whole, rtol=1e-5) and 0.1 < rates.min() < rates.max() < 0.9
    for n, m, saved in zip(lengths, gated_tokens(config, lengths, rates), whole - spent - routers, strict=True):
        left = dcdit_flops(config, float(n))["total"] - 2e-9 * float(saved)
        assert dcdit_flops(config, float(m))["total"] == pytest.approx(left, rel=1e-6)
    run = sample(net, [0, 1], objective="flow", steps=2, guidance=2.0)
    assert (run.trace.tokens < run.trace.decided["kept"]).all() and (run.trace.decided["gates"] < 0.9).all()


def test_sampled(digits):
    """A policy's wrapper tabulates over the steps; a picture does not depend on its batch."""
    net = closing(DyDCDiT.from_dcdit(digits).eval())
    options = {"objective": "flow", "steps": 3, "guidance": 2.0}
    whole = sample(net, [0, 1], **options).latents
    assert torch.allclose(sample(net, [1], indices=[1], **options).latents, whole[1:], atol=1e-4)
    open_net = DyDCDiT.from_dcdit(digits).eval()
    plain = sample(digits, [0, 1], **options, policy="reuse=2").latents
    assert torch.allclose(sample(open_net, [0, 1], **options, policy="reuse=2").latents, plain, atol=1e-4)
    assert not torch.allclose(whole, plain, atol=1e-2)


def test_bad_input(digits):
    net = DyDCDiT.from_dcdit(digits).eval().tabulate([1.0, 2.0])
    x, t, y = inputs()
    with pytest.raises(ValueError, match="t must be one of the 2 timesteps that were tabulated, got 400"):
        net(x, t, y)
    with pytest.raises(ValueError, match="t must be one time for all samples, got 2"):
        net(x, torch.tensor([1.0, 2.0, 2.0]), y)
    assert preset("digits").depth == 6
