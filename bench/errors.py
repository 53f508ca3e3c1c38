"""Errors of every back-end against float64, as the table of docs/kernels.md: `python -m bench.errors`.

Inputs are drawn in the dtype and then promoted. Each number is the largest error of a tensor over its largest value,
next to the errors of the eager reference in that dtype; boundary_prob is float32 throughout. Without a GPU Triton's
kernels run in its interpreter, under `gpu_arithmetic`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import dcdit_kernels as K

from .gpu_arithmetic import gpu_arithmetic

BACKENDS, DTYPES = ("reference", "native", "triton"), (torch.float32, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID, WIDTH, BATCH = (12, 12), 72, 2


def operators() -> dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor], list[str]]]:
    """name → (function of (backend, *tensors), tensors in float32, the name of each gradient)."""
    torch.manual_seed(0)
    cells = GRID[0] * GRID[1]
    prob = torch.rand(BATCH, cells, device=DEVICE)
    prob = torch.where(prob < 0.25, 0.5 + prob, 0.6 * prob)
    plan = K.plan_chunks(prob, GRID)
    draw = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    x, y, h, pos = draw(plan.capacity, WIDTH), draw(plan.capacity, WIDTH), draw(BATCH, cells, WIDTH), draw(cells, WIDTH)
    gate, shift, scale = draw(3, BATCH, WIDTH)
    q, k, kernel = draw(BATCH, cells, WIDTH), draw(BATCH, cells, WIDTH), torch.rand(WIDTH, 3, 3, device=DEVICE) / 9
    features, vectors = draw(BATCH, WIDTH, *GRID), draw(3, WIDTH)
    table = {
        "boundary_cosine": (
            lambda b, q, k, w: K.boundary_cosine(q, k, w, GRID, backend=b),
            [q, k, kernel],
            ["q", "k", "kernel"],
        ),
        "boundary_predictability": (
            lambda b, f, w, v, s: K.boundary_predictability(f, w, v, s, s[:1], backend=b),
            [features, *vectors],
            ["features", "norm_weight", "norm_bias", "score_weight"],
        ),
        "chunk": (lambda b, h, pos: K.chunk(h, plan, pos, backend=b), [h, pos], ["h", "pos_embed"]),
        "chunk, mean": (lambda b, h, pos: K.chunk(h, plan, pos, "mean", backend=b), [h, pos], ["h", "pos_embed"]),
        "adaln_modulate": (
            lambda b, *t: K.adaln_modulate(*t, plan, backend=b),
            [x, shift, scale],
            ["x", "shift", "scale"],
        ),
        "gate_residual": (lambda b, *t: K.gate_residual(*t, plan, backend=b), [x, y, gate], ["x", "y", "gate"]),
        "ema_smooth": (lambda b, *t: K.ema_smooth(*t, plan, backend=b), [x, prob], ["x", "boundary_prob"]),
    }
    for smoothing in ("gaussian", "ema", None):
        table[f"dechunk, {smoothing}"] = (
            lambda b, x, p, r, s=smoothing: K.dechunk(x, p, plan, r, 1.0, s, backend=b),
            [x, prob, h],
            ["x", "boundary_prob", "residual"],
        )
    return table


def evaluate(function, backend, tensors) -> list[torch.Tensor]:
    """Output and gradients, in float64."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(backend, *leaves)
    # Equal numbers in every dtype.
    weights = torch.linspace(-1, 2, out.numel(), device=DEVICE).bfloat16().double().view(out.shape)
    grads = torch.autograd.grad((out.double() * weights).sum(), leaves)
    return [t.detach().double() for t in (out, *grads)]


def main() -> None:
    """Print the table."""
    print("| operator | tensor | " + " | ".join(f"{b}, {str(d)[6:]}" for d in DTYPES for b in BACKENDS) + " |")
    print("|---|---|" + "---|" * len(DTYPES) * len(BACKENDS))
    for name, (function, tensors, gradients) in operators().items():
        columns: list[list[str]] = []
        for dtype in DTYPES:
            drawn = [t if g == "boundary_prob" else t.to(dtype) for t, g in zip(tensors, gradients, strict=True)]
            want = evaluate(function, "reference", [t.double() for t in drawn])
            for backend in BACKENDS:
                try:
                    got = evaluate(function, backend, drawn)
                except K.BackendError:
                    columns.append(["–"] * len(want))
                    continue
                errors = [(g - w).abs().max() / w.abs().max() for g, w in zip(got, want, strict=True)]
                columns.append([f"{float(e):.1e}" for e in errors])
        for tensor, row in zip(["output", *(f"∂{g}" for g in gradients)], zip(*columns, strict=True), strict=True):
            print(f"| {name} | {tensor} | " + " | ".join(row) + " |")
            name = ""


if __name__ == "__main__":
    with gpu_arithmetic():
        main()
