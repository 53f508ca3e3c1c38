"""python -m bench.savings: how much of the FLOPs that SparseDiT, DyDiT and patches of twice the side save is saved
in time, beside the plain DiT.

All models have random weights and take turns in one run. A realised saving of 1 is a time that falls as the FLOPs do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from dcdit.model import DyDiT, PatchDiT, PlainDiT, SparseDiT
from dcdit.model.config import preset
from dcdit.model.gates import Gates
from dcdit.model.rival_macs import (
    dydit_macs,
    dydit_on,
    gate_rates,
    patch_dit_macs,
    patch_on,
    sparse_dit_macs,
    sparse_on,
)

TIME = 500.0


def half_open(model: DyDiT) -> DyDiT:
    """The model with every second head and group on, and about half of the tokens."""
    for block in model.blocks:
        for layer in (block.routers.heads, block.routers.groups):
            torch.nn.init.zeros_(layer.weight)
            layer.bias.copy_(torch.where(torch.arange(len(layer.bias)) % 2 == 0, -5.0, 5.0))
        torch.nn.init.zeros_(block.routers.tokens[2].bias)
    return model


@torch.no_grad()
def cases(name: str, batch: int) -> tuple[dict[str, Callable], dict[str, float]]:
    """The forwards by name, and their multiply-adds of one image; the plain DiT's come first."""
    config = preset(name)
    dynamic, sparse = dydit_on(config), sparse_on(config)
    table = half_open(DyDiT(dynamic).eval()).tabulate([TIME])
    inputs = torch.randn(batch, 4, *config.input_size), torch.full((batch,), TIME), torch.zeros(batch, dtype=torch.long)
    gates: Gates = table(*inputs, return_gates=True)[1]
    rate = float(gate_rates(gates, dynamic.tokens, dynamic.hidden_size).mean())
    models = {"plain": PlainDiT(dynamic).eval(), "sparse": SparseDiT(sparse).eval(), "dydit": table}
    macs = {
        "plain": dydit_macs(dynamic, routers=False),
        "sparse": sparse_dit_macs(sparse),
        "dydit": dydit_macs(dynamic, rate),
    }
    forwards: dict[str, Callable] = {key: lambda model=model: model(*inputs) for key, model in models.items()}
    if not any(side % 2 for side in dynamic.grid):
        coarse = PatchDiT(patch_on(config, scales=(1, 2))).eval()
        forwards["patches"], macs["patches"] = (lambda: coarse(*inputs, 2)), patch_dit_macs(coarse.config, 2)
    return forwards, macs


@torch.no_grad()
def main() -> None:
    """Print one line for each model: GMAC, milliseconds, and the realised saving."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=["DC-DiT-S/N4", "DC-DiT-B/N4"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    for name in args.presets:
        forwards, macs = cases(name, args.batch)
        seconds: dict[str, list[float]] = {key: [] for key in forwards}
        for _ in range(args.rounds + 1):  # the first round warms up
            for key, forward in forwards.items():
                begin = time.perf_counter()
                forward()
                seconds[key].append(time.perf_counter() - begin)
        middle = {key: statistics.median(times[1:]) for key, times in seconds.items()}
        for key in forwards:
            share, cost = middle[key] / middle["plain"], macs[key] / macs["plain"]
            saving = (
                ""
                if key == "plain"
                else f"  FLOPs {cost:.2f}, time {share:.2f}: realised {(1 - share) / (1 - cost):.2f}"
            )
            print(f"{name} {key:<7} {macs[key] / 1e9:8.2f} GMAC {1e3 * middle[key]:8.1f} ms{saving}", flush=True)


if __name__ == "__main__":
    main()
