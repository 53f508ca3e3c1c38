"""Which FlashAttention varlen_attention takes, how each is called, and that no row past the last live one matters."""

import inspect
import math
import sys
import types

import pytest
import torch

import dcdit_kernels as K
from dcdit_kernels import flash, reference

CU_Q, CU_K = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 4, 4, 9], [0, 2, 5, 11]))


def math_of(q, k, v, cu_q, cu_k, scale, dirty):
    """Attention in float64. With `dirty`, rows past the last live one are NaN, in the output and in the gradients."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    live_q, live_k = int(cu_q[-1]), int(cu_k[-1])
    rows = [Dirty.apply(x, n) if dirty else x for x, n in ((q, live_q), (k, live_k), (v, live_k))]
    out = reference.varlen_attention(*(x.double() for x in rows), cu_q, cu_k, 0, 0, scale).to(q.dtype)
    return out + torch.where(torch.arange(len(out)) < live_q, 0.0, math.nan)[:, None, None].to(out) if dirty else out


class Dirty(torch.autograd.Function):
    """x; its gradient is NaN past the live rows, as an empty buffer may be."""

    @staticmethod
    def forward(ctx, x, live):
        ctx.live = live
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.live :] = math.nan
        return grad, None


# The signatures of the releases, in their order; nothing else of them is here.
def flash_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
            seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
            learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            return_lse=False):  # fmt: skip
    assert seqused_q is seqused_k is page_table is learnable_sink is None and not causal
    assert not any(x.isnan().any() for x in (q, k, v)), "loads past a sample's end"
    return math_of(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, dirty=True), None


def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False):  # fmt: skip
    assert seqused_q is seqused_k is qv is None and not causal
    assert not any(x.isnan().any() for x in (q, k, v)), "loads past a sample's end"
    return math_of(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, dirty=True)


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None):  # fmt: skip
    assert dropout_p == 0.0 and not causal and alibi_slopes is None
    return math_of(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, dirty=True)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert not is_causal and return_aux is None
    return math_of(query, key, value, cu_seq_q, cu_seq_k, None, dirty=True)


def torch_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert return_aux is seqused_k is block_table is None and window_size == (-1, -1)
    return math_of(query, key, value, cu_seq_q, cu_seq_k, scale, dirty=True)


STAND_INS = {
    "flash-attn 4": ("flash_attn.cute", "flash_attn_varlen_func", flash_4),
    "flash-attn 3": ("flash_attn_interface", "flash_attn_varlen_func", flash_3),
    "flash-attn 2": ("flash_attn", "flash_attn_varlen_func", flash_2),
    "torch varlen_attn": ("torch.nn.attention.varlen", "varlen_attn", torch_2_12),
    "torch 2.10": ("torch.nn.attention.varlen", "varlen_attn", torch_2_10),
}


@pytest.fixture
def install(monkeypatch):
    """Install stand-ins, and nothing else, on a machine where any GPU would do."""
    monkeypatch.setattr(flash, "_found", {})
    monkeypatch.setattr(flash, "_refuses_device", lambda *args: None)
    for module in ("flash_attn.cute", "flash_attn_interface", "flash_attn", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, module, None)  # an ImportError

    def put(*names):
        for name in names:
            module, function, stand_in = STAND_INS[name]
            monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{function: stand_in}))

    return put


def rows(dtype=torch.float16, head_dim=8):
    """q, and k, v of a fused tensor, NaN past the live rows."""
    torch.manual_seed(0)
    q, kv = torch.randn(12, 2, head_dim).to(dtype), torch.randn(13, 2, 2, head_dim).to(dtype)
    q[9:], kv[11:] = math.nan, math.nan
    return q, *kv.unbind(1)


def value_and_gradients(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    weight = torch.linspace(-1, 2, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("name", STAND_INS)
def test_each_library_is_called_as_it_wants(name, scale, install):
    """Argument order, returned tuples, scale and rows past the last live one, for what each release takes."""
    install(name)
    tensors = rows()
    attend = lambda *t: K.varlen_attention(*t, CU_Q.long(), CU_K, 5, 6, scale)  # noqa: E731
    assert f"native is {name.replace('2.10', 'varlen_attn')}" in K.explain(
        "varlen_attention", *tensors, CU_Q, CU_K, 5, 6
    )
    got = value_and_gradients(attend, tensors)
    double = [t.double() for t in tensors]
    want = value_and_gradients(lambda *t: K.varlen_attention(*t, CU_Q, CU_K, 5, 6, scale, backend="reference"), double)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float16
        torch.testing.assert_close(g.double(), w, rtol=2**-9, atol=2**-9)
    assert got[0][9:].abs().max() == got[1][9:].abs().max() == got[2][11:].abs().max() == got[3][11:].abs().max() == 0


@pytest.mark.parametrize("name", STAND_INS)
def test_an_exact_plan_has_no_tail_to_zero(name, install, monkeypatch):
    """With every row live nothing is masked, and the numbers are those of the reference."""
    install(name)
    monkeypatch.setattr(flash, "_live", lambda *_: pytest.fail("a mask was made"))
    q, k, v = rows()
    tensors = q[:9], k[:11], v[:11]
    got = value_and_gradients(lambda *t: K.varlen_attention(*t, CU_Q, CU_K, 5, 6, exact=True), tensors)
    double = [t.double() for t in tensors]
    want = value_and_gradients(lambda *t: K.varlen_attention(*t, CU_Q, CU_K, 5, 6, backend="reference"), double)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=2**-9, atol=2**-9)


def test_order_and_reasons(install):
    """The first that can run is taken, and explain says why the others cannot."""
    q, k, v = rows()
    explain = lambda *t: K.explain("varlen_attention", *t, CU_Q, CU_K, 5, 6)  # noqa: E731
    assert "native is SDPA sample by sample" in explain(q, k, v)
    assert "flash-attn 2: not installed" in explain(q, k, v)
    install("torch varlen_attn", "flash-attn 2")
    flash._found.clear()
    text = explain(q, k, v)
    assert "native is flash-attn 2" in text and "torch varlen_attn: can run" in text
    install("flash-attn 3", "flash-attn 4")
    flash._found.clear()
    assert "native is flash-attn 4" in explain(q, k, v)
    wide = rows(head_dim=192)
    assert "native is flash-attn 3" in explain(*wide) and "multiple of 8 up to 128, got 192" in explain(*wide)
    odd = rows(head_dim=12)
    assert "native is SDPA" in explain(*odd) and "multiple of 8 up to 256, got 12" in explain(*odd)
    single = rows(torch.float32)
    assert "native is SDPA" in explain(*single) and "got torch.float32, torch.float32" in explain(*single)
    assert "there are no rows" in explain(q[:0], k, v)


def test_a_release_that_lacks_an_argument_is_not_called(install, monkeypatch):
    """The first flash-attn 4 had no max_seqlen_q."""
    module = types.SimpleNamespace(flash_attn_varlen_func=lambda q, k, v, cu_seqlens_q, cu_seqlens_k: None)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    text = K.explain("varlen_attention", *rows(), CU_Q, CU_K, 5, 6)
    assert "flash-attn 4: this release does not take max_seqlen_q, max_seqlen_k" in text


def test_deterministic_algorithms_are_asked_for(install):
    install("flash-attn 2")
    asked = []

    def record(**kwargs):
        asked.append(kwargs.pop("deterministic", False))
        return flash_2(**kwargs)

    q, k, v = rows()
    K.varlen_attention(q, k, v, CU_Q, CU_K, 5, 6)
    flash._found["flash_attn"] = (record, frozenset())
    K.varlen_attention(q, k, v, CU_Q, CU_K, 5, 6)
    torch.use_deterministic_algorithms(True)
    try:
        K.varlen_attention(q, k, v, CU_Q, CU_K, 5, 6)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


def test_devices():
    refuses = flash._refuses_device
    assert refuses((8, 9), False, "cpu", None) == "needs a GPU, got cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "capability", lambda index: (7, 5))
        patch.setattr(torch.version, "hip", None)
        assert refuses((8, 9), False, "cuda", 0) == "needs compute capability 8.x, 9.x, got 7.5"
        patch.setattr(flash, "capability", lambda index: (9, 0))
        assert refuses((8, 9), False, "cuda", 0) is None
        patch.setattr(torch.version, "hip", "6.3")
        assert refuses((8, 9), False, "cuda", 0) == "not for ROCm" and refuses((8,), True, "cuda", 0) is None


def test_torch_varlen_takes_our_keywords():
    """The installed torch, not a stand-in; nothing is run."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10 has no varlen_attn")
    signature = inspect.signature(varlen.varlen_attn)
    bound = signature.bind(**dict.fromkeys(flash.TORCH_KEYWORDS))
    missing = [p.name for p in signature.parameters.values() if p.default is p.empty and p.name not in bound.arguments]
    assert not missing
    assert isinstance(flash._find("torch.nn.attention.varlen", "varlen_attn", flash.TORCH_KEYWORDS), tuple)


def compiled_against_eager(dtype, tolerance):
    """Graphs after each call of attention over varying T, empty batches included, each checked against eager."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, frames = CompileCounterWithBackend("aot_eager"), []

    def block(qkv, cu, longest):
        return K.varlen_attention(*qkv.unbind(1), cu, cu, longest, longest).square()

    graph = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for lengths, tail in (([5, 0, 4], 2), ([7, 6, 3], 0), ([0, 0, 0], 0), ([2, 9, 8], 3), ([0, 0, 0], 0)):
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        qkv = torch.randn(sum(lengths) + tail, 3, 2, 8).to(dtype).requires_grad_()
        results = []
        for function in (graph, block):
            out = function(qkv, cu, max(lengths))
            results.append((out, *torch.autograd.grad(out.sum(), qkv)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        frames.append(counter.frame_count)
    return frames


def test_sample_by_sample_compiles_without_a_break():
    frames = compiled_against_eager(torch.float32, 1e-6)
    assert frames[-1] - frames[0] <= 1, f"graphs after each call: {frames}"


def simple(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None):
    """Something that can be traced and differentiated; no attention."""
    return q * k + v * cu_seqlens_q[1]


def test_a_library_compiles_without_a_break(install, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=simple))
    frames = compiled_against_eager(torch.float16, 1e-2)
    assert frames[-1] - frames[0] <= 1, f"graphs after each call: {frames}"


def test_what_cannot_be_traced_stands_back(install, monkeypatch):
    """flash-attn 4 runs eagerly; a compiled graph takes the next."""
    install("flash-attn 4")
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=simple))
    q, k, v = (torch.randn(9, 2, 8).half() for _ in range(3))
    graph = torch.compile(K.varlen_attention, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(graph(q, k, v, CU_Q, CU_Q, 5, 5), simple(q, k, v, CU_Q, CU_Q, 5, 5))
    assert "native is flash-attn 4" in K.explain("varlen_attention", q, k, v, CU_Q, CU_Q, 5, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the libraries that are installed run on a GPU")
def test_installed_libraries_on_the_gpu():
    """Every library that can run here, against float64, with NaN past the live rows."""
    tensors = [t.cuda() for t in rows(torch.bfloat16, 64)]
    cu_q, cu_k = CU_Q.cuda(), CU_K.cuda()
    want = value_and_gradients(
        lambda *t: reference.varlen_attention(*t, CU_Q, CU_K, 5, 6), [t.double().cpu() for t in tensors]
    )
    for library in flash.LIBRARIES:
        if flash.why_not(library, *tensors) is None:
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = flash.attend(library, False, *leaves, cu_q, cu_k, 5, 6, None)
            weight = torch.linspace(-1, 2, out.numel(), device="cuda").view(out.shape).to(out.dtype)
            got = [out, *torch.autograd.grad(out, leaves, weight)]
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g.double().cpu(), w, rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck(backend):
    """Schemas and fakes say what the operator does, with a query that is a view and a tail."""
    q, k, v = (torch.nan_to_num(x.float()) for x in rows())
    args = (q[:, ::2], k[:, :1], v[:, 1:], CU_Q, CU_K, [], [], 5, 6, None, backend)
    ops, tests = torch.ops.dcdit, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.varlen_attention.default, args, test_utils=tests)
    # The schema test runs below autograd, by which the backward is made.
    backward = (torch.ones(12, 1, 8), [True, True, True, False, False], *args)
    torch.library.opcheck(ops.varlen_attention_backward.default, backward, test_utils=tests[1:])
