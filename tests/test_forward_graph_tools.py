"""enable_cuda_graph beside compiled blocks, LoRA, wrapping and copies; its switch. The graphs are a stand-in's."""

import contextlib
import copy
import inspect
import itertools

import pytest
import torch

pytest.importorskip("diffusers")
from forward_graph_stand_in import both, enabling  # noqa: F401
from test_transformer_no_host import attention  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend
from transformer_families import FAMILIES, close, make, run

import dcdit
from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking, remove_dynamic_chunking
from dcdit.model.forward_graphs import GraphedForward


def test_compiled_blocks(enable):
    """They are not compiled anew for graphs."""
    torch._dynamo.reset()
    family = FAMILIES["wan"]
    model, own, other, chunking, graph = both(family, enable, contextlib.nullcontext)
    own.budget_per_sample = chunking.budget_per_sample = 12
    inputs, counted = family.inputs(), CompileCounterWithBackend("eager")
    other.compile_repeated_blocks(backend=counted)
    chunking.see(other, (), inputs)
    with torch.no_grad():
        graph.own(**inputs)
    frames = counted.frame_count
    close(run(other, inputs), run(model, inputs), 1e-6)
    assert graph.replays == 1 and counted.frame_count == frames > 0


def test_lora_comes_is_weighed_and_goes(enable):
    peft, family = pytest.importorskip("peft"), FAMILIES["flux"]
    model = make(family)
    add_dynamic_chunking(model).budget_per_sample = 12
    graph, inputs = enable(model), family.inputs()
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    changes = {
        "none": lambda: None,
        "loaded": lambda: model.add_adapter(config),
        "weighed": lambda: model.set_adapters("default", 0.3),
        "off": model.disable_adapters,
        "on": model.enable_adapters,
        "merged": model.fuse_lora,
        "other weights": lambda: model.load_state_dict({k: -v for k, v in model.state_dict().items()}, assign=True),
    }
    results = []
    for number, change in enumerate(changes.values(), 1):
        change()
        model.requires_grad_(False)
        results.append(run(model, inputs))
        assert torch.equal(results[-1], graph.own(**inputs).sample)
        assert graph.captures == graph.replays == number
    different = [not torch.allclose(a, b) for a, b in itertools.pairwise(results)]
    assert different == [True, True, True, True, False, True]


def test_wrapped_unwrapped_copied_and_undone(enable):
    family = FAMILIES["flux"]
    model = make(family)
    graph, inputs = enable(model), family.inputs()
    untouched = run(model, inputs)
    add_dynamic_chunking(model).budget_per_sample = 12
    model.requires_grad_(False)
    chunked = run(model, inputs)
    assert not torch.allclose(chunked, untouched)
    other = copy.deepcopy(model)
    assert isinstance(other.forward, GraphedForward) and other.forward.model is other
    assert torch.equal(run(other, inputs), chunked) and other.forward.eager == {"needs a GPU, got cpu": 1}
    remove_dynamic_chunking(model)
    assert torch.equal(run(model, inputs), untouched)
    assert (graph.captures, graph.replays, graph.eager) == (3, 3, {}), graph.summary()
    with torch.no_grad():
        model.x_embedder.weight.mul_(2)
    assert torch.equal(run(model, inputs), graph.own(**inputs).sample) and graph.captures == 3
    model.x_embedder.weight.data = model.x_embedder.weight.data.clone()
    run(model, inputs)
    assert graph.captures == 4
    assert inspect.signature(model.forward) == inspect.signature(graph.own)
    with pytest.raises(ConfigError, match="has graphs already: disable_cuda_graph"):
        dcdit.enable_cuda_graph(model)
    dcdit.disable_cuda_graph(model)
    assert "forward" not in vars(model) and torch.equal(run(model, inputs), graph.own(**inputs).sample)
    with pytest.raises(ConfigError, match="model must be one that enable_cuda_graph was called on"):
        dcdit.disable_cuda_graph(model)
    model.forward = model.forward  # as hooks of accelerate and diffusers do
    with pytest.raises(ConfigError, match="hooks that replace a forward must come after enable_cuda_graph"):
        dcdit.enable_cuda_graph(model)
    del model.forward
    for number in (0, 1.5, "8"):
        with pytest.raises(ConfigError, match="max_graphs must be an integer of at least 1, got"):
            dcdit.enable_cuda_graph(model, number)
    assert isinstance(dcdit.enable_cuda_graph(model), GraphedForward)
    for call in (dcdit.enable_cuda_graph, dcdit.disable_cuda_graph):
        with pytest.raises(ConfigError, match=r"model must be .* got a function"):
            call(run)


class Highest(torch.nn.Module):
    """Ranks cells by their latents."""

    def forward(self, h, *, latents):
        return 0.5 + 0.4 * latents.mean(2).sigmoid()


def test_a_router_of_latents_sees_those_of_the_call(enable):
    family = FAMILIES["flux"]
    model = make(family)
    chunking = add_dynamic_chunking(model, router=Highest())
    chunking.budget_per_sample = 12
    graph = enable(model)
    for _ in range(2):
        inputs = family.inputs()
        run(model, inputs)
        top = inputs["hidden_states"].mean(2).topk(12).indices.sort().values
        assert torch.equal(chunking.routing.boundary_mask.nonzero()[:, 1].view(2, 12), top)
    assert graph.captures == 1 and graph.replays == 2
