"""Encoder and decoder: the formula in float64, and one layout from end to end, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dcdit import DCDiT, DCDiTConfig
from dcdit.errors import ConfigError
from dcdit.model.conv_blocks import CoarseDecoder, CoarseEncoder, ConvStack, Stem
from dcdit.model.flops import dcdit_flops
from dcdit.model.layers import Conv3x3, PointwiseConv2d
from dcdit.model.routers import PredictabilityRouter
from dcdit_kernels import use_backend

WIDTHS = (64, 64, 128)  # two channels a group: with one the conditioning is taken away


def stack():
    torch.manual_seed(0)
    net = ConvStack(WIDTHS, 48)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def straightforward(weights, x, c):
    """The stack as METHOD's section on the encoder puts it, from its weights by name."""

    def norm_silu(name, x):
        return F.silu(F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"]))

    def conv(name, x, padding=1):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

    for i in range(2):
        block = f"blocks.{i}"
        shift = F.linear(F.silu(c), weights[f"{block}.cond.1.weight"], weights[f"{block}.cond.1.bias"])
        h = conv(f"{block}.conv1", norm_silu(f"{block}.norm1", x)) + shift[:, :, None, None]
        h = conv(f"{block}.conv2", norm_silu(f"{block}.norm2", h))
        x = h + (conv(f"{block}.skip", x, 0) if f"{block}.skip.weight" in weights else x)
    rows = x.flatten(2).mT
    return rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["norm.weight"]


def outputs_and_gradients(function, weights, *inputs):
    leaves = [t.detach().requires_grad_() for t in (*inputs, *weights.values())]
    out = function(dict(zip(weights, leaves[len(inputs) :], strict=True)), *leaves[: len(inputs)])
    grad = torch.linspace(-1, 2, out.numel()).to(out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * grad).sum(), leaves)]


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_against_the_formula_in_float64(backend):
    net = stack()
    weights, x, c = net.state_dict(), torch.randn(2, 64, 5, 7), torch.randn(2, 48)
    wide = {name: weight.double() for name, weight in weights.items()}
    want = outputs_and_gradients(straightforward, wide, x.double(), c.double())
    with use_backend(backend):
        stacked = lambda w, x, c: torch.func.functional_call(net, w, (x, F.silu(c)))  # noqa: E731
        got = outputs_and_gradients(stacked, weights, x, c)
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=2e-5 * float(w.detach().abs().max()))


class Layouts(TorchDispatchMode):
    """Names the convolutions with an operand that is not channels-last, and the copies of features."""

    def __init__(self, features):
        super().__init__()
        self.features, self.convolutions, self.wrong = features, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name in ("aten::convolution", "aten::convolution_backward"):
            self.convolutions += 1
            fields = [t for t in args if isinstance(t, torch.Tensor) and t.dim() == 4]
            if not all(t.is_contiguous(memory_format=torch.channels_last) for t in fields):
                self.wrong.append((str(function), [t.stride() for t in fields]))
        elif function._schema.name in ("aten::clone", "aten::copy_", "aten::_to_copy"):
            # Triton's interpreter copies its reads, as one row of memory.
            if args[0].dim() > 1 and args[0].numel() >= self.features:
                self.wrong.append((str(function), [t.shape for t in args]))
        return out


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_layout_is_converted(layout):
    """From stem to output and back, in float32: a tensor in another layout is converted once, at the door."""
    stem, net, router = (
        Conv3x3(4, 64),
        stack(),
        PredictabilityRouter(DCDiTConfig(input_size=(6, 8), hidden_size=128, num_heads=2)),
    )
    x = torch.randn(2, 4, 6, 8).to(memory_format=layout)
    decoder = ConvStack(WIDTHS[::-1], 48)
    for module in (stem, net, router, decoder):  # as the weights are on a GPU
        module.to(memory_format=torch.channels_last)
    with use_backend("triton"), Layouts(features=2 * 32 * 48) as seen:
        c = torch.randn(2, 48, requires_grad=True)
        h = net(stem(x.contiguous(memory_format=torch.channels_last)), c)
        out = decoder(h.mT.unflatten(2, (6, 8)), c).square().sum() + router(h).sum()
        out.backward()
    assert seen.convolutions == 2 * 11 and not seen.wrong


def test_weights_are_channels_last_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(Conv3x3, "channels_last_on", ("meta",))
    with torch.device("meta"):
        made_there = Conv3x3(8, 16)
    moved = Conv3x3(8, 16)
    assert moved.weight.is_contiguous()
    for conv in (made_there, moved.to("meta")):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert moved.to(memory_format=torch.contiguous_format).weight.is_contiguous()


def test_layout_of_weights_outlives_casts_and_loading():
    net = stack()
    copied = ConvStack(WIDTHS, 48).to(memory_format=torch.channels_last).to(torch.bfloat16).float()
    copied.load_state_dict({name: weight.contiguous() for name, weight in net.state_dict().items()})
    convolutions = [module for module in copied.modules() if isinstance(module, Conv3x3)]
    assert len(convolutions) == 4
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pointwise_is_the_convolution(layout):
    conv, x = PointwiseConv2d(6, 5), torch.randn(2, 6, 3, 4).to(memory_format=layout)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias))
    assert conv(x).is_contiguous(memory_format=torch.channels_last) and conv(x[:0]).shape == (0, 5, 3, 4)


COARSE = DCDiTConfig(
    input_size=(6, 8), num_classes=5, hidden_size=64, depth=1, num_heads=2, encoder_width=32, encoder_stride=2
)


def test_coarse_encoder_and_decoder_see_blocks_of_cells():
    """Without conv blocks: the cell (y, x) has the rows of number 2·(y % 2) + x % 2 in the linear map of its block."""
    encoder, decoder, c = CoarseEncoder(32, 64, 2), CoarseDecoder(64, 32, 2), torch.randn(2, 64)
    x, y = torch.randn(2, 32, 3, 4), torch.randn(2, 64, 6, 8)
    for net in (encoder, decoder):
        net.blocks, net.norm = torch.nn.ModuleList(), torch.nn.Identity()
    h, coarse = encoder(x, c).unflatten(1, (6, 8)), decoder(y, c).unflatten(1, (3, 4))
    spread, gather = encoder.spread, decoder.gather
    summed = gather.bias.expand(2, 3, 4, 32)
    for i in range(2):
        for j in range(2):
            part = slice((2 * i + j) * 64, (2 * i + j + 1) * 64)
            want = F.linear(x.movedim(1, 3), spread.weight[part], spread.bias[part])
            torch.testing.assert_close(h[:, i::2, j::2], want)
            summed = summed + F.linear(y[:, :, i::2, j::2].movedim(1, 3), gather.weight[:, part])
    torch.testing.assert_close(coarse, summed)


def test_coarse_model():
    """Every parameter learns, and the output's cells are where the input's are: a change at one cell moves the features
    around it only."""
    torch.manual_seed(0)
    net = DCDiT(COARSE)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, y = torch.randn(2, 4, 6, 8), torch.tensor([10.0, 900.0]), torch.tensor([0, 5])
    out = net(x, t, y)
    assert out.shape == (2, 8, 6, 8)
    out.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
    stem = Stem(4, 32, 2)
    moved = stem(torch.nn.functional.pad(torch.ones(1, 4, 1, 1), (7, 0, 5, 0))) - stem(torch.zeros(1, 4, 6, 8))
    assert moved[:, :, 1:, 2:].any() and not moved[:, :, 0].any() and not moved[..., :2].any()


def test_coarse_flops_are_counted():
    """By PyTorch's own counter, of encoder and decoder."""
    from torch.utils.flop_counter import FlopCounterMode

    for config in (COARSE, DCDiTConfig(**{**COARSE.to_dict(), "encoder_stride": 1})):
        net, c = DCDiT(config), torch.randn(1, 64)
        x = torch.randn(1, 32, 6 // config.encoder_stride, 8 // config.encoder_stride)
        for name, inputs in (("encoder", (x, c)), ("decoder", (torch.randn(1, 64, 6, 8), c))):
            with FlopCounterMode(display=False) as counter:
                getattr(net, name)(*inputs)
            assert counter.get_total_flops() == pytest.approx(1e9 * dcdit_flops(config, 1)[name])


def test_strides_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match=r"input_size must be a multiple of encoder_stride 2, got \(7, 8\)"):
        DCDiTConfig(input_size=(7, 8), encoder_stride=2)
    with pytest.raises(ConfigError, match="encoder_stride must be a positive integer, got 0"):
        DCDiTConfig(encoder_stride=0)
