"""The correctness gate: a variant whose outputs or gradients miss float64 by more than its budget gets no time.

Budget: |variant − fp64| ≤ 2·|eager − fp64| + √K·eps32·max|fp64|, each the largest over a tensor, with eager the
straightforward formulation in its dtype. The yardstick first meets the budget in float32 itself, where the
reference operator takes its place; when it fails, nothing is reported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .problem import Family, Problem, Tensors, Variant

EPS32 = torch.finfo(torch.float32).eps
ZERO = 1e-12  # of the largest number of a result: the residue of a cancelling sum in float64


def check(problem: Problem) -> dict[str, str | None]:
    """For each variant its fault, or None."""
    verdicts: dict[str, str | None] = {}
    for name, family in problem.families.items():
        members = {key: variant for key, variant in problem.variants.items() if variant.family == name}
        try:
            with full_float32():
                verdicts |= check_family(problem, family, members)
        except Exception as error:  # too large for float64 here, say
            verdicts |= dict.fromkeys(members, f"the gate could not run: {one_line(error)}")
    return verdicts


def check_family(problem: Problem, family: Family, variants: dict[str, Variant]) -> dict[str, str | None]:
    """For each variant of one family its fault, or None."""
    backward = problem.backward
    eager, reference = variants[family.yardstick], variants[family.reference]
    want = evaluate(reference, cast(problem.inputs, torch.float64), backward)
    if eager is not reference:
        # The fused attention kernels of a GPU take float32 apart for its tensor cores.
        with sdpa_kernel(SDPBackend.MATH):
            got, base = (evaluate(v, cast(problem.inputs, torch.float32), backward) for v in (eager, reference))
        wrong = complaint(got, want, base, problem.reduction)
        if wrong:
            return dict.fromkeys(variants, f"the yardstick, {family.yardstick}, failed in float32: {wrong}")
    yardstick = evaluate(eager, problem.inputs, backward)
    verdicts = {}
    for name, variant in variants.items():
        try:
            got = evaluate(variant, problem.inputs, backward)
        except Exception as error:  # a variant that cannot run is a failed variant, and the others go on
            verdicts[name] = one_line(error)
        else:
            verdicts[name] = complaint(got, want, yardstick, problem.reduction)
    return verdicts


def one_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """cuDNN's float32 is TF32 by default; the error of TF32 would hide any other."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def cast(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """The floating ones in `dtype`."""
    return tuple(t.detach().to(dtype) if t.is_floating_point() else t for t in inputs)


def evaluate(variant: Variant, inputs: Tensors, backward: bool) -> Tensors:
    """Outputs, and with `backward` the gradients of their weighted sum; integers as they are."""
    leaves = [t.detach().clone().requires_grad_(backward and t.is_floating_point()) for t in inputs]
    with torch.set_grad_enabled(backward), variant.around():
        outs = variant.result(variant.run(*variant.prepare(*leaves)))
        if not backward:
            return outs
        # The weights depend on the place, so that no error cancels; float32 holds them in every dtype alike.
        weights = [torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape) for out in outs]
        total = sum((out * w.bfloat16().to(out.dtype)).sum() for out, w in zip(outs, weights, strict=True))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return *(out.detach() for out in outs), *torch.autograd.grad(total, wanted)


def complaint(got: Tensors, want: Tensors, yardstick: Tensors, reduction: int) -> str | None:
    """The first tensor that misses its budget, or None."""
    largest = max((b.abs().max().item() for b in want if b.is_floating_point() and b.numel()), default=0.0)
    for place, (a, b, c) in enumerate(zip(got, want, yardstick, strict=True)):
        if a.shape != b.shape:
            return f"result {place} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        if not b.is_floating_point():
            if not torch.equal(a.long(), b.long()):
                return f"result {place} differs at {int((a.long() != b.long()).sum())} of {b.numel()} places"
            continue
        if b.numel() == 0:
            continue
        error, eager = ((t.double() - b).abs().max().item() for t in (a, c))
        scale = b.abs().max().item()
        if scale < ZERO * largest:  # a gradient that is zero in exact arithmetic has the rounding of its terms
            scale = largest
        budget = 2 * eager + math.sqrt(reduction) * EPS32 * scale
        if not error <= budget:
            return f"result {place} is off by {error:.3g}, allowed {budget:.3g}"
    return None
