"""model([x1, x2, …], t, y): samples of different sizes in one batch, against calls of each sample alone in float64."""

import dataclasses

import pytest
import torch
from torch import nn

from dcdit.model import DCDiT, DCDiTConfig, PlainDiT, graphed
from dcdit.model.embedders import positions_of, sincos_2d
from dcdit.model.mixed import MixedRouting, by_size
from dcdit.training.objectives import ratio_loss

CONFIG = DCDiTConfig(
    input_size=(8, 8), in_channels=3, num_classes=5, hidden_size=64, depth=2, num_heads=2, encoder_width=32
)
SIZES = [(8, 8), (6, 10), (8, 8), (2, 18), (6, 10), (12, 10), (2, 4)]
BATCH = len(SIZES)


def make_model(**changes):
    torch.manual_seed(1)
    model = DCDiT(dataclasses.replace(CONFIG, **changes)).double()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.08)
    if hasattr(model.router, "score"):
        nn.init.constant_(model.router.score.bias, 0.3)
    return model


def make_batch():
    torch.manual_seed(2)
    xs = [torch.randn(3, *size, dtype=torch.float64) for size in SIZES]
    return xs, torch.rand(BATCH).double() * 1000, torch.arange(BATCH) % 6


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize(
    ("changes", "rho"),
    [
        ({}, 0.3),
        ({"router": "cosine"}, torch.tensor(0.5)),
        ({"encoder_stride": 2, "cond_norm": True}, torch.linspace(0, 0.6, BATCH)),
        ({"segment_mean": True, "keep_grid": 3}, 0.3),
    ],
)
def test_as_each_sample_alone(changes, rho):
    """Predictions, retained cells, probabilities and all gradients."""
    model = make_model(**changes)
    xs, t, y = make_batch()
    leaves = [x.clone().requires_grad_() for x in xs]
    outs, routing = model(leaves, t, y, rho, return_routing=True)
    weights = [torch.randn_like(out) for out in outs]
    loss = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
    wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    alone, kept, loss = [], [], 0
    for i, x in enumerate(leaves):
        own = rho[i : i + 1] if isinstance(rho, torch.Tensor) and rho.dim() else rho
        out, part = model(x[None], t[i : i + 1], y[i : i + 1], own, return_routing=True)
        alone.append(out[0])
        kept.append(part)
        loss = loss + (out[0] * weights[i]).sum()
        torch.testing.assert_close(outs[i], out[0], rtol=0, atol=1e-10)
    own_grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    for got, want in zip(grads, own_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-10)
    assert routing.packing.lengths.tolist() == [part.plan.capacity for part in kept]
    for i, part in enumerate(kept):
        cells = part.plan.cells
        torch.testing.assert_close(routing.boundary_prob[i, :cells], part.boundary_prob[0])
        assert torch.equal(routing.boundary_mask[i, :cells], part.boundary_mask[0])
        assert routing.valid[i].sum() == cells and routing.valid[i, :cells].all()
        assert routing.kept[i] == part.kept[0]
    assert not routing.boundary_prob[~routing.valid].any()
    assert 0 < routing.kept.mean() < 1


def test_one_wait_and_exact_plans(model, monkeypatch):
    """The router's plans wait for nothing, the counts come in one copy, and no plan keeps a spare row."""
    import dcdit.model.routing as rooms

    capacities, copies = [], []
    plan, tolist = rooms.plan_chunks, torch.Tensor.tolist

    def planned(prob, *args, capacity=None, **kwargs):
        capacities.append(capacity)
        return plan(prob, *args, capacity=capacity, **kwargs)

    def counted(tensor):
        copies.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(rooms, "plan_chunks", planned)
    _, routing = model(*make_batch(), return_routing=True)
    assert capacities == [2 * 64, 2 * 60, 36, 120, 8]
    from dcdit.model import mixed

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    h = [torch.randn(n, cells, 64).double() for n, cells in ((2, 64), (1, 36))]
    mixed._route(model, h, [torch.zeros(len(x), 64).double() for x in h], [(8, 8), (2, 18)], [{}, {}])
    assert copies.count((2, 3)) == 1
    for part in routing.parts:
        dataclasses.replace(part.plan)  # checks every value of it, that it is exact included
        assert part.plan.exact and part.plan.max_seqlen == part.plan.lengths.max()
    dataclasses.replace(routing.packing)


def test_routing_again(model):
    xs, t, y = make_batch()
    outs, routing = model(xs, t, y, 0.4, return_routing=True)
    assert isinstance(routing, MixedRouting)
    assert all(map(torch.equal, outs, model(xs, t, y, routing=routing)))
    with pytest.raises(ValueError, match=r"routing must be for samples of .*got one of"):
        model(xs[::-1], t, y, routing=routing)
    with pytest.raises(ValueError, match="drop_fraction must be left out beside a routing"):
        model(xs, t, y, 0.2, routing=routing)
    with pytest.raises(ValueError, match="must be a MixedRouting for a list of samples, got a Routing"):
        model(xs, t, y, routing=routing.parts[0])
    with pytest.raises(ValueError, match="must be a Routing for a batch of one size, got a MixedRouting"):
        model(torch.stack([xs[0], xs[2]]), t[:2], y[:2], routing=routing)


def test_backbone_sees_the_order_of_the_batch():
    """A user's backbone gets each sample's inputs with the rows of that sample."""

    class Adds(nn.Module):
        def forward(self, tokens, c, packing, text):
            return tokens + text[packing.sample_index]

    torch.manual_seed(0)
    model = DCDiT(CONFIG, backbone=Adds()).double()
    nn.init.normal_(model.final.linear.weight)
    xs, t, y = make_batch()
    text = torch.randn(BATCH, 64, dtype=torch.float64)
    outs = model(xs, t, y, text=text)
    for i, x in enumerate(xs):
        out = model(x[None], t[i : i + 1], y[i : i + 1], text=text[i : i + 1])
        torch.testing.assert_close(outs[i], out[0], rtol=0, atol=1e-10)


def test_no_grad_inference_mode_and_limits(model):
    xs, t, y = make_batch()
    want = model(xs, t, y)
    with torch.inference_mode():
        outs, routing = model(xs, t, y, return_routing=True)
    assert all(map(torch.equal, outs, want))
    tensors = [routing.packing.cu_seqlens, routing.packing.sample_index]
    tensors += [tensor for part in routing.parts for tensor in vars(part.plan).values()]
    assert not any(isinstance(tensor, torch.Tensor) and tensor.is_inference() for tensor in tensors)
    routing = model(xs, t, y, max_seqlen=3, return_routing=True)[1]
    assert routing.packing.lengths.max() <= 3 and routing.packing.max_seqlen <= 3
    assert graphed(model)(xs, t, y)[0].equal(want[0])


def test_masks_of_cells(model):
    xs, t, y = make_batch()
    cells = [x.shape[1] * x.shape[2] for x in xs]
    keep, ban = [torch.rand(n) < 0.2 for n in cells], [torch.rand(n) < 0.2 for n in cells]
    ban = [b & ~k for b, k in zip(ban, keep, strict=True)]
    outs = model(xs, t, y, 0.3, keep=keep, ban=ban)
    for i, x in enumerate(xs):
        out = model(x[None], t[i : i + 1], y[i : i + 1], 0.3, keep=keep[i][None], ban=ban[i][None])
        torch.testing.assert_close(outs[i], out[0], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"ban must be a list of masks of shapes \[\(64,\).*, got \[\(64,\)\]"):
        model(xs, t, y, ban=ban[:1])


def test_nothing_kept_of_a_sample():
    class Few(nn.Module):
        """Keeps cells of the first size alone."""

        def forward(self, h, c, *, grid=None):
            return torch.full(h.shape[:2], 0.7 if grid is None else 0.2).to(h)

    xs, t, y = make_batch()
    model = DCDiT(CONFIG, router=Few()).double()
    outs, routing = model(xs, t, y, return_routing=True)
    assert routing.packing.lengths.tolist() == [64, 0, 64, 0, 0, 0, 0]
    assert [tuple(out.shape[1:]) for out in outs] == SIZES
    assert model(xs[3:], t[3:], y[3:], return_routing=True)[1].packing.capacity == 0


def test_bits_do_not_depend_on_the_order_of_the_list(model):
    xs, t, y = make_batch()
    outs, back = model(xs, t, y), list(range(BATCH))[::-1]
    turned = model([xs[i] for i in back], t[back], y[back])
    for i, out in zip(back, turned, strict=True):
        torch.testing.assert_close(out, outs[i], rtol=0, atol=1e-12)


def test_ratio_loss_of_mixed_sizes(model):
    """Over the samples' own cells: as counted by hand."""
    routing = model(*make_batch(), return_routing=True)[1]
    own = [part.boundary_prob[j] for part in routing.parts for j in range(len(part.boundary_prob))]
    prob = torch.cat(own)
    kept, mean, n = (prob > 0.5).double().mean(), prob.mean(), 4.0
    want = n / (n - 1) * ((n - 1) * kept * mean + (1 - kept) * (1 - mean))
    got = ratio_loss(routing.boundary_prob, routing.natural_mask, n, valid=routing.valid)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_positions_of_another_grid(patch):
    """In the unit of the table, and so that a smaller grid is a corner of the larger."""
    table = sincos_2d(64, (8, 8), patch)
    for grid in ((8, 8), (1, 9), (30, 70)):
        torch.testing.assert_close(positions_of(table, grid), sincos_2d(64, grid, patch), rtol=0, atol=1e-6)
    corner = positions_of(table, (5, 3)).view(5, 3, 64)
    torch.testing.assert_close(corner, table.view(8, 8, 64)[:5, :3], rtol=0, atol=1e-6)


def test_by_size():
    xs, t, _ = make_batch()
    outs = by_size(lambda x, s: x * s.view(-1, 1, 1, 1), xs, t)
    assert all(torch.equal(out, x * s) for out, x, s in zip(outs, xs, t, strict=True))
    assert torch.equal(by_size(torch.add, t, t), 2 * t)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": []}, r"x must be a tensor \(B, C, H, W\) or a list of tensors \(C, H, W\), got \[\]"),
        ({"x": "pictures"}, "got str"),
        ({"x": [[0.0]]}, r"got \['list'\]"),
        ({0: torch.zeros(3, 8, 8)}, r"x\[1\] must be torch.float32 on cpu as x\[0\] is, got torch.float64 on cpu"),
        ({3: torch.zeros(3, 8, 8, dtype=torch.float64, device="meta")}, r"x\[3\] must be torch.float64 on cpu .* meta"),
        ({2: torch.zeros(4, 8, 8).double()}, r"x\[2\] must have shape \(3, H, W\), got \(4, 8, 8\)"),
        ({2: torch.zeros(1, 3, 8, 8).double()}, r"x\[2\] must have shape \(3, H, W\), got \(1, 3, 8, 8\)"),
        ({2: torch.zeros(3, 0, 8).double()}, r"x\[2\] must have shape \(3, H, W\), got \(3, 0, 8\)"),
        ({"t": torch.zeros(2)}, r"t must have shape \(7,\), got \(2,\)"),
        ({"y": torch.zeros(8).long()}, r"y must have shape \(7,\), got \(8,\)"),
        ({"drop_fraction": torch.zeros(2)}, r"drop_fraction must have shape \(7\), got \(2,\)"),
        ({"drop_fraction": 1.0}, r"drop_fraction must be in \[0, 1\), got 1.0"),
        ({"capacity": 60}, "capacity is for samples of one size: leave it out for a list"),
        ({"budget": 60}, "budget is for samples of one size: leave it out for a list"),
    ],
)
def test_bad_input(model, change, message):
    xs, t, y = make_batch()
    for i in [key for key in change if isinstance(key, int)]:
        xs[i] = change[i]
    given = {"x": xs, "t": t, "y": y, **{k: v for k, v in change.items() if isinstance(k, str)}}
    with pytest.raises(ValueError, match=message):
        model(**given)


def test_sizes_that_a_model_cannot_take(model):
    xs, t, y = make_batch()
    with pytest.raises(ValueError, match=r"x\[2\] must have sides that encoder_stride 2 divides, got \(7, 8\)"):
        make_model(encoder_stride=2)([*xs[:2], xs[2][:, :7], *xs[3:]], t, y)

    class Mine(nn.Module):
        def forward(self, h, c):
            return h.mean(2).sigmoid()

    own = DCDiT(CONFIG, router=Mine()).double()
    own(torch.stack([xs[0], xs[2]]), t[:2], y[:2])
    with pytest.raises(ValueError, match=r"x must have sides \(8, 8\): Mine.forward takes no grid, got \(6, 10\)"):
        own(xs, t, y)
    broken = make_model()
    nn.init.constant_(broken.stem.weight, torch.nan)
    with pytest.raises(ValueError, match=r"boundary_prob has .* NaN"):
        broken(xs, t, y)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_plain_dit_takes_the_list_too(patch):
    torch.manual_seed(0)
    model = PlainDiT(CONFIG, patch).double()
    xs, t, y = make_batch()
    outs = model(xs, t, y)
    for i, size in enumerate(SIZES):
        config = dataclasses.replace(CONFIG, input_size=size)
        alone = PlainDiT(config, patch).double()
        weights = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
        alone.load_state_dict({**alone.state_dict(), **weights})
        torch.testing.assert_close(outs[i], alone(xs[i][None], t[i : i + 1], y[i : i + 1])[0])
    if patch == 2:
        with pytest.raises(ValueError, match=r"x must have sides that patch 2 divides, got \(7, 8\)"):
            model([torch.zeros(3, 7, 8).double()], t[:1], y[:1])
