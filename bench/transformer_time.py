"""Time of a chunked FLUX-like stack beside the untouched one: python -m bench.transformer_time [--rounds N]

Width 512, 1024 image and 64 text tokens, two samples, three double and six single blocks with random weights. The
models take turns in one run on one thread, and CPU seconds are counted, which other processes do not lengthen much. The
realised saving is the share of the time that is saved over the share of the FLOPs that is, plan and gathers included.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import diffusers
import torch

from dcdit.integrations.attention import add_dynamic_chunking

from .timing import interleave
from .transformers import flops

SIDE, TEXT, BATCH = 32, 64, 2


def models() -> dict[str, Callable[[], object]]:
    """The forwards by name: untouched, wrapped with all cells kept, and with half of them."""
    untouched = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=6, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    ).requires_grad_(False)  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(BATCH, SIDE**2, 16),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 64),
        "pooled_projections": torch.randn(BATCH, 64),
        "timestep": torch.rand(BATCH),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(SIDE)), torch.arange(float(SIDE))),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    found = {"untouched": untouched}
    for name, rho in (("all kept", 0.0), ("half kept", 0.5)):
        found[name] = copy.deepcopy(untouched)
        add_dynamic_chunking(found[name]).drop_fraction = rho
    for model in found.values():
        model.eval().requires_grad_(False)
    return {name: lambda model=model: model(**inputs) for name, model in found.items()}


def cpu_seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


@torch.no_grad()
def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    calls = models()
    work = {name: flops(call) for name, call in calls.items()}  # each is warm afterwards
    samples = interleave({name: lambda call=call: cpu_seconds(call) for name, call in calls.items()}, rounds, 1e9)
    print("| | FLOPs | CPU seconds | time | realised saving |\n|---|---|---|---|---|")
    for name in calls:
        ratio = statistics.median(own / whole for own, whole in zip(samples[name], samples["untouched"], strict=True))
        share = work[name] / work["untouched"]
        saving = f"{(1 - ratio) / (1 - share):.2f}" if share < 0.9 else "–"
        print(f"| {name} | {share:.3f} | {statistics.median(samples[name]):.2f} | {ratio:.3f} | {saving} |")


if __name__ == "__main__":
    main()
