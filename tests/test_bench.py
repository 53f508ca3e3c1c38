"""The measuring: wrong results are refused, and work is counted in full."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dcdit_kernels as K
from bench import headline, parts, timing
from bench import measure as measuring
from bench.cases import GROUPS, MODELS, OPERATORS, Case, compiled_too, select
from bench.gate import check, complaint
from bench.headline import COMPONENTS, component_flops, component_times, outside_products
from bench.measure import build, measure
from bench.models import kept_tokens
from bench.operators import routed_prob
from bench.parts import training_parts
from bench.problem import as_tuple


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Triton's interpreter is tested elsewhere; here it would only take time."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def small(group: str, **changes) -> Case:
    return dataclasses.replace(Case(group, "digits", 14, 2), **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", OPERATORS)
def test_variants_agree(group, dtype):
    """Every formulation computes equal results, gradients included."""
    for share in (0.25, 1.0):
        problem = build(small(group, share=share, backward=group != "plan", dtype=dtype), "cpu")
        verdicts = check(problem)
        assert {"plain", "reference"} <= verdicts.keys()
        assert not any(verdicts.values()), verdicts


@pytest.mark.parametrize("group", [group for group in OPERATORS if group not in ("plan", "pad")])
def test_plain_never_waits(group):
    """On a GPU it is then replayed as a graph, as ours is. A wait needs values, which fake tensors do not have."""
    problem = build(small(group, backward=True), "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        timing.make_call(problem.variants["plain"], problem.inputs, backward=True)()


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("group", [group for group in OPERATORS if group not in ("plan", "pad")])
def test_least_work_is_no_more_than_it_takes(group, share):
    """Inputs and outputs pass once; with a backward pass the inputs again, and the gradients of both. Smoothing by all
    M×M weights is no less work than is counted."""
    forward, both = (build(small(group, share=share, backward=backward), "cpu") for backward in (False, True))
    outs = as_tuple(forward.variants["reference"].run(*forward.inputs))
    read, written = (sum(t.nbytes for t in tensors) for tensors in (forward.inputs, outs))
    assert forward.work.bytes <= read + written
    assert both.work.bytes <= (read + written) + (read + written + read)
    if group == "dechunk":
        tokens, width = forward.inputs[0].shape
        assert forward.work.flops <= 2 * tokens * width * tokens / 2  # of two samples


@pytest.mark.parametrize("group", MODELS)
def test_models_agree(group):
    problem = build(small(group, drop_fraction=0.3, backward=group == "train"), "cpu")
    verdicts = check(problem)
    padded = {"plain padded"} if group == "forward" else set()
    assert set(verdicts) == {"dcdit", "dcdit reference", "plain", "DiT/2"} | padded
    assert not any(verdicts.values()), verdicts


def broken(problem, name, change):
    """The problem with one variant's outputs changed."""
    variant = problem.variants[name]
    wrong = dataclasses.replace(variant, run=lambda *a: change(variant.run(*a)))
    return dataclasses.replace(problem, variants={**problem.variants, name: wrong})


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda out: out + 1e-4 * (out == out.max()), "result 0 is off"),
        (lambda out: out * torch.nan, "result 0 is off by nan"),
        (lambda out: out[:, 1:], "has shape"),
        (WrongGradient.apply, "result 1 is off"),
    ],
    ids=["one value", "nan", "shape", "gradient"],
)
def test_gate_catches(change, reason):
    problem = build(small("dechunk", backward=True), "cpu")
    verdicts = check(broken(problem, "native", change))
    assert reason in verdicts["native"]
    assert verdicts["plain"] is None


def test_gate_catches_a_wrong_plan_and_a_wrong_yardstick():
    problem = build(small("plan"), "cpu")
    moved = broken(problem, "plain", lambda padded: padded._replace(nearest=padded.nearest.roll(1, 1)))
    for name, reason in check(moved).items():
        if moved.variants[name].family == "budget":  # it has a yardstick of its own
            assert reason is None
        else:
            assert "yardstick" in reason and "differs at" in reason
    problem = build(small("modulate"), "cpu")
    verdicts = check(broken(problem, "plain", lambda outs: (outs[0], outs[1] * 1.01)))
    assert all("yardstick" in reason for reason in verdicts.values())


def test_gate_measures_what_is_zero_in_truth_by_the_largest():
    want = (torch.ones(3).double(), torch.full((3,), 1e-19).double())
    for noise, passes in ((1e-8, True), (1e-5, False)):
        reason = complaint((torch.ones(3), torch.full((3,), noise)), want, (torch.ones(3), torch.zeros(3)), 1)
        assert passes == (reason is None)


def test_gate_that_cannot_run_passes_nothing():
    problem = build(small("modulate"), "cpu")

    def too_large(out):
        raise torch.OutOfMemoryError("tried to allocate 9 TiB")

    assert check(broken(problem, "native", too_large))["native"] == "OutOfMemoryError: tried to allocate 9 TiB"
    verdicts = check(broken(problem, "reference", too_large))
    assert set(verdicts) == set(problem.variants) and all("could not run" in reason for reason in verdicts.values())


def test_a_failed_variant_has_no_time(monkeypatch):
    real = K.dechunk
    monkeypatch.setattr(K, "dechunk", lambda *a, backend: real(*a, backend=backend) + 0.01 * (backend == "native"))
    entry = measure(small("dechunk"), "cpu", False, rounds=3, seconds=0.1)
    assert entry["variants"]["native"]["status"] == "failed"
    assert "seconds" not in entry["variants"]["native"]
    good = entry["variants"]["plain"]
    assert good["status"] == "ok" and len(good["samples"]) == 3 and good["peak_bytes"] > 0
    assert entry["variants"]["triton"]["status"] == "absent" and "GPU" in entry["variants"]["triton"]["reason"]


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_routing_is_what_the_case_says(share):
    prob = routed_prob(Case("plan", "S", 32, 3, share), "cpu")
    kept = prob > 0.5
    assert (kept.sum(1) == round(share * 1024)).all() and kept[:, 0].all() and kept[:, -1].all()
    assert all(len(row.unique()) == 1024 for row in prob)
    plan = K.plan_chunks(prob, (32, 32), 0.3)
    assert plan.lengths.tolist() == [kept_tokens(Case("forward", "S", 32, 3, share), 0.3)] * 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_selection(device):
    """Every group and axis of the issue is there; the name tells the cases apart; one of a group is also compiled."""
    cases = select(device)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.group for case in cases} == set(GROUPS)
    compiled = [case.group for case in cases if compiled_too(case, device)]
    assert sorted(compiled) == sorted(("forward", *OPERATORS))
    assert {0.1, 0.25, 0.5, 1.0} <= {case.share for case in cases}
    if device == "cuda":
        for group in (*OPERATORS, "forward"):
            mine = [case for case in cases if case.group == group]
            assert {1, 4, 16, 64} <= {case.batch for case in mine}
            assert {"S", "B", "XL"} <= {case.size for case in mine}
            assert {32, 64} <= {case.side for case in mine}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("group", OPERATORS)
def test_a_case_has_the_dtype_that_it_says(group, device):
    """Its work is held against the rate of that dtype."""
    case = dataclasses.replace(select(device, (group,))[0], size="digits", side=14, batch=1)
    assert case.torch_dtype in {tensor.dtype for tensor in build(case, "cpu").inputs}


def test_interleaving():
    order = []
    clocks = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    samples = timing.interleave(clocks, rounds=6, seconds=0.0)
    assert "".join(order) == "abcbcacababcbca"  # five rounds at least, each begun by the next
    assert samples == {"a": [1, 6, 8, 10, 15], "b": [2, 4, 9, 11, 13], "c": [3, 5, 7, 12, 14]}
    assert timing.ratios([2.0, 6.0, 3.0], [1.0, 2.0, 1.0]) == (3.0, 2.5, 3.0)
    assert timing.interleave({}, rounds=4, seconds=0.0) == {}  # where the gate refused all


def test_calls_of_a_pass_write_to_memory_of_their_own(monkeypatch):
    """One call's output must not be the memory, and so the cache, that the next call writes to."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 8.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    written = []

    def call():
        out = torch.empty(4096)
        written.append(out.data_ptr())
        return out

    assert timing.gpu_event_clock([call] * 4, graph=False)() == 2e-3
    assert len(set(written[-4:])) == 4


def test_launches_are_counted_of_what_ran(monkeypatch):
    monkeypatch.setattr(measuring, "build", lambda case, device, *rest: build(case, "cpu", *rest))
    monkeypatch.setattr(measuring, "kernels", lambda call: call() is not None and 7)
    variants = {"native": {"status": "ok", "launches": None}, "triton": {"status": "absent"}}
    entry = {"case": dataclasses.asdict(small("modulate")), "variants": variants}
    measuring.count_launches(entry, compiled=False)
    assert variants == {"native": {"status": "ok", "launches": 7}, "triton": {"status": "absent"}}


def test_components_add_up():
    case = small("forward", batch=8)
    times = component_times(case, "cpu", rounds=3)
    assert set(times) == {*COMPONENTS, "rest"} and all(seconds > 0 for seconds in times.values())
    assert times["main"] > times["chunk"]
    assert sum(component_flops(case).values()) == pytest.approx(1)


def test_share_outside_products(monkeypatch):
    """Each of the three kinds has its part of the time."""
    case = small("forward", batch=8)
    shares = []
    for counted in (headline.PRODUCTS, *((product,) for product in headline.PRODUCTS), ()):
        monkeypatch.setattr(headline, "PRODUCTS", counted)
        shares.append(outside_products(case, rounds=3))
    assert 0 < shares[0] < min(shares[1:4]) and max(shares[1:4]) < shares[4] == 1


def test_parts_of_a_training_step():
    case = dataclasses.replace(small("train", batch=8), backward=True)
    times = training_parts(case, "cpu", step_s=100.0, rounds=2)
    assert set(times) == {*COMPONENTS, "rest"} - {"embed"} and all(seconds > 0 for seconds in times.values())
    assert times["main"] > times["chunk"] and sum(times.values()) == pytest.approx(100.0, rel=1e-3)


def test_parts_begin_anew_each_time(monkeypatch):
    """As in a step, a weight is cast once for each forward, and no gradient is added to the one before."""
    problem = build(dataclasses.replace(small("train"), backward=True, dtype="bfloat16"), "cpu")
    monkeypatch.setattr(parts, "build", lambda case, device: problem)
    net = problem.variants["dcdit"].run.args[0][torch.float32]
    weight, casts = net.main.blocks[0].qkv.weight, []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0] is weight:
                casts.append(kwargs["dtype"])
            return func(*args, **(kwargs or {}))

    with Casts():
        training_parts(dataclasses.replace(small("train"), dtype="bfloat16"), "cpu", step_s=1.0, rounds=3)
    assert casts == [torch.bfloat16] * 5  # two of them to warm up
    assert all(parameter.grad is None for parameter in net.parameters())
