"""make gpu: build in place, test, sanitise, measure and profile on a machine with a GPU, under one time limit.

The stages go in the order of their importance; each has a limit of its own, a failure is noted and the next one starts,
and the result file is rewritten after each, so that whatever cuts the run short leaves what it had. Nothing is
installed and no network is needed: Python with torch (2.11 or newer) and pybind11, nvcc, and pytest for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

BEGIN = time.time()  # importing torch counts, which takes many seconds where no process has done it before

import torch  # noqa: E402

from .machine import ROOT, describe  # noqa: E402
from .run import quiet, unused, write  # noqa: E402

TAIL = 6000  # characters of a stage's output that are kept


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    limit: float  # seconds


def main(argv: list[str] | None = None, begin: float | None = None) -> int:
    """Run the stages; their limit counts from `begin`."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under 2 minutes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu rehearses the stages")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    end = (begin or time.time()) + (112 if args.quick else 460)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: this Python's torch sees no GPU", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage is ended too
    header = describe(args.device)
    output = args.output or unused(header)
    stages: list[dict] = []
    write(output, {**header, "stages": stages, "rates": None, "current": None, "cases": []})
    for stage in plan(args.device, args.quick, output):
        limit = min(stage.limit, end - time.time())
        if stage.name == "bench":  # it takes what is left, less what the profile needs
            limit = end - time.time() - (14 if args.quick else 30)
            stage.command.extend(["--deadline", f"{time.time() + limit - 15:.0f}", "--grace", "12"])
        stages.append(run(stage, limit))
        print(
            f"{stage.name}: {stages[-1]['status']}, {stages[-1]['seconds']} s\n{stages[-1]['tail'][-1500:]}", flush=True
        )
        write(output, {**json.loads(output.read_text()), "stages": stages})
    print(output)
    return 0 if all(stage["status"] == 0 for stage in stages) else 1


def plan(device: str, quick: bool, output: Path) -> list[Stage]:
    """The stages. A rehearsal on a CPU builds nothing and has no sanitizer."""
    python = [sys.executable, "-m"]
    script = [*python, "bench.exercise", "--device", device]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    stages = []
    if device == "cuda":
        build = ["env", f"DCDIT_CUDA_ARCHS={architecture()}", sys.executable, "setup.py", "build_ext", "--inplace"]
        stages.append(Stage("build", build, 30 if quick else 90))
    # Compiling for other GPUs needs none. For this one some 300 kernels are compiled, a third of a second each.
    chosen = ["-k", "not test_operator or 0.25-bfloat16"] if quick else ["tests/test_triton.py", "-k", "not ahead_of"]
    together = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    # A test that hangs shows where: the stage is killed without a summary.
    hung = ["-o", "faulthandler_timeout=20"]
    tests = [*python, "pytest", "-q", "-rs", *hung, *together, "tests/test_gpu.py", *chosen]
    stages.append(Stage("tests", tests, 30 if quick else 160))
    for tool in ("memcheck",) if quick else ("memcheck", "racecheck"):
        # Errors of API calls are what PyTorch asks for and handles: whether there is a context, say.
        options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        # Of memory out of PyTorch's cache it sees blocks of megabytes and no tensor's end.
        prefix = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, *options] if device == "cuda" else []
        stages.append(Stage(tool, [*prefix, *script], 25 if quick else 45))
    bench = [*python, "bench.run", "--device", device, "--output", str(output), "--seconds", "1.5"]
    bench += ["--quick", "--no-compile"] * quick
    stages.append(Stage("bench", bench, 0))
    stages.append(Stage("profile", [*python, "bench.profile_step", "--device", device], 14 if quick else 30))
    return stages


def architecture() -> str:
    """The compute capability of this machine's GPU, such as 90; code for others would only take time to compile."""
    return "{}{}".format(*torch.cuda.get_device_capability())


def run(stage: Stage, limit: float) -> dict:
    """What came of a stage: exit status, "timeout" or "cut"; seconds; the end of its output."""
    begin, status = time.time(), "cut"
    # A file, not a pipe: a grandchild that outlives the stage would keep a pipe open.
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        if limit > 0:
            try:
                status = wait(stage.command, log, limit)
            except OSError as error:  # no such tool
                status = str(error)
        log.seek(0)
        tail = log.read()[-TAIL:]
    seconds = round(time.time() - begin, 1)
    return {"name": stage.name, "command": " ".join(stage.command), "status": status, "seconds": seconds, "tail": tail}


def wait(command: list[str], log: IO[str], limit: float) -> int | str:
    """Run a command in a process group of its own, none of which outlives the limit or this process's end."""
    env = {**quiet(), "PYTHONUNBUFFERED": "1"}  # what a killed process holds back is lost
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main(begin=BEGIN))
