"""Derivatives beyond the first, and in forward mode: right, or an error that names the reference."""

import pytest
import torch
from torch.autograd import forward_ad

import dcdit_kernels as K
from dcdit_kernels import _library

PLAN = K.plan_chunks(torch.tensor([[0.9, 0.2, 0.7, 0.4], [0.8, 0.6, 0.1, 0.3]]), (2, 2), backend="reference")
ROWS = PLAN.capacity
SHAPES = {
    "h": (2, 4, 8), "pos": (4, 8), "x": (ROWS, 8), "y": (ROWS, 8), "vector": (2, 8), "other": (2, 8), "prob": (2, 4),
    "features": (2, 8, 2, 2), "channel": (8,), "bias": (1,),
}  # fmt: skip
OPERATORS = {
    "chunk": lambda t: K.chunk(t["h"], PLAN, t["pos"]),
    "chunk mean": lambda t: K.chunk(t["h"], PLAN, t["pos"], "mean"),
    "dechunk": lambda t: K.dechunk(t["x"], t["prob"], PLAN, t["h"]),
    "dechunk ema": lambda t: K.dechunk(t["x"], t["prob"], PLAN, t["h"], smoothing="ema"),
    "ema_smooth": lambda t: K.ema_smooth(t["x"], t["prob"], PLAN),
    "adaln_modulate": lambda t: K.adaln_modulate(t["x"], t["vector"], t["other"], PLAN),
    "adaln_modulate dense": lambda t: K.adaln_modulate(t["h"], t["vector"], t["other"]),
    "gate_residual": lambda t: K.gate_residual(t["x"], t["y"], t["vector"], PLAN),
    "gate_residual_modulate": lambda t: torch.cat(
        K.gate_residual_modulate(t["x"], t["y"], t["vector"], t["other"], t["vector"], PLAN)
    ),
    "boundary_cosine": lambda t: K.boundary_cosine(t["h"], t["h"].sin()),
    "boundary_predictability": lambda t: K.boundary_predictability(
        t["features"], t["channel"], t["channel"], t["channel"], t["bias"], groups=2
    ),
    "group_norm_silu": lambda t: K.group_norm_silu(t["features"], t["channel"], t["channel"], 2, t["vector"]),
    "qk_norm_rope": lambda t: torch.cat(
        K.qk_norm_rope(t["x"][:, None], t["y"][:, None], torch.ones(ROWS, 4), torch.ones(ROWS, 4), None, t["channel"])
    ),
    "pack_rows": lambda t: K.pack_rows(t["x"], torch.arange(ROWS)),
    "unpack_rows": lambda t: K.unpack_rows(t["x"], torch.arange(ROWS), ROWS + 1),
}
BACKENDS = ["native", "triton"]


def tensors(requires_grad=False):
    gen = torch.Generator().manual_seed(0)
    drawn = {name: torch.rand(shape, generator=gen) for name, shape in SHAPES.items()}
    return {name: t.requires_grad_(requires_grad) for name, t in drawn.items()}


def hessian_product(operator, backend):
    """Second derivatives of a function that uses each tensor outside of the operator too."""
    given = tensors(requires_grad=True)
    leaves = list(given.values())
    with K.use_backend(backend):
        value = OPERATORS[operator](given).pow(3).sum() + sum(t.pow(3).sum() for t in leaves)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.cos().sum() for g in first), leaves)


def tangent(operator, backend):
    with K.use_backend(backend), forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(t, torch.ones_like(t)) for name, t in tensors().items()}
        return forward_ad.unpack_dual(OPERATORS[operator](dual)).tangent


def transformed(operator, backend):
    given = tensors()

    def value(x):
        return OPERATORS[operator]({name: t * x for name, t in given.items()}).sum()

    with K.use_backend(backend):
        return torch.func.grad(value)(torch.tensor(1.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("derivative", [hessian_product, tangent, transformed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("operator", OPERATORS)
def test_right_or_refused(operator, derivative, backend):
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("the tensors are a CPU's")
    want = derivative(operator, "reference")
    try:
        got = derivative(operator, backend)
    except K.BackendError as error:
        assert 'use_backend("reference")' in str(error)
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_gradient_may_be_kept_with_its_graph():
    """The second derivative raises, and a graph for another derivative does not."""
    given = tensors(requires_grad=True)
    value = OPERATORS["gate_residual"](given).sum() + given["h"].pow(3).sum()
    got = torch.autograd.grad(value, [given["y"], given["h"]], create_graph=True)
    (second,) = torch.autograd.grad(got[1].sum(), given["h"])
    torch.testing.assert_close(second, 6 * given["h"])


def test_below_torch_compile():
    """`dcdit::NAME_backward` has no derivative either."""
    given = tensors(requires_grad=True)
    args = (given["h"], given["pos"], *_library.flat_plan(PLAN), "own", "reference")
    out = torch.ops.dcdit.chunk_backward(given["x"], [True, False], *args)[0]
    with pytest.raises(K.BackendError, match="gradients of gradients"):
        out.sum().backward()
