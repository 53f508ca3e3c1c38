"""With a budget the number of tokens is known beforehand: forward and backward look at no tensor's values on the host.

An operator that reads data would wait for a GPU; here each such operator raises, on a CPU as well. Two things that
run on a CPU alone are left out: the look at class ids, and attention's loop over samples, where masked attention stands
in.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.training.objectives import ratio_loss

CONFIG = DCDiTConfig(input_size=(8, 8), num_classes=5, hidden_size=64, depth=1, num_heads=2, encoder_width=32)
READS = {
    "_local_scalar_dense",
    "nonzero",
    "item",
    "equal",
    "is_nonzero",
    "unique_consecutive",
    "_unique2",
    "masked_select",
}
BUDGETS = [{"budget": 100}, {"budget_per_sample": 20}]


class Host(RuntimeError):
    """The host read a tensor."""


class NoHost(TorchDispatchMode):
    """Raises on each operator that makes the host look at data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in READS or indexed or repeats:
            raise Host(str(func))
        return func(*args, **(kwargs or {}))


def masked_attention(q, k, v, *lengths, packing):
    same = packing.sample_index[:, None] == packing.sample_index
    q, k, v = (rows.transpose(0, 1) for rows in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, same).transpose(0, 1)


def build():
    torch.manual_seed(0)
    model = DCDiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(DCDiT, "_check", lambda self, x, t, y: None)
    monkeypatch.setattr("dcdit.model.blocks.varlen_attention", masked_attention)
    # tolist and numpy read memory without an operator.
    for name in ("tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, name=name: raise_(name))
    return build()


def raise_(name):
    raise Host(name)


def batch(seed, size=4):
    gen = torch.Generator().manual_seed(seed)
    x, t = torch.randn(size, 4, 8, 8, generator=gen), 1000 * torch.rand(size, generator=gen)
    return x, t, torch.randint(0, 5, (size,), generator=gen)


def step(model, x, t, y, **options):
    out, routing = model(x, t, y, return_routing=True, **options)
    return out.square().mean() + 0.03 * ratio_loss(routing.boundary_prob, routing.natural_mask, 4.0).mean(), routing


@pytest.mark.parametrize("budget", BUDGETS)
def test_forward_and_backward_read_nothing(model, budget):
    with NoHost():
        loss, routing = step(model, *batch(1), **budget)
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert routing.plan.lengths.sum() == routing.plan.capacity


@pytest.mark.parametrize("options", [{}, {"drop_fraction": 0.5}])
def test_the_mode_sees_what_a_router_alone_needs(model, options):
    """The exact number of rows is known by a look at the data alone."""
    from dcdit_kernels import use_backend

    with NoHost(), use_backend("reference"), pytest.raises(Host):
        step(model, *batch(1), **options)


def test_one_graph_for_fifty_batches():
    model, budget = build(), {"budget": 100}
    compiled = torch.compile(lambda *inputs: step(model, *inputs, **budget)[0], fullgraph=True, backend="aot_eager")
    for seed in range(50):
        model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            loss = compiled(*batch(seed))
            loss.backward()
        if seed % 10 == 0:
            torch.testing.assert_close(loss, step(model, *batch(seed), **budget)[0], rtol=1e-5, atol=1e-6)
