"""Which FlashAttention varlen_attention takes, how each is called, and that no row past the last live one matters."""

import inspect
import sys
import types

import pytest
import torch
from attention_stand_ins import (
    ATEN,
    CU_K,
    CU_Q,
    STAND_INS,
    dtype_of,
    flash_2,
    rows,
    value_and_gradients,
)

import dcdit_kernels as K
from dcdit import DCDiT, DCDiTConfig
from dcdit_kernels import Packing, attention, flash, flash_calls, reference


@pytest.fixture
def install(monkeypatch):
    """Install stand-ins, and nothing else, on a machine where any GPU would do."""
    monkeypatch.setattr(flash, "_found", {})
    monkeypatch.setattr(attention, "_chosen", {})
    operators = {}

    def aten(name):
        if name not in operators:
            raise ImportError("no kernel")
        return operators[name], frozenset(inspect.signature(operators[name]).parameters)

    monkeypatch.setattr(flash, "_aten", aten)
    monkeypatch.setattr(flash, "_refuses_device", lambda *args: None)
    for module in {library.module for library in flash.LIBRARIES} - {"torch.ops.aten"}:
        monkeypatch.setitem(sys.modules, module, None)  # an ImportError

    def put(*names):
        flash._found.clear()
        attention._chosen.clear()
        for name in names:
            if name in ATEN:
                operators[next(x.function for x in flash.LIBRARIES if x.name == name)] = ATEN[name]
                continue
            module, function, stand_in = STAND_INS[name]
            monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{function: stand_in}))

    return put


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("name", [*STAND_INS, *ATEN])
def test_each_library_is_called_as_it_wants(name, scale, install):
    """Argument order, returned tuples, scale and rows past the last live one, as each release takes them."""
    install(name)
    tensors = rows(dtype_of(name))
    attend = lambda *t: K.varlen_attention(*t, CU_Q.long(), CU_K, 5, 6, scale)  # noqa: E731
    assert f"native is {name.replace('2.10', 'varlen_attn')}" in K.explain(
        "varlen_attention", *tensors, CU_Q, CU_K, 5, 6
    )
    got = value_and_gradients(attend, tensors)
    double = [t.double() for t in tensors]
    want = value_and_gradients(lambda *t: K.varlen_attention(*t, CU_Q, CU_K, 5, 6, scale, backend="reference"), double)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype_of(name)
        torch.testing.assert_close(g.double(), w, rtol=2**-9, atol=2**-9)
    assert got[0][9:].abs().max() == got[1][9:].abs().max() == got[2][11:].abs().max() == got[3][11:].abs().max() == 0


def row_by_row(q, k, v, cu_q, cu_k, causal):
    """Each row and head by itself: the keys of its sample, with `causal` those no nearer to the end than it is."""
    out = []
    for row in range(len(q)):
        sample = int(torch.searchsorted(cu_q[1:], row, right=True))
        if sample == len(cu_q) - 1:
            out.append(0 * q[row])
            continue
        first, last = int(cu_k[sample]), int(cu_k[sample + 1])
        last -= (int(cu_q[sample + 1]) - 1 - row) if causal else 0
        heads = [h // (q.shape[1] // k.shape[1]) for h in range(q.shape[1])]
        keys, values = k[first : max(first, last), heads], v[first : max(first, last), heads]
        weight = torch.einsum("hd,jhd->hj", q[row] * q.shape[2] ** -0.5, keys).softmax(1)
        out.append(torch.einsum("hj,jhd->hd", weight, values))
    return torch.stack(out)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [*STAND_INS, *ATEN, "reference", "native"])
def test_grouped_queries_and_a_causal_mask(name, causal, alike, install):
    """Fewer heads of k and v than of q; rows that see no key are zero."""
    install(*({name} & {*STAND_INS, *ATEN}))
    backend, dtype = (name, torch.float64) if name in ("reference", "native") else (None, dtype_of(name))
    cu_k = CU_Q if alike else CU_K
    q = torch.randn(12, 4, 8).to(dtype)
    k, v = torch.randn(12 if alike else 13, 2, 2, 8).to(dtype).unbind(1)
    got = value_and_gradients(
        lambda *t: K.varlen_attention(*t, CU_Q, cu_k, 5, 6, causal=causal, backend=backend), (q, k, v)
    )
    double = [t.double() for t in (q, k, v)]
    want = value_and_gradients(lambda *t: row_by_row(*t, CU_Q, cu_k, causal), double)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-8}[dtype]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*STAND_INS, *ATEN])
def test_an_exact_plan_has_no_tail_to_zero(name, install, monkeypatch):
    """With every row live nothing is masked, and the numbers are the reference's."""
    install(name)
    monkeypatch.setattr(flash_calls, "_live", lambda *_: pytest.fail("a mask was made"))
    q, k, v = rows(dtype_of(name))
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
    text = explain(q, k, v)
    assert "native is flash-attn 2" in text and "torch varlen_attn: can run" in text
    install("flash-attn 3", "flash-attn 4")
    assert "native is flash-attn 4" in explain(q, k, v)
    wide = rows(head_dim=192)
    assert "native is flash-attn 3" in explain(*wide) and "multiple of 8 up to 128, got 192" in explain(*wide)
    odd = rows(head_dim=12)
    assert "native is SDPA" in explain(*odd) and "multiple of 8 up to 256, got 12" in explain(*odd)
    single = rows(torch.float32)
    assert "native is SDPA" in explain(*single) and "got torch.float32, torch.float32" in explain(*single)
    install("torch FlashAttention", "torch efficient attention")
    assert "native is torch efficient attention" in explain(*single)
    assert "torch FlashAttention: needs q, k and v in float16 or bfloat16" in explain(*single)
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
    flash._found["flash_attn", "flash_attn_varlen_func"] = (record, frozenset())
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


def small_net():
    """A model without an idle parameter, on 6×6 cells."""
    net = DCDiT(DCDiTConfig(input_size=(6, 6), hidden_size=64, depth=2, num_heads=4, encoder_width=32))
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.constant_(net.router.score.bias, 0.0)
    return net, torch.randn(3, 4, 6, 6), torch.tensor([1.0, 500.0, 999.0]), torch.tensor([1, 2, 3])


@pytest.mark.parametrize("max_seqlen", [None, 35])
@pytest.mark.parametrize("gradients", [False, True])
def test_garbage_past_the_live_rows_reaches_nobody(gradients, max_seqlen, install, monkeypatch):
    """The model in fixed mode, attention's tails NaN in the output and in the gradients, against the exact mode."""
    net, *inputs = small_net()
    install("torch efficient attention")
    asked, live = [], Packing.live
    monkeypatch.setattr(Packing, "live", property(lambda plan: asked.append(live.fget(plan)) or asked[-1]))
    results = {}
    for capacity, bound in ((None, None), (108, max_seqlen)):
        with torch.set_grad_enabled(gradients):
            out, routing = net(*inputs, capacity=capacity, max_seqlen=bound, return_routing=True)
            assert capacity is None or routing.plan.max_seqlen == (bound or 36)
            assert routing.plan.exact == (capacity is None) and 0 < routing.plan.cu_seqlens[-1] < 108
            grads = torch.autograd.grad(out.square().sum(), list(net.parameters())) if gradients else ()
        results[capacity] = (out, *grads)
    for got, want in zip(results[108], results[None], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(asked) == 2 * gradients and len(set(map(id, asked))) == gradients, "one mask for both blocks, or none"


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


def simple(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """Something that can be traced and differentiated; no attention."""
    return q * k + v * cu_seqlens_q[1]


def test_a_library_compiles_without_a_break(install, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=simple))
    frames = compiled_against_eager(torch.float16, 1e-2)
    assert frames[-1] - frames[0] <= 1, f"graphs after each call: {frames}"


def test_a_packing_with_spare_rows_compiles(install, monkeypatch):
    """Its mask of live rows included."""
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=simple))

    def attend(q, k, v, cu):
        packing = Packing.from_cu_seqlens(cu, 5, 12)
        return K.varlen_attention(q, k, v, packing.cu_seqlens, packing.cu_seqlens, 5, 5, packing=packing)

    tensors = [torch.randn(12, 2, 8).half().requires_grad_() for _ in range(3)]
    results = []
    for function in (torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager"), attend):
        out = function(*tensors, CU_Q)
        results.append((out, *torch.autograd.grad(out.sum(), tensors)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
        assert not got[9:].any()


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
        if flash.why_not(library, *tensors, gradients=True) is None:
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = flash_calls.attend(library, None, False, *leaves, cu_q, cu_k, 5, 6, None)
            weight = torch.linspace(-1, 2, out.numel(), device="cuda").view(out.shape).to(out.dtype)
            got = [out, *torch.autograd.grad(out, leaves, weight)]
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g.double().cpu(), w, rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck(backend):
    """Schemas and fakes describe the operator, with a query that is a view and a tail."""
    q, k, v = (torch.nan_to_num(x.float()) for x in rows())
    args = (q[:, ::2], k[:, :1], v[:, 1:], CU_Q, CU_K, [], [], 5, 6, None, True, backend)
    ops, tests = torch.ops.dcdit, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.varlen_attention.default, args, test_utils=tests)
    # The schema test runs below autograd, by which the backward is made.
    backward = (torch.ones(12, 1, 8), [True, True, True, False, False], *args)
    torch.library.opcheck(ops.varlen_attention_backward.default, backward, test_utils=tests[1:])
