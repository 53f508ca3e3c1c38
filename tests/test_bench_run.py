"""Runs of the benches as a whole: the cost of a crash, a fault or the end of the time; a GPU's stages; comparing."""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import compare, replay, run
from bench import measure as measuring
from bench.cases import Case, select
from bench.machine import version
from bench.measure import build
from bench.models import TrainGraph
from dcdit.training.step_graphs import StepGraphs

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Triton's interpreter is tested elsewhere; here it would only take time."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("OUT", raising=False)


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
    """The process dies within one case: that case is recorded, earlier cases are kept, later cases are measured."""
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


HANG = """
import time
import bench.machine
import bench.measure
bench.machine.rates = lambda device: {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": {}}
def measure(case, *args):
    if case.group == "chunk":
        time.sleep(600)
    return {"name": case.name, "variants": {"plain": {"status": "ok", "seconds": 1.0}}}
bench.measure.measure = measure
"""


def test_a_case_that_hangs_costs_its_limit(tmp_path, monkeypatch):
    """The process ends, having said where it hung; a fresh one goes on."""
    (tmp_path / "sitecustomize.py").write_text(HANG)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    options = ["--device", "cpu", "--quick", "--no-compile", "--output", str(tmp_path / "r.json")]
    assert run.main([*options, "--groups", "chunk,pad", "--limit", "3"]) == 0
    crashed, measured = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert crashed["name"].startswith("chunk") and "status 1 after" in crashed["crashed"]
    assert measured["name"].startswith("pad") and measured["variants"]["plain"]["status"] == "ok"


def test_a_list_is_measured_by_name_and_its_compiled_cases_later(tmp_path, monkeypatch):
    """A second run goes on with the file of the first: its additions to a case stand in the case's place."""
    chunk, pad = Case("chunk", "digits", 14, 2), Case("pad", "digits", 14, 2)
    first = [(chunk, ("native", "plain")), (pad, ("plain",))]
    monkeypatch.setitem(run.LISTS, "decisive", lambda: [*first, (chunk, ("plain", "plain compiled"))])
    args = run.parse(["--device", "cuda", "--cases", "decisive"])
    assert [task[2] for task in run.tasks(args)] == [False, False, True]
    assert run.tasks(run.parse(["--device", "cuda", "--cases", "decisive", "--no-compile"])) == run.tasks(args)[:2]
    entries = [{"name": chunk.name, "variants": 1, "launches": 5}, {"name": pad.name, "crashed": "at once"}]
    run.merge(entries, {"name": chunk.name, "variants": 2, "compiled": True})
    assert entries[0] == {"name": chunk.name, "variants": 2, "launches": 5, "compiled": True}
    assert run.finished({"cases": entries}) == {chunk.name, pad.name, f"{chunk.name} compiled"}


@pytest.mark.parametrize("grace", ["0", "60"])
def test_cases_without_time_are_listed(tmp_path, grace):
    """Also where the process was still at an earlier one, and was ended."""
    options = ["--device", "cpu", "--quick", "--groups", "plan,chunk", "--budget", "0.1", "--grace", grace]
    assert run.main([*options, "--output", str(tmp_path / "r.json")]) == (grace == "0")
    result = json.loads((tmp_path / "r.json").read_text())
    names = [case.name for case in select("cpu", ("plan", "chunk"), quick=True)]
    assert result["cut"] == [*names, *(f"{name} compiled" for name in names)]
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
    monkeypatch.setattr(measuring, "count_launches", lambda entry, compiled, names: entry.update(launches=compiled))
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
    """Calls after a GPU's fault fail as well: the next case would have the blame."""

    def fault():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    timers = []
    start, stop = (lambda *_, **__: timers.append(1)), timers.clear
    faulthandler = SimpleNamespace(dump_traceback_later=start, cancel_dump_traceback_later=stop)
    monkeypatch.setattr(run, "faulthandler", faulthandler)
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(RuntimeError, match="illegal"):
        run.work(gpu_worker)
    assert not timers  # one that is left would end this process, with status 1 and no word
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
    case = Case("forward", "digits", 14, 2, drop_fraction=0.5)
    problem = build(case, "cpu")
    nets, predict = problem.variants["dcdit"].run.args
    net, again = nets[torch.float32], replay.Replay(predict)
    for seed in (0, 1):
        torch.manual_seed(seed)
        inputs = tuple(torch.rand_like(t) if t.is_floating_point() else t for t in problem.inputs)
        with torch.no_grad():
            torch.testing.assert_close(again(net, *inputs, 0.5), predict(net, *inputs, 0.5))
    assert len(made) == 1


def test_what_ships_is_timed_as_a_graph_or_not_at_all():
    case = Case("forward", "digits", 14, 2, drop_fraction=0.5)
    problem = build(case, "cpu")
    nets, _ = problem.variants["dcdit"].run.args
    with pytest.raises(
        RuntimeError, match="0 of 1 forwards replayed from 0 CUDA graphs, 1 eager: needs a GPU, got cpu"
    ):
        replay.Shipped(capacity=400)(nets[torch.float32], *problem.inputs, 0.5)


def test_a_training_step_in_graphs_has_the_gradients_of_an_eager_one(monkeypatch):
    """With stand-ins that run the captured function again. The step that is timed leaves the weights as they are."""
    captures = []

    def capture(function):
        captures.append(function)
        return function, function()

    monkeypatch.setattr(replay, "captured", lambda calls: capture(calls[0])[0])
    monkeypatch.setattr(replay, "StepGraphs", functools.partial(StepGraphs, capture=capture))
    case = Case("train", "digits", 14, 2, drop_fraction=0.5, backward=True)
    problem, graph = build(case, "cpu"), TrainGraph(case, "cpu")
    for name in ("dcdit", "DiT/2"):
        nets, predict = problem.variants[name].run.args
        want = problem.variants[name].run(*problem.inputs)
        with torch.no_grad():
            got = graph.run(nets, predict, *problem.inputs)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        parameters, step = list(nets[torch.float32].parameters()), graph.step(nets, predict)
        before = [p.clone() for p in parameters]
        captures.clear()
        for _ in range(3):
            step()
        assert len(captures) == 1
        assert all(torch.equal(p, q) and p.grad is None for p, q in zip(parameters, before, strict=True))


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
    """A tree with a dechunk that sleeps is slower than the tree without."""
    for package in ("bench", "dcdit", "dcdit_kernels"):
        (tmp_path / package).symlink_to(ROOT / package)
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    case = Case("dechunk", "digits", 14, 2)
    with compare.Side(ROOT, "cpu") as base, compare.Side(tmp_path, "cpu") as here:
        assert compare.compare(case, base, here, rounds=3)[0] == "SLOWER"
        assert compare.compare(case, here, base, rounds=3)[0] == "faster"
        nonsense = dataclasses.replace(case, group="nonsense")
        assert compare.compare(nonsense, base, here, rounds=3) == ("SLOWER", "here KeyError: 'nonsense'")
