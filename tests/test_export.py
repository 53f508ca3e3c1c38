"""The model outside of Python: torch.export takes every batch; jit.trace, which cannot, is refused."""

import pytest
import torch
from torch import nn

from dcdit import DCDiT, DCDiTConfig


def make():
    sizes = {"num_classes": 10, "hidden_size": 64, "depth": 2, "num_heads": 2, "encoder_width": 32}
    model = DCDiT(DCDiTConfig(input_size=8, **sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    nn.init.zeros_(model.router.score.bias)  # some of the cells are kept
    return model


def batch(size):
    return torch.randn(size, 4, 8, 8), 1000 * torch.rand(size), torch.arange(size)


def test_export_takes_every_batch(tmp_path):
    """Saved, loaded, and called with batches that keep other cells."""
    model = make()
    size = {0: torch.export.Dim("batch", min=2, max=64)}
    torch.export.save(torch.export.export(model, batch(2), dynamic_shapes=(size,) * 3), tmp_path / "model.pt2")
    exported, rows = torch.export.load(tmp_path / "model.pt2").module(), set()
    for inputs in (batch(3), batch(3), batch(5)):
        want, routing = model(*inputs, return_routing=True)
        torch.testing.assert_close(exported(*inputs), want, rtol=1e-5, atol=1e-6)
        rows.add(routing.plan.capacity)
    assert len(rows) == 3


def test_jit_trace_is_refused():
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot follow .*use torch\.export"):
        torch.jit.trace(make(), batch(2))
