"""The model against numbers of the method's public release: every intermediate, the loss and every gradient."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dcdit.checkpoints.folder import from_release, load_state, release_key
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.training.objectives import ratio_loss
from dcdit_kernels import chunk, dechunk, plan_chunks, use_backend

DATA = Path(__file__).parent / "data"
CASES = [("dcdit_tiny", c) for c in ("full", "drop30", "per_sample")] + [
    ("dcdit_tiny_sigma2", c) for c in ("full", "drop60")
]


def load(name):
    file = DATA / f"{name}.safetensors"
    with safe_open(file, "pt") as handle:
        meta = handle.metadata()
    golden = load_file(file)
    width = int(meta["d_model"])
    factor = 1 if meta["enc_dec_dim_factor"] == "None" else int(meta["enc_dec_dim_factor"])
    side = int(meta["input_size"])
    config = DCDiTConfig(
        input_size=(side, side),
        in_channels=int(meta["in_channels"]),
        num_classes=int(meta["num_classes"]),
        hidden_size=width,
        depth=int(meta["depth"]),
        num_heads=int(meta["num_heads"]),
        encoder_width=width // factor,
        sigma=float(meta["dechunk_kernel_sigma"]),
    )
    model = DCDiT(config)
    state = {key[6:]: value for key, value in golden.items() if key.startswith("state.")}
    load_state(model, from_release(state))
    return model, golden


def close(actual, golden, rtol, what):
    """Largest error over the largest golden value: elementwise ratios mean nothing where a value is near zero."""
    error = (actual.double() - golden.double()).abs().max() / golden.double().abs().max().clamp(min=1e-30)
    assert error <= rtol, f"{what}: relative error {error:.2e} > {rtol}"


# A GPU's convolutions are in TF32, and beside it nothing interprets Triton's kernels.
BACKENDS = ("auto", "reference", "triton")[: 2 if torch.cuda.is_available() else 3]
RUNS = [(*case, backend) for case in CASES for backend in BACKENDS]


@pytest.fixture(params=RUNS, ids=lambda case: "-".join(case), scope="module")
def ran(request):
    """The model run once on a back-end with hooks on its parts, and its golden."""
    name, case, backend = request.param
    with use_backend(backend):
        return run(name, case)


def run(name, case):
    model, golden = load(name)
    seen = {}
    for part in ("encoder", "main", "decoder"):
        getattr(model, part).register_forward_hook(lambda m, i, o, part=part: seen.__setitem__(part, o))
    model.decoder.register_forward_pre_hook(lambda m, i: seen.__setitem__("decoder_in", i[0]))
    want = {key[len(case) + 1 :]: value for key, value in golden.items() if key.startswith(case + ".")}
    inputs = golden["in.x"], golden["in.t"], golden["in.y"]
    rho = want["drop_fraction"]
    out, routing = model(*inputs, drop_fraction=rho if rho.dim() else float(rho), return_routing=True)
    seen["out"] = out
    ratio = ratio_loss(routing.boundary_prob, routing.natural_mask, 4.0, sub_batch=len(out))
    loss = (out * want["loss_weight"]).sum() / len(out) + 0.03 * ratio
    loss.backward()
    return model, want, seen, routing, ratio, loss


@pytest.mark.parametrize("part", ["encoder", "main", "decoder", "out"])
def test_activations(ran, part):
    _, want, seen, *_ = ran
    close(seen[part], want[part], 1e-5, part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_and_dechunk(ran, backend):
    model, want, seen, routing, *_ = ran
    close(chunk(seen["encoder"], routing.plan, backend=backend), want["packed"], 1e-5, "packed")
    plugged = dechunk(seen["main"], routing.boundary_prob, routing.plan, sigma=model.config.sigma, backend=backend)
    close(plugged, want["dechunk"], 1e-5, "dechunk")
    close(seen["decoder_in"].flatten(2).transpose(1, 2), want["decoder_in"], 1e-5, "decoder_in")


def test_routing(ran):
    _, want, _, routing, *_ = ran
    close(routing.boundary_prob, want["boundary_prob"], 1e-5, "boundary_prob")
    close(
        torch.maximum(routing.boundary_prob, 1 - routing.boundary_prob),
        want["selected_prob"],
        1e-5,
        "confidence",
    )
    assert torch.equal(routing.natural_mask, want["natural_mask"].bool())
    assert torch.equal(routing.boundary_mask, want["boundary_mask"].bool())


def test_plan(ran):
    model, want, _, routing, *_ = ran
    plan = routing.plan
    assert torch.equal(plan.lengths.long(), want["lengths"])
    assert torch.equal(plan.token_index.long() % plan.cells, want["token_index"])
    start = plan.cu_seqlens[:-1, None]
    assert torch.equal((plan.nearest.view(plan.batch_size, -1) - start).long(), want["nearest_2d"])
    rho = want["drop_fraction"]
    plan = plan_chunks(routing.boundary_prob, model.config.input_size, rho if rho.dim() else float(rho), nearest="1d")
    assert torch.equal((plan.nearest.view(plan.batch_size, -1) - start).long(), want["nearest_1d"])


def test_loss_and_gradients(ran):
    model, want, *_, ratio, loss = ran
    close(ratio.detach(), want["ratio_loss"], 1e-5, "ratio_loss")
    close(loss.detach(), want["loss"], 1e-5, "loss")
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = {release_key(key[10:]): value for key, value in want.items() if key.startswith("grad_norm.")}
    assert norms.keys() == grads.keys()
    # With one channel per group a bias in front of a GroupNorm has no effect: its gradient is rounding, below 1e-5.
    zero = [name for name, norm in norms.items() if norm < 1e-5]
    assert all(name.endswith(("conv1.bias", "cond.1.bias", "cond.1.weight")) for name in zero)
    for name, norm in norms.items():
        if name in zero:
            assert grads[name].norm() < 1e-5
        else:
            close(grads[name].norm(), norm, 1e-4, f"norm of the gradient of {name}")
    checked = {release_key(key[5:]): value for key, value in want.items() if key.startswith("grad.")}
    assert len(checked) == 6
    for name, grad in checked.items():
        close(grads[name], grad, 1e-4, f"gradient of {name}")


@pytest.mark.parametrize("case", ["full", "drop30"])
def test_float64_model_agrees(case):
    """The operators in float64 stay within float32's own error of the golden."""
    model, golden = load("dcdit_tiny")
    out = model.double()(
        golden["in.x"].double(), golden["in.t"], golden["in.y"], float(golden[f"{case}.drop_fraction"])
    )
    close(out, golden[f"{case}.out"], 1e-5, "out")
