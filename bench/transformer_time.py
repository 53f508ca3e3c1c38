"""Time of a chunked FLUX-like stack beside the untouched one: python -m bench.transformer_time [--device cuda]

On a CPU: width 512, 1024 image and 64 text tokens, two samples, three double and six single blocks with random weights;
one thread, whose CPU seconds are counted, which other processes do not lengthen much. On a GPU: two double and four
single blocks of FLUX.1's width 3072, 4096 image tokens (1024 px) and 512 of text, bfloat16, by the wall clock; beside
ρ, for whose tokens the host waits, a budget that is a number, eagerly and as a CUDA graph, and the untouched model as a
graph. The models take turns in one run. The realised saving is the share of the time that is saved over the share of
the FLOPs that is, plan and gathers included; graphs are compared with the untouched graph.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

from dcdit import enable_cuda_graph
from dcdit.integrations.attention import add_dynamic_chunking

from .arguments import add_device, positive
from .timing import interleave
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


KEPT = {"all kept": 1.0, "half kept": 0.5, "a quarter kept": 0.25}
FORMS = {"cpu": ("",), "cuda": (", graph", "", ", budget")}


def stack(device: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The untouched model and its inputs."""
    side, text, batch = SIDE[device], TEXT[device], BATCH[device]
    double, single = LAYERS[device]
    dtype, before = torch.float32 if device == "cpu" else torch.bfloat16, torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=double, num_single_layers=single, pooled_projection_dim=64, **SIZES[device]
        )
        torch.set_default_dtype(before)
        inputs = {
            "hidden_states": torch.randn(batch, side**2, 16, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, text, SIZES[device]["joint_attention_dim"], dtype=dtype),
            "pooled_projections": torch.randn(batch, 64, dtype=dtype),
            "timestep": torch.rand(batch, dtype=dtype),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side))),
            "txt_ids": torch.zeros(text, 3),
        }
    return model.eval().requires_grad_(False), inputs


def names(device: str) -> list[str]:
    """The variants: the untouched model, then shares of the tokens as graphs, by ρ and by a budget."""
    chunked = [f"{share}{form}" for form in FORMS[device] for share in KEPT]
    return ["untouched", *(["untouched, graph"] if ", graph" in FORMS[device] else []), *chunked]


def variant(untouched: nn.Module, inputs: dict[str, torch.Tensor], name: str) -> tuple[Callable[[], Any], int]:
    """A warm forward and its FLOPs."""
    share, _, form = name.partition(", ")
    model = copy.deepcopy(untouched)
    call = own = lambda: model(**inputs)
    if share != "untouched":
        chunking = add_dynamic_chunking(model)
        model.requires_grad_(False)
        if form:
            chunking.budget_per_sample = round(KEPT[share] * inputs["hidden_states"].shape[1])
        else:
            chunking.drop_fraction = 1 - KEPT[share]
    if form == "graph":
        graph = enable_cuda_graph(model)
        call()
        own = lambda: graph.own(**inputs)  # noqa: E731
        bits = "the bits" if torch.equal(call().sample, own().sample) else "NOT the bits"
        print(f"{name}: {graph.summary()}, {bits} of its own forward", flush=True)
    work = flops(own)  # a replay shows no operators
    for _ in range(3):
        call()
    return call, work


def clock(call: Callable[[], Any], device: str, host: list[float]) -> Callable[[], float]:
    """Seconds of a call, and in `host` those until it is back: of a CPU's process, or by the wall clock."""
    now, wait = (time.perf_counter, torch.cuda.synchronize) if device == "cuda" else (time.process_time, int)

    def sample() -> float:
        wait()
        begin = now()
        call()
        host.append(now() - begin)
        wait()
        return now() - begin

    return sample


@torch.no_grad()
def main() -> None:
    """Print a row for each variant; one that fails costs a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=9)
    add_device(parser, "cpu")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no further variant is made")
    args = parser.parse_args()
    begin = time.perf_counter()
    torch.set_num_threads(1)
    untouched, inputs = stack(args.device)
    clocks: dict[str, Callable[[], float]] = {}
    work: dict[str, int] = {}
    host: dict[str, list[float]] = {}
    for name in names(args.device):
        if time.perf_counter() - begin > args.limit:
            print(f"{name}: no time left", flush=True)
            continue
        try:
            call, work[name] = variant(untouched, inputs, name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
        else:
            host[name] = []
            clocks[name] = clock(call, args.device, host[name])
    samples = interleave(clocks, args.rounds, 1e9)
    print("| | FLOPs | seconds | of them on the host | time | realised saving |\n|---|---|---|---|---|---|")
    for name in clocks:
        chunked_graph = name.endswith("graph") and name != "untouched, graph"
        like = ("untouched, graph", "untouched") if chunked_graph else ("untouched",)
        base = next((other for other in like if other in clocks), name)
        ratio = statistics.median(own / whole for own, whole in zip(samples[name], samples[base], strict=True))
        share = work[name] / work[base]
        saving = f"{(1 - ratio) / (1 - share):.2f}" if share < 0.9 else "–"
        seconds = [statistics.median(found[name]) for found in (samples, host)]
        print(f"| {name} | {share:.3f} | {seconds[0]:.4g} | {seconds[1]:.4g} | {ratio:.3f} | {saving} |")


if __name__ == "__main__":
    main()
