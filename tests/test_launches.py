"""How many operators a forward and a training step hand to PyTorch, each a launch on a GPU: exact, fixed and graph.

Attention is one operator here, as FlashAttention's is on a GPU. Triton's kernels are interpreted; they are alike in
all modes and are not counted.
"""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcdit import DCDiT, DCDiTConfig
from dcdit.model.graphs import Graphed
from dcdit_kernels import attention, flash, flash_calls, use_backend

DEPTH = 2
ALLOCATIONS = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "detach",
    "alias",
    "_local_scalar_dense",
    "lift_fresh",
)


class Launches(TorchDispatchMode):
    """Counts operators that compute: neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        schema = operator._schema
        view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        name = schema.name.removeprefix("aten::")
        if not view and name not in ALLOCATIONS:
            self.names[name] += 1
        return operator(*args, **(kwargs or {}))

    @property
    def total(self):
        return self.names.total()


@pytest.fixture
def net(monkeypatch):
    monkeypatch.setattr(flash, "choose", lambda *_, **__: flash.LIBRARIES[-1])
    monkeypatch.setattr(attention, "_chosen", {})  # remembered choices, before and here
    one = lambda library, q, k, v, *_: torch.addcmul(v, q, k)  # noqa: E731
    monkeypatch.setitem(flash_calls.CALLS, flash.LIBRARIES[-1].keywords, one)
    net = DCDiT(DCDiTConfig(input_size=(4, 4), hidden_size=64, depth=DEPTH, num_heads=2, encoder_width=32)).eval()
    torch.nn.init.constant_(net.router.score.bias, 0.0)
    return net


def count(net, train=False, **limits):
    inputs = torch.randn(2, 4, 4, 4), 1000 * torch.rand(2), torch.arange(2)
    net.zero_grad()
    with use_backend("triton"), torch.set_grad_enabled(train), Launches() as launches:
        out = net(*inputs, 0.2, **limits)
        if train:
            out.square().sum().backward()
    return launches


def test_a_fixed_capacity_costs_a_forward_nothing_in_its_blocks(net):
    exact, fixed = count(net), count(net, capacity=28, max_seqlen=15)
    assert fixed.total <= exact.total + 4, fixed.names - exact.names


def test_a_fixed_capacity_costs_training_four_masked_copies_a_block(net):
    """Of attention's output and of the gradients of q, k and v, with a zero for them; and the plan's one mask."""
    exact, fixed = count(net, train=True), count(net, train=True, capacity=28, max_seqlen=15)
    more = fixed.names - exact.names
    assert more["where"] == 4 * DEPTH and more["ge"] == 1, more
    assert fixed.total <= exact.total + 5 * DEPTH + 4, more


def test_a_replay_is_copies_in_a_launch_and_a_copy_out(net):
    outputs = []

    def capture(function):
        outputs.append(function())
        return lambda: None, outputs[-1]

    graph = Graphed(net.requires_grad_(False), capture=capture)
    count(graph, capacity=28, max_seqlen=15)
    replay = count(graph, capacity=28, max_seqlen=15)
    assert graph.replays == 2 and outputs
    assert replay.names == {"full": 1, "copy_": 4, "clone": 1}
