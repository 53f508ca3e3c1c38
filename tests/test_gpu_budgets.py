"""On a GPU: with a budget the host waits for nothing, eagerly, in graphs of ours and in those of torch.compile.

`make gpu` runs this file; elsewhere every test is skipped.
"""

import pytest
import torch
from test_gpu import DEVICE, digits_net, no_waits

from dcdit import graphed
from dcdit.model.memory import peak_bytes
from dcdit.model.precision import cast_weights
from dcdit.training.objectives import ratio_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none"),
]
BUDGETS = [{"budget": 300}, {"budget_per_sample": 70}]


def batch(seed, dtype=torch.float32, size=4):
    torch.manual_seed(seed)
    x = torch.randn(size, 4, 14, 14, device=DEVICE, dtype=dtype)
    return x, 1000 * torch.rand(size, device=DEVICE), torch.randint(10, (size,), device=DEVICE)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_forward_and_backward_never_wait(budget, autocast):
    net = digits_net().to(DEVICE)

    def step(inputs):
        net.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out, routing = net(*inputs, return_routing=True, **budget)
        ratio = ratio_loss(routing.boundary_prob, routing.natural_mask, 4.0).mean()
        (out.float().square().mean() + 0.03 * ratio).backward()
        return routing

    step(batch(0))  # compiles
    inputs = batch(1)
    with no_waits():
        routing = step(inputs)
    assert int(routing.plan.lengths.sum()) == routing.plan.capacity
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("budget", BUDGETS)
def test_graphs_have_the_bits_of_the_eager_model(budget, dtype):
    net = digits_net().to(DEVICE, dtype)
    graph = graphed(net)
    graph(*batch(0, dtype), **budget)  # captures
    for seed in (1, 2):
        inputs = batch(seed, dtype)
        want = net(*inputs, **budget)
        with no_waits():
            got = graph(*inputs, **budget)
        assert torch.equal(got, want)
    assert (graph.captures, graph.replays, graph.eager) == (1, 3, {}), graph.summary()


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 8])
def test_tensors_of_budgets_in_one_graph(size):
    """Each sample's own number, with a capacity: an input of the graph."""
    net = digits_net().to(DEVICE)
    graph = graphed(net)
    for seed in range(3):
        inputs, rows = batch(seed, size=size), torch.randint(20, 90, (size,), device=DEVICE)
        options = {"budget_per_sample": rows, "capacity": 90 * size}
        got, routing = graph(*inputs, 0.0, True, **options)
        assert torch.equal(got, net(*inputs, **options)) and torch.equal(routing.plan.lengths, rows.int())
    assert (graph.captures, graph.eager) == (1, {}), graph.summary()


@torch.no_grad()
def test_reduce_overhead():
    """Inductor's own CUDA graphs: the eager results, and no wait once they are recorded.

    In half precision: compiled, attention in float32 reads the lengths on the host."""
    net = cast_weights(digits_net().to(DEVICE), torch.bfloat16)
    compiled = torch.compile(lambda *inputs: net(*inputs, budget=300), fullgraph=True, mode="reduce-overhead")
    for seed in range(3):  # compiles, records
        torch.compiler.cudagraph_mark_step_begin()
        compiled(*batch(seed, torch.bfloat16))
    inputs = batch(3, torch.bfloat16)
    want = net(*inputs, budget=300)
    torch.compiler.cudagraph_mark_step_begin()
    with no_waits():
        got = compiled(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_memory_that_was_foretold(training, record_property):
    """The allocator's peak beside `dcdit info`'s figure, which was made for a CPU."""
    net, inputs = digits_net().to(DEVICE).train(training), batch(0, size=64)

    def step():
        with torch.set_grad_enabled(training):
            out = net(*inputs, budget=64 * 50)
            if training:
                out.square().mean().backward()

    step()
    net.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    ratio = (torch.cuda.max_memory_allocated() - before) / peak_bytes(net.config, 64, 50, training)
    record_property("counted over expected", f"{ratio:.3f}")
    assert 0.5 < ratio < 1.1, ratio
