"""The reference's gradients against finite differences."""

import torch

from dcdit_kernels import reference
from dcdit_kernels.testing import make_scene


def test_reference_gradients_are_derivatives():
    """By finite differences, twice, and in forward mode. dechunk's straight-through confidence is none: p is fixed."""
    scene = make_scene((3, 4), batch=2, spare=2)
    prob, plan = scene.prob.double(), scene.plan
    cells, width = plan.cells, 3
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, y, h = draw(plan.capacity, width), draw(plan.capacity, width), draw(2, cells, width)
    modulators = draw(2, width), draw(2, width)
    inner = prob.clone().clamp(0.1, 0.9).requires_grad_()
    weights = draw(8), draw(8), draw(8), draw(1)
    angle = torch.rand(5, 4, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    cases = {
        "chunk": (lambda h, pos: reference.chunk(h, plan, pos), (h, draw(cells, width))),
        "chunk mean": (lambda h, pos: reference.chunk(h, plan, pos, "mean"), (h, draw(cells, width))),
        "dechunk": (lambda x, r: reference.dechunk(x, prob, plan, r, 1.3), (x, h)),
        "ema_smooth": (lambda x, p: reference.ema_smooth(x, p, plan), (x, inner)),
        "adaln_modulate": (lambda x, *m: reference.adaln_modulate(x, *m, plan), (x, *modulators)),
        "gate_residual": (lambda x, y, g: reference.gate_residual(x, y, g, plan), (x, y, modulators[0])),
        "boundary_cosine 1D": (
            lambda q, k: reference.boundary_cosine(q, k, None, None, cu_seqlens),
            (draw(9, 4), draw(9, 4)),
        ),
        "boundary_cosine 2D": (
            lambda q, k, w: reference.boundary_cosine(q, k, w / 9, (3, 4)),
            (h, draw(2, cells, 3), draw(3, 3, 3)),
        ),
        "boundary_predictability": (reference.boundary_predictability, (draw(2, 8, 2, 3), *weights)),
        "group_norm_silu": (
            lambda x, w, b, c, v: reference.group_norm_silu(x, w, b, c, v, groups=4),
            (draw(2, 8, 2, 3), *weights[:2], draw(2, 8), weights[2]),
        ),
        "qk_norm_rope": (
            lambda q, k, w: torch.cat(
                reference.qk_norm_rope(q, k, None, None, w, w, cos=angle.cos(), sin=angle.sin(), pairing="half")
            ),
            (draw(5, 2, 8), draw(5, 2, 8), weights[0]),
        ),
        "varlen_attention": (
            lambda q, k, v: reference.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, 5, 5),
            (draw(9, 2, 2), draw(9, 2, 2), draw(9, 2, 2)),
        ),
    }
    for name, (function, inputs) in cases.items():
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True), name
        # Second derivatives along random directions: in full they take twenty times as long.
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True), name
