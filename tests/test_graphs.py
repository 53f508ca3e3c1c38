"""graphed: when it captures, replays and leaves a call to the eager model. A stand-in for CUDA's graphs runs the
captured function again and writes into the tensors that the first run returned."""

import copy

import numpy as np
import pytest
import torch
from graph_stand_in import run_again, tensors

import dcdit
from dcdit import DCDiT, DCDiTConfig
from dcdit.model.graphs import Graphed, room
from dcdit.sampling.sampler import sample
from dcdit_kernels import use_backend

CONFIG = DCDiTConfig(input_size=(8, 8), hidden_size=64, depth=1, num_heads=2, encoder_width=32, num_classes=5)


@pytest.fixture
def net():
    net = DCDiT(CONFIG).eval().requires_grad_(False)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.constant_(net.router.score.bias, 0.0)
    return net


@pytest.fixture
def graph(net):
    return Graphed(net, capture=run_again)


def batch(count=3):
    return torch.randn(count, 4, 8, 8), 1000 * torch.rand(count), torch.arange(count)


def assert_same(got, want):
    for a, b in zip(tensors((*got, got[0])), tensors((*want, want[0])), strict=True):
        assert torch.equal(a, b)


def test_fixed_rows_are_replayed_with_the_bits_of_the_eager_model(net, graph):
    results = []
    for rho in (0.0, 0.3, torch.tensor([0.0, 0.5, 0.9])):  # a number is no part of the graph
        inputs = batch()
        limits = {"capacity": 150, "max_seqlen": 60}
        results.append((graph(*inputs, rho, True, **limits), net(*inputs, rho, True, **limits)))
    for got, want in results:  # no result is overwritten by a later call
        assert_same(got, want)
    assert (graph.captures, graph.replays, graph.eager) == (1, 3, {})
    assert graph.summary() == "3 of 3 forwards replayed from 1 CUDA graphs"


def test_any_number_of_rows_loses_no_token(net, graph):
    """As many rows as the batch before had, and some; a batch that needs more is computed again."""
    inputs = batch()
    for rho in (0.9, 0.9, 0.0, 0.0, 0.5, 0.5):
        out, routing = graph(*inputs, rho, True)
        want, exact = net(*inputs, rho, True)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
        assert torch.equal(routing.boundary_mask, exact.boundary_mask) and routing.plan.overflow == 0
    assert graph.eager == {"first batch of its shape": 1, "more tokens than there was room for": 1}
    assert graph.replays == 5 and graph.captures == 3
    graph(*batch(2))
    assert graph.eager["first batch of its shape"] == 2


def test_a_budget_is_a_number_of_rows(net, graph):
    """A graph for each number, without a look at the device; a tensor of budgets is an input, as ρ is."""
    for budget in ({"budget": 90}, {"budget": 90}, {"budget": 70}, {"budget_per_sample": 30}):
        inputs = batch()
        got, want = graph(*inputs, 0.0, True, **budget), net(*inputs, 0.0, True, **budget)
        assert_same(got, want)
        assert got[1].plan.exact and got[1].plan.capacity == budget.get("budget", 90)
    assert (graph.captures, graph.replays) == (3, 4)
    for rows in ([9, 20, 64], [30, 31, 32], [2, 64, 2]):
        inputs, limits = batch(), {"budget_per_sample": torch.tensor(rows), "capacity": 100}
        assert_same(graph(*inputs, 0.0, True, **limits), net(*inputs, 0.0, True, **limits))
    assert (graph.captures, graph.replays, graph.eager) == (4, 7, {})
    for rows in ([9, 20, 64], [9, 20, 64]):
        inputs, limits = batch(), {"budget_per_sample": torch.tensor(rows)}
        torch.testing.assert_close(graph(*inputs, **limits), net(*inputs, **limits), rtol=1e-5, atol=1e-6)
    assert graph.eager == {"first batch of its shape": 1}
    with pytest.raises(ValueError, match="exclude each other, got drop_fraction and budget"):
        graph(*batch(), 0.5, budget=90)


def test_a_budget_that_is_no_integer_raises_as_eagerly(net, graph):
    for name in ("budget", "budget_per_sample"):
        for rows in (50.0, "50"):
            with pytest.raises(ValueError, match=f"{name} must be an integer, got {rows!r}"):
                graph(*batch(), **{name: rows})
    with pytest.raises(ValueError, match=r"capacity must be a number of rows, 0 or more, got 50\.0"):
        graph(*batch(), capacity=50.0)
    for _ in range(2):
        assert graph(*batch(), 0.0, True, budget=np.int64(90))[1].plan.capacity == 90
    assert (graph.captures, graph.replays) == (1, 2)


@pytest.mark.parametrize("cells", [1, 64, 65, 1024])
def test_room(cells):
    for lengths in ([0], [cells], [cells, 0, cells // 2], [cells // 3] * 7):
        limits = room(sum(lengths), max(lengths), len(lengths), cells)
        most = len(lengths) * cells
        assert sum(lengths) <= limits["capacity"] <= most and max(lengths) <= limits["max_seqlen"] <= cells
        assert limits["capacity"] == most or limits["capacity"] <= sum(lengths) * 17 / 16 + most / 16 + 2
    assert room(0, 0, 0, cells) == {"capacity": 0, "max_seqlen": room(0, 0, 1, cells)["max_seqlen"]}


def test_settings_have_graphs_of_their_own(net, graph):
    inputs, limits = batch(), {"capacity": 150}
    graph(*inputs, **limits)
    with torch.inference_mode():
        assert torch.equal(graph(*inputs, **limits), net(*inputs, **limits))
    with use_backend("reference"):
        assert torch.equal(graph(*inputs, **limits), net(*inputs, **limits))
    assert torch.equal(graph(*inputs, **limits), net(*inputs, **limits))
    assert (graph.captures, graph.replays) == (3, 4)


def test_convolutions_in_tf32_have_graphs_of_their_own(net, graph):
    """A graph keeps the precision that it was captured in: an H200 replayed full float32 at 1.6 times the time."""
    before = torch.backends.cudnn.allow_tf32
    try:
        for tf32 in (True, False, True):
            torch.backends.cudnn.allow_tf32 = tf32
            graph(*batch(), capacity=100)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert graph.captures == 2 and graph.replays == 3


def test_the_least_recently_used_graph_goes(net):
    graph = Graphed(net, max_graphs=2, capture=run_again)
    for capacity in (50, 60, 50, 70, 50, 60):
        graph(*batch(), capacity=capacity)
    assert graph.captures == 4 and graph.replays == 6  # 50 stays, 60 is captured again


def test_what_no_graph_can_do_is_left_to_the_model(net, graph):
    inputs = batch()
    limits = {"capacity": 150}
    assert torch.equal(Graphed(net)(*inputs, **limits), net(*inputs, **limits))
    cases = {
        "a gradient is needed": lambda: graph(inputs[0].requires_grad_(), *inputs[1:], **limits),
        "max_seqlen without a capacity": lambda: graph(*inputs, max_seqlen=9),
        "under autocast, which casts weights outside of the graph": lambda: graph(*inputs, **limits),
        "main.blocks.0 has forward hooks": lambda: graph(*inputs, **limits),
        "a graph does not know keep": lambda: graph(*inputs, keep=torch.zeros(len(inputs[0]), net.config.cells).bool()),
        "a graph does not know routing": lambda: graph(*inputs, routing=net(*inputs, 0.0, True)[1]),
    }
    for reason, call in cases.items():
        hook = net.main.blocks[0].register_forward_hook(lambda *_: None) if "hooks" in reason else None
        with (
            torch.autocast("cpu", torch.bfloat16, enabled="autocast" in reason),
            torch.set_grad_enabled("grad" in reason),
        ):
            call()
        if hook is not None:
            hook.remove()
        assert graph.eager.pop(reason) == 1 and not graph.eager
    with pytest.raises(ValueError, match=r"drop_fraction must be in \[0, 1\), got 1.5"):
        graph(*batch(), 1.5, **limits)
    assert not graph.captures


def test_a_capture_that_fails_is_not_tried_again(net):
    tries = []

    def fails(function):
        tries.append(function())
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graph, inputs = Graphed(net, capture=fails), batch()
    for limits in ({"capacity": 150}, {"capacity": 150}, {}, {}):
        want = net(*inputs, **limits)
        assert torch.equal(graph(*inputs, **limits), want)
    reason = "cannot be captured: operation not permitted when stream is capturing"
    assert graph.eager == {reason: 3, "first batch of its shape": 1} and len(tries) == 2


def test_improper_probabilities_raise_as_eagerly(net, graph):
    graph(*batch())
    x, t, y = batch()
    x[1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        graph(x, t, y)


def test_weights_may_change_in_place_or_move(net, graph):
    inputs, limits = batch(), {"capacity": 150}
    graph(*inputs, **limits)
    with torch.no_grad():
        net.final.linear.weight.mul_(2)
    assert torch.equal(graph(*inputs, **limits), net(*inputs, **limits)) and graph.captures == 1
    net.final.linear.weight.data = net.final.linear.weight.data.clone()
    assert torch.equal(graph(*inputs, **limits), net(*inputs, **limits)) and graph.captures == 2
    net.load_state_dict({name: -weight for name, weight in net.state_dict().items()}, assign=True)
    net.final = copy.deepcopy(net.final)
    assert torch.equal(graph(*inputs, **limits), net.requires_grad_(False)(*inputs, **limits)) and graph.captures == 3
    assert graph.config is net.config and copy.copy(graph).config is net.config
    with pytest.raises(ValueError, match="max_graphs must be an integer of at least 1, got 0"):
        dcdit.graphed(net, 0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_from_a_graphed_model(net, graph, guidance):
    """Lite-CFG: both halves are one packed batch, hence one graph."""
    options = {"objective": "flow", "steps": 4, "guidance": guidance, "drop_fraction": [0.2, 0.0]}
    options |= {"uncond_drop_fraction": None if guidance == 1 else 0.9, "seed": 3, "batch_size": 2}
    want, got = sample(net, [0, 1, 2, 3], **options), sample(graph, [0, 1, 2, 3], **options)
    torch.testing.assert_close(got.latents, want.latents, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.trace.tokens, want.trace.tokens)
    assert graph.eager["first batch of its shape"] == 1 and graph.replays >= 5, graph.summary()


def test_a_graph_needs_a_gpu(tmp_path, capsys):
    from dcdit.cli import main

    assert main(["sample", "digits", "--cpu", "--cuda-graph", "--output", str(tmp_path / "out")]) == 2
    assert "--cuda-graph needs a GPU, the model is on cpu; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_pipelines_use_it(net):
    pytest.importorskip("diffusers")
    from diffusers import FlowMatchEulerDiscreteScheduler

    from dcdit.errors import ConfigError
    from dcdit.integrations.pipeline import DCDiTPipeline
    from dcdit.integrations.transformer import DCDiTTransformer2DModel

    transformer = DCDiTTransformer2DModel.from_dcdit(net)
    pipe = DCDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}

    def run():
        return pipe([0, 1], **options, generator=torch.Generator().manual_seed(1)).images

    want = run()
    with pytest.raises(ConfigError, match="cuda_graph needs a GPU, the pipeline is on cpu"):
        pipe([0, 1], **options, cuda_graph=True)
    assert transformer.graph is None
    transformer.graph = Graphed(net, capture=run_again)
    transformer.enable_cuda_graph()
    torch.testing.assert_close(run(), want, rtol=1e-4, atol=1e-4)
    assert transformer.graph.replays >= 2 and set(transformer.state_dict()) == {f"model.{n}" for n in net.state_dict()}
    transformer.enable_cuda_graph(False)
    assert torch.equal(run(), want)
