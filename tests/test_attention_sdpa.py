"""varlen_attention sample by sample, by PyTorch's fused attention on a CPU."""

import pytest
import torch

from dcdit_kernels import varlen_attention
from dcdit_kernels.sdpa import SHORT

LENGTHS = (0, 1, 65, SHORT - 1, SHORT, 300)


def rows_of(length):
    """q, k, v and an output's gradient, each (length, 2, 32) in bfloat16, always the same."""
    return torch.randn(length, 4, 2, 32, generator=torch.Generator().manual_seed(length)).bfloat16().unbind(1)


def attend(lengths, dtype):
    """The output and the gradients of q, k, v, of samples of these lengths."""
    *qkv, grad = (torch.cat(parts).to(dtype) for parts in zip(*map(rows_of, lengths), strict=True))
    qkv = [x.requires_grad_() for x in qkv]
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    out = varlen_attention(*qkv, offsets, offsets, max(lengths), max(lengths))
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


@pytest.mark.parametrize("length", LENGTHS)
def test_short_samples_are_float32s_rounded_once(length):
    """Where gradients are wanted: there a CPU's bfloat16 takes several times as long for few rows."""
    half, full = attend([length], torch.bfloat16), attend([length], torch.float32)
    same = [torch.equal(a, b.bfloat16()) for a, b in zip(half, full, strict=True)]
    assert all(same) == (length < SHORT)
    for a, b in zip(half, full, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)


def test_a_sample_has_the_same_bits_in_any_batch():
    apart = [torch.cat(parts) for parts in zip(*(attend([n], torch.bfloat16) for n in LENGTHS), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(attend(LENGTHS, torch.bfloat16), apart, strict=True))


def test_without_gradients_bfloat16_stays():
    *qkv, _ = rows_of(65)
    offsets = torch.tensor([0, 65], dtype=torch.int32)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv))
    assert torch.equal(varlen_attention(*qkv, offsets, offsets, 65, 65), expected[0].transpose(0, 1))
