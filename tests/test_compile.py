"""torch.compile(fullgraph=True, dynamic=True) where the number of tokens comes out of the graph's own plan."""

import pytest
import torch
from torch import nn

import dcdit_kernels as K
from dcdit import DCDiT, DCDiTConfig, DynamicChunking


def whole(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def stack(h, prob):
    """The first snippet of docs/ops.md."""
    plan = K.plan_chunks(prob, grid=(8, 8), drop_fraction=0.2)
    heads = K.chunk(h, plan).unflatten(1, (2, 16))
    lengths = plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen
    x = K.varlen_attention(heads, heads, heads, *lengths).flatten(1)
    return K.dechunk(x, prob, plan, residual=h), plan.boundary_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_operators(dtype):
    compiled = whole(stack)
    for batch, scale in ((2, 1.0), (3, 1.0), (2, 0.4), (0, 1.0)):  # 0.4: nothing is kept
        h, prob = torch.randn(batch, 64, 32).to(dtype), scale * torch.rand(batch, 64)
        for got, want in zip(compiled(h, prob), stack(h, prob), strict=True):
            assert torch.equal(got, want)


def test_fixed_rows_with_a_bound():
    def fixed(prob):
        plan = K.plan_chunks(prob, (8, 8), capacity=100, max_seqlen=40)
        return plan.cu_seqlens, plan.token_index, plan.overflow, torch.tensor(plan.max_seqlen)

    prob, compiled = torch.rand(3, 64), whole(fixed)
    for got, want in zip(compiled(prob), fixed(prob), strict=True):
        assert torch.equal(got, want)


def test_masks_that_change():
    """One graph for all masks."""

    def masked(prob, keep, ban):
        plan = K.plan_chunks(prob, (8, 8), 0.3, keep=keep, ban=ban)
        return plan.cu_seqlens, plan.token_index

    compiled = torch.compile(masked, fullgraph=True, dynamic=True, backend="aot_eager")
    prob = torch.rand(3, 64)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            ban = torch.rand(3, 64) < 0.3
            keep = (torch.rand(3, 64) < 0.3) & ~ban
            for got, want in zip(compiled(prob, keep, ban), masked(prob, keep, ban), strict=True):
                assert torch.equal(got, want)


def test_rows_are_packed_and_put_back():
    def twice(x, mask):
        rows, indices, *_ = K.unpad_input(x, mask)
        return K.pad_input(2 * rows, indices, *mask.shape)

    x, mask = torch.randn(3, 7, 4, requires_grad=True), torch.rand(3, 7) > 0.5
    compiled = whole(twice)
    for taken in (mask, ~mask, torch.zeros_like(mask)):
        out = compiled(x, taken)
        assert torch.equal(out, 2 * x * taken[..., None])
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], 2.0 * taken[..., None].expand_as(x))


def attend_with_text(h, prob, text, cu_text):
    """Joint attention to text: a packing made, joined, cut into segments and looked up inside the graph."""
    plan = K.plan_chunks(prob, grid=(8, 8))
    words = K.Packing.from_cu_seqlens(cu_text, max_seqlen=7, capacity=text.shape[0])
    joined = plan.join(words)
    x = joined.cat(K.chunk(h, plan) + plan.rows(h[0]) + plan.rows(h[:, 0]), text)
    heads = x.unflatten(1, (2, 16))
    lengths = joined.cu_seqlens, joined.cu_seqlens, joined.max_seqlen, joined.max_seqlen
    x = x + K.varlen_attention(heads, heads, heads, *lengths).flatten(1)
    own, words = joined.split(x)
    return own.sum(0), words


def test_streams_are_joined():
    compiled = whole(attend_with_text)
    for batch, lengths in ((2, [3, 0]), (3, [7, 1, 2]), (2, [0, 0]), (5, [1, 2, 3, 4, 5])):
        h, prob = torch.randn(batch, 64, 32, dtype=torch.float64, requires_grad=True), torch.rand(batch, 64)
        text = torch.randn(sum(lengths) + 2, 32, dtype=torch.float64, requires_grad=True)
        cu_text = K.Packing.from_lengths(lengths).cu_seqlens
        results = []
        for function in (compiled, attend_with_text):
            outs = function(h, prob, text, cu_text)
            results.append([*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), (h, text))])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_model_takes_every_batch():
    torch.manual_seed(0)
    net = DCDiT(DCDiTConfig(input_size=(8, 8), hidden_size=64, depth=1, num_heads=2, encoder_width=32)).eval()
    compiled = whole(net)
    for batch in (2, 3, 0):
        inputs = torch.randn(batch, 4, 8, 8), 1000 * torch.rand(batch), torch.arange(batch)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), net(*inputs), rtol=1e-5, atol=1e-6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x, plan):
        return x + self.linear(x)


def test_wrapped_blocks():
    chunking = DynamicChunking([Block()], 64, (8, 8))
    chunking.drop_fraction = 0.5
    h = torch.randn(2, 64, 64)
    torch.testing.assert_close(whole(chunking)(h), chunking(h))
