"""The embedding of the time: its frequencies are kept for each device, and by nothing that traces or transforms."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dcdit.model import embedders
from dcdit.model.embedders import TimestepEmbedding, frequencies

T = torch.tensor([0.0, 1.5, 999.0])


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    kept = {}
    monkeypatch.setattr(embedders, "_kept", kept)
    return kept


def test_frequencies_are_rounded_once_and_kept(kept):
    wide = torch.exp((torch.arange(128, dtype=torch.float32) * (-math.log(10000) / 128)).double())
    assert torch.equal(frequencies(T), wide.float()) and frequencies(T) is kept[T.device]


def test_a_model_has_no_more_state_and_moves_as_it_did():
    with torch.device("meta"):
        net = TimestepEmbedding(8)
    weights = {name: torch.randn(value.shape) for name, value in net.state_dict().items()}
    assert not net(T.to("meta")).is_cpu and not list(net.buffers())
    net.load_state_dict(weights, assign=True)
    assert net(T).isfinite().all()


def transforms():
    """Ways to call `frequencies` of which nothing may be kept."""
    yield "make_fx", lambda: make_fx(frequencies)(T)
    yield "export", lambda: torch.export.export(TimestepEmbedding(8), (T,))
    yield "grad", lambda: torch.func.grad(lambda t: (t.sum() * frequencies(t)).sum())(T)
    yield "compile", lambda: torch.compile(frequencies, fullgraph=True, backend="eager")(T)


@pytest.mark.parametrize("name, call", list(transforms()))
def test_tracing_keeps_nothing_and_sees_the_computation(name, call, kept):
    call()
    assert not kept


def test_a_mode_of_fake_tensors_keeps_nothing(kept):
    with FakeTensorMode() as mode:
        frequencies(mode.from_tensor(T))
        frequencies(T)
    assert not kept
    with FakeTensorMode():
        assert type(frequencies(torch.zeros(3))) is not torch.Tensor


def test_a_table_of_inference_serves_training(kept):
    with torch.inference_mode():
        frequencies(T)
    t = T.clone().requires_grad_()
    TimestepEmbedding(8)(t).sum().backward()
    assert t.grad.isfinite().all() and not kept[T.device].is_inference()


def test_a_captured_graph_computes_its_own_unless_they_were_kept(kept, monkeypatch):
    monkeypatch.setattr(embedders, "capturing", lambda like: True)
    assert torch.equal(frequencies(T), embedders._frequencies(T.device)) and not kept
