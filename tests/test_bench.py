"""The measuring: it refuses what is wrong, counts what it should, survives crashes, and reports what it measured."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dcdit_kernels as K
from bench import compare, gpu, headline, parts, replay, run, timing
from bench import measure as measuring
from bench.cases import GROUPS, MODELS, OPERATORS, Case, compiled_too, select
from bench.gate import check, complaint
from bench.headline import COMPONENTS, component_flops, component_times, outside_products
from bench.machine import version
from bench.measure import build, measure
from bench.models import kept_tokens
from bench.operators import routed_prob
from bench.parts import training_parts
from bench.problem import as_tuple

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Triton's interpreter is tested elsewhere; here it would only take time."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("OUT", raising=False)


def small(group: str, **changes) -> Case:
    return dataclasses.replace(Case(group, "digits", 14, 2), **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", OPERATORS)
def test_variants_agree(group, dtype):
    """Every formulation computes the same, gradients included."""
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
    assert all("yardstick" in reason and "differs at" in reason for reason in check(moved).values())
    problem = build(small("modulate"), "cpu")
    verdicts = check(broken(problem, "plain", lambda outs: (outs[0], outs[1] * 1.01)))
    assert all("yardstick" in reason for reason in verdicts.values())


def test_gate_measures_what_is_zero_in_truth_by_the_largest():
    want = (torch.ones(3).double(), torch.full((3,), 1e-19).double())
    for noise, passes in ((1e-8, True), (1e-5, False)):
        reason = complaint((torch.ones(3), torch.full((3,), noise)), want, (torch.ones(3), torch.zeros(3)), 1)
        assert passes == (reason is None)


def test_gate_that_cannot_run_passes_nothing():
    problem = build(small("chunk"), "cpu")

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
        assert not compiled_too(cases[0], device)  # a run that is cut short would have nothing else
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
    samples = timing.interleave(clocks, rounds=4, seconds=0.0)
    assert "".join(order) == "abcbcacab"  # three rounds at least, each begun by another
    assert samples == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert timing.ratios([2.0, 6.0, 3.0], [1.0, 2.0, 1.0]) == (3.0, 2.5, 3.0)
    assert timing.interleave({}, rounds=4, seconds=0.0) == {}  # where the gate refused all


def test_calls_of_a_pass_write_to_memory_of_their_own(monkeypatch):
    """What one call wrote must not be the memory, and so the cache, that the next one writes to."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 8.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    written = []

    def call():
        out = torch.empty(4096)
        written.append(out.data_ptr())
        return out

    assert timing.gpu_event_clock([call] * 4, graph=False)() == 2e-3
    assert len(set(written[-4:])) == 4


def test_launches_are_counted_of_what_ran(monkeypatch):
    monkeypatch.setattr(measuring, "build", lambda case, device, compiled: build(case, "cpu", compiled))
    monkeypatch.setattr(measuring, "kernels", lambda call: call() is not None and 7)
    variants = {"native": {"status": "ok", "launches": None}, "triton": {"status": "absent"}}
    entry = {"case": dataclasses.asdict(small("chunk")), "variants": variants}
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


CRASH = """
import bench.measure
real = bench.measure.measure
def measure(case, *args):
    if case.group == "chunk":
        import os; os._exit(77)
    return real(case, *args)
bench.measure.measure = measure
"""


def test_a_crash_costs_one_case(tmp_path, monkeypatch):
    """The process dies within one case: that one is recorded, what came before is kept, what follows is measured."""
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    options = ["--device", "cpu", "--quick", "--no-compile", "--seconds", "0.2", "--output", str(tmp_path / "r.json")]
    assert run.main([*options, "--groups", "plan,chunk,modulate"]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert [("crashed" in entry, entry["name"].split("-")[0]) for entry in result["cases"]] == [
        (False, "plan"),
        (True, "chunk"),
        (False, "modulate"),
    ]
    assert "77" in result["cases"][1]["crashed"]
    assert result["rates"]["copy_bytes_per_s"] > 1e8 and result["torch"] == torch.__version__
    assert json.loads((tmp_path / "out" / "r.json").read_text()) == result


@pytest.mark.parametrize("grace", ["0", "60"])
def test_cases_without_time_are_listed(tmp_path, grace):
    """Also where the process was still at an earlier one, and was ended."""
    options = ["--device", "cpu", "--quick", "--groups", "plan,chunk", "--budget", "0.1", "--grace", grace]
    assert run.main([*options, "--output", str(tmp_path / "r.json")]) == (grace == "0")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["cut"] == [case.name for case in select("cpu", ("plan", "chunk"), quick=True)]
    assert result["cases"] == [] and (result["rates"] is None) == (grace == "0")


@pytest.fixture
def gpu_worker(tmp_path, monkeypatch):
    """The arguments of a process that measures on a GPU for 100 s, where each case takes 8 s and has no content."""
    now = [0.0]

    def measure(case, *_):
        now[0] += 8
        return {"name": case.name, "case": dataclasses.asdict(case), "variants": {}}

    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(run, "rates", lambda device: {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": {}})
    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(measuring, "count_launches", lambda entry, compiled: entry.update(launches=compiled))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    output = tmp_path / "r.json"
    run.write(output, {"rates": None, "current": None, "cases": []})
    options = ["--device", "cuda", "--groups", "plan,modulate", "--deadline", "100", "--output", str(output)]
    return run.parse(options)


def test_launches_of_the_centres_are_counted_before_the_time_is_over(gpu_worker):
    run.work(gpu_worker)
    result = json.loads(gpu_worker.output.read_text())
    assert len(result["cases"]) == 12 < len(select("cuda", gpu_worker.groups))
    counted = [entry["name"] for entry in result["cases"] if "launches" in entry]
    assert counted == [case.name for case in select("cuda", gpu_worker.groups, quick=True)]


def test_a_fault_of_the_gpu_ends_the_process_within_its_case(gpu_worker, monkeypatch):
    """What is asked of the GPU after a fault fails as well: the next case would have the blame."""

    def fault():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(RuntimeError, match="illegal"):
        run.work(gpu_worker)
    assert json.loads(gpu_worker.output.read_text())["current"] == select("cuda", gpu_worker.groups)[0].name


def test_rates_are_the_best_seen():
    old = {"copy_bytes_per_s": 5.0, "matmul_flops_per_s": {"float32": 1.0, "bfloat16": 4.0}}
    new = {"copy_bytes_per_s": 3.0, "matmul_flops_per_s": {"float32": 2.0, "bfloat16": 3.0}}
    assert run.faster(None, old) == old
    assert run.faster(old, new) == {"copy_bytes_per_s": 5.0, "matmul_flops_per_s": {"float32": 2.0, "bfloat16": 4.0}}


def test_version_of_a_package_without_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert version("flash_attn") is None and version("nowhere") is None and version("torch") == torch.__version__


def test_unknown_group(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--groups", "plan,plam"])
    assert "unknown group plam" in capsys.readouterr().err


def test_replay_copies_its_inputs_and_captures_once(monkeypatch):
    """Here the graph is a function; that a real one replays is tested on a GPU."""
    made = []

    def capture(calls):
        made.append(calls)
        return calls[0]

    monkeypatch.setattr(replay, "captured", capture)
    case = small("forward", drop_fraction=0.5)
    problem = build(case, "cpu")
    nets, predict = problem.variants["dcdit"].run.args
    net, again = nets[torch.float32], replay.Replay(predict)
    for seed in (0, 1):
        torch.manual_seed(seed)
        inputs = tuple(torch.rand_like(t) if t.is_floating_point() else t for t in problem.inputs)
        with torch.no_grad():
            torch.testing.assert_close(again(net, *inputs, 0.5), predict(net, *inputs, 0.5))
    assert len(made) == 1


def test_gpu_stages_in_order_of_importance(monkeypatch):
    monkeypatch.setattr(gpu, "architecture", lambda: "90")
    stages = gpu.plan("cuda", False, Path("r.json"))
    assert [stage.name for stage in stages] == ["build", "tests", "memcheck", "racecheck", "bench", "profile"]
    assert sum(stage.limit for stage in stages) < 8 * 60
    assert not any("pip" in part for stage in stages for part in stage.command)
    assert all("PYTORCH_NO_CUDA_MEMORY_CACHING=1" in stage.command for stage in stages[2:4])
    assert sum(stage.limit for stage in gpu.plan("cuda", True, Path("r.json"))) < 100  # and the benches the rest


def test_gpu_rehearsal(tmp_path, monkeypatch):
    """A stage that fails, one that hangs and one that is missing are recorded, and the rest goes on."""
    sleep = [sys.executable, "-c", "import time; print('begun'); time.sleep(60)"]
    bench = [sys.executable, "-m", "bench.run", "--device", "cpu", "--quick", "--no-compile", "--groups", "chunk"]
    output = tmp_path / "r.json"
    stages = [
        gpu.Stage("tests", sleep, 1.0),
        gpu.Stage("memcheck", ["/nowhere/compute-sanitizer"], 5),
        gpu.Stage("racecheck", [sys.executable, "-m", "bench.exercise", "--device", "cpu"], 30),
        gpu.Stage("bench", [*bench, "--output", str(output)], 0),
        gpu.Stage("profile", [sys.executable, "-c", "raise SystemExit(5)"], 5),
    ]
    monkeypatch.setattr(gpu, "plan", lambda *_: stages)
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0, 7.0, 7.0))  # before the first stage; the benches see another
    assert gpu.main(["--device", "cpu", "--quick", "--output", str(output)]) == 1
    result = json.loads(output.read_text())
    status = {stage["name"]: stage["status"] for stage in result["stages"]}
    assert status.pop("racecheck") in (0, 3)  # 3: the extension is not built
    assert status.pop("memcheck").startswith("[Errno 2]")
    assert status == {"tests": "timeout", "bench": 0, "profile": 5} and result["load"] == 7.0
    assert result["stages"][0]["tail"].startswith("begun")
    assert [entry["case"]["group"] for entry in result["cases"]] == ["chunk"]


def test_gpu_limit_counts_from_the_start(tmp_path, monkeypatch):
    """What was spent before the first stage is not given to it; nor is a result of the same day overwritten."""
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "plan", lambda *_: [gpu.Stage("tests", [sys.executable, "-c", ""], 30)])
    assert gpu.main(["--device", "cpu", "--quick"], begin=time.time() - 1000) == 1
    assert gpu.main(["--device", "cpu", "--quick"]) == 0
    first, second = sorted(tmp_path.iterdir(), key=lambda path: len(path.name))
    assert [json.loads(path.read_text())["stages"][0]["status"] for path in (first, second)] == ["cut", 0]


def test_gpu_says_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "make gpu: this Python's torch sees no GPU\n"


SLOW = """
import time
import dcdit_kernels
real = dcdit_kernels.dechunk
def dechunk(*args, **kwargs):
    time.sleep(0.02)
    return real(*args, **kwargs)
dcdit_kernels.dechunk = dechunk
"""


def test_compare_finds_a_slower_operator(tmp_path):
    """A tree whose dechunk sleeps is slower than the same tree without."""
    for package in ("bench", "dcdit", "dcdit_kernels"):
        (tmp_path / package).symlink_to(ROOT / package)
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    case = small("dechunk")
    with compare.Side(ROOT, "cpu") as base, compare.Side(tmp_path, "cpu") as here:
        assert compare.compare(case, base, here, rounds=3)[0] == "SLOWER"
        assert compare.compare(case, here, base, rounds=3)[0] == "faster"
        nonsense = dataclasses.replace(case, group="nonsense")
        assert compare.compare(nonsense, base, here, rounds=3) == ("SLOWER", "here KeyError: 'nonsense'")
