"""Who runs a call: back-ends asked for by task, thread and graph, and calls that no kernel may take."""

import asyncio
import threading

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import dcdit_kernels as K
from dcdit_kernels._dispatch import requested_backend


def case():
    prob = torch.tensor([[0.9, 0.2, 0.7, 0.4]])
    return torch.rand(1, 4, 8), prob, K.plan_chunks(prob, (2, 2))


def test_each_task_has_its_own_choice():
    async def task(name, seen):
        with K.use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(requested_backend())
        await asyncio.sleep(0)
        seen.append(requested_backend())

    async def both():
        seen = {name: [] for name in ("reference", "native")}
        await asyncio.gather(*(task(name, part) for name, part in seen.items()))
        return seen

    assert asyncio.run(both()) == {name: [name] * 3 + ["auto"] for name in ("reference", "native")}
    assert requested_backend() == "auto"


def test_each_thread_has_its_own_choice():
    seen = []
    with K.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_a_graph_follows_the_choice():
    """Made outside of it and inside of it, and in whatever task the graph runs."""
    h, _, plan = case()
    graphs = []

    def compiler(graph, inputs):
        graphs.append(str(graph.code))
        return graph.forward

    def inside(h):
        with K.use_backend("native"):
            return K.adaln_modulate(h, h[:, 0], h[:, 0])

    torch._dynamo.reset()
    outside = torch.compile(lambda h: K.chunk(h, plan), fullgraph=True, backend="eager")
    for name in ("auto", "reference", "auto"):
        with K.use_backend(name):
            assert torch.equal(outside(h), K.chunk(h, plan))
    own = torch.compile(inside, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(own(h), inside(h))

    def which(x):
        return x + ("auto", "native", "triton", "reference").index(requested_backend())

    graph = torch.compile(which, fullgraph=True, backend="eager")

    async def task(name):
        with K.use_backend(name):
            await asyncio.sleep(0)
            return int(graph(torch.tensor(0)))

    async def all_tasks():
        return await asyncio.gather(*(task(name) for name in ("native", "reference", "native")))

    assert asyncio.run(all_tasks()) == [1, 3, 1] and int(graph(torch.tensor(0))) == 0


OPERATORS = {
    "chunk": lambda h, prob, plan: K.chunk(h, plan),
    "dechunk": lambda h, prob, plan: K.dechunk(h[0, : plan.capacity], prob, plan, h),
    "gate_residual": lambda h, prob, plan: K.gate_residual(h, h, h[:, 0]),
    "plan_chunks": lambda h, prob, plan: K.plan_chunks(prob, (2, 2)).nearest.clone(),
    "pack_rows": lambda h, prob, plan: K.pack_rows(h[0], torch.tensor([2, 0])),
    "boundary_cosine": lambda h, prob, plan: K.boundary_cosine(h, h),
}


@pytest.mark.parametrize("early", [False, True], ids=["", "pre-dispatch"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_make_fx_sees_the_operators(operator, early):
    """In its default mode tensors are real, and a kernel that is handed their addresses leaves no trace."""
    h, prob, plan = case()
    graph = make_fx(lambda h, prob: OPERATORS[operator](h, prob, plan), pre_dispatch=early)(h, prob)
    torch.manual_seed(1)
    h, other = torch.rand_like(h), prob.flip(1) if operator == "plan_chunks" else prob
    torch.testing.assert_close(graph(h, other), OPERATORS[operator](h, other, plan))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_tensor_without_memory_of_its_own_is_refused(operator):
    """A DTensor is one; this wrapper needs no process group."""
    h, prob, plan = case()
    wrapped = TwoTensor(h, h.clone()), TwoTensor(prob, prob.clone())
    with pytest.raises(TypeError, match=r"is a TwoTensor, .*to_local\(\).*use_backend\(\"reference\"\)"):
        OPERATORS[operator](*wrapped, plan)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_default_device_changes_nothing(operator):
    """An operator makes its tensors on the device of its inputs."""
    h, prob, plan = case()
    if operator == "pack_rows":
        pytest.skip("the test makes an index")
    want = OPERATORS[operator](h, prob, plan)
    with torch.device("meta"):
        got = OPERATORS[operator](h, prob, plan)
        half = OPERATORS[operator](h.bfloat16(), prob.bfloat16(), plan)
    assert got.device == half.device == want.device and torch.equal(got, want)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_saved_tensors_may_be_moved(backend):
    """save_on_cpu copies the tensors of a node; of tensors that no backward reads a node keeps shapes alone."""
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("the tensors are a CPU's")
    grads = []
    for hooks in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    ):
        torch.manual_seed(0)
        h, prob, plan = case()
        h.requires_grad_()
        with K.use_backend(backend), hooks:
            out = K.dechunk(K.chunk(h, plan), prob, plan, h)
        grads.append(torch.autograd.grad(out.square().sum(), h)[0])
    assert torch.equal(*grads)


def test_explain_needs_a_tensor_alone():
    """Of every public operator; those made of others are explained by them."""
    for name in K.__all__:
        function = getattr(K, name)
        if callable(function) and not isinstance(function, type) and name not in ("explain", "use_backend"):
            text = K.explain(name, torch.zeros(1, 2, 8))
            assert text.startswith(name) and ("(asked for: auto)" in text)
