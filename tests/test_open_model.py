"""The five steps of a DC-DiT: called alone, overridden, with a router, a backbone and a routing from elsewhere."""

import pytest
import torch
from torch import nn

from dcdit.errors import CheckpointError, ConfigError
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.model.flops import dcdit_flops
from dcdit.model.routing import Routing
from dcdit_kernels import adaln_modulate

CONFIG = DCDiTConfig(input_size=(6, 5), num_classes=5, hidden_size=64, depth=2, num_heads=2, encoder_width=32)


def build(**parts):
    torch.manual_seed(0)
    model = DCDiT(CONFIG, **parts)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def batch(size=3):
    torch.manual_seed(1)
    return torch.randn(size, 4, 6, 5), 1000 * torch.rand(size), torch.arange(size)


class LateRouter(nn.Module):
    """Keeps more cells where the conditioning says so, and looks at nothing else."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(64, 30)

    def forward(self, h, c):
        return torch.sigmoid(self.score(c))

    def macs(self, cells):
        return 64 * 30


class TextBackbone(nn.Module):
    """Adds each sample's text to its tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(7, 64)

    def forward(self, tokens, c, packing, text):
        shift = self.embed(text)
        return adaln_modulate(tokens, shift, torch.zeros_like(shift), packing)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_the_steps_one_by_one_are_the_forward(rho):
    model, (x, t, y) = build(), batch()
    c, outer = model.condition(t, y)
    h = model.encode(x, outer)
    routing = model.route(h, c, rho)
    tokens = model.backbone(routing.chunk(h, model.pos_embed), c, routing.plan)
    assert torch.equal(model.decode(tokens, h, routing, outer), model(x, t, y, rho))


def test_a_routing_is_used_again():
    """The bits of the call that made it, and its gradients, without the router."""
    model, (x, t, y) = build(), batch()
    out, routing = model(x, t, y, torch.tensor([0.0, 0.3, 0.9]), return_routing=True)
    (first,) = torch.autograd.grad(out.square().sum(), model.stem.weight, retain_graph=True)
    model.router.forward = None
    again, same = model(x, t, y, routing=routing, return_routing=True)
    assert same is routing and torch.equal(again, out)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), model.stem.weight)[0], first)
    later = model(x + 0.1, t - 1, y, routing=routing)
    assert later.shape == out.shape and not torch.equal(later, out)


def test_a_routing_that_does_not_fit():
    model, (x, t, y) = build(), batch()
    _, routing = model(x, t, y, return_routing=True)
    with pytest.raises(ValueError, match=r"routing must be for 2 samples of \(6, 5\) cells, got 3 of 3 samples"):
        model(x[:2], t[:2], y[:2], routing=routing)
    mask = torch.zeros(3, 30, dtype=torch.bool)
    budgets = [{"drop_fraction": 0.5}, {"drop_fraction": torch.zeros(3)}, {"capacity": 9}, {"max_seqlen": 9}]
    for budget in (*budgets, {"keep": mask}, {"ban": mask}, {"budget": 30}, {"budget_per_sample": 9}):
        with pytest.raises(ValueError, match=f"{next(iter(budget))} must be left out beside a routing"):
            model(x, t, y, routing=routing, **budget)


def test_kept_and_banned_cells():
    """The backbone gets kept cells and no banned ones; the router's own choice, seen by its loss, is untouched."""
    model, (x, t, y) = build(), batch()
    _, free = model(x, t, y, 0.5, return_routing=True)
    keep, ban = (torch.arange(30) % 5 == place for place in (1, 3))
    keep, ban = keep.repeat(3, 1), ban.repeat(3, 1)
    out, routing = model(x, t, y, 0.5, return_routing=True, keep=keep, ban=ban)
    assert routing.boundary_mask[keep].all() and not routing.boundary_mask[ban].any()
    assert torch.equal(routing.natural_mask, free.natural_mask)
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.router.score.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"plan_chunks: keep must have shape \(3, 30\), got \(3, 6, 5\)"):
        model(x, t, y, keep=keep.view(3, 6, 5))


@pytest.mark.parametrize(
    "budget", [{"budget": 40}, {"budget_per_sample": 13}, {"budget_per_sample": torch.tensor([5, 30, 2])}]
)
def test_budgets(budget):
    """Exactly so many tokens, forced ones among them, with the gradients of any other routing."""
    model, (x, t, y) = build(), batch()
    out, routing = model(x, t, y, return_routing=True, **budget)
    (rows,) = budget.values()
    wanted = [rows] * 3 if isinstance(rows, int) else rows.tolist()
    assert int(routing.plan.lengths.sum()) == routing.plan.capacity == (40 if "budget" in budget else sum(wanted))
    assert "budget" in budget or routing.plan.lengths.tolist() == wanted
    assert routing.boundary_mask[:, [0, -1]].all() and routing.plan.exact
    out.square().mean().backward()
    grads = [p.grad for p in (model.stem.weight, model.router.score.weight)]
    model.zero_grad()
    model(x, t, y, keep=routing.boundary_mask, ban=~routing.boundary_mask).square().mean().backward()
    for grad, p in zip(grads, (model.stem.weight, model.router.score.weight), strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="exclude each other, got drop_fraction and budget"):
        model(x, t, y, 0.3, **budget)


def test_a_router_that_sees_the_conditioning():
    model, (x, t, y) = build(router=LateRouter()), batch()
    out, routing = model(x, t, y, return_routing=True)
    c, _ = model.condition(t, y)
    assert torch.equal(routing.boundary_prob, torch.sigmoid(model.router.score(c)))
    out.square().mean().backward()
    assert model.router.score.weight.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, t, y, return_routing=True)[1].boundary_prob.dtype == torch.float32


def test_a_backbone_with_inputs_of_its_own():
    model, (x, t, y) = build(backbone=TextBackbone()), batch()
    text = torch.randn(3, 7)
    out = model(x, t, y, text=text)
    one = model(x[1:2], t[1:2], y[1:2], text=text[1:2])
    torch.testing.assert_close(out[1:2], one, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x, t, y, text=-text), out)
    with pytest.raises(TypeError, match="text"):
        model(x, t, y)


def test_parts_of_ones_own_keep_their_weights():
    router, network = LateRouter(), TextBackbone()
    before = [p.clone() for part in (router, network) for p in part.parameters()]
    model = DCDiT(CONFIG, router=router, backbone=network)
    after = [*model.router.parameters(), *model.main.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_step_may_be_overridden():
    class Everywhere(DCDiT):
        def route(self, h, c, drop_fraction=0.0, capacity=None):
            return Routing.of(torch.ones(h.shape[:2]), self.config.input_size, drop_fraction, capacity=capacity)

    torch.manual_seed(0)
    model, (x, t, y) = Everywhere(CONFIG), batch()
    assert bool(model(x, t, y, return_routing=True)[1].boundary_mask.all())


@pytest.mark.parametrize("router", ["predictability", "cosine"])
@pytest.mark.parametrize("cond_norm", [False, True])
def test_init_weights_after_meta_gives_a_fresh_model(router, cond_norm):
    config = DCDiTConfig(**{**CONFIG.to_dict(), "router": router, "cond_norm": cond_norm})
    torch.manual_seed(7)
    fresh = DCDiT(config).state_dict()
    with torch.device("meta"):
        model = DCDiT(config)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    torch.manual_seed(7)
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name


def test_a_router_says_what_it_costs():
    ours, theirs = dcdit_flops(CONFIG, 10), dcdit_flops(CONFIG, 10, LateRouter())
    assert theirs["router"] == 2e-9 * 64 * 30 and theirs["main"] == ours["main"]
    assert theirs["total"] == pytest.approx(ours["total"] - ours["router"] + theirs["router"])
    with pytest.raises(ConfigError, match="the FLOPs of Linear are unknown"):
        dcdit_flops(CONFIG, 10, nn.Linear(2, 2))


def test_parts_of_ones_own_are_saved_and_loaded(tmp_path):
    model, (x, t, y) = build(router=LateRouter(), backbone=TextBackbone()).eval(), batch()
    model.save_pretrained(tmp_path)
    text = torch.randn(3, 7)
    again = DCDiT.from_pretrained(tmp_path, router=LateRouter(), backbone=TextBackbone())
    assert torch.equal(again(x, t, y, text=text), model(x, t, y, text=text))
    with pytest.raises(CheckpointError, match="has a router of its own, LateRouter: give the module as router="):
        DCDiT.from_pretrained(tmp_path, backbone=TextBackbone())
    with pytest.raises(CheckpointError, match="has a backbone of its own, TextBackbone"):
        DCDiT.from_pretrained(tmp_path, router=LateRouter())
    with pytest.raises(CheckpointError, match=r"missing keys in checkpoint: router"):
        DCDiT.from_pretrained(tmp_path, router=nn.Bilinear(2, 2, 2), backbone=TextBackbone())
