"""The correctness gate: a variant whose outputs or gradients miss float64 by more than its budget gets no time.

The budget is that of `dcdit_kernels.testing.complaint`, with eager the straightforward formulation in the same dtype.
That one is first held to the same budget in float32, where the reference operator takes its place; when it fails,
nothing is reported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcdit_kernels.testing import complaint, gradient_weight

from .problem import Family, Problem, Tensors, Variant


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


def psnr(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of two batches of latents or pictures, in dB over the range of `want`."""
    error = (got.double() - want.double()).square().mean().sqrt()
    return 20 * math.log10((want.max() - want.min()).item() / max(error.item(), 1e-30))


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
        total = sum((out * gradient_weight(out)).sum() for out in outs)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return *(out.detach() for out in outs), *torch.autograd.grad(total, wanted)
