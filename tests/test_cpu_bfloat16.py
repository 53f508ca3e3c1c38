"""bfloat16 on the CPU: loops that widen numbers as they read them, and GELU in the matrix product."""

from unittest import mock

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import dcdit_kernels as K
from dcdit.model import layers
from dcdit_kernels.testing import make_scene


def same(got, want):
    """Whether bfloat16 results are float32's, rounded once, to the bit; NaN equals NaN."""
    assert got.dtype == torch.bfloat16
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.bfloat16().nan_to_num())


@pytest.mark.parametrize("width", [24, 100])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_modulation_is_the_float32_one_rounded_once(width, norm):
    scene = make_scene((9, 30), width, share=0.7)
    x, y = scene.packed(torch.bfloat16), scene.packed(torch.bfloat16)
    gate, shift, scale = (vector.bfloat16() for vector in scene.vectors(3))
    for tensors in ((x, y, gate, shift, scale), (x, y.float(), gate, shift, scale), (x, y, gate.float(), shift, scale)):
        got = K.gate_residual_modulate(*tensors, scene.plan, norm=norm)
        want = K.gate_residual_modulate(*(t.float() for t in tensors), scene.plan, norm=norm)
        assert all(map(same, got, want))
    weight = torch.randn(width).bfloat16()
    got = K.adaln_modulate(x, shift, scale, scene.plan, norm=norm, norm_weight=weight)
    want = K.adaln_modulate(*(t.float() for t in (x, shift, scale)), scene.plan, norm=norm, norm_weight=weight.float())
    assert same(got, want)
    assert same(
        K.gate_residual(x, y, gate, scene.plan), K.gate_residual(x.float(), y.float(), gate.float(), scene.plan)
    )


def test_group_norm_and_refilled_cells_are_the_float32_ones_rounded_once():
    x, cond = torch.randn(2, 48, 9, 30).bfloat16(), torch.randn(2, 48)
    weight, bias = torch.randn(2, 48)
    assert same(K.group_norm_silu(x, weight, bias, 8, cond), K.group_norm_silu(x.float(), weight, bias, 8, cond))
    scene = make_scene((9, 30), 48, share=0.7)
    rows, residual = scene.packed(torch.bfloat16), scene.dense()
    # Ties, numbers that round to infinity, infinities, subnormals and NaN of any bits.
    ties = torch.arange(0x3F80, 0x3F90, dtype=torch.int32).bitwise_left_shift(16) | 0x8000
    odd = torch.tensor([3.3961775e38, -3.4e38, torch.inf, -torch.inf, 1e-40, -0.0, torch.nan, 3.3895e38])
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32)
    special = torch.cat([ties.view(torch.float32), odd, nans.view(torch.float32)])
    residual[1, :, : len(special)] = special  # of the sample that keeps no cell
    for smoothing in ("gaussian", "ema", None):
        got, want = (K.dechunk(r, scene.prob, scene.plan, residual, smoothing=smoothing) for r in (rows, rows.float()))
        assert same(got, want)


def test_chunk_rounds_once():
    """A cell's own row as the reference has it; the mean of a segment and its position are rounded together."""
    scene = make_scene((9, 30), 100, share=0.3)
    h, pos = scene.dense().bfloat16(), scene.table(270, 100)
    want = K.chunk(h, scene.plan, pos, backend="reference")
    assert torch.equal(K.chunk(h, scene.plan, pos), want) and want.dtype == torch.bfloat16
    assert same(K.chunk(h, scene.plan, pos, "mean"), K.chunk(h.float(), scene.plan, pos.bfloat16().float(), "mean"))


def test_gradients_are_taken_in_float32():
    """A gradient wants the sums that are not rounded; rows in bfloat16 have no backward."""
    scene = make_scene((6, 7), 24)
    x, y = scene.packed(torch.bfloat16), scene.packed(torch.bfloat16)
    vectors = [vector.bfloat16() for vector in scene.vectors(3)]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in (x, y, *vectors)]
        outs = K.gate_residual_modulate(*leaves, scene.plan)
        live = slice(int(scene.plan.cu_seqlens[-1]))
        found.append([g[live] for g in torch.autograd.grad(outs[1][live].float().square().sum(), leaves[:2])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)


def test_gelu_is_in_the_product_where_onednn_takes_bfloat16(monkeypatch):
    """Without a gradient and with a plain layer alone; the fused one rounds once, so its error is smaller."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(48, 96).bfloat16(), torch.randn(3, 5, 48).bfloat16()
    gelu, apart = layers.gelu_tanh, []
    monkeypatch.setattr(layers, "gelu_tanh", lambda *args: apart.append(args) or gelu(*args))
    want = gelu(torch.nn.functional.linear(*(t.double() for t in (x, layer.weight, layer.bias))))
    with torch.no_grad():
        got = layers.linear_gelu(layer, x)
        assert len(apart) == (0 if layers.onednn_takes(x) else 1)
        error, yardstick = ((t.double() - want).abs().max() for t in (got, gelu(layer(x))))
        assert got.dtype == torch.bfloat16 and error <= yardstick
        apart.clear()
        assert layers.linear_gelu(layer, x[:0]).shape == (0, 5, 96)
        hook = layer.register_forward_hook(lambda *_: None)
        layers.linear_gelu(layer, x)
        hook.remove()
        wrapped = torch.nn.Linear(48, 96).bfloat16()  # as torchao's quantised weights are
        wrapped.weight = torch.nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data))
        layers.linear_gelu(wrapped, x)
        with mock.patch.object(torch.backends.mkldnn, "is_available", lambda: False):
            layers.linear_gelu(layer, x)
    layers.linear_gelu(layer, x).sum().backward()
    layers.linear_gelu(layer.float(), x.float())
    assert len(apart) == 6 and layer.weight.grad is not None
