"""Errors of every back-end against float64, as the table of docs/kernels.md: `python -m bench.errors`.

Inputs are drawn in the dtype and then promoted. Each number is the largest error of a tensor over its largest value,
next to the same of the eager reference in that dtype; boundary_prob is float32 throughout. Without a GPU Triton's
kernels run in its interpreter, under `gpu_arithmetic`.
"""

from __future__ import annotations

import argparse
import functools
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import dcdit_kernels as K
from dcdit_kernels.testing import EXAMPLES, Example, Scene, evaluate

from .gpu_arithmetic import gpu_arithmetic

BACKENDS, DTYPES = ("reference", "native", "triton"), (torch.float32, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID, WIDTH, BATCH = (12, 12), 72, 2


def examples() -> dict[str, Example]:
    """name → example."""
    torch.manual_seed(0)
    cells = GRID[0] * GRID[1]
    prob = torch.rand(BATCH, cells, device=DEVICE)
    prob = torch.where(prob < 0.25, 0.5 + prob, 0.6 * prob)
    scene = Scene(K.plan_chunks(prob, GRID), prob, WIDTH)
    return {name: make(scene) for name, make in EXAMPLES.items()}


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(prog="python -m bench.errors", description=__doc__.splitlines()[0]).parse_args()
    print("| operator | tensor | " + " | ".join(f"{b}, {str(d)[6:]}" for d in DTYPES for b in BACKENDS) + " |")
    print("|---|---|" + "---|" * len(DTYPES) * len(BACKENDS))
    for name, example in examples().items():
        columns: list[list[str]] = []
        for dtype in DTYPES:
            drawn = example.drawn(dtype)
            want = evaluate(functools.partial(example.function, "reference"), drawn, torch.float64)
            for backend in BACKENDS:
                try:
                    got = evaluate(functools.partial(example.function, backend), drawn)
                except K.BackendError:
                    columns.append(["–"] * len(want))
                    continue
                errors = [(g.double() - w).abs().max() / w.abs().max() for g, w in zip(got, want, strict=True)]
                columns.append([f"{float(e):.1e}" for e in errors])
        outputs = ["output"] * (len(columns[0]) - len(example.tensors))
        tensors = [*outputs, *(f"∂{g}" for g in example.tensors)]
        for tensor, row in zip(tensors, zip(*columns, strict=True), strict=True):
            print(f"| {name} | {tensor} | " + " | ".join(row) + " |")
            name = ""


if __name__ == "__main__":
    with gpu_arithmetic():
        main()
