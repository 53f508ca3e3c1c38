"""Triton's attention of short samples: its numbers, and which calls it serves."""

import importlib
import inspect
import math
import sys

import pytest
import torch
from attention_stand_ins import ATEN, CU_Q, rows, value_and_gradients
from torch.fx.experimental.proxy_tensor import make_fx

import dcdit_kernels as K
from dcdit_kernels import attention, flash, flash_calls, reference

pytest.importorskip("triton", reason="Triton's kernels need Triton")
NAME = "Triton attention"
LIBRARY = next(library for library in flash.LIBRARIES if library.name == NAME)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 7, 0, 63, 65, 130]
# Of the largest value: a few roundings of the weights and of the result, or of float32's sums.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture
def kernel():
    return importlib.import_module(LIBRARY.module).varlen_attention


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def fused(lengths, heads, head_dim, dtype, spare=3):
    """q, k and v of one tensor, NaN past the live rows, and their offsets."""
    qkv = torch.randn(sum(lengths) + spare, 3, heads, head_dim).to(dtype).to(DEVICE)
    qkv[sum(lengths) :] = math.nan
    return *qkv.unbind(1), offsets(lengths)


def near(got, tensors, *rest, **options):
    """Whether live rows are those of the reference in float64."""
    want = reference.varlen_attention(*(t.nan_to_num().double().cpu() for t in tensors), *(cu.cpu() for cu in rest),
                                      0, 0, **options)  # fmt: skip
    live = int(rest[0][-1])
    error = (got.double().cpu() - want)[:live].abs().max()
    assert error <= TOLERANCE[got.dtype] * want.abs().max(), float(error / want.abs().max())


@pytest.mark.parametrize("head_dim", [72, 64, 32, 128, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_against_float64(dtype, head_dim, kernel, launches):
    """Every length about a tile's, no spare row read; float32 shows what is no rounding."""
    if dtype == torch.float32 and DEVICE == "cuda":
        pytest.skip("tensor cores take float32 for TF32")
    lengths = LENGTHS if head_dim == 72 else [1, 0, 65]
    *qkv, cu = fused(lengths, 2, head_dim, dtype)
    near(kernel(*qkv, cu, cu, max(lengths), max(lengths)), qkv, cu, cu)
    assert launches is None or launches == [("attention_forward", len(lengths) * 2 * math.ceil(max(lengths) / 64))]


def test_bfloat16_with_a_gpus_rounding(kernel, gpu_arithmetic):
    *qkv, cu = fused([70, 1], 1, 72, torch.bfloat16)
    near(kernel(*qkv, cu, cu, 70, 70), qkv, cu, cu)


@pytest.mark.parametrize("transposed", [False, True])
def test_other_keys_fewer_heads_and_any_strides(transposed, kernel, poisoned):
    """A sample without keys is zero; nothing is written past the live rows; heads may lie apart, at odd addresses."""
    cu_q, cu_k = offsets([3, 66, 5, 0]), offsets([70, 2, 0, 4])
    q, kv = torch.randn(76, 4, 24).half().to(DEVICE), torch.randn(2, 78, 2, 24).half().to(DEVICE)
    q[74:], kv[:, 76:] = math.nan, math.nan
    k, v = kv
    if transposed:
        wide = torch.empty(4, 76, 37, dtype=q.dtype, device=DEVICE)[:, :, 1:25]
        wide.copy_(q.transpose(0, 1))
        q, k = wide.transpose(0, 1), k.transpose(0, 1).contiguous().transpose(0, 1)
    got = kernel(q, k, v, cu_q, cu_k, 66, 70, 0.3)
    near(got, (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), cu_q, cu_k, softmax_scale=0.3)
    assert not got[69:74].any() and got[74:].isnan().all()


def test_a_sample_has_the_same_bits_in_any_batch_and_keeps_its_nan(kernel):
    *qkv, cu = fused([5, 67, 9, 64], 2, 72, torch.float16)
    for part in qkv:
        part[5 + 67] = math.nan  # in the third sample
    out = kernel(*qkv, cu, cu, 67, 67)
    for sample, (first, last) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        one = offsets([last - first])
        alone = kernel(*(part[first:last].clone() for part in qkv), one, one, 128, 128)
        assert torch.equal(alone.view(torch.int16), out[first:last].view(torch.int16)), sample
        assert out[first:last].isnan().any() == (sample == 2)


def test_no_sample_is_no_launch(kernel, launches):
    *qkv, cu = fused([0, 0], 2, 8, torch.float16)
    assert kernel(*qkv, cu, cu, 0, 0).shape == kernel(*qkv, cu[:1], cu[:1], 4, 4).shape == (3, 2, 8)
    assert not launches


@pytest.fixture
def hopper(monkeypatch):
    """A machine where any GPU would do, with PyTorch's operators and without flash-attn."""
    monkeypatch.setattr(flash, "_found", {})
    monkeypatch.setattr(attention, "_chosen", {})
    monkeypatch.setattr(flash, "_refuses_device", lambda *_: None)
    found = {x.function: ATEN[x.name] for x in flash.LIBRARIES if x.name in ATEN}
    taken = {name: frozenset(inspect.signature(function).parameters) for name, function in found.items()}
    monkeypatch.setattr(flash, "_aten", lambda name: (found[name], taken[name]))
    for module in ("flash_attn.cute", "flash_attn_interface", "flash_attn", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, module, None)
    called, own = [], dict(flash_calls.CALLS)
    for keywords, call in own.items():
        note = lambda library, *rest, call=call: called.append(library.name) or call(library, *rest)  # noqa: E731
        monkeypatch.setitem(flash_calls.CALLS, keywords, note)
    return called


@pytest.mark.skipif(DEVICE == "cuda", reason="stand-ins for PyTorch's operators run on a CPU")
def test_calls_it_serves(hopper):
    """Half precision without gradients, short and not causal; FlashAttention serves all others."""
    q = rows()[0].nan_to_num()
    leaf, cu = q.clone().requires_grad_(), CU_Q
    attend = lambda q, longest=5, **how: K.varlen_attention(q, q, q, cu, cu, longest, longest, **how)  # noqa: E731
    with torch.no_grad():
        attend(leaf)
    for call in (
        lambda: attend(q),
        lambda: attend(q, 512),
        lambda: attend(q, 513),
        lambda: attend(q, causal=True),
        lambda: attend(leaf),
        lambda: attend(rows(head_dim=136)[0]),
        lambda: attend(q.as_subclass(type("Marked", (torch.Tensor,), {}))),
        lambda: attend(q.float()),
    ):
        call()
    assert hopper == [*[NAME] * 3, *["torch FlashAttention"] * 5, "torch efficient attention"]


@pytest.mark.skipif(DEVICE == "cuda", reason="stand-ins for PyTorch's operators run on a CPU")
def test_what_is_traced_is_not_for_it(hopper):
    """A graph has operators of PyTorch alone: compiled none of these libraries, recorded FlashAttention."""
    q = rows()[0].nan_to_num()
    attend = lambda q: K.varlen_attention(q, q, q, CU_Q, CU_Q, 5, 5)  # noqa: E731
    got = torch.compile(attend, fullgraph=True, backend="eager")(q)
    near(got, (q, q, q), CU_Q, CU_Q)
    assert not hopper
    with pytest.raises(RuntimeError, match="value out of a tracing tensor"):  # the stand-in reads the offsets
        make_fx(attend)(q)
    assert hopper == ["torch FlashAttention"]


@pytest.mark.skipif(DEVICE == "cuda", reason="stand-ins for PyTorch's operators run on a CPU")
@pytest.mark.parametrize("how", ["exact", "packing", "neither"])
def test_rows_past_the_live_ones(how, hopper, poisoned):
    """As of every library: zeros, but undefined where a packing has it that nobody reads them."""
    packing = K.Packing.from_cu_seqlens(CU_Q, 5, 12)
    q, cu = rows()[0], packing.cu_seqlens
    q = q[:9] if how == "exact" else q
    options = {"exact": {"exact": True}, "packing": {"packing": packing}, "neither": {}}[how]
    with torch.no_grad():
        got = K.varlen_attention(q, q, q, cu, cu, 5, 5, **options)
    near(got, (q, q, q), cu, cu)
    assert hopper == [NAME] and (how == "packing" or not got[9:].any())


def test_explain_names_the_reason(hopper):
    q, k, v = rows()
    explain = lambda *args, **how: K.explain("varlen_attention", *args, **how)  # noqa: E731
    assert f"native is {NAME}" in explain(q, k, v, CU_Q, CU_Q, 5, 5)
    assert f"native is {NAME}" in explain(q, k, v)
    for reason, text in {
        "serves samples of at most 512 rows": explain(q, k, v, CU_Q, CU_Q, 5, 513),
        "serves samples of at most 512 rows ": explain(q, k, v, CU_Q, CU_Q, max_seqlen_q=600, max_seqlen_k=5) + " ",
        "takes no causal mask": explain(q, k, v, CU_Q, CU_Q, 5, 5, causal=True),
        "serves plain tensors without gradients": explain(q.clone().requires_grad_(), k, v, CU_Q, CU_Q, 5, 5),
        "needs a head_dim that is a multiple of 8 up to 128, got 136": explain(*rows(head_dim=136), CU_Q, CU_Q, 5, 5),
    }.items():
        assert f"{NAME}: {reason.strip()}" in text and "native is torch FlashAttention" in text, text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none")
@pytest.mark.parametrize("head_dim", [72, 64, 128])
def test_beside_flash_attention_on_a_gpu(head_dim, kernel):
    """Short full samples as PyTorch's FlashAttention has them, and as many bits from a graph."""
    *qkv, cu = fused([128, 77, 512], 6, head_dim, torch.bfloat16, spare=0)
    with torch.no_grad():
        got = kernel(*qkv, cu, cu, 512, 512)
    near(got, qkv, cu, cu)
    flash_2 = value_and_gradients(lambda *t: K.varlen_attention(*t, cu, cu, 512, 512), qkv)[0]
    torch.testing.assert_close(got, flash_2, rtol=2**-6, atol=2**-7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel(*qkv, cu, cu, 512, 512)
    graph.replay()
    assert torch.equal(captured, got)
