"""`python -m bench.gpu`: the stages of its two calls, and the cost of a failure."""

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import ablation, gpu, machine
from bench.lists import LISTS, at_hand
from bench.measure import build, measure

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A fresh folder, and no interpreter of Triton, which would only take time."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu, "FOLDER", tmp_path / "gpu")
    monkeypatch.setattr(gpu, "RESULT", tmp_path / "gpu" / "result.json")
    monkeypatch.setattr(gpu, "architecture", lambda: "90")


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_stages_of_both_calls():
    end = time.time() + 300
    first = gpu.first("cuda", None, end)
    names = [[stage.name for stage in together] for together in first]
    assert names[0] == ["build", "machine", "plan", "warm"] and names[1] == ["plan times"]
    assert names[2] == ["tests", "memcheck", "racecheck", "synccheck", "initcheck"] and names[3] == ["clocks", "bench"]
    assert not any("pip install" in part for together in first for stage in together for part in stage.command)
    second = gpu.second("cuda", {"stages": [{"name": "tests", "status": 0}]}, end)
    assert [stage.name for together in second for stage in together][-8:] == [
        "latency", "clocks", "compiled", "large", "profile forward", "ablation", "ncu", "profile",
    ]  # fmt: skip


def test_what_failed_comes_first_in_the_second_call():
    """With the tests that lost the GPU once more under memcheck."""
    gpu.FOLDER.mkdir()
    log = "..F\ntests/test_triton.py::test_a[x-1]: E   RuntimeError: CUDA error: an illegal memory access\n"
    (gpu.FOLDER / "tests.log").write_text(log + "F\ntests/test_gpu.py::test_b: E   AssertionError: off by 2\n")
    stages = gpu.second("cuda", {"stages": [{"name": "tests", "status": 1}]}, time.time() + 300)
    again, memcheck = next(together for together in stages if together[0].name == "failed tests")
    assert "--lf" in again.command and "test_a[x-1]" in memcheck.command[-1] and "test_b" not in memcheck.command[-1]


@pytest.fixture
def stages(monkeypatch):
    """Stages in place of the first call's, and its result afterwards."""

    def run(stages, limit=60.0, begin=None):
        monkeypatch.setattr(gpu, "first", lambda *_: stages)
        status = gpu.main(["first", "--device", "cpu", "--limit", str(limit)], begin)
        return status, {stage["name"]: stage["status"] for stage in json.loads(gpu.RESULT.read_text())["stages"]}

    return run


def test_a_failure_costs_its_own_stage(stages, tmp_path, monkeypatch, capsys):
    """One that hangs, with a child, one that is missing and one that fails; those beside and after them run."""
    monkeypatch.setenv("OUT", str(tmp_path))
    child = tmp_path / "child"
    hangs = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 3; touch {child}'])"
    watch = gpu.Stage("clocks", python("import time; time.sleep(60)"), 60, True)
    status, found = stages([
        [gpu.Stage("tests", python(hangs), 1.0), gpu.Stage("plan", python("print('here')"), 30)],
        [gpu.Stage("memcheck", ("/nowhere/compute-sanitizer",), 5)],
        [watch, gpu.Stage("bench", python("exit(5)"), 30)],
    ])  # fmt: skip
    assert status == 1
    assert found == {"tests": "timeout", "plan": 0, "memcheck": "missing", "bench": 5, "clocks": 0}
    assert (
        "===== plan: passed" in (tmp_path / "first.log").read_text() and "here" in (tmp_path / "first.log").read_text()
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FIRST CALL FAILED: tests FAILED (timeout), memcheck FAILED (missing), bench FAILED (5);")
    time.sleep(3)
    assert not child.exists()


def test_nothing_follows_a_failed_build(stages):
    found = stages([[gpu.Stage("build", python("exit(1)"), 30)], [gpu.Stage("tests", python(""), 30)]])[1]
    assert found == {"build": 1}


def test_the_limit_counts_from_the_start(stages):
    """The first stage does not get the time that was spent before it."""
    later = [[gpu.Stage("tests", python(""), 30)]]
    assert stages(later, begin=time.time() - 1000) == (1, {"tests": "cut"})


def test_says_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["first"]) == 2
    assert capsys.readouterr().err == "bench.gpu: this Python's torch sees no GPU\n"


def test_commit_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("DCDIT_COMMIT", raising=False)
    assert machine.commit() is None
    monkeypatch.setenv("DCDIT_COMMIT", "abc123")
    assert machine.commit() == "abc123"


def test_names_of_profiled_kernels():
    """Every alternative of the pattern is still a kernel's name."""
    sources = [*(ROOT / "dcdit_kernels" / "triton").glob("*.py"), *(ROOT / "csrc").glob("*.cu")]
    names = re.findall(r"(\w+)\(", "\n".join(path.read_text() for path in sources))
    for part in gpu.PROFILED.split("|"):
        assert any(part in name for name in names), part


def test_tests_that_use_a_gpu_run_there():
    found = gpu.gpu_tests()
    assert found[0] == "tests/test_gpu.py"
    assert {"tests/test_triton.py", "tests/test_group_norm.py", "tests/test_attention_choice.py"} <= set(found)
    assert not any("bench" in file or "launch_check" in file for file in found)


@pytest.mark.parametrize("name", LISTS)
def test_lists_name_what_there_is(name):
    """At the digits model's size every case builds, and no wanted variant is unknown to the device's problems."""
    wanted = at_hand(LISTS[name](), "cpu")
    assert wanted
    for case, names in wanted:
        problem = build(dataclasses.replace(case, dtype="float32"), "cpu", names=names)
        assert problem.variants.keys() & set(names), case.name


def test_choices_pass_the_gate_and_are_in_force_when_they_run(monkeypatch):
    """A context holds in the backward pass as well."""
    case, names = next((c, n) for c, n in at_hand(LISTS["ablation"](), "cpu") if c.group == "modulate")
    case = dataclasses.replace(case, dtype="float32", backward=True)
    seen = []

    def around():
        monkeypatch.setenv("CHOICE", "1")
        return gpu.contextlib.nullcontext(seen.append(os.environ.get("CHOICE")))

    monkeypatch.setitem(ablation.CONTEXTS, "modulate", {"choice": around})
    monkeypatch.setattr(ablation, "SHIPPED", ("native",))
    entry = measure(case, "cpu", False, rounds=3, seconds=0.1, names=(*names, "choice"))
    assert entry["variants"]["choice"]["status"] == "ok" and len(seen) > 3


def test_scaffold_formulations_agree():
    case, names = next((c, n) for c, n in at_hand(LISTS["ablation"](), "cpu") if c.group == "scaffold")
    entry = measure(dataclasses.replace(case, dtype="float32"), "cpu", False, rounds=3, seconds=0.1, names=names)
    assert {name: v["status"] for name, v in entry["variants"].items()} == {
        "dcdit": "ok", "plain": "ok", "plain channels-last": "ok",
    }  # fmt: skip
