"""python -m bench.savings: how much of the FLOPs that SparseDiT, DyDiT and patches of twice the side save is saved
in time, beside the plain DiT.

All models have random weights and take turns in one run. A realised saving of 1 is a time that falls as the FLOPs do.
On a GPU the models are in bfloat16, and each forward is also timed as a CUDA graph where it never waits for the host.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

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

from .arguments import add_device, known, positive
from .timing import captured, cpu_clock, gpu_wall_clock, interleave

TIME = 500.0


def half_open(model: DyDiT, inputs: tuple[torch.Tensor, ...]) -> DyDiT:
    """The model with every second head and group on, and at `inputs` half of the tokens in each block."""

    def halve(tokens: torch.nn.Sequential, _: Any, logits: torch.Tensor) -> torch.Tensor:
        middle = logits.float().median().to(logits.dtype)
        tokens[2].bias.sub_(middle)
        return logits - middle

    hooks = []
    for block in model.blocks:
        for layer in (block.routers.heads, block.routers.groups):
            torch.nn.init.zeros_(layer.weight)
            layer.bias.copy_(torch.where(torch.arange(len(layer.bias)) % 2 == 0, -5.0, 5.0))
        torch.nn.init.normal_(block.routers.tokens[2].weight)
        hooks.append(block.routers.tokens.register_forward_hook(halve))
    model.tabulate([TIME])(*inputs)  # block after block, each on what the ones before leave
    for hook in hooks:
        hook.remove()
    return model


@torch.no_grad()
def cases(name: str, batch: int, device: str = "cpu") -> tuple[dict[str, Callable], dict[str, float]]:
    """The forwards by name, and their multiply-adds of one image; the plain DiT's come first."""
    config, dtype = preset(name), torch.float32 if device == "cpu" else torch.bfloat16
    dynamic, sparse = dydit_on(config), sparse_on(config)
    with torch.device(device):
        x = torch.randn(batch, 4, *config.input_size, dtype=dtype)
        inputs = x, torch.full((batch,), TIME), torch.zeros(batch, dtype=torch.long)
        plain, slim = PlainDiT(dynamic).to(dtype).eval(), SparseDiT(sparse).to(dtype).eval()
        table = half_open(DyDiT(dynamic).to(dtype).eval(), inputs).tabulate([TIME])
    gates: Gates = table(*inputs, return_gates=True)[1]
    rate = float(gate_rates(gates, dynamic.tokens, dynamic.hidden_size).mean())
    models = {"plain": plain, "sparse": slim, "dydit": table}
    macs = {
        "plain": dydit_macs(dynamic, routers=False),
        "sparse": sparse_dit_macs(sparse),
        "dydit": dydit_macs(dynamic, rate),
    }
    forwards: dict[str, Callable] = {key: lambda model=model: model(*inputs) for key, model in models.items()}
    if not any(side % 2 for side in dynamic.grid):
        with torch.device(device):
            coarse = PatchDiT(patch_on(config, scales=(1, 2))).to(dtype).eval()
        forwards["patches"], macs["patches"] = (lambda: coarse(*inputs, 2)), patch_dit_macs(coarse.config, 2)
    return forwards, macs


def clocks(forwards: dict[str, Callable], device: str, clock: Callable = time.perf_counter) -> dict[str, Callable]:
    """Seconds of each forward by a clock; on a GPU by the wall clock, and of its CUDA graph as well."""
    if device == "cpu":
        return {key: cpu_clock(forward, clock) for key, forward in forwards.items()}
    found = {key: gpu_wall_clock(forward) for key, forward in forwards.items()}
    for key, forward in forwards.items():
        try:
            found[f"{key} graph"] = gpu_wall_clock(captured([forward]))
        except RuntimeError as error:
            print(f"{key}: no CUDA graph: {error}".splitlines()[0], flush=True)
    return found


@torch.no_grad()
def main() -> None:
    """Print one line for each model: GMAC, milliseconds, and the realised saving."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", type=known(preset), default=["DC-DiT-S/N4", "DC-DiT-B/N4"])
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--rounds", type=positive, default=9)
    add_device(parser, "cpu")
    parser.add_argument("--processor-time", action="store_true", help="on a CPU that others use: of all threads")
    args = parser.parse_args()
    for name in args.presets:
        forwards, macs = cases(name, args.batch, args.device)
        clock = time.process_time if args.processor_time else time.perf_counter
        samples = interleave(clocks(forwards, args.device, clock), args.rounds, 1e9)
        middle = {key: statistics.median(times) for key, times in samples.items()}
        for key in middle:
            kind, *graph = key.split()
            base = " ".join(["plain", *graph])
            saving = ""
            if kind != "plain" and base in middle:
                share, cost = middle[key] / middle[base], macs[kind] / macs["plain"]
                saving = f"  FLOPs {cost:.2f}, time {share:.2f}: realised {(1 - share) / (1 - cost):.2f}"
            print(f"{name} {key:<13} {macs[kind] / 1e9:8.2f} GMAC {1e3 * middle[key]:8.2f} ms{saving}", flush=True)


if __name__ == "__main__":
    main()
