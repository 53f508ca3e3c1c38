"""On a GPU: every back-end against float64, without hidden waits, in CUDA graphs, on side streams, past 2³¹ elements.

`make gpu` runs this file; elsewhere every test is skipped.
"""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch

import dcdit_kernels as K
from bench.cases import OPERATORS, Case
from bench.gate import check
from bench.measure import build, host_waits
from bench.operators import routed_prob
from bench.timing import captured
from dcdit import DCDiT, graphed, preset
from dcdit.training.batches import TrainingStream, batches
from dcdit.training.objectives import FlowMatching, ratio_loss
from dcdit.training.step_graphs import StepGraphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none"),
]
DEVICE = "cuda"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("share", [0.02, 0.25, 1.0])
@pytest.mark.parametrize("group", OPERATORS)
def test_operator(group, share, dtype):
    """Outputs and gradients of every variant within the error budget, at 14×14 with D 96 and at 32×32 with D 384."""
    for size, side in (("digits", 14), ("S", 32)):
        case = Case(group, size, side, 3, share, backward=group != "plan", dtype=dtype)
        problem = build(case, DEVICE)
        if (group, dtype) != ("attention", "float32"):  # FlashAttention knows half precision only
            assert {"native", "triton"} & problem.variants.keys(), problem.absent
        wrong = {name: reason for name, reason in check(problem).items() if reason}
        assert not wrong


def pipeline(prob, h, modulators, residual, grid, capacity, attend=True):
    """Plan, chunk, modulate, attend, dechunk in fixed mode."""
    plan = K.plan_chunks(prob, grid, 0.3, capacity=capacity)
    gate, shift, scale = modulators.chunk(3, dim=1)
    x = K.chunk(h, plan)
    x, normed = K.gate_residual_modulate(x, x, gate, shift, scale, plan)
    if attend:
        heads, cu, longest = normed.view(capacity, -1, 32), plan.cu_seqlens, plan.max_seqlen
        normed = K.varlen_attention(heads, heads, heads, cu, cu, longest, longest).flatten(1)
    x = K.gate_residual(x, normed, gate, plan)
    return K.dechunk(x, prob, plan, residual)


def pipeline_inputs(seed=0):
    torch.manual_seed(seed)
    prob = torch.rand(2, 256, device=DEVICE)
    h, residual = torch.randn(2, 2, 256, 96, device=DEVICE, dtype=torch.bfloat16)
    return prob, h, torch.randn(2, 288, device=DEVICE, dtype=torch.bfloat16), residual


def test_fixed_mode_never_waits():
    tensors = pipeline_inputs()
    pipeline(*tensors, (16, 16), 300)  # compiles
    assert host_waits(lambda: pipeline(*tensors, (16, 16), 300)) == 0


def test_exact_mode_waits_once():
    prob = pipeline_inputs()[0]
    K.plan_chunks(prob, (16, 16), 0.3)
    assert host_waits(lambda: K.plan_chunks(prob, (16, 16), 0.3)) == 1


def assert_replays(function, make_inputs, **tolerance):
    """A captured call gives the eager call's result when other inputs, which keep other counts, are copied in."""
    static, outs = make_inputs(0), []
    replay = captured([lambda: outs.append(function(*static))])
    for seed in (1, 2):
        fresh = make_inputs(seed)
        for slot, value in zip(static, fresh, strict=True):
            slot.copy_(value)
        replay()
        torch.testing.assert_close(outs[-1], function(*fresh), **tolerance)


def test_graph_replays_on_new_inputs():
    assert_replays(lambda *tensors: pipeline(*tensors, (16, 16), 300), pipeline_inputs, rtol=0, atol=0)


def test_side_stream():
    """Work queued on another stream is waited for by nobody else: every kernel runs on the current one."""
    prob, *rest = pipeline_inputs()
    want = pipeline(prob, *rest, (16, 16), 300)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(prob)
        torch.cuda._sleep(100_000_000)
        late.copy_(prob)
        got = pipeline(late, *rest, (16, 16), 300)
    stream.synchronize()
    assert torch.equal(got, want)


def test_backward_is_deterministic():
    """Of our operators, to the bit; attention's own backward adds in any order."""
    prob, h, modulators, residual = pipeline_inputs()
    leaves = [t.requires_grad_() for t in (prob, h, modulators, residual)]
    runs = []
    for _ in range(3):
        out = pipeline(*leaves, (16, 16), 300, attend=False)
        runs.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_spare_rows_are_never_read():
    prob, h, modulators, residual = pipeline_inputs()
    plan = K.plan_chunks(prob, (16, 16), capacity=400)
    live = int(plan.cu_seqlens[-1])
    x = K.chunk(h, plan)
    assert live < 400 and not x[live:].any()
    x = x.clone()
    x[live:] = math.nan
    gate, shift, scale = modulators.chunk(3, dim=1)
    for out in K.gate_residual_modulate(x, x, gate, shift, scale, plan):
        assert out.isfinite().all() and not out[live:].any()
    assert K.dechunk(x, prob, plan, residual).isfinite().all()


def test_offsets_past_two_billion():
    """A tensor of more than 2³¹ elements: its last sample comes through as it does alone."""
    batch, side, width = 460, 64, 1152
    case = Case("chunk", "XL", side, batch, 0.1)
    free, _ = torch.cuda.mem_get_info()
    if free < 30 * 2**30:
        pytest.skip(f"needs 30 GiB of GPU memory, {free / 2**30:.0f} are free")
    prob = routed_prob(case, DEVICE)
    h = torch.zeros(batch, side**2, width, device=DEVICE, dtype=torch.bfloat16)
    assert h.numel() > 2**31
    h[-1].normal_()
    alone = routed_prob(dataclasses.replace(case, batch=1), DEVICE).copy_(prob[-1:])
    outs = []
    for p, cells in ((prob, h), (alone, h[-1:].clone())):
        plan = K.plan_chunks(p, (side, side))
        outs.append(K.dechunk(K.chunk(cells, plan), p, plan)[-1])
    assert outs[0].any()
    # Blocks of rows begin elsewhere in a sample alone, and add in another order.
    torch.testing.assert_close(*(out.float() for out in outs), rtol=2**-7, atol=2**-7)


def digits_net():
    """The digits model with random weights, all nonzero."""
    torch.manual_seed(0)
    net = DCDiT(preset("digits")).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return net


@torch.no_grad()
def test_model_in_a_graph():
    net = digits_net().to(DEVICE, torch.bfloat16)

    def inputs(seed):
        torch.manual_seed(seed)
        x = torch.randn(4, 4, 14, 14, device=DEVICE, dtype=torch.bfloat16)
        return x, 1000 * torch.rand(4, device=DEVICE), torch.randint(10, (4,), device=DEVICE)

    assert_replays(lambda x, t, y: net(x, t, y, 0.2, capacity=784), inputs, rtol=1e-2, atol=1e-2)


@contextlib.contextmanager
def no_waits():
    """Within it PyTorch raises where it would make the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_model_with_a_capacity_never_waits(dtype):
    net = digits_net().to(DEVICE, dtype)
    x, t, y = (
        torch.randn(4, 4, 14, 14, device=DEVICE, dtype=dtype),
        torch.rand(4, device=DEVICE),
        torch.arange(4).cuda(),
    )
    want = net(x, t, y, 0.2, capacity=784)  # compiles
    with no_waits():
        got = net(x, t, y, 0.2, capacity=784)
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graphed_model(dtype, record_property):
    """Replays without a wait give the eager model's result; with as many rows as it takes no token is lost."""
    net = digits_net().to(DEVICE, dtype)
    torch.nn.init.constant_(net.router.score.bias, 0.0)
    graph, limits, bits = graphed(net), {"capacity": 784, "max_seqlen": 196}, []

    def inputs():
        x = torch.randn(4, 4, 14, 14, device=DEVICE, dtype=dtype)
        return x, 1000 * torch.rand(4, device=DEVICE), torch.randint(10, (4,), device=DEVICE)

    for rho in (0.0, 0.2, 0.6):
        batch = inputs()
        got, want = graph(*batch, rho, **limits), net(*batch, rho, **limits)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
        bits.append(torch.equal(got, want))
    record_property("equal bits", str(bits))
    with no_waits():
        graph(*batch, 0.4, **limits)
    assert (graph.captures, graph.replays, graph.eager) == (1, 4, {}), graph.summary()
    for rho in (0.9, 0.9, 0.0, 0.0):
        out, routing = graph(*batch, rho, True)
        want, exact = net(*batch, rho, True)
        torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)
        assert torch.equal(routing.boundary_mask, exact.boundary_mask) and routing.plan.overflow == 0
    assert graph.captures == 3 and sum(graph.eager.values()) == 2, graph.summary()


def test_training_step_with_a_capacity_never_waits():
    net = digits_net().to(DEVICE)
    x, t, y = torch.randn(4, 4, 14, 14, device=DEVICE), torch.rand(4, device=DEVICE), torch.arange(4).cuda()

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            out = net(x, t, y, 0.2, capacity=784)
        out.square().mean().backward()

    step()
    with no_waits():
        step()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_graphed_training_step(record_property):
    """Replayed steps give the gradients of eager ones, on new data, at several ρ; the host waits once a step."""
    net = digits_net().to(DEVICE)
    torch.nn.init.constant_(net.router.score.bias, 0.0)
    objective = FlowMatching()

    def losses(x0, noise, t, y, rho, **limits):
        with torch.autocast(DEVICE, torch.bfloat16):
            out, routing = net(objective.add_noise(x0, noise, t), t, y, rho, True, **limits)
        ratio = ratio_loss(routing.boundary_prob, routing.natural_mask, 4.0)
        return {"loss": objective.loss(out.float(), x0, noise, t).mean() + 0.03 * ratio, "ratio_loss": ratio}, routing

    def inputs():
        x0, noise = torch.randn(2, 8, 4, 14, 14, device=DEVICE)
        return x0, noise, 1000 * torch.rand(8, device=DEVICE), torch.randint(10, (8,), device=DEVICE)

    def gradients(backward):
        net.zero_grad()
        loss = backward()
        return loss.clone(), torch.cat([p.grad.flatten() for p in net.parameters()])

    def eager(batch, rho):
        loss = losses(*batch, torch.full((), rho, device=DEVICE))[0]["loss"]
        loss.backward()
        return loss.detach()

    graphs, errors = StepGraphs(losses, net.parameters(), 196), []
    for rho in (0.0, 0.4, 0.4, 0.0, 0.4, 0.0, 0.0, 0.4):
        batch = inputs()
        loss, got = gradients(lambda: graphs.backward(batch, rho)["loss"])  # noqa: B023
        want_loss, want = gradients(lambda: eager(batch, rho))  # noqa: B023
        torch.testing.assert_close(loss, want_loss, rtol=1e-2, atol=0)
        errors.append(((got - want).norm() / want.norm()).item())
    record_property("relative errors of the gradients", str(errors))
    assert all(error < 0.03 for error in errors), errors
    assert graphs.replays >= 4 and not any("captured" in reason for reason in graphs.eager), graphs.summary()
    graphs.rows["0.4"] = [8 * 196, 196]
    batch = inputs()
    graphs.backward(batch, 0.4)  # captures
    assert host_waits(lambda: graphs.backward(batch, 0.4)) == 1, graphs.summary()


class Noise(list):
    """A source of training data."""

    def load(self, index, flip):
        return self[index], 0


def test_the_next_batch_is_copied_while_the_gpu_works():
    source = Noise(np.random.default_rng(0).standard_normal((64, 4, 32, 32), dtype=np.float32))
    stream = TrainingStream(source, FlowMatching(), (4, 32, 32), 10, batch_size=64)
    for batch in batches(stream, 0, 2, pin_memory=True):
        torch.cuda._sleep(100_000_000)
        copied = {key: tensor.to(DEVICE, non_blocking=True) for key, tensor in batch.items()}
        event = torch.cuda.Event()
        event.record()
        assert not event.query()
        assert all(torch.equal(copied[key].cpu(), tensor) for key, tensor in batch.items())


@pytest.mark.parametrize("drop_fraction", [0.0, 0.5])
def test_model_equals_cpu(drop_fraction):
    """The digits model in float32 gives equal results on the GPU and on the CPU."""
    net = digits_net()
    torch.nn.init.constant_(net.router.score.bias, -0.2)  # a third of the cells
    x, t, y = torch.randn(4, 4, 14, 14), torch.tensor([10.0, 300.0, 600.0, 990.0]), torch.arange(4)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            want, cpu = net(x, t, y, drop_fraction, return_routing=True)
            got, gpu = net.cuda()(x.cuda(), t.cuda(), y.cuda(), drop_fraction, return_routing=True)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    torch.testing.assert_close(gpu.boundary_prob.cpu(), cpu.boundary_prob, rtol=1e-4, atol=1e-5)
    same = (gpu.boundary_mask.cpu() == cpu.boundary_mask).flatten(1).all(1)
    assert same.any(), "no sample was routed alike"
    torch.testing.assert_close(got.cpu()[same], want[same], rtol=1e-3, atol=1e-4)
