"""Operators on tensors in unusual states: elsewhere, fake, changed in place, under autocast, or malformed."""

import gc
import math
import pickle
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dcdit_kernels as K
from dcdit_kernels.testing import EXAMPLES, make_scene


@pytest.fixture(autouse=True)
def device(request):
    """Triton's kernels take tensors of the GPU where there is one, as no interpreter runs then."""
    with torch.device("cuda" if "triton" in request.node.name and torch.cuda.is_available() else "cpu"):
        yield


OPERATORS = {
    "chunk": (("h", "pos_embed"), lambda t, plan: K.chunk(t["h"], plan, t["pos_embed"])),
    "dechunk": (("x", "prob", "h"), lambda t, plan: K.dechunk(t["x"], t["prob"], plan, t["h"])),
    "ema_smooth": (("x", "prob"), lambda t, plan: K.ema_smooth(t["x"], t["prob"], plan)),
    "adaln_modulate": (("x", "gate"), lambda t, plan: K.adaln_modulate(t["x"], t["gate"], t["gate"], plan)),
    "gate_residual": (("x", "gate"), lambda t, plan: K.gate_residual(t["x"], t["x"], t["gate"], plan)),
    "varlen_attention": (("x", "plan"), lambda t, plan: attend(t["x"], t["x"], t["x"], plan)),
}


def attend(q, k, v, plan, **options):
    q, k, v = (part.unflatten(1, (2, -1)) for part in (q, k, v))
    lengths = plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen
    return K.varlen_attention(q, k, v, *lengths, **options)


def packed_ones(plan):
    return torch.ones(plan.capacity, 8)


def rotated(position):
    table = torch.ones(4, 4)
    return K.qk_norm_rope(ROWS, ROWS, table, table, torch.tensor([0, 1, -1, position]))


def case(capacity=None, batch=2, **options):
    torch.manual_seed(0)
    plan = K.plan_chunks(torch.rand(batch, 16), (4, 4), capacity=capacity)
    shapes = {
        "h": (batch, 16, 8),
        "x": (plan.capacity, 8),
        "prob": (batch, 16),
        "gate": (batch, 8),
        "pos_embed": (16, 8),
    }
    return {name: torch.rand(shape, **options) for name, shape in shapes.items()}, plan


@pytest.mark.parametrize(
    ("operator", "elsewhere"), [(op, name) for op, (names, _) in OPERATORS.items() for name in names[1:]]
)
def test_tensors_on_two_devices_are_refused(operator, elsewhere):
    """Kernels are handed addresses, and a tensor elsewhere has another tensor's or none."""
    tensors, plan = case()
    if elsewhere == "plan":
        plan = plan.to("meta")
    else:
        tensors[elsewhere] = tensors[elsewhere].to("meta")
    with pytest.raises(ValueError, match=rf"{operator}: \w+ must be on cpu as the first tensor is, got meta"):
        OPERATORS[operator][1](tensors, plan)


@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_tensors_have_shapes_alone(operator):
    tensors, plan = case()
    want = OPERATORS[operator][1](tensors, plan)
    with FakeTensorMode():
        tensors, plan = case(capacity=plan.capacity)
        got = OPERATORS[operator][1](tensors, plan)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "varlen_attention"])
def test_no_plan_and_no_memory_are_named(operator):
    names, call = OPERATORS[operator]
    tensors, plan = case()
    call(tensors, plan)  # what passed once with dense tensors of these dtypes is not known of others
    for other in (3, "plan", tensors["x"]):
        with pytest.raises(
            TypeError, match=f"{operator}: plan must be a .*(Packing|ChunkPlan).*, got {type(other).__name__}"
        ):
            call(tensors, other)
    with pytest.raises((TypeError, ValueError), match=f"{operator}: .*plan"):
        call(tensors, None)
    for change, words in (
        (lambda t: t.to_sparse(), "must be a dense tensor with memory, got torch.sparse_coo"),
        (lambda t: t.to("meta"), "must be a dense tensor with memory, got one on the meta device"),
        (lambda t: t.numpy(), "must be float16, bfloat16, float32 or float64, got <class 'numpy.ndarray'>"),
    ):
        with pytest.raises(TypeError, match=f"{operator}: {names[0]} {words}|{operator}: {names[0]} must be a tensor"):
            call({**tensors, names[0]: change(tensors[names[0]])}, plan)
    with pytest.raises(TypeError, match="plan_chunks: boundary_prob must be a dense tensor with memory"):
        K.plan_chunks(tensors["prob"].to("meta"), (4, 4))


ROWS, OFFSETS = torch.randn(4, 2, 8), torch.tensor([0, 4])
NO_TENSORS = {
    "q": lambda: K.boundary_cosine(None, ROWS),
    "k": lambda: K.boundary_cosine(ROWS, None),
    "boundary_prob": lambda: K.ema_smooth(ROWS[:, 0], None, K.Packing.from_lengths([4])),
    "x": lambda: K.group_norm_silu(None, None, None, 4),
    "v": lambda: K.varlen_attention(ROWS, ROWS, None, OFFSETS, OFFSETS, 4, 4),
    "cu_seqlens_k": lambda: K.varlen_attention(ROWS, ROWS, ROWS, OFFSETS, None, 4, 4),
    "index": lambda: K.pack_rows(ROWS, None),
    "attention_mask": lambda: K.unpad_input(ROWS, None),
    "table": lambda: K.plan_chunks(torch.rand(2, 16), (4, 4)).rows(None),
}


@pytest.mark.parametrize("name", NO_TENSORS)
def test_what_is_no_tensor_is_named(name):
    with pytest.raises(TypeError, match=rf"\w+: {name} must be a tensor, got .*NoneType"):
        NO_TENSORS[name]()


OPTIONAL = {"pos_embed", "residual", "kernel", "cond", "q_weight", "k_weight"}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_every_tensor_of_an_operator_is_one(name):
    """A kernel that is handed no address, or that of something else, ends its process."""
    example = EXAMPLES[name](make_scene((4, 6)))
    for key, tensor in example.tensors.items():
        others = [1.0, [1.0], tensor.numpy(), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]
        for other in others + [None] * (key not in OPTIONAL):
            tensors = {**example.tensors, key: other}
            with pytest.raises(TypeError, match=rf"\w+: {key} must be (a (dense )?tensor.*|float16.*float64), got "):
                example.function(None, *tensors.values())


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_outputs_may_be_changed_in_place(operator, backend):
    grads = []
    with K.use_backend(backend):
        for change in (lambda out: out.mul_(2), lambda out: out * 2):
            tensors, plan = case(requires_grad=True)
            change(OPERATORS[operator][1](tensors, plan)).sum().backward()
            grads.append([t.grad for t in tensors.values() if t.grad is not None])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_order_in_memory_changes_nothing(operator, backend):
    """A kernel that is handed addresses takes no dense tensor for one in raster order, boundary_prob included."""
    results = []
    with K.use_backend(backend):
        for order in (lambda t: t, lambda t: t.mT.contiguous().mT):
            tensors, plan = case()
            leaves = {name: order(t).requires_grad_() for name, t in tensors.items()}
            out = OPERATORS[operator][1](leaves, plan)
            (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
            results.append([out, *(t.grad for t in leaves.values() if t.grad is not None)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_batch_may_be_without_samples(operator, capacity, backend):
    with K.use_backend(backend):
        tensors, plan = case(capacity, batch=0, requires_grad=True)
        out = OPERATORS[operator][1](tensors, plan)
        out.sum().backward()
    assert not out.any() and not any(t.grad.any() for t in tensors.values() if t.grad is not None)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_a_gradient_is_rounded_to_its_own_dtype(backend):
    """The gradient of a float32 shift keeps its bits beside a scale in half precision."""
    tensors, plan = case()
    shift, scale = tensors["gate"].clone().requires_grad_(), tensors["gate"].half()
    out = K.adaln_modulate(tensors["x"], shift, scale, plan, backend=backend)
    weight = torch.linspace(-1, 2, out.numel()).view(out.shape)
    (out * weight).sum().backward()
    torch.testing.assert_close(shift.grad, torch.stack([rows.sum(0) for rows in weight.split(plan.lengths.tolist())]))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_scores_learn_from_channels_last_features_without_gradient(backend):
    features, grads = torch.rand(2, 8, 3, 4), []
    for layout in (torch.channels_last, torch.contiguous_format):
        vectors = torch.ones(4, 8, requires_grad=True)
        K.boundary_predictability(
            features.contiguous(memory_format=layout), *vectors[:3], vectors[3, :1], backend=backend
        ).square().sum().backward()
        grads.append(vectors.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(("operator", "name"), [("chunk", "h"), ("dechunk", "h"), ("gate_residual", "x")])
def test_what_no_gradient_reads_is_not_kept(operator, name, backend):
    tensors, plan = case(requires_grad=True)
    tensors[name] = tensors[name] * 1  # nobody else holds it
    y = torch.rand(plan.capacity, 8, requires_grad=True)
    with K.use_backend(backend):
        if operator == "gate_residual":
            out = K.gate_residual(tensors["x"], y, tensors["gate"], plan)
        else:
            out = OPERATORS[operator][1](tensors, plan)
    kept = weakref.ref(tensors.pop(name))
    gc.collect()
    assert kept() is None
    out.sum().backward()


def test_attention_under_autocast_takes_one_dtype():
    """Normalised q and k are float32 there, v is not."""
    tensors, plan = case()
    x = tensors["x"]
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(x, x, x.bfloat16(), plan)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, attend(*[x.bfloat16()] * 3, plan))
    with pytest.raises(TypeError, match=r"q, k and v must have one dtype, got torch.float32, torch.float32, torch.bfl"):
        attend(x, x, x.bfloat16(), plan)


@pytest.mark.parametrize("cu_seqlens", [[2, 20], [0, 12, 9], [0, 21]])
def test_attention_offsets_rise_from_0(cu_seqlens):
    x, cu = torch.rand(20, 2, 4), torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must rise from 0 to at most 20, got \["):
        K.varlen_attention(x, x, x, cu, cu, 20, 20)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must be integers \(B \+ 1,\), got torch.int32 \(0,\)"):
        K.varlen_attention(x, x, x, cu[:0], cu[:0], 20, 20)


def test_packing_wants_each_row_once_for_a_gradient():
    x, index = torch.rand(3, 4), torch.tensor([1, -1, -1, 1])
    assert torch.equal(K.pack_rows(x, index)[0], x[1])
    with pytest.raises(ValueError, match="pack_rows: where x needs a gradient a row is taken once, got 1 2 times"):
        K.pack_rows(x.requires_grad_(), index)


def test_packing_sees_through_lazy_views():
    z, index = torch.randn(3, 4, dtype=torch.complex64), torch.tensor([2, 0])
    for view in (z.conj(), z.conj().imag):
        assert torch.equal(K.pack_rows(view, index), view[index])


def test_plans_travel_and_are_compared_as_objects():
    plan = case()[1]
    again = pickle.loads(pickle.dumps(plan))
    assert plan == plan and again != plan and torch.equal(again.token_index, plan.token_index)


def predictability(prob, norm_bias=None, **options):
    vector = prob[0]
    norm_bias = vector if norm_bias is None else norm_bias
    return K.boundary_predictability(prob[..., None, None], vector, norm_bias, vector, vector[:1], **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda prob, plan: K.plan_chunks(prob, (4, 4), capacity=7.5),
            r"capacity must be a number of rows, .* got 7.5",
        ),
        (
            lambda prob, plan: K.plan_chunks(prob, (4, 4), capacity=prob),
            r"capacity must be a number of rows, .* tensor",
        ),
        (
            lambda prob, plan: K.dechunk(torch.rand(plan.capacity, 8), prob, plan, sigma=math.inf),
            "sigma must be .* inf",
        ),
        (lambda prob, plan: K.plan_chunks(prob, 16), r"grid must be \(L,\), .* got 16"),
        (lambda prob, plan: K.plan_chunks(prob.numpy(), (4, 4)), "boundary_prob must be float16, .* got .*ndarray"),
        (lambda prob, plan: K.chunk([1.0], plan), "chunk: h must be a tensor, got .*list"),
        (lambda prob, plan: K.explain("dechunk"), r"explain\('dechunk', …\) needs the operator's arguments"),
        (
            lambda prob, plan: K.boundary_cosine(prob, prob, cu_seqlens=torch.tensor([0, 3])),
            r"boundary_cosine: cu_seqlens must rise from 0 to at most 2, got \[0, 3\]",
        ),
        (
            lambda prob, plan: K.boundary_cosine(*[prob[None].mT] * 2, torch.ones(2, 3, 3), (4, 4, 1)),
            r"boundary_cosine: grid must be \(H, W\) with H·W = L = 16, got \(4, 4, 1\)",
        ),
        (
            lambda prob, plan: K.boundary_cosine(*[prob[None].mT] * 2, torch.ones(2, 3, 3), (4.0, 4.0)),
            r"boundary_cosine: grid must be \(H, W\) with H·W = L = 16, got \(4\.0, 4\.0\)",
        ),
        (lambda prob, plan: predictability(prob, groups=0), "16 channels do not fit 0 groups"),
        (lambda prob, plan: predictability(prob, groups=2.0), "16 channels do not fit 2.0 groups"),
        (lambda prob, plan: predictability(prob, eps="a"), "predictability: eps must not be negative, got 'a'"),
        (lambda prob, plan: K.plan_chunks(prob, None), "grid must be .*, got None"),
        (lambda prob, plan: K.plan_chunks(prob, (4, 4), capacity=2**31), "capacity must be a number of rows"),
        (lambda prob, plan: plan.join(3), "join: plan must be a Packing or ChunkPlan, got int"),
        (lambda prob, plan: K.dechunk(packed_ones(plan), prob, plan, sigma="1"), "sigma must be positive .* got '1'"),
        (
            lambda prob, plan: attend(*[packed_ones(plan)] * 3, plan, causal="no"),
            "causal must be True or False, got 'no",
        ),
        (
            lambda prob, plan: attend(*[packed_ones(plan)] * 3, plan, softmax_scale=math.nan),
            "softmax_scale must be a finite number, got nan",
        ),
        (lambda prob, plan: rotated(4), r"qk_norm_rope: position must be in \[-1, 4\), got 4"),
        (lambda prob, plan: rotated(-2), r"qk_norm_rope: position must be in \[-1, 4\), got -2"),
        (lambda prob, plan: predictability(prob, eps=-1.0), "predictability: eps must not be negative, got -1.0"),
        (lambda prob, plan: predictability(prob, norm_bias=prob[0].int()), "norm_bias must be float16, .* got .*int32"),
        (
            lambda prob, plan: K.gate_residual(prob[None], prob[None].cfloat(), prob[:1]),
            "y must be .* got torch.complex64",
        ),
        (
            lambda prob, plan: K.gate_residual_modulate(prob[None], prob[None] > 0, *[prob[:1]] * 3),
            "gate_residual_modulate: y must be float16, .* got torch.bool",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    tensors, plan = case()
    with pytest.raises((TypeError, ValueError, IndexError, K.BackendError), match=message):
        call(tensors["prob"], plan)
