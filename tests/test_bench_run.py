"""Runs of the benches as a whole: what a crash, a fault or the end of the time costs; a GPU's stages; comparing."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import compare, gpu, replay, run
from bench import measure as measuring
from bench.cases import Case, select
from bench.machine import version
from bench.measure import build

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
    case = Case("dechunk", "digits", 14, 2)
    with compare.Side(ROOT, "cpu") as base, compare.Side(tmp_path, "cpu") as here:
        assert compare.compare(case, base, here, rounds=3)[0] == "SLOWER"
        assert compare.compare(case, here, base, rounds=3)[0] == "faster"
        nonsense = dataclasses.replace(case, group="nonsense")
        assert compare.compare(nonsense, base, here, rounds=3) == ("SLOWER", "here KeyError: 'nonsense'")
