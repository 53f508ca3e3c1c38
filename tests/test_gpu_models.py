"""On a GPU: models on every back-end, against the reference and float64. Elsewhere every test is skipped."""

import copy

import pytest
import torch

from bench.cases import Case
from bench.gate import check, evaluate, full_float32, psnr
from bench.measure import build
from dcdit.model.layers import linear_gelu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none"),
]
DEVICE = "cuda"


@pytest.mark.parametrize(("dtype", "least"), [("float32", 50), ("bfloat16", 34)])
def test_back_ends_sample_the_same_pictures(dtype, least):
    """A batch sampled with Lite-CFG from equal noise, eager, as graphs, and on the reference operators."""
    problem = build(Case("sample", "digits", 14, 4, dtype=dtype), DEVICE)
    with full_float32():
        names = ("dcdit", "dcdit graph", "dcdit reference")
        eager, graph, reference = (evaluate(problem.variants[name], problem.inputs, False)[0] for name in names)
    found = [psnr(eager, reference), psnr(graph, reference), psnr(graph, eager)]
    assert min(found) >= least, found


def test_model_case():
    """Every variant of a forward pass that is timed, replayed graphs among them, within its budget."""
    problem = build(Case("forward", "digits", 14, 2, drop_fraction=0.5, dtype="bfloat16"), DEVICE)
    assert {"dcdit graph", "DiT/2 graph"} <= problem.variants.keys()
    assert not {name: reason for name, reason in check(problem).items() if reason}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 77])
def test_gelu_inside_the_product(rows, dtype):
    """Against float64 no worse than a separate pass; a hook still sees the layer's output."""
    layer = torch.nn.Linear(72, 288).to(DEVICE, dtype)
    x = 2 * torch.randn(rows, 72, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        want = torch.nn.functional.gelu(copy.deepcopy(layer).double()(x.double()), approximate="tanh")
        got, apart = linear_gelu(layer, x), torch.nn.functional.gelu(layer(x), approximate="tanh")
        assert got.dtype == dtype and got.shape == (rows, 288)
        assert (got - want).abs().max() <= (apart - want).abs().max()
        seen = []
        layer.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        torch.testing.assert_close(linear_gelu(layer, x), apart, rtol=0, atol=0)
        assert torch.equal(seen[0], layer(x))
