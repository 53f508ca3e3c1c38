"""The machine of a result: its name, its versions, and the two rates that the figures are held against."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from .timing import cpu_clock, gpu_event_clock

ROOT = Path(__file__).parents[1]


def read_lines(file: Path) -> list[dict]:
    """The mappings of a file with one on each line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def describe(device: str) -> dict:
    """Everything that a figure depends on besides the case."""
    return {
        "machine": machine_name(device),
        "device": device,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(["python -m bench.run", *sys.argv[1:]]),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of others, when this is asked before the measuring begins
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "flash_attn": version("flash_attn"),
        "cuda": torch.version.cuda if device == "cuda" else None,
    }


def machine_name(device: str) -> str:
    """The model of the GPU or CPU as a file name, with the number of cores of a CPU."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return slug(f"{models[0] if models else platform.processor() or platform.machine()} {os.cpu_count()} cores")


def slug(name: str) -> str:
    """Lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def version(module: str) -> str | None:
    """Version of an importable module, or None; flash-attn 4 alone is a namespace that has none."""
    try:
        return str(__import__(module).__version__)
    except (ImportError, AttributeError, OSError):  # OSError: a shared library of another CUDA
        return None


def commit() -> str | None:
    """DCDIT_COMMIT, else the short hash of HEAD, marked where tracked files differ from it; None outside a checkout."""
    if os.environ.get("DCDIT_COMMIT"):
        return os.environ["DCDIT_COMMIT"]
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "dcdit", "dcdit_kernels", "csrc", "bench"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-modified" if dirty.returncode else "")


def rates(device: str) -> dict[str, dict[str, float]]:
    """Measured bytes per second of a copy (read plus written) and operations per second of a matrix product by dtype,
    the best of several."""
    size = 2**30 if device == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = best(lambda: target.copy_(source), device)
    side = 8192 if device == "cuda" else 512  # a CPU without bfloat16 takes 10 s for a product of 1536
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        flops[str(dtype).removeprefix("torch.")] = 2 * side**3 / best(lambda a=a, b=b: a @ b, device)
    return {"copy_bytes_per_s": 2 * size / copy, "matmul_flops_per_s": flops}


def best(call, device: str, rounds: int = 7) -> float:
    """Least seconds of one call, by the clock of the operators."""
    clock = cpu_clock(call) if device == "cpu" else gpu_event_clock([call], graph=False)
    return min(clock() for _ in range(rounds))
