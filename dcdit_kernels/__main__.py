"""`python -m dcdit_kernels`: the parts that are here, the missing ones, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from . import __version__, extension
from ._dispatch import BackendError
from ._explain import explain
from ._ops import OPERATORS

# Distributions, each with its purpose.
PACKAGES = {
    "triton": "kernels that move features",
    "flash-attn": "attention, flash-attn 2",
    "flash-attn-3": "attention, flash-attn 3",
    "flash-attn-4": "attention, flash-attn 4",
}


def versions() -> list[str]:
    """The back-ends that run here, a line each."""
    lines = [f"dcdit_kernels {__version__}, Python {platform.python_version()} on {platform.platform()}"]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    lines.append(f"torch {torch.__version__} ({cuda if torch.version.cuda or torch.version.hip else 'CPU build'})")
    for name, purpose in PACKAGES.items():
        try:
            lines.append(f"{name} {importlib.metadata.version(name)} ({purpose})")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed ({purpose})")
    return lines


def compiled() -> list[str]:
    """The compiled part, and the CUDA it was made for."""
    if extension._C is None:
        return [f"extension: {extension.missing(torch.device('cpu'))}"]
    if not extension._C.cuda_archs:
        return [f"extension: {extension._C.__file__}, CPU only"]
    built, driver = (extension.cuda_name(version) for version in extension._C.cuda_versions())
    archs = " ".join(f"sm_{arch}" for arch in extension._C.cuda_archs.split(","))
    return [f"extension: {extension._C.__file__}, CPU and {archs} + PTX, CUDA {built} (driver: {driver})"]


def gpus() -> list[str]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        return ["GPU: none that torch can use"]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"GPU {i}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 20} MiB" for i, gpu in enumerate(found)
    ]


def operators(device: str) -> tuple[list[str], bool]:
    """Each operator's back-ends for small tensors on this device, and whether each operator can run.

    An operator cannot run where DCDIT_BACKEND names a back-end that is none, or that cannot.
    """
    x = torch.zeros(1, 1, 8, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    lines, run = [], True
    for op in sorted(OPERATORS):
        try:
            lines.append(explain(op, x))
        except BackendError as error:
            lines.append(str(error))
            run = False
    return list(dict.fromkeys(lines)), run  # a back-end that is none is one line


def main(argv: list[str] | None = None) -> int:
    """Print all of it; 1 where an operator cannot run."""
    argparse.ArgumentParser(prog="python -m dcdit_kernels", description=__doc__).parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines, run = operators(device)
    lines = [*versions(), *compiled(), *gpus(), "", f"Operators on {device}:", *lines]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if run else 1


if __name__ == "__main__":
    sys.exit(main())
