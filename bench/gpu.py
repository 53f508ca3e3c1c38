"""python -m bench.gpu first | second: build, test, sanitise, measure on a machine with a GPU, in two calls of minutes.

first: builds, warms the compilers' caches, checks the plan under compute-sanitizer, tests, measures the decisive cases.
second, within the same tree: failed tests again and under memcheck; then the latency of steps with a budget, compiled
variants, 512 px, the choices inside operators, Nsight Compute on the kernels, a profile and a trace of a training step.

Every stage has a limit and is killed as a process group; a failure costs its own stage, but for a build that fails.
Logs and results are in build/gpu and, if that is set, in the folder $OUT. It needs a Python with torch (2.11 or newer)
and pybind11, nvcc, and pytest for the tests; nothing is installed, and no network is used.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BEGIN = time.time()  # importing torch counts, which takes many seconds where no process has done it before

import torch  # noqa: E402

from .machine import ROOT, describe  # noqa: E402
from .run import quiet, summary, write  # noqa: E402

LIMIT = {"first": 385, "second": 420}  # seconds of a call
FOLDER = ROOT / "build" / "gpu"  # ignored by git; the second call finds the first one's results here
RESULT = FOLDER / "result.json"
PYTHON = (sys.executable, "-m")
SECTIONS = ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
PROFILED = "modulate_forward|modulate_backward|smooth|plug|cosine|predictability|plan_fill|group_norm"
USES_A_GPU = re.compile(r'"cuda" if .*cuda\.is_available|skipif\(\s*not torch\.cuda\.is_available')
CLOCKS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active,utilization.gpu"


@dataclass(frozen=True)
class Stage:
    """A command with its limit in seconds. A `watch` runs as long as the stages beside it, and cannot fail."""

    name: str
    command: tuple[str, ...]
    limit: float
    watch: bool = False


def main(argv: list[str] | None = None, begin: float | None = None) -> int:
    """Run the stages of a call; its limit counts from `begin`."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("call", choices=["first", "second"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu rehearses the stages")
    parser.add_argument("--limit", type=float, help="seconds of the whole call")
    args = parser.parse_args(argv)
    begin = begin or time.time()
    end = begin + (args.limit or LIMIT[args.call])
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: this Python's torch sees no GPU", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(RESULT.read_text()) if args.call == "second" and RESULT.exists() else None
    result = earlier or {**describe(args.device), "stages": [], "rates": None, "current": None, "cases": []}
    write(RESULT, result)
    stages: list[dict] = []
    for together in (first if args.call == "first" else second)(args.device, earlier, end):
        if time.time() > end - 5:
            done = [{"name": stage.name, "status": "cut", "seconds": 0} for stage in together]
        else:
            done = side_by_side(together, end)
        stages += done
        keep(args.call, stages)
        if any(stage["name"] == "build" and stage["status"] != 0 for stage in done):
            break
    print(report(args.call, stages, time.time() - begin))
    return 0 if all(stage["status"] == 0 for stage in stages) else 1


def first(device: str, earlier: dict | None, end: float) -> list[list[Stage]]:
    """The stages of the first call; stages of an inner list run side by side."""
    gpu = device == "cuda"
    machine = [
        "nvidia-smi -q -d CLOCK,POWER,PERFORMANCE,MEMORY",
        "nvcc --version",
        "lscpu",
        f"{sys.executable} -m pip list",
    ]
    program = FOLDER / "check_plan"
    plan = shlex.join([*check_plan_command(architecture() if gpu else None), "-o", str(program)])
    opening = [shell("machine", "; ".join(machine), 20), shell("plan", f"{plan} && {program}", 90)]
    opening += [warm("decisive", device, 80)]
    if gpu:
        build = f"DCDIT_CUDA_ARCHS={architecture()} {sys.executable} setup.py build_ext --inplace"
        opening.insert(0, shell("build", build, 120))
    checks = [shell(tool, f"{sanitizer(tool) if gpu else ''} {program} {'raw' * (tool == 'initcheck')}", 75)
              for tool in ("memcheck", "racecheck", "synccheck", "initcheck")]  # fmt: skip
    files = gpu_tests() if gpu else ["tests/test_gpu.py"]
    tests = pytest("tests", files, 140, workers=14)
    return [
        opening,
        [shell("plan times", f"{program} time", 20)],
        [tests, *checks],
        [*clocks(device), benches("bench", "decisive", device, end, 1000, "--no-compile")],
    ]


def second(device: str, earlier: dict | None, end: float) -> list[list[Stage]]:
    """The stages of the second call: first the failures of the first call."""
    failed = {stage["name"] for stage in (earlier or {}).get("stages", []) if stage["status"] != 0}
    stages: list[list[Stage]] = []
    if device == "cuda" and not list((ROOT / "dcdit_kernels").glob("_C*.so")):
        stages.append(
            [shell("build", f"DCDIT_CUDA_ARCHS={architecture()} {sys.executable} setup.py build_ext --inplace", 90)]
        )
    if "tests" in failed:
        again = ["--lf", "--lfnf=none", "--tb=long", *gpu_tests()]
        beside = [pytest("failed tests", again, 75, workers=6)]
        faults = faulty()
        if faults and device == "cuda":
            # Of memory out of PyTorch's cache memcheck sees blocks of megabytes and no tensor's end.
            run = shlex.join([*PYTHON, "pytest", "-q", "-x", *faults[:2]])
            beside.append(
                shell("memcheck of failed tests", f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 {sanitizer('memcheck')} {run}", 90)
            )
        stages.append(beside)
    ncu = [tool("ncu", "nsight-compute"), "--clock-control", "none", "--profile-from-start", "off", "-c", "24"]
    ncu += ["-k", f"regex:{PROFILED}", "--csv", "--page", "details", "--log-file", str(out("ncu.csv"))]
    ncu += [word for name in SECTIONS for word in ("--section", name)]
    kernels = [*(ncu if device == "cuda" else []), *PYTHON, "bench.profile", "kernels", "--device", device]
    step = [*PYTHON, "bench.profile", "step", "--device", device, "--trace", str(out("trace.json.gz"))]
    return [
        *stages,
        [warm("compiled,large,ablation", device, 100)],
        [Stage("latency", (*PYTHON, "bench.latency", "--device", device), 40)],
        [*clocks(device), benches("compiled", "compiled", device, end - 220, 150)],
        [benches("large", "large", device, end - 150, 70)],
        [Stage("profile forward", (*PYTHON, "bench.profile", "forward", "--device", device), 30)],
        [benches("ablation", "ablation", device, end - 75, 120)],
        [Stage("ncu", tuple(kernels), 60)],
        [Stage("profile", tuple(step), 40)],
    ]


def shell(name: str, command: str, limit: float) -> Stage:
    return Stage(name, ("bash", "-c", command), limit)


def warm(cases: str, device: str, limit: float) -> Stage:
    return Stage("warm", (*PYTHON, "bench.warm", "--device", device, "--cases", cases), limit)


def benches(name: str, cases: str, device: str, end: float, limit: float, *more: str) -> Stage:
    """`bench.run` on a list of cases, which stops by itself `limit` seconds from its start, or before `end`."""
    command = [*PYTHON, "bench.run", "--device", device, "--cases", cases, "--output", str(RESULT), "--limit", "60"]
    command += ["--seconds", "1.2", "--grace", "10", "--end", f"{end - 5:.0f}", "--budget", f"{limit - 15:.0f}", *more]
    return Stage(name, tuple(command), limit)


def pytest(name: str, chosen: list[str], limit: float, workers: int) -> Stage:
    """A run of tests; one that hangs shows where, and ends its own process alone."""
    options = ["-q", "-rfE", f"--junitxml={out(name.replace(' ', '-') + '.xml')}", "-o", "faulthandler_timeout=60"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(workers, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout=60", "--timeout-method=thread"]
    return Stage(name, ("env", "OMP_NUM_THREADS=1", *PYTHON, "pytest", *options, *chosen), limit)


def gpu_tests() -> list[str]:
    """The files of tests that run on a GPU where there is one; whole back-ends first."""
    found = [path for path in sorted(ROOT.glob("tests/test_*.py")) if USES_A_GPU.search(path.read_text())]
    return [str(path.relative_to(ROOT)) for path in sorted(found, key=lambda path: path.stem != "test_gpu")]


def clocks(device: str) -> list[Stage]:
    """The GPU's clocks, power and temperature every two seconds."""
    watching = (tool("nvidia-smi"), f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--loop-ms=2000")
    return [Stage("clocks", watching, 600, watch=True)] if device == "cuda" else []


def check_plan_command(arch: str | None, nvcc: str | None = None) -> list[str]:
    """Compiles tests/check_plan.cpp, for this compute capability such as "90" or, without one, for the CPU alone."""
    sources = ["tests/check_plan.cpp", "csrc/plan_cpu.cpp"]
    if arch is None:
        return ["c++", "-O2", "-std=c++17", "-pthread", "-Icsrc", *sources, "-ldl"]
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = ["-O2", "-std=c++17", "-lineinfo", "-DDCDIT_CUDA", "-Icsrc", code]
    return [nvcc or tool("nvcc"), *flags, *sources, "csrc/plan_cuda.cu", "csrc/rows_cuda.cu", "-ldl"]


def architecture() -> str:
    """The compute capability of this machine's GPU, such as 90; code for others would only take time to compile."""
    return "{}{}".format(*torch.cuda.get_device_capability())


def tool(name: str, *folders: str) -> str:
    """A program of CUDA's, on PATH or where it is installed by default."""
    found = [shutil.which(name), shutil.which(name, path="/usr/local/cuda/bin:/usr/local/nvidia/bin")]
    found += [
        str(p) for folder in folders for p in sorted(Path("/opt/nvidia").glob(f"{folder}/*/{name}"), reverse=True)
    ]
    return next(filter(None, found), name)


def sanitizer(check: str) -> str:
    """PyTorch provokes and handles errors of API calls, to learn whether there is a context, say."""
    return f"{tool('compute-sanitizer')} --tool {check} --report-api-errors no --error-exitcode 9"


def out(name: str) -> Path:
    """Where a file goes that is to be kept: $OUT, or build/gpu."""
    return Path(os.environ.get("OUT") or FOLDER) / name


def faulty() -> list[str]:
    """The tests of the first call after which the GPU was lost, from their log."""
    log = (FOLDER / "tests.log").read_text() if (FOLDER / "tests.log").exists() else ""
    return list(
        dict.fromkeys(re.findall(r"^(tests/\S+\.py::.*?)(?:: E .*(?:CUDA error|illegal|misaligned).*)$", log, re.M))
    )


def side_by_side(stages: list[Stage], end: float) -> list[dict]:
    """Run stages at once, each in a process group of its own that outlives neither its limit nor this process."""
    begin, running, done = time.time(), {}, []
    try:
        for stage in stages:
            log = (FOLDER / f"{stage.name.replace(' ', '-')}.log").open("w+", errors="replace")
            with contextlib.suppress(OSError):  # no such program: without a process the stage is "missing"
                running[stage] = None, log
                env = {**quiet(), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
                process = subprocess.Popen(
                    stage.command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
                running[stage] = process, log
        while running:
            watching = all(stage.watch for stage in running)
            for stage, (process, log) in list(running.items()):
                over = time.time() > min(begin + stage.limit, end)
                status = "missing" if process is None else process.poll()
                if status is None and (over or watching):
                    status = "timeout"
                if status is not None:
                    finish(process, log)
                    status = 0 if stage.watch else status
                    done.append({"name": stage.name, "status": status, "seconds": round(time.time() - begin, 1)})
                    print(f"{stage.name}: {said(status)}, {done[-1]['seconds']} s", flush=True)
                    del running[stage]
            time.sleep(0.1)
    finally:
        for process, log in running.values():
            finish(process, log)
    return done


def finish(process: subprocess.Popen | None, log) -> None:
    """Kill the remaining processes of a stage."""
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    log.close()


def said(status: object) -> str:
    return "passed" if status == 0 else f"FAILED ({status})"


def keep(call: str, stages: list[dict]) -> None:
    """The stages into the result, and all logs of this call, one after the other, beside it."""
    result = json.loads(RESULT.read_text())
    earlier = [stage for stage in result["stages"] if stage.get("call") != call]
    result["stages"] = [*earlier, *({**stage, "call": call} for stage in stages)]
    write(RESULT, result)
    with out(f"{call}.log").open("w") as whole:
        for stage in stages:
            log = FOLDER / f"{stage['name'].replace(' ', '-')}.log"
            whole.write(f"\n===== {stage['name']}: {said(stage['status'])}, {stage['seconds']} s\n")
            whole.write(log.read_text(errors="replace") if stage["status"] != "cut" else "")


def report(call: str, stages: list[dict], seconds: float) -> str:
    """The summary: a line for each failed test and each case, then the verdict."""
    result = json.loads(RESULT.read_text())
    lines = []
    for stage in stages:
        if stage["status"] == "cut":
            continue
        log = (FOLDER / f"{stage['name'].replace(' ', '-')}.log").read_text(errors="replace")
        if stage["name"] in ("tests", "failed tests"):
            lines += [line[:200] for line in log.splitlines() if re.match(r"FAILED|ERROR|\d+ \w+.* in [\d.]+s", line)][
                -30:
            ]
        elif stage["name"] in ("plan times", "profile"):
            lines += [line[:150] for line in log.splitlines() if line.strip()][:16]
        elif stage["status"] != 0:
            lines += [f"--- the end of {stage['name']}", *log[-800:].splitlines()]
    entries = [entry for entry in result["cases"] if "variants" in entry]
    if call == "second":  # the others were printed by the first
        entries = [entry for entry in entries if entry["compiled"] or entry["case"]["ablation"]]
    lines += [summary(entry) for entry in entries]
    lines += [f"{entry['name']}: CRASHED, {entry['crashed']}" for entry in result["cases"] if "crashed" in entry]
    lines += [f"cut: {', '.join(result['cut'])}"] if result.get("cut") else []
    failed = [f"{stage['name']} {said(stage['status'])}" for stage in stages if stage["status"] != 0]
    verdict = "PASSED" if not failed else f"FAILED: {', '.join(failed)}"
    lines.append(f"{call.upper()} CALL {verdict}; {len(entries)} cases measured, {seconds:.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stages are ended too
    sys.exit(main(begin=BEGIN))
