"""pack_rows, unpack_rows and, on them, flash_attn.bert_padding's unpad_input and pad_input."""

import math

import pytest
import torch

import dcdit_kernels as K
from dcdit_kernels import extension

BACKENDS = [
    pytest.param(
        "native", marks=pytest.mark.skipif(extension.load_error is not None, reason=f"{extension.load_error}")
    ),
    "reference",
]
DTYPES = [torch.uint8, torch.bool, torch.int16, torch.bfloat16, torch.float32, torch.int64, torch.complex128]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0,)])
def test_rows_of_any_type_and_shape(backend, dtype, shape):
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2**8, (700, *shape), generator=gen).to(dtype)
    index = torch.randperm(700, generator=gen)[:600]
    index[::7] = -1
    packed = K.pack_rows(x, index, backend=backend)
    unpacked = K.unpack_rows(packed, index.int(), 710, backend=backend)
    assert packed.dtype == unpacked.dtype == dtype and unpacked.shape == (710, *shape)
    back = torch.zeros(710, *shape, dtype=dtype)
    for i, row in enumerate(index.tolist()):
        assert torch.equal(packed[i], x[row] if row >= 0 else torch.zeros(shape, dtype=dtype))
        if row >= 0:
            back[row] = x[row]
    assert torch.equal(unpacked, back)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows(backend):
    """A view of a fused tensor, elements of a row apart, and one row many times."""
    fused = torch.randn(20, 3, 8)
    index = torch.tensor([4, 19, -1, 0])
    for x in (fused[:, 1], fused[..., ::2], fused.transpose(1, 2), fused[:1].expand(20, 3, 8)):
        want = torch.stack([x[4], x[19], torch.zeros_like(x[0]), x[0]])
        assert torch.equal(K.pack_rows(x, index, backend=backend), want)
        assert torch.equal(K.unpack_rows(x[:4], index, 20, backend=backend)[[4, 19, 0]], x[[0, 1, 3]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_is_the_gradient_of_the_other(backend):
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([8, -1, 2, 0])
    check = lambda f, *a: torch.autograd.gradcheck(f, a) and torch.autograd.gradgradcheck(f, a)  # noqa: E731
    assert check(lambda x: K.pack_rows(x, index, backend=backend).sin(), x)
    assert check(lambda x: K.unpack_rows(x[:4], index, 9, backend=backend).sin(), x)
    poison = torch.full((9, 4), math.nan, dtype=torch.float64)
    poison[[8, 2, 0]] = 1
    assert not K.pack_rows(poison, index, backend=backend).isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_bad_input(backend):
    x = torch.randn(5, 4)
    assert K.pack_rows(x[:0], torch.tensor([-1, -1]), backend=backend).equal(torch.zeros(2, 4))
    assert K.pack_rows(x, torch.tensor([], dtype=torch.int64), backend=backend).shape == (0, 4)
    for index in (-2, 5):
        with pytest.raises(IndexError, match=rf"pack_rows: index must be in \[-1, 5\), got {index}"):
            K.pack_rows(x, torch.tensor([0, index]), backend=backend)
    with pytest.raises(TypeError, match="unpack_rows: index must be int32 or int64"):
        K.unpack_rows(x, torch.zeros(5), 5, backend=backend)
    with pytest.raises(ValueError, match=r"unpack_rows: index must have shape \(5\), got \(4,\)"):
        K.unpack_rows(x, torch.arange(4), 5, backend=backend)
    with pytest.raises(ValueError, match="unpack_rows: a row is filled once, got 1 2 times"):
        K.unpack_rows(x[:3], torch.tensor([1, -1, 1]), 5, backend=backend)
    with pytest.raises(ValueError, match="pack_rows: x must have rows, got a scalar"):
        K.pack_rows(x[0, 0], torch.arange(4), backend=backend)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("with_unused", [False, True])
def test_unpad_and_pad(mask_dtype, with_unused):
    """Names, order, types and values as flash_attn.bert_padding documents them; one sequence is empty."""
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 11, 2, 3, generator=gen, requires_grad=True)
    kind = torch.randint(0, 3, (4, 11), generator=gen)  # 0 nothing, 1 used, 2 takes room without being used
    kind[2] = 0
    used, unused = (kind == 1).to(mask_dtype), (kind == 2).to(mask_dtype)
    tokens, indices, cu_seqlens, max_seqlen, seqused = K.unpad_input(hidden, used, unused if with_unused else None)
    taken = kind > 0 if with_unused else kind == 1
    assert torch.equal(tokens, hidden[taken]) and indices.dtype == torch.int64
    assert torch.equal(indices, taken.flatten().nonzero().squeeze(1))
    lengths = taken.sum(1)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert type(max_seqlen) is int and max_seqlen == lengths.max()
    assert seqused.dtype == torch.int32 and torch.equal(seqused, (kind == 1).sum(1).int())
    padded = K.pad_input(tokens, indices, batch=4, seqlen=11)
    assert torch.equal(padded, torch.where(taken[..., None, None], hidden, 0))
    padded.sum().backward()
    assert torch.equal(hidden.grad, taken[..., None, None].expand_as(hidden).float())


@pytest.mark.parametrize("mask", [torch.tensor([[0.0, -10000.0]]), torch.tensor([[0, -10000]]), torch.tensor([[0, 2]])])
def test_masks_other_than_0_and_1_are_refused(mask):
    hidden = torch.randn(1, 2, 3)
    value = mask[0, 1].item()
    with pytest.raises(ValueError, match=f"unpad_input: attention_mask must be bool or hold 0 and 1, got {value}"):
        K.unpad_input(hidden, mask)
    with pytest.raises(ValueError, match=f"unpad_input: unused_mask must be bool or hold 0 and 1, got {value}"):
        K.unpad_input(hidden, torch.ones(1, 2), mask)


def test_a_token_may_be_marked_by_both_masks():
    hidden, ones = torch.randn(1, 2, 3), torch.ones(1, 2)
    tokens, *_, seqused = K.unpad_input(hidden, ones, ones)
    assert torch.equal(tokens, hidden[0]) and seqused.tolist() == [2]


def test_pad_input_names_its_own_arguments():
    with pytest.raises(ValueError, match=r"pad_input: indices must have shape \(4\), got \(3,\)"):
        K.pad_input(torch.zeros(4, 8), torch.arange(3), 1, 4)
    with pytest.raises(TypeError, match="pad_input: indices must be a tensor"):
        K.pad_input(torch.zeros(4, 8), [0, 1, 2, 3], 1, 4)
