"""The saving: time and FLOPs over the plain DiT's, and time by component."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from dcdit.model import routing as routing_module
from dcdit.model.flops import dcdit_flops

from .cases import Case
from .measure import build
from .models import kept_tokens, products
from .operators import OURS
from .problem import Tensors
from .timing import between, delay, ratios, stamp

PRODUCTS = ("aten::linear", "aten::conv2d", "aten::scaled_dot_product_attention")
COMPONENTS = ("embed", "encoder", "router", "plan", "chunk", "main", "dechunk", "decoder")


def saving(entry: dict, variant: str = "dcdit", base: str = "DiT/2") -> dict | None:
    """Time and FLOPs of a variant over the plain DiT's, and the realised saving: time saved over FLOPs saved.

    None where either has no time; "realised" is None where no FLOPs are saved.
    """
    ours, plain = (entry["variants"].get(name, {}) for name in (variant, base))
    if ours.get("status") != "ok" or plain.get("status") != "ok":
        return None
    ratio, low, high = ratios(ours["samples"], plain["samples"])
    flops = ours["gflop_per_image"] / plain["gflop_per_image"]
    realised = (1 - ratio) / (1 - flops) if flops < 0.99 else None
    return {"time": ratio, "low": low, "high": high, "flops": flops, "realised": realised}


def fastest(entry: dict) -> dict | None:
    """The fastest of our back-ends on an operator case, or None."""
    ours = [entry["variants"][name] for name in OURS if entry["variants"].get(name, {}).get("status") == "ok"]
    return min(ours, key=lambda variant: variant["seconds"], default=None)


def component_times(case: Case, device: str, rounds: int = 5) -> dict[str, float]:
    """Median seconds of each part of the forward pass of `dcdit`; "rest" is the time between parts.

    On a GPU of device time: behind a delay as long as the host needs, with rows for exactly the tokens, so that nothing
    waits.
    """
    net, inputs = shipped(case, device)
    kept = kept_tokens(case, case.drop_fraction)
    limits = {"capacity": case.batch * kept, "max_seqlen": kept} if device == "cuda" else {}
    launching = 0.0
    marks: list[tuple[str, object]] = []
    taken: list[Counter[str]] = []
    with torch.no_grad(), marked(net, marks, device), products(case.torch_dtype):
        for _ in range(rounds + 1):
            marks.clear()
            delay(device, launching)
            marks.append(("begin", stamp(device)))
            begin = time.perf_counter()
            net(*inputs, case.drop_fraction, **limits)
            launching = time.perf_counter() - begin
            marks.append(("rest", stamp(device)))
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(Counter())
            for (_, before), (name, after) in itertools.pairwise(marks):
                taken[-1][name] += between(before, after)
    warm_up, *taken = taken
    return {name: float(f"{statistics.median(spent[name] for spent in taken):.4g}") for name in warm_up}


def shipped(case: Case, device: str) -> tuple[torch.nn.Module, Tensors]:
    """The network of `dcdit` in the dtype of a forward case, and its inputs x, t, y."""
    problem = build(case, device)
    return problem.variants["dcdit"].run.args[0][case.torch_dtype], problem.inputs


def outside_products(case: Case, rounds: int = 5) -> float:
    """Share of the forward pass of `dcdit` on a CPU outside matrix products, convolutions and attention: the profiler's
    time of all operators less that of these with what they call, median of `rounds`."""
    net, inputs = shipped(case, "cpu")
    shares = []
    with torch.no_grad():
        net(*inputs, case.drop_fraction)
        for _ in range(rounds):
            with profile(activities=[ProfilerActivity.CPU]) as prof:
                net(*inputs, case.drop_fraction)
            events = prof.key_averages()
            everything = sum(event.self_cpu_time_total for event in events)
            shares.append(1 - sum(event.cpu_time_total for event in events if event.key in PRODUCTS) / everything)
    return float(f"{statistics.median(shares):.3g}")


def component_flops(case: Case) -> dict[str, float]:
    """Share of the forward's FLOPs by component, all that runs counted."""
    counted = dcdit_flops(case.config, kept_tokens(case, case.drop_fraction))
    everything = counted["total"] + counted["uncounted"]
    shares = {name: counted[name] / everything for name in ("encoder", "router", "main", "dechunk", "decoder")}
    return {**shares, "rest": counted["uncounted"] / everything}


@contextmanager
def marked(net: torch.nn.Module, marks: list, device: str) -> Iterator[None]:
    """Within it, every part of the model leaves a mark before ("rest" up to there) and after itself."""

    def mark(name: str) -> Callable[..., None]:
        return lambda *_: marks.append((name, stamp(device)))

    def wrapped(name: str, operator: Callable) -> Callable:
        def call(*args, **kwargs):
            mark("rest")()
            out = operator(*args, **kwargs)
            mark(name)()
            return out

        return call

    parts = {"embed": (net.time_embed, net.class_embed, net.stem), "encoder": (net.encoder,), "router": (net.router,)}
    parts |= {"main": (net.main,), "decoder": (net.decoder, net.final)}
    handles = []
    for name, modules in parts.items():
        for module in modules:
            handles += [module.register_forward_pre_hook(mark("rest")), module.register_forward_hook(mark(name))]
    operators = {"plan": "plan_chunks", "chunk": "chunk", "dechunk": "dechunk"}
    replaced = {function: wrapped(name, getattr(routing_module, function)) for name, function in operators.items()}
    with patch.multiple(routing_module, **replaced):
        yield
    for handle in handles:
        handle.remove()
