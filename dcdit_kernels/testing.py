"""Shared by tests and benches of operators: example inputs, gradient weights, error budgets, poisoned buffers.

`EXAMPLES` has an entry for each operator on features and for attention. A new operator is its formula, its reference,
its kernels, and an entry here: the tests against float64 and the table of `bench.errors` then take it in.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import dcdit_kernels as K

EPS32 = torch.finfo(torch.float32).eps
ZERO = 1e-12  # of the largest number of a result: the residue of a cancelling sum in float64


@dataclass(frozen=True)
class Scene:
    """The source of examples: a plan of `prob` (B, L), and the width D of the features."""

    plan: K.ChunkPlan
    prob: torch.Tensor
    width: int

    def dense(self) -> torch.Tensor:
        """Features (B, L, D), as a strided view."""
        batch, cells = self.prob.shape
        return torch.randn(cells, batch, self.width, device=self.prob.device).transpose(0, 1)

    def packed(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Features (capacity, D) with NaN past the live rows, as a strided view."""
        rows = torch.randn(self.plan.capacity, 2 * self.width, device=self.prob.device, dtype=dtype)[:, : self.width]
        rows[int(self.plan.cu_seqlens[-1]) :] = math.nan
        return rows

    def vectors(self, count: int) -> Sequence[torch.Tensor]:
        """Vectors (B, D) for each sample, as views of one tensor."""
        return torch.randn(len(self.prob), count * self.width, device=self.prob.device).split(self.width, 1)

    def table(self, *shape: int) -> torch.Tensor:
        """Random numbers of any other shape."""
        return torch.randn(*shape, device=self.prob.device)


def make_scene(
    grid: tuple[int, ...],
    width: int = 24,
    share: float | str = 0.25,
    batch: int = 3,
    nearest: str | None = None,
    spare: int = 5,
    device: torch.device | str = "cpu",
) -> Scene:
    """A plan that keeps about `share` of the cells, none of the middle sample, or "one" cell of each."""
    cells = math.prod(grid)
    prob = torch.rand(batch, cells, generator=torch.Generator().manual_seed(cells))
    keep = prob < (0.25 if isinstance(share, str) else share)
    prob = torch.where(keep, 0.55 + 0.4 * prob, 0.05 + 0.4 * prob)
    if share == "one":
        prob = torch.where(torch.arange(cells) == cells // 2, 0.9, prob.clamp(max=0.45))
    else:
        prob[batch // 2] = 0.2
    prob = prob.to(device)
    capacity = int((prob > 0.5).sum()) + spare
    nearest = nearest or f"{len(grid)}d"
    return Scene(K.plan_chunks(prob, grid, nearest=nearest, capacity=capacity, backend="reference"), prob, width)


@dataclass(frozen=True)
class Example:
    """A call of an operator: `function(backend, *tensors)` returns a tensor or a tuple.

    `fixed` names the tensors that stay float32 whatever dtype the features have.
    """

    function: Callable[..., Any]
    tensors: dict[str, torch.Tensor]
    fixed: tuple[str, ...] = ()

    def drawn(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The tensors, features in `dtype`."""
        return [t if name in self.fixed else t.to(dtype) for name, t in self.tensors.items()]


def _chunk(s: Scene) -> Example:
    tensors = {"h": s.dense(), "pos_embed": s.table(s.plan.cells, s.width)}
    return Example(lambda b, *t: K.chunk(t[0], s.plan, t[1], backend=b), tensors)


def _adaln_modulate(s: Scene) -> Example:
    shift, scale = s.vectors(2)
    tensors = {"x": s.packed(), "shift": shift, "scale": scale}
    return Example(lambda b, *t: K.adaln_modulate(t[0], t[1], t[2], s.plan, backend=b), tensors)


def _adaln_modulate_dense(s: Scene) -> Example:
    shift, scale = s.vectors(2)
    tensors = {"x": s.dense(), "shift": shift, "scale": scale}
    return Example(lambda b, *t: K.adaln_modulate(t[0], t[1], t[2], backend=b), tensors)


def _gate_residual(s: Scene) -> Example:
    tensors = {"x": s.packed(), "y": s.packed(), "gate": s.vectors(3)[0]}
    return Example(lambda b, *t: K.gate_residual(t[0], t[1], t[2], s.plan, backend=b), tensors)


def _gate_residual_modulate(s: Scene) -> Example:
    tensors = {"x": s.packed(), "y": s.packed(), **dict(zip(("gate", "shift", "scale"), s.vectors(3), strict=True))}
    return Example(lambda b, *t: K.gate_residual_modulate(t[0], t[1], t[2], t[3], t[4], s.plan, backend=b), tensors)


def _ema_smooth(s: Scene) -> Example:
    tensors = {"x": s.packed(), "boundary_prob": s.prob}
    return Example(lambda b, *t: K.ema_smooth(t[0], t[1], s.plan, backend=b), tensors, ("boundary_prob",))


def _dechunk(smoothing: str | None) -> Callable[[Scene], Example]:
    def example(s: Scene) -> Example:
        tensors = {"x": s.packed(), "boundary_prob": s.prob, "residual": s.dense()}
        function = lambda b, x, p, r: K.dechunk(x, p, s.plan, r, 1.3, smoothing, backend=b)  # noqa: E731
        return Example(function, tensors, ("boundary_prob", "residual"))  # a residual of float32 beside any rows

    return example


def _boundary_cosine(s: Scene) -> Example:
    tensors = {"q": s.dense(), "k": s.dense(), "kernel": s.table(s.width, 3, 3)}
    return Example(lambda b, q, k, w: K.boundary_cosine(q, k, w, _sides(s), backend=b), tensors)


def _boundary_predictability(s: Scene) -> Example:
    names = ("norm_weight", "norm_bias", "score_weight")
    tensors = {"features": _picture(s), **dict(zip(names, s.table(3, s.width), strict=True)), "score_bias": s.table(1)}
    return Example(lambda b, f, n, m, w, v: K.boundary_predictability(f, n, m, w, v, backend=b), tensors)


def _group_norm_silu(s: Scene) -> Example:
    tensors = {"x": _picture(s), "weight": s.table(s.width), "bias": s.table(s.width), "cond": s.vectors(2)[0]}
    return Example(lambda b, x, w, v, c: K.group_norm_silu(x, w, v, 8, c, backend=b), tensors)


def _qk_norm_rope(s: Scene) -> Example:
    q, k = _heads(s, 2)
    angle = s.table(s.plan.capacity, q.shape[2] // 2)
    tensors = {"q": q, "k": k, "q_weight": s.table(q.shape[2]), "k_weight": s.table(q.shape[2])}
    cos, sin = angle.cos(), angle.sin()
    return Example(lambda b, q, k, u, w: K.qk_norm_rope(q, k, cos, sin, None, u, w, s.plan, backend=b), tensors)


def _varlen_attention(s: Scene) -> Example:
    offsets, longest = s.plan.cu_seqlens, s.plan.max_seqlen
    limits = (offsets, offsets, longest, longest)
    tensors = dict(zip("qkv", _heads(s, 3), strict=True))
    return Example(lambda b, q, k, v: K.varlen_attention(q, k, v, *limits, backend=b), tensors)


def _sides(s: Scene) -> tuple[int, int]:
    """The scene's grid as rows and columns."""
    return s.plan.cells // s.plan.grid[-1], s.plan.grid[-1]


def _picture(s: Scene) -> torch.Tensor:
    """Features (B, D, H, W), as a strided view."""
    return s.dense().transpose(1, 2).unflatten(2, _sides(s))


def _heads(s: Scene, count: int) -> list[torch.Tensor]:
    """Packed tensors (capacity, 2, D / 2), two heads of the features."""
    return [s.packed().unflatten(1, (2, -1)) for _ in range(count)]


EXAMPLES: dict[str, Callable[[Scene], Example]] = {
    "chunk": _chunk,
    "adaln_modulate": _adaln_modulate,
    "adaln_modulate, dense": _adaln_modulate_dense,
    "gate_residual": _gate_residual,
    "gate_residual_modulate": _gate_residual_modulate,
    "ema_smooth": _ema_smooth,
    "dechunk, gaussian": _dechunk("gaussian"),
    "dechunk, ema": _dechunk("ema"),
    "dechunk, None": _dechunk(None),
    "boundary_cosine": _boundary_cosine,
    "boundary_predictability": _boundary_predictability,
    "group_norm_silu": _group_norm_silu,
    "qk_norm_rope": _qk_norm_rope,
    "varlen_attention": _varlen_attention,
}


def gradient_weight(out: torch.Tensor) -> torch.Tensor:
    """Weights like `out` that grow along the tensor, so that no error cancels, equal numbers in every dtype."""
    return torch.linspace(-1, 2, out.numel(), device=out.device).bfloat16().to(out.dtype).view(out.shape)


def evaluate(
    function: Callable[..., Any], tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Outputs of function(*tensors), then the gradients of their weighted sum; the tensors in `dtype` where given."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    total = sum((out * gradient_weight(out)).sum() for out in outs)
    return [out.detach() for out in outs] + list(torch.autograd.grad(total, leaves))


def complaint(
    got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], terms: int
) -> str | None:
    """The first tensor that misses its budget, or None.

    Budget: |got − want| ≤ 2·|eager − want| + √terms·eps32·max|want|, each the largest over a tensor, where `want` is
    float64, `eager` the straightforward formulation in got's dtype, and `terms` the length of the longest sum.
    """
    largest = max((w.abs().max().item() for w in want if w.is_floating_point() and w.numel()), default=0.0)
    for place, (g, w, e) in enumerate(zip(got, want, eager, strict=True)):
        if g.shape != w.shape:
            return f"result {place} has shape {tuple(g.shape)}, expected {tuple(w.shape)}"
        if not w.is_floating_point():
            if not torch.equal(g.long(), w.long()):
                return f"result {place} differs at {int((g.long() != w.long()).sum())} of {w.numel()} places"
            continue
        if w.numel() == 0:
            continue
        error, yardstick = ((t.double() - w).abs().max().item() for t in (g, e))
        scale = w.abs().max().item()
        if scale < ZERO * largest:  # a gradient that is zero in exact arithmetic has the rounding of its terms
            scale = largest
        budget = 2 * yardstick + math.sqrt(terms) * EPS32 * scale
        if not error <= budget:
            return f"result {place} is off by {error:.3g}, allowed {budget:.3g}"
    return None


def compare(example: Example, backend: str, dtype: torch.dtype, terms: int) -> str | None:
    """The fault of a back-end's outputs and gradients in `dtype`, or None: `complaint`, and the dtypes."""
    drawn = example.drawn(dtype)
    want = evaluate(lambda *t: example.function("reference", *t), drawn, torch.float64)
    eager, got = (evaluate(lambda *t, b=b: example.function(b, *t), drawn) for b in ("reference", backend))
    kinds = [[t.dtype for t in results] for results in (got, eager)]
    if kinds[0] != kinds[1]:
        return f"results are of {kinds[0]}, expected {kinds[1]}"
    return complaint(got, want, eager, terms)


@contextlib.contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Every buffer that is allocated without a value holds NaN, so that an element nobody writes is seen."""
    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            allocate = getattr(owner, name)

            def poisoned(*args: Any, allocate: Callable[..., torch.Tensor] = allocate, **kwargs: Any) -> torch.Tensor:
                out = allocate(*args, **kwargs)
                return out.fill_(math.nan) if out.is_floating_point() else out

            stack.enter_context(mock.patch.object(owner, name, poisoned))
        yield
