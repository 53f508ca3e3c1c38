"""Pictures of different sizes in one batch: each in the corner of one canvas, without valid cells around it."""

import pytest
import torch

import dcdit_kernels as K

GRIDS = [(5, 7), (8, 3), (1, 9), (8, 9)]
CANVAS = (8, 9)
WIDTH = 16


def on_canvas(parts, fill):
    """(h·w, …) of each picture → (B, L, …)."""
    out = torch.full((len(parts), *CANVAS, *parts[0].shape[1:]), fill, dtype=parts[0].dtype)
    for b, ((height, width), part) in enumerate(zip(GRIDS, parts, strict=True)):
        out[b, :height, :width] = part.unflatten(0, (height, width))
    return out.flatten(1, 2)


def cut(dense, b):
    """The picture b of (B, L, …), as (h·w, …)."""
    height, width = GRIDS[b]
    return dense[b].unflatten(0, CANVAS)[:height, :width].flatten(0, 1)


def run(h, prob, residual, grid, valid, backend):
    plan = K.plan_chunks(prob, grid, 0.2, valid=valid, backend=None if backend == "triton" else backend)
    x = K.chunk(h, plan, backend=None if backend == "native" else backend)
    return plan, x, K.dechunk(x * 2, prob, plan, residual, 1.3, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_as_each_picture_alone(backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    h, residual = ([torch.randn(a * b, WIDTH, dtype=dtype) for a, b in GRIDS] for _ in range(2))
    prob = [torch.rand(a * b, dtype=dtype) for a, b in GRIDS]
    prob[2][:] = 0.3  # no cell is kept
    valid = on_canvas([torch.ones(a * b, dtype=torch.bool) for a, b in GRIDS], False)
    together = [on_canvas(parts, 7.0).requires_grad_() for parts in (h, residual)]
    p = on_canvas(prob, 1.0).requires_grad_()
    plan, rows, out = run(together[0], p, together[1], CANVAS, valid, backend)
    weight = torch.randn_like(out) * valid[..., None]  # the loss is of the pictures alone
    grads = torch.autograd.grad(out, (*together, p), weight)
    for b, grid in enumerate(GRIDS):
        leaves = [t[b][None].requires_grad_() for t in (h, prob, residual)]
        alone, own_rows, own_out = run(leaves[0], leaves[1], leaves[2], grid, None, backend)
        start, end = plan.cu_seqlens[b : b + 2].tolist()
        assert end - start == alone.capacity
        torch.testing.assert_close(rows[start:end], own_rows)
        torch.testing.assert_close(cut(out, b), own_out[0])
        inputs = leaves[0], leaves[2], leaves[1]
        own_grads = torch.autograd.grad(
            own_out, inputs, cut(weight, b)[None], allow_unused=True, materialize_grads=True
        )
        for got, want in zip(grads, own_grads, strict=True):
            torch.testing.assert_close(cut(got, b), want[0], rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-10)
    for grad in grads:
        assert not grad[~valid].any()
