"""Layers and activations that mind two things: the dtype of their input, and who else may hold it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as hooks


def check_dtype(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise ValueError where a model's input x is not floating point, or without autocast not of its weight's dtype."""
    if not x.is_floating_point() or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"x must be {weight.dtype} as the model is, got {x.dtype}")


class RMSNorm(nn.RMSNorm):
    """In its input's dtype: under autocast the weight is wider, and PyTorch's fused kernel takes one dtype only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, D)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class CastLinear(nn.Linear):
    """A linear map in its weight's dtype, or autocast's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) of any dtype → (…, out)."""
        return super().forward(x.to(self.weight.dtype))


class WideLinear(nn.Linear):
    """A linear map in its weight's dtype, under autocast too: the method computes it in float32 in any model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) of any dtype → (…, out) in the weight's."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution, 'same'.

    On a GPU its weights are channels-last, or each call would convert them; elsewhere contiguous, for `fully_shard`.
    """

    channels_last_on = ("cuda",)

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)
        self._lay_out()

    def _apply(self, fn: Callable, recurse: bool = True) -> Conv3x3:
        before = self.weight.device
        super()._apply(fn, recurse)
        if self.weight.device != before:
            self._lay_out()
        return self

    def _lay_out(self) -> None:
        if self.weight.device.type in self.channels_last_on and type(self.weight.data) is torch.Tensor:
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)


class BiasApartConv3x3(Conv3x3):
    """`Conv3x3` with its bias left to the next kernel: a GPU would spend one pass more over the features."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, in, H, W) → (features (B, out, H, W) without the bias, bias (out,))."""
        return self._conv_forward(x, self.weight, None), self.bias.view(-1)


class PointwiseConv2d(nn.Conv2d):
    """A 1×1 convolution, as a matrix product over cells: the bias then costs no further pass."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1)

    def forward(self, x: torch.Tensor, further_bias: torch.Tensor | None = None) -> torch.Tensor:
        """(B, in, H, W), best channels-last, → (B, out, H, W) channels-last; `further_bias` (out,) is added as well."""
        batch, _, height, width = x.shape
        bias = self.bias if further_bias is None else self.bias + further_bias
        out = F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), self.weight.flatten(1), bias)
        return out.view(batch, height, width, self.out_channels).permute(0, 3, 1, 2)


class WidePointwiseConv2d(PointwiseConv2d):
    """A 1×1 convolution in its weight's dtype, whatever x's dtype."""

    def forward(self, x: torch.Tensor, further_bias: torch.Tensor | None = None) -> torch.Tensor:
        """(B, in, H, W) of any dtype → (B, out, H, W) in the weight's."""
        return super().forward(x.to(self.weight.dtype), further_bias)


def gelu_tanh(x: torch.Tensor, source: nn.Module | None = None) -> torch.Tensor:
    """GELU, tanh form (arXiv 1606.08415). May overwrite x: see `may_overwrite`."""
    if may_overwrite(x, source):
        return torch.ops.aten.gelu_(x, approximate="tanh")
    return F.gelu(x, approximate="tanh")


def linear_gelu(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """GELU, tanh form, of layer(x). (…, in) → (…, out).

    In half precision, where no gradient is wanted, the matrix product applies it before it rounds and writes: one pass
    over the hidden features of an MLP in place of three. On a CPU that is for bfloat16, in oneDNN; PyTorch's own GELU
    takes longer there than the product.
    """
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiled x has an unknown number of rows
        half = x.dtype in (torch.float16, torch.bfloat16) if x.is_cuda else onednn_takes(x)
        if half and is_plain(layer) and layer.weight.dtype == x.dtype and layer.bias is not None:
            if not x.is_cuda:
                return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
            hidden = torch.ops.aten._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
            return hidden.view(*x.shape[:-1], hidden.shape[1])
    return gelu_tanh(layer(x), layer)


def onednn_takes(x: torch.Tensor) -> bool:
    """Whether x is in bfloat16 on a CPU, and not empty, and PyTorch's oneDNN multiplies such numbers there."""
    if x.dtype is not torch.bfloat16 or x.device.type != "cpu" or x.numel() == 0:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_plain(layer: nn.Module) -> bool:
    """Whether layer(x) is a linear map or convolution and nothing more: no adapter, quantisation, offload or hook."""
    if type(layer) not in (nn.Linear, Conv3x3, BiasApartConv3x3) or "forward" in layer.__dict__:
        return False
    watched = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or hooks._global_forward_hooks
    # A quantised weight is a class of its own; so is the stand-in of a mode that counts memory.
    return not watched and type(layer.weight) in (nn.Parameter, torch.Tensor, FakeTensor)


def may_overwrite(x: torch.Tensor, source: nn.Module | None) -> bool:
    """Whether x may be computed in place: no gradient needs it, and no hook of `source`, the layer that made it, holds
    it. An adapter or a quantised layer in the place of `source` may hold its output as well."""
    if x.requires_grad or source is None:
        return not x.requires_grad
    return is_plain(source)


def init_linears(model: nn.Module, zero: tuple[str, ...], skipped: tuple[str, ...] = ()) -> None:
    """DiT's initialisation of linear maps: Xavier, the time embedding's normal, zeros where names end in
    `zero`; biases zero. Children that `skipped` names keep their weights."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.split(".")[0] in skipped:
            continue
        if name.endswith(zero):
            nn.init.zeros_(module.weight)
        elif name.startswith("time_embed"):
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
