"""Branches of CUDA graphs, with stand-ins for streams: what runs beside the main stream, and that it is waited for."""

import contextlib

import pytest
import torch

from dcdit import DCDiT, DCDiTConfig
from dcdit.model import aside as module
from dcdit.model import blocks

CONFIG = DCDiTConfig(input_size=(8, 8), hidden_size=64, depth=3, num_heads=2, encoder_width=32, num_classes=5)


class Streams:
    """A main stream and one beside it. `log` has what modules ran, by stream, and what waited for what."""

    def __init__(self):
        self.log, self.active = [], ["main"]

    def of(self, name):
        stream = type(name, (), {})()
        stream.wait_stream = lambda other: self.log.append((name, "waits for", other.name))
        stream.record_event = lambda: self.log.append((name, "records")) or len(self.log) - 1
        stream.wait_event = lambda event: self.log.append((name, "joins", event))
        stream.name = name
        return stream

    @contextlib.contextmanager
    def switch(self, stream):
        self.active.append(stream.name)
        yield
        self.active.pop()

    def watch(self, net):
        for name, part in net.named_modules():
            part.register_forward_pre_hook(lambda *_, name=name: self.log.append((self.active[-1], "runs", name)))


@pytest.fixture
def streams(monkeypatch):
    streams = Streams()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.of(streams.active[-1]))
    monkeypatch.setattr(torch.cuda, "stream", streams.switch)
    monkeypatch.setattr(module, "_side", lambda device: streams.of("side"))
    monkeypatch.setattr(blocks, "captured", lambda like: not torch.is_grad_enabled())
    return streams


def model():
    net = DCDiT(CONFIG).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.constant_(net.router.score.bias, 0.0)
    return net


def test_modulators_are_a_branch(streams):
    """With the bits of one stream. A branch waits for what it reads, and is joined before its result is read."""
    net = model()
    inputs = torch.randn(2, 4, 8, 8), 1000 * torch.rand(2), torch.arange(2)
    want = net(*inputs).detach()  # with gradients there are no branches
    assert not streams.log
    streams.watch(net)
    with torch.no_grad():
        assert torch.equal(net(*inputs), want)
    log = streams.log
    on_side = {entry[2] for entry in log if entry[:2] == ("side", "runs")}
    assert on_side == {f"main.blocks.{i}.adaln.1" for i in range(3)}
    for place, entry in enumerate(log):
        if entry == ("side", "records"):  # from the wait for the main stream on nothing else is in a branch
            begin = max(i for i, earlier in enumerate(log[:place]) if earlier[1] == "waits for")
            assert log[begin] == ("side", "waits for", "main") and {e[0] for e in log[begin:place]} == {"side"}
            assert log.count(("main", "joins", place)) == 1
    joined = [log[: log.index(("main", "runs", "main.blocks.0"))][-1]]
    assert joined[0][:2] == ("main", "joins") and log[joined[0][2] - 1] == ("side", "runs", "main.blocks.2.adaln.1")


def test_a_backbone_of_your_own_gets_no_further_inputs(streams):
    class Own(DCDiT):
        def backbone(self, tokens, c, packing):
            return self.main(tokens, c, packing)

    with torch.no_grad():
        for net in (Own(CONFIG), DCDiT(CONFIG, backbone=Plain())):
            net(torch.randn(2, 4, 8, 8), 1000 * torch.rand(2), torch.arange(2))
    events = [i for i, entry in enumerate(streams.log) if entry == ("side", "records")]
    assert not events


class Plain(torch.nn.Module):
    def forward(self, tokens, c, packing):
        return tokens
