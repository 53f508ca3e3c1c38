"""Time of a chunked FLUX-like stack beside the untouched one: python -m bench.transformer_time [--device cuda]

On a CPU: width 512, 1024 image and 64 text tokens, two samples, three double and six single blocks with random weights;
one thread, whose CPU seconds are counted, which other processes do not lengthen much. On a GPU: two double and four
single blocks of FLUX.1's width 3072, 4096 image tokens (1024 px) and 512 of text, bfloat16, by the wall clock. The
models take turns in one run. The realised saving is the share of the time that is saved over the share of the FLOPs
that is, plan and gathers included.
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

from .timing import gpu_wall_clock, interleave
from .transformers import flops

LAYERS = {"cpu": (3, 6), "cuda": (2, 4)}  # double and single blocks
SIZES = {
    "cpu": {
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "joint_attention_dim": 64,
        "axes_dims_rope": (16, 24, 24),
    },
    "cuda": {"joint_attention_dim": 4096},
}
SIDE, TEXT, BATCH = {"cpu": 32, "cuda": 64}, {"cpu": 64, "cuda": 512}, {"cpu": 2, "cuda": 1}


def models(device: str) -> dict[str, Callable[[], object]]:
    """The forwards by name: untouched, wrapped with all cells kept, with a half and with a quarter of them."""
    side, text, batch = SIDE[device], TEXT[device], BATCH[device]
    double, single = LAYERS[device]
    dtype, before = torch.float32 if device == "cpu" else torch.bfloat16, torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(dtype)
        untouched = diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=double, num_single_layers=single, pooled_projection_dim=64, **SIZES[device]
        ).requires_grad_(False)
        torch.set_default_dtype(before)
        inputs = {
            "hidden_states": torch.randn(batch, side**2, 16, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, text, SIZES[device]["joint_attention_dim"], dtype=dtype),
            "pooled_projections": torch.randn(batch, 64, dtype=dtype),
            "timestep": torch.rand(batch, dtype=dtype),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side))),
            "txt_ids": torch.zeros(text, 3),
        }
    found = {"untouched": untouched}
    for name, rho in (("all kept", 0.0), ("half kept", 0.5), ("a quarter kept", 0.75)):
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    calls = models(args.device)
    work = {name: flops(call) for name, call in calls.items()}  # each is warm afterwards
    clock = gpu_wall_clock if args.device == "cuda" else lambda call: lambda: cpu_seconds(call)
    samples = interleave({name: clock(call) for name, call in calls.items()}, args.rounds, 1e9)
    print("| | FLOPs | seconds | time | realised saving |\n|---|---|---|---|---|")
    for name in calls:
        ratio = statistics.median(own / whole for own, whole in zip(samples[name], samples["untouched"], strict=True))
        share = work[name] / work["untouched"]
        saving = f"{(1 - ratio) / (1 - share):.2f}" if share < 0.9 else "–"
        print(f"| {name} | {share:.3f} | {statistics.median(samples[name]):.4g} | {ratio:.3f} | {saving} |")


if __name__ == "__main__":
    main()
