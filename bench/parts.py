"""Where the time of a training step goes: each part of the model forward and backward, alone on inputs of its shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from dcdit_kernels import chunk, dechunk, plan_chunks

from .cases import Case
from .measure import build
from .models import products
from .operators import routed_prob
from .timing import between, delay, stamp


def training_parts(case: Case, device: str, step_s: float, rounds: int = 5) -> dict[str, float]:
    """Median seconds of each part of a training step of `dcdit` that takes `step_s`; on a GPU of device time, behind a
    delay as long as the host needs.

    "encoder" has the stem, "router" the residual projection, "decoder" the output layer; "rest" is the remainder of the
    step: embedders, losses, optimiser.
    """
    net = build(case, device).variants["dcdit"].run.args[0][torch.float32]
    config = net.config
    grid, width, cells = config.input_size, config.hidden_size, case.side**2

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    # In the dtypes that they have in a step: autocast leaves the router and the residual path in float32.
    c, active = draw(case.batch, width), draw(case.batch, width)
    x = draw(case.batch, config.in_channels, *grid)
    h, wide = draw(case.batch, cells, width, dtype=case.torch_dtype), draw(case.batch, cells, width)
    prob = routed_prob(case, device).clone().requires_grad_()
    plan = plan_chunks(prob, grid, case.drop_fraction)
    capacity = plan.capacity if device == "cuda" else None
    tokens, image = draw(plan.capacity, width, dtype=case.torch_dtype), h.transpose(1, 2).unflatten(2, grid)

    @torch.autocast(device, enabled=False)
    def score() -> tuple[torch.Tensor, torch.Tensor]:
        return net.router.inner(wide, c), net.residual_proj(wide)

    parts = {
        "encoder": lambda: net.encoder(net.stem(x), active),
        "router": score,
        "plan": lambda: plan_chunks(prob, grid, case.drop_fraction, capacity=capacity),
        "chunk": lambda: chunk(h, plan, net.pos_embed),
        "main": lambda: net.main(tokens, c, plan),
        "dechunk": lambda: dechunk(tokens, prob, plan, wide, config.sigma),
        "decoder": lambda: net.final(net.decoder(image, active), active),
    }
    leaves = [*net.parameters(), c, active, x, h, wide, prob, tokens]
    mixed = case.torch_dtype != torch.float32

    launching: dict[Callable, float] = {}

    def once(part: Callable[[], object]) -> float:
        """Seconds of `part` and its backward, with casts and gradients as fresh as each step has them."""
        delay(device, launching.get(part, 0.0))
        begin, before = time.perf_counter(), stamp(device)
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            out = part()
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor)]
        if outs:
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
        after = stamp(device)
        launching[part] = time.perf_counter() - begin
        if device == "cuda":
            torch.cuda.synchronize()
        for leaf in leaves:
            leaf.grad = None
        return between(before, after)

    with products(case.torch_dtype):  # after two calls to warm up
        times = {name: statistics.median([once(part) for _ in range(rounds + 2)][2:]) for name, part in parts.items()}
    times["rest"] = max(0.0, step_s - sum(times.values()))
    return {name: float(f"{seconds:.4g}") for name, seconds in times.items()}
