"""The cases: groups, sizes, and the selection for each kind of machine."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from dcdit import DCDiTConfig, preset

OPERATORS = ("plan", "chunk", "dechunk", "boundary", "cosine", "norm", "modulate", "rope", "attention", "pad")
MODELS = ("forward", "train", "sample")
ALL_CELLS = ("boundary", "cosine", "norm")  # they see every cell, whatever share is kept afterwards
ROUTER = ("plan", "boundary", "cosine")  # always in float32
GROUPS = (*MODELS, *OPERATORS)


@dataclass(frozen=True)
class Case:
    """One row of the results. `share` of the L = side² latent cells is kept before ρ (`drop_fraction`) is applied.

    `backward` adds the backward pass to the time. `dtype` is the features'; the router is always in float32.
    `clustered` keeps the cells of one disc in place of scattered ones. `ablation` adds the variants of
    `bench.ablation`. `stride` is the model's encoder_stride.
    """

    group: str
    size: str = "S"
    side: int = 32
    batch: int = 1
    share: float = 0.25
    drop_fraction: float = 0.0
    backward: bool = False
    dtype: str = "float32"
    clustered: bool = False
    ablation: bool = False
    stride: int = 1

    @property
    def config(self) -> DCDiTConfig:
        name = "digits" if self.size == "digits" else f"DC-DiT-{self.size}/N4" + "-512" * (self.side == 64)
        return dataclasses.replace(preset(name), encoder_stride=self.stride)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def name(self) -> str:
        parts = [self.group, self.size, f"{self.side}x{self.side}", f"B{self.batch}", f"keep{self.share:g}"]
        if self.group in MODELS:
            parts.append(f"drop{self.drop_fraction:g}")
        parts += ["fwdbwd" if self.backward else "fwd", self.dtype]
        return "-".join(
            [
                *parts,
                *["clustered"] * self.clustered,
                *["ablation"] * self.ablation,
                *[f"stride{self.stride}"] * (self.stride > 1),
            ]
        )


def select(device: str, groups: tuple[str, ...] = GROUPS, quick: bool = False) -> list[Case]:
    """The cases of a machine: around one centre per group, each axis in turn; `quick` leaves the centres.

    All centres come first, then the second of every group and so on: a run that is cut short has some of everything.
    """
    cases_of = _on_gpu if device == "cuda" else _on_cpu
    rows = itertools.zip_longest(*(cases_of(group)[: 1 if quick else None] for group in groups))
    return [case for row in rows for case in row if case is not None]


def compiled_too(case: Case, device: str) -> bool:
    """Whether the baselines are also measured compiled. Compiling costs more than the rest of a case: only the first
    case of each group is, and no training step and no sampling loop."""
    return case.group not in ("train", "sample") and case == select(device, (case.group,))[0]


def _on_gpu(group: str) -> list[Case]:
    centre = Case(group, "B", 32, 16, 0.25, dtype="float32" if group in ROUTER else "bfloat16")
    if group == "forward":
        sizes = [("B", 32), ("S", 32), ("XL", 32), ("XL", 64)]
        axes = [{}, *({"batch": batch} for batch in (1, 4, 64)), *({"drop_fraction": d} for d in (0.2, 0.0, 0.8))]
        return [
            dataclasses.replace(centre, **{"size": size, "side": side, "drop_fraction": 0.5, **axis})
            for axis in axes
            for size, side in sizes
        ]
    if group == "train":
        return [
            dataclasses.replace(centre, size=size, batch=batch, drop_fraction=drop, backward=True)
            for size in ("B", "S", "XL")
            for batch, drop in ((16, 0.5), (64, 0.5), (16, 0.0))
        ]
    if group == "sample":
        return [dataclasses.replace(centre, size=s, batch=b, drop_fraction=0.0) for s in ("B", "XL") for b in (4, 16)]
    # First the sizes that the targets are set at.
    axes = [{}, {"size": "XL", "batch": 64}, *({"batch": b} for b in (1, 4, 64)), {"size": "S"}, {"side": 64}]
    axes += [{"share": s} for s in (0.1, 0.5, 1.0) if group not in ALL_CELLS]
    directions = (False,) if group == "plan" else (False, True)
    return [dataclasses.replace(centre, backward=b, **axis) for axis in axes for b in directions]


def _on_cpu(group: str) -> list[Case]:
    if group == "forward":
        small = [Case(group, "digits", 14, b, drop_fraction=d) for b, d in ((64, 0.5), (4, 0.5))]
        return [
            *(Case(group, "S", batch=1, drop_fraction=drop) for drop in (0.5, 0.2, 0.0, 0.8)),
            Case(group, "S", batch=4, drop_fraction=0.5),
            Case(group, "B", batch=1, drop_fraction=0.5),
            Case(group, "S", 64, batch=2),
            *small,
        ]
    if group == "train":
        return [
            Case(group, "S", batch=2, drop_fraction=0.5, backward=True),
            *(Case(group, "digits", 14, 64, drop_fraction=drop, backward=True) for drop in (0.5, 0.0)),
        ]
    if group == "sample":
        return [Case(group, "digits", 14, 16), Case(group, "S", batch=1)]
    centre = Case(group, "S", 32, 4)
    if group == "plan":
        axes = [{"batch": 1}, {"batch": 16}, {"batch": 64}, {"share": 0.1}, {"share": 0.5}, {"share": 1.0}]
        large = (Case(group, "S", 64, 64, share) for share in (0.25, 0.02, 0.002))
        return [centre, *(dataclasses.replace(centre, **axis) for axis in axes), *large]
    both = [centre, dataclasses.replace(centre, size="XL")]
    axes = [{"batch": 1}, {"batch": 16}]
    if group not in ALL_CELLS:
        both.append(dataclasses.replace(centre, share=1.0))
        axes += [{"share": 0.1}, {"share": 0.5}]
    both += [Case(group, "S", 64, 2)] * (group == "dechunk")
    backward = [dataclasses.replace(case, backward=True) for case in both]
    return [*both, *backward, *(dataclasses.replace(centre, **axis) for axis in axes)]
