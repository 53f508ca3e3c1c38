"""Named lists of cases with the variants that are timed, for a GPU that is there for minutes: `bench.run --cases NAME`.

Most important first: a run that is cut short loses the end.
"""

from __future__ import annotations

from dataclasses import replace

from .ablation import CONTEXTS, FUNCTIONS
from .cases import OPERATORS, ROUTER, Case, select
from .replay import CHAIN

Wanted = tuple[Case, tuple[str, ...]]  # a case, and the names of its variants to time

SERVED = ("dcdit", "dcdit graph", "DiT/2", "DiT/2 graph")
COMPILED = ("dcdit compiled", "dcdit compiled graph", "DiT/2 compiled", "DiT/2 compiled graph")
KERNELS = ("native", "native fixed", "triton", "plain")


def forward(size: str, batch: int, stride: int = 1, side: int = 32) -> Case:
    """A forward pass in bfloat16 that keeps an eighth of the cells: half of the plain DiT's tokens at side² cells."""
    return Case("forward", size, side, batch, drop_fraction=0.5, dtype="bfloat16", stride=stride)


def largest(group: str, backward: bool = False, **changes) -> Case:
    """An operator at XL, batch 64, 256 px, a quarter of the cells kept."""
    dtype = "float32" if group in ROUTER else "bfloat16"
    return replace(Case(group, "XL", 32, 64, backward=backward, dtype=dtype), **changes)


def both(group: str) -> list[Case]:
    """Without and with the backward pass."""
    return [largest(group, backward) for backward in (False, True)]


def decisive() -> list[Wanted]:
    """Cases that decide between designs, then the table of the README, then the centre of every group."""
    first = [forward(*at) for at in (("XL", 64), ("B", 16), ("XL", 1), ("S", 1))]
    step = Case("train", "B", 32, 16, drop_fraction=0.5, backward=True, dtype="bfloat16")
    larger = replace(step, size="XL", batch=32)
    coarse = [forward(size, batch, 2) for batch in (64, 8, 1) for size in ("S", "B", "XL")]
    centres = select("cuda", OPERATORS, quick=True)
    loop = select("cuda", ("sample",), quick=True)
    wanted = [*((case, SERVED) for case in (*first, step, larger)), *kernels()]
    wanted += [
        *passes(),
        *((case, ("dcdit", "dcdit graph")) for case in coarse),
        *((case, KERNELS) for case in centres),
        *((case, SERVED) for case in loop),
    ]
    return list(dict(wanted).items())


def kernels() -> list[Wanted]:
    """Every operator at XL, batch 64, 256 px."""
    cases = [case for group in ("dechunk", "modulate", "boundary", "attention", "chunk") for case in both(group)]
    cases += [largest("plan"), largest("plan", side=64), largest("dechunk", clustered=True)]
    cases += [case for group in ("norm", "rope", "cosine") for case in both(group)]
    further = ("native batch budget", "triton mean", "plain mean")
    return [(case, (*KERNELS, *further)) for case in cases]


def passes() -> list[Wanted]:
    """The forward passes of the README's table."""
    return [(forward(size, batch), SERVED) for batch in (64, 8, 1) for size in ("S", "B", "XL")]


def compiled() -> list[Wanted]:
    """The plain DiT, the model and the straightforward operators through Inductor."""
    sizes = [("XL", 64), ("S", 64), ("B", 64), ("XL", 8), ("XL", 1), ("S", 1), ("B", 1), ("S", 8), ("B", 8)]
    models = [forward(*at) for at in sizes]
    operators = [largest(group, backward=True) for group in ("modulate", "dechunk", "boundary")]
    wanted: list[Wanted] = [(case, SERVED + COMPILED) for case in models]
    wanted[3:3] = [(case, (*KERNELS, "plain compiled")) for case in operators]
    return wanted


def large() -> list[Wanted]:
    """Passes at 512 px, where one picture fills a GPU, at small batches too."""
    at = [("XL", 1), ("XL", 4), ("B", 4), ("S", 4), ("XL", 16), ("B", 1), ("S", 1), ("B", 16), ("S", 16)]
    return [(forward(*sizes, side=64), SERVED + COMPILED) for sizes in at]


def choices() -> list[Wanted]:
    """The tables of `bench.ablation`, beside the shipped choice and the plain formulation."""
    shipped = ("triton", "native", "dcdit", "plain", "plain channels-last")
    scaffold = [largest("scaffold", size=size, batch=batch) for size, batch in (("S", 64), ("XL", 1), ("S", 1))]
    cases = [*both("scaffold"), *scaffold]
    cases += [largest("modulate", True, batch=batch, share=share) for batch, share in ((64, 0.25), (32, 0.125))]
    cases += [*both("attention"), largest("attention", dtype="float32")]
    served = [replace(forward(*at), ablation=True) for at in (("XL", 1), ("S", 1), ("XL", 8))]
    extra = [(*CONTEXTS.get(case.group, {}), *FUNCTIONS.get(case.group, ())) for case in cases]
    wanted = [(replace(case, ablation=True), (*shipped, *names)) for case, names in zip(cases, extra, strict=True)]
    return [*((case, (*SERVED, CHAIN)) for case in served), *wanted]


def at_hand(wanted: list[Wanted], device: str) -> list[Wanted]:
    """The list as a device can run it: on a CPU, where it is rehearsed, at the size of the digits model."""
    if device == "cuda":
        return wanted
    small = {"size": "digits", "side": 14, "batch": 2}
    return list({replace(case, **small): names for case, names in wanted}.items())


LISTS = {
    "kernels": kernels,
    "passes": passes,
    "decisive": decisive,
    "compiled": compiled,
    "large": large,
    "ablation": choices,
}
