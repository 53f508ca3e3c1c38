"""enable_cuda_graph on diffusers' transformers: what it replays, and what it leaves to the module's own forward.

A stand-in for CUDA's graphs runs the captured function again and writes into the tensors that the first run returned.
Captures run under a mode in which the host cannot look at a tensor.
"""

import contextlib
import copy

import pytest
import torch

pytest.importorskip("diffusers")
from forward_graph_stand_in import assert_same, both, enabling  # noqa: F401
from test_gpu import no_waits
from test_integrations import batch, build, dit, pixart
from test_transformer_no_host import attention, masked_attention, no_host  # noqa: F401
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as tree
from transformer_families import FAMILIES, every_family, make, run

import dcdit
from dcdit.integrations.attention import add_dynamic_chunking
from dcdit.model.forward_graphs import GraphedForward


@every_family
def test_replayed_with_the_bits_of_the_model(family, enable):
    model, own, other, chunking, graph = both(family, enable)
    results, given = [], [family.inputs(), family.inputs()]
    for budget in (12, 20, 12):
        own.budget_per_sample = chunking.budget_per_sample = budget
        for inputs in given:
            results.append((run(other, inputs), run(model, inputs)))
            assert_same(own, chunking)
    for got, want in results:  # no result is overwritten by a later call
        assert torch.equal(got, want)
    assert (graph.captures, graph.replays, graph.eager) == (2, 6, {}), graph.summary()


@every_family
def test_a_drop_fraction_has_room_for_the_last_call_and_some_more(family, enable):
    """The bits of a forward with equal rows; too few rows and the model's own forward computes the call again."""
    # On a CPU the values of a tensor ρ are looked at.
    model, own, other, chunking, graph = both(family, enable, contextlib.nullcontext)
    for rho, replayed in ((0.7, False), (0.7, True), (0.8, True), (0.1, False), (0.1, True)):
        own.drop_fraction, chunking.drop_fraction = (torch.full((2,), rho) for _ in range(2))
        inputs, before = family.inputs(), graph.replays
        got, want = run(other, inputs), run(model, inputs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        plan = chunking.routing.plan
        assert plan.lengths.tolist() == own.routing.plan.lengths.tolist()
        assert graph.replays == before + replayed, graph.summary()
        if replayed:
            assert rho < 0.5 or plan.capacity < plan.cells
            own.capacity, own.max_seqlen = plan.capacity, plan.max_seqlen
            assert torch.equal(got, run(model, inputs))
            own.capacity = own.max_seqlen = None
    assert graph.eager == {"first call of its kind": 1, "more tokens than there was room for": 1}


@every_family
def test_an_untouched_model_is_replayed(family, enable):
    model = make(family)
    other = copy.deepcopy(model)
    graph = enable(other)
    for _ in range(2):
        inputs = family.inputs()
        assert torch.equal(run(other, inputs), run(model, inputs))
    assert (graph.captures, graph.replays, graph.eager) == (1, 2, {}), graph.summary()


@pytest.mark.parametrize("kind", [dit, pixart])
def test_basic_blocks(kind, enable, monkeypatch):
    """DiT and PixArt, whose texts are masked."""
    monkeypatch.setattr("dcdit.integrations.basic_blocks.varlen_attention", masked_attention)
    model, given = build(kind), []
    own = add_dynamic_chunking(model)
    own.budget_per_sample = 7
    other = copy.deepcopy(model)
    graph, (x, options) = enable(other), batch(kind)
    for latents in (x, x.flip(0)):
        got, want = (each(latents, **options).sample for each in (other, model))
        assert torch.equal(got, want)
        given.append(got)
    assert not torch.equal(*given)
    assert (graph.captures, graph.replays, graph.eager) == (1, 2, {}), graph.summary()


def test_two_stacks_in_a_model_of_ones_own(enable):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            stacks = [dcdit.DynamicChunking([torch.nn.Linear(32, 32)], 32, (4, 6), run=self.run) for _ in range(2)]
            self.stacks = torch.nn.ModuleList(stacks)

        def run(self, blocks, tokens, plan):
            return blocks[0](tokens)

        def forward(self, h, *, scale=1.0, both=True):
            h = self.stacks[0](h)
            return {"h": (self.stacks[1](h) if both else h) * scale}

    model = Net().requires_grad_(False)
    other = copy.deepcopy(model)
    graph = enable(other)
    for net in (model, other):
        net.stacks[0].budget, net.stacks[1].budget_per_sample = 17, 9
    h = torch.randn(2, 24, 32)
    assert torch.equal(other(h, both=False)["h"], model(h, both=False)["h"]) and other.stacks[1].routing is None
    for scale in (1.0, 2.0, 1.0):
        h = torch.randn(2, 24, 32)
        assert torch.equal(other(h, scale=scale)["h"], model(h, scale=scale)["h"])
        assert [stack.routing.plan.capacity for stack in other.stacks] == [17, 18]
    assert (graph.captures, graph.replays, graph.eager) == (3, 4, {}), graph.summary()
    for net in (model, other):
        net.stacks[0].budget = net.stacks[1].budget_per_sample = None
    for both_run in (False, False, True, True):
        h = torch.randn(2, 24, 32)
        assert torch.allclose(other(h, both=both_run)["h"], model(h, both=both_run)["h"], atol=1e-6)
        assert (other.stacks[1].routing is None) is not both_run or both_run
    assert (graph.captures, graph.replays, graph.eager) == (5, 6, {"first call of its kind": 2}), graph.summary()


def test_grids_of_equally_many_tokens(enable):
    """FLUX's ids have one shape for both."""
    family = FAMILIES["flux"]
    model, own, other, chunking, graph = both(family, enable)
    own.budget = chunking.budget = 20
    for grid in ((5, 7), (7, 5), (5, 7)):
        inputs = family.inputs(grid)
        assert torch.equal(run(other, inputs), run(model, inputs))
        assert chunking.routing.plan.grid == grid
    assert (graph.captures, graph.replays) == (2, 3)


def test_tensors_among_the_settings_are_inputs(enable):
    family = FAMILIES["sd3"]
    model, own, other, chunking, graph = both(family, enable)
    own.capacity = chunking.capacity = 60
    for budgets in ([9, 20], [30, 10]):
        inputs = family.inputs()
        own.budget_per_sample, chunking.budget_per_sample = torch.tensor(budgets), torch.tensor(budgets)
        assert torch.equal(run(other, inputs), run(model, inputs))
        assert chunking.routing.plan.lengths.tolist() == budgets
        assert chunking.budget_per_sample.tolist() == budgets  # the caller's, not the graph's
    assert (graph.captures, graph.replays) == (1, 2)


def test_routers_with_values_of_their_own(enable):
    """The map, which is looked at on a CPU."""
    family = FAMILIES["flux"]
    model, own, other, chunking, graph = both(
        family, enable, contextlib.nullcontext, router="map"
    )  # its values are looked at
    own.budget_per_sample = chunking.budget_per_sample = 12
    inputs = family.inputs()
    for _ in range(3):
        own.router.map = chunking.router.map = torch.rand(5, 7)
        assert torch.equal(run(other, inputs), run(model, inputs))
        assert_same(own, chunking)
    assert (graph.captures, graph.replays) == (1, 3)


def test_a_router_that_remembers_predictions(enable):
    family = FAMILIES["flux"]
    model, own, other, chunking, graph = both(family, enable, router="difference")
    own.budget_per_sample = chunking.budget_per_sample = 12
    for time in (0.9, 0.8, 0.7, 0.6, 0.5):
        inputs = {**family.inputs(), "timestep": torch.full((2,), time)}
        assert torch.equal(run(other, inputs), run(model, inputs))
        assert_same(own, chunking)
    assert graph.captures == 3 and graph.replays == 5  # before, with one and with two predictions


def test_the_unconditional_pass(enable):
    family = FAMILIES["wan"]
    model, own, other, chunking, graph = both(family, enable)
    own.budget_per_sample = chunking.budget_per_sample = 20
    own.uncond = chunking.uncond = {"budget_per_sample": 9}
    for name in ("cond", "uncond") * 2:
        inputs = family.inputs()
        with model.cache_context(name), other.cache_context(name):
            assert torch.equal(run(other, inputs), run(model, inputs))
        assert chunking.routing.plan.max_seqlen == {"cond": 20, "uncond": 9}[name]
    assert (graph.captures, graph.replays) == (2, 4)


@pytest.mark.parametrize("family", ["flux", "sd3", "z-image"])
def test_a_pipeline_replays(family, enable):
    family = FAMILIES[family]
    model, own, other, chunking, graph = both(family, enable)
    own.budget_per_sample = chunking.budget_per_sample = 3
    prompts, pictures = family.prompts(), []
    for transformer in (model, other):
        pipe = family.pipeline(transformer)
        pipe.set_progress_bar_config(disable=True)
        options = {"height": 32, "width": 48, "num_inference_steps": 3, "output_type": "latent"}
        pictures.append(pipe(**options | prompts, generator=torch.Generator().manual_seed(0))[0])
    assert torch.equal(*pictures)
    assert graph.captures == 1 and graph.replays >= 3 and not graph.eager, graph.summary()


def test_reasons(enable):
    family = FAMILIES["flux"]
    model, own, other, chunking, graph = both(family, enable)
    inputs = family.inputs()
    cases = {
        "first call of its kind": {},
        "a gradient is needed": {"hidden_states": inputs["hidden_states"].clone().requires_grad_()},
        "under autocast, which casts weights outside of the graph": {},
        "transformer_blocks.0.ff has forward hooks": {},
        "a set is no argument of a graph": {"return_dict": {1}},
    }
    for number, (reason, changed) in enumerate(cases.items()):
        own.budget_per_sample = chunking.budget_per_sample = 12 if number else None
        hook = chunking.blocks[0].ff.register_forward_hook(lambda *_: None) if "hooks" in reason else None
        context = torch.autocast("cpu", torch.bfloat16) if "autocast" in reason else contextlib.nullcontext()
        with context, torch.set_grad_enabled("gradient" in reason):
            got, want = (each(**{**inputs, **changed}) for each in (other, model))
        assert torch.equal(got[0], want[0])
        if hook:
            hook.remove()
        assert graph.eager.pop(reason, 0) == 1 and not graph.eager, (reason, graph.summary())
    plain = GraphedForward(model)
    plain(**inputs)
    assert plain.summary() == "0 of 1 forwards replayed from 0 CUDA graphs, 1 eager: needs a GPU, got cpu (1)"
    elsewhere = enable(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        elsewhere(input=torch.ones(2, device="meta"))
    assert elsewhere.eager == {"['input'] is on meta, the weights are on cpu": 1}
    assert not graph.captures


def test_a_capture_that_fails_is_not_tried_again():
    def fails(function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = torch.nn.Linear(2, 2).requires_grad_(False)
    graph = GraphedForward(model, capture=fails)
    for _ in range(2):
        assert torch.equal(graph(torch.ones(2)), model(torch.ones(2)))
    assert graph.eager == {"cannot be captured: operation not permitted when stream is capturing": 2}


def test_what_waits_cannot_be_captured(enable):
    """The stand-in sees it: a forward that reads a number."""

    class Reads(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum())

    model = Reads(2, 2)
    graph = enable(model)
    x = torch.ones(2)
    assert torch.equal(model(x), graph.own(x))
    (reason,) = graph.eager
    assert reason.startswith("cannot be captured: ")


def test_numbers_are_no_copies_from_the_host(enable):
    """Qwen-Image makes a tensor of the text's length under a mask: a copy that a capture refuses."""

    class NoNumbers(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.tensor, torch.as_tensor)
            return func(*args, **(kwargs or {}))

    family = FAMILIES["qwen-image"]
    model, own, other, chunking, graph = both(family, enable, NoNumbers)
    own.budget_per_sample = chunking.budget_per_sample = 12
    inputs = family.inputs()
    with pytest.raises(AssertionError), NoNumbers():
        run(model, inputs)
    assert torch.equal(run(other, inputs), run(model, inputs))
    assert graph.replays == 1

    class Numbers(torch.nn.Linear):
        def forward(self, x):
            return torch.as_tensor(True), torch.tensor(3, dtype=torch.int32), torch.as_tensor(0.5) * super().forward(x)

    model = Numbers(2, 2)
    graph, x = enable(model, NoNumbers), torch.ones(2)
    for got, want in zip(model(x), graph.own(x), strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype
    assert graph.replays == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none")
@every_family
@torch.no_grad()
def test_on_a_gpu(family):
    """Untouched, and wrapped with budgets: the bits of the model's own forward, and the host waits for nothing."""
    halved = lambda value: value / 2 if value.is_floating_point() else value.clone()  # noqa: E731
    for budget in (None, 12, 20):
        model, first = make(family).to("cuda"), tree.tree_map_only(torch.Tensor, torch.Tensor.cuda, family.inputs())
        second = {  # the host reads FLUX's grid once for each tensor
            name: value if name.endswith("ids") else tree.tree_map_only(torch.Tensor, halved, value)
            for name, value in first.items()
        }
        if budget:
            add_dynamic_chunking(model).budget_per_sample = budget
        graph = dcdit.enable_cuda_graph(model.requires_grad_(False))
        model(**first)
        with no_waits():
            got = model(**second)
        want = graph.own(**second)
        assert all(map(torch.equal, tree.tree_leaves(got), tree.tree_leaves(want)))
        assert (graph.captures, graph.replays, graph.eager) == (1, 2, {}), graph.summary()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none")
@every_family
@torch.no_grad()
def test_a_drop_fraction_on_a_gpu(family):
    """The first call is the module's own, the others are replays with room for its tokens and some more."""
    model = make(family).to("cuda").requires_grad_(False)
    given = tree.tree_map_only(torch.Tensor, torch.Tensor.cuda, family.inputs())
    add_dynamic_chunking(model).drop_fraction = 0.5
    graph = dcdit.enable_cuda_graph(model)
    for _ in range(3):
        got, want = model(**given), graph.own(**given)
        for one, other in zip(tree.tree_leaves(got), tree.tree_leaves(want), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert (graph.captures, graph.replays, graph.eager) == (1, 2, {"first call of its kind": 1}), graph.summary()
