"""DyDiT against numbers of its public release in all modes, and against the plain DiT; nothing masked is run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dcdit.checkpoints import load_dydit
from dcdit.checkpoints.systems import dynamic_key
from dcdit.errors import CheckpointError, ConfigError
from dcdit.model import DyDiT, DyDiTConfig, Gates, PlainDiT
from dcdit.model import gates as gates_module
from dcdit.model.rival_macs import gate_rates
from dcdit.training.gate_loss import gate_loss, gate_target
from dcdit_kernels import use_backend

DATA = Path(__file__).parent / "data" / "systems"
TINY = {"hidden_size": 32, "num_heads": 2, "num_classes": 5, "input_size": (14, 6), "depth": 2}
TABLES = {"tiny": (64, 48), "DiT-S/2": (256, 384), "DiT-B/2": (256, 768), "DiT-XL/2": (256, 1152)}
GATES = ("head_mask", "group_mask", "token_mask")


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "dydit_a.io.safetensors") | load_file(DATA / "dydit_a.grad.safetensors")


@pytest.fixture
def model():
    return load_dydit(load_file(DATA / "dydit_a.state.safetensors"), num_heads=4)


def close(actual, wanted, bound, what):
    error = float((actual.detach() - wanted).norm() / wanted.norm())
    assert error <= bound, f"{what}: {error:.1e} > {bound}"


def masks(golden, mode):
    heads, groups, tokens = (golden[f"{mode}/{name}"].float() for name in GATES)
    return Gates(heads, groups, tokens.squeeze(3))


def run(model, golden, mode, monkeypatch):
    """One forward of a mode of the golden; returns x, the output and the gates (None in the complete pass)."""
    x = golden["in/x"].clone().requires_grad_()
    inputs = x, golden["in/t"], golden["in/y"]
    if mode == "complete":
        return x, model(*inputs, complete=True), None
    if mode == "evalconst":
        return x, *model(*inputs, return_gates=True, gates=masks(golden, "eval"))
    model.train(mode.startswith("train"))
    parts = ("attn_rate", "token_selection", "mlp_rate")
    noises = iter([f"trainN/noise/blocks.{i}.{part}" for i in range(4) for part in parts])

    def noise(like):
        return golden[next(noises)].reshape(like.shape) if mode == "trainN" else torch.zeros_like(like)

    monkeypatch.setattr(gates_module, "logistic_noise", noise)
    return x, *model(*inputs, return_gates=True)


MODES = ["eval", "evalconst", "train0", "trainN", "complete"]


@pytest.mark.parametrize("mode", MODES)
def test_release_outputs_and_gradients(model, golden, mode, monkeypatch):
    seen = {}
    for number, block in enumerate(model.blocks):

        def keep(name, call):
            def kept(stream, c, packing, *rest):
                result = call(stream, c, packing, *rest)
                seen[name] = (result if mode == "complete" else result[0]).hidden(packing)
                return result

            return kept

        name = "forward" if mode == "complete" else "gated"
        monkeypatch.setattr(block, name, keep(f"blocks.{number}", getattr(block, name)))
    x, out, gates = run(model, golden, mode, monkeypatch)
    values = mode if mode in ("trainN", "complete") else "eval"
    close(out, golden[f"{values}/out"], 1e-5, "out")
    for name, hidden in seen.items():
        close(hidden.unflatten(0, (4, -1)), golden[f"{values}/act/{name}"], 1e-5, name)
    loss = (out * golden["in/loss_weight"]).sum() / len(x)
    close(loss, golden[f"{mode if mode != 'train0' else 'eval'}/loss"], 1e-5, "loss")
    if gates is not None:
        assert all(torch.equal(have, want) for have, want in zip(gates, masks(golden, values), strict=True))
    loss.backward()
    if f"{mode}/grad_in/x" in golden:
        close(x.grad, golden[f"{mode}/grad_in/x"], 3e-5, "gradient of x")
    check_gradients(model, golden, mode, "grad")


def check_gradients(model, golden, mode, kind):
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    prefix = f"{mode}/{kind}norm/"
    norms = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    if norms:
        assert {dynamic_key(key) for key in norms} == {name for name, grad in ours.items() if grad.any()}
    for key, norm in norms.items():
        close(ours[dynamic_key(key)].norm(), norm, 3e-5, f"norm of the gradient of {key}")
    for key, wanted in golden.items():
        if key.startswith(f"{mode}/{kind}/") and "final_layer.linear" not in key:  # its rows are in another order
            close(ours[dynamic_key(key.removeprefix(f"{mode}/{kind}/"))], wanted, 3e-5, key)


@pytest.mark.parametrize("mode", ["eval", "train0", "trainN"])
def test_flops_loss(model, golden, mode, monkeypatch):
    _, _, gates = run(model, golden, mode, monkeypatch)
    stored = mode if f"{mode}/flops/tiny/rate" in golden else "eval"
    for table, sizes in TABLES.items():
        rate = gate_rates(gates, *sizes).mean()
        close(rate, golden[f"{stored}/flops/{table}/rate"], 1e-5, table)
        for target in (0.5, 0.7):
            wanted = golden[f"{stored}/flops/{table}/loss_{target}"]
            assert abs(float(gate_loss(rate.detach(), target)) - wanted) <= 1e-6
    if mode != "eval":
        gate_loss(gate_rates(gates, *TABLES["tiny"]).mean(), 0.5).backward()
        check_gradients(model, golden, mode, "flopsgrad")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tabulated_release(model, golden, backend):
    """Weights sliced and tokens gathered: output and masks are unchanged, samples of several times in one batch."""
    inputs = golden["in/x"], golden["in/t"], golden["in/y"]
    with use_backend(backend):
        out, gates = model.tabulate(inputs[1])(*inputs, return_gates=True)
    close(out, golden["eval/out"], 1e-5, "out")
    assert all(torch.equal(have, want) for have, want in zip(gates, masks(golden, "eval"), strict=True))


def test_nothing_masked_is_computed(model, golden):
    """PyTorch counts the products of open gates and no others, to the multiply-add."""
    inputs = golden["in/x"][:1], golden["in/t"][:1], golden["in/y"][:1]
    table = model.tabulate(inputs[1])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # its products are counted
        _, gates = table(*inputs, return_gates=True)
    n, d, h = 64, 48, 4
    heads, groups, tokens = gates.heads[0].sum(1), gates.groups[0].sum(1), gates.tokens[0].sum(1)
    attention = (heads * (4 * n * d * d // h + 2 * n * n * d // h)).sum()
    mlp = (8 * d * d // h * groups * tokens).sum()
    routers = 4 * n * (d * (d // 16) + d // 16)
    rest = 16 * n * d + 256 * d + d * d + 6 * 4 * d * d + 2 * d * d + 32 * n * d
    assert counter.get_total_flops() / 2 == float(attention + mlp) + routers + rest
    assert gates.heads.mean() < 0.7 and gates.tokens.mean() < 0.7


def tiny():
    torch.manual_seed(3)
    plain = PlainDiT(DyDiTConfig(**TINY))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    net = DyDiT.from_dit(plain, DyDiTConfig(**TINY)).eval()
    inputs = torch.randn(3, 4, 14, 6), torch.tensor([3.0, 500.0, 3.0]), torch.tensor([0, 5, 2])
    return plain, net, inputs


@torch.no_grad()
def test_open_gates_are_the_dit():
    """A DyDiT fresh from a DiT equals it; its complete pass, its open gates and its table equal each other in bits."""
    plain, net, inputs = tiny()
    out, gates = net(*inputs, return_gates=True)
    assert all(part.all() for part in gates)
    close(out, plain(*inputs), 1e-5, "plain")
    assert torch.equal(net(*inputs, complete=True), out)
    close(net.tabulate(inputs[1])(*inputs), out, 1e-6, "tabulated")


@torch.no_grad()
@pytest.mark.parametrize("bias", [-50.0, 0.0])
def test_tabulated_uneven_grid(bias):
    """On 7×3 tokens, closed and random gates; one sample alone; a sample that keeps no token at all."""
    _, net, inputs = tiny()
    for block in net.blocks:
        for layer in (block.routers.heads, block.routers.groups, block.routers.tokens[2]):
            torch.nn.init.normal_(layer.weight, std=0.1 if bias else 1.0)
            torch.nn.init.constant_(layer.bias, bias)
    table = net.tabulate([3.0, 500.0, 900.0])
    out, gates = table(*inputs, return_gates=True)
    want, decided = net(*inputs, return_gates=True)
    close(out, want, 1e-5, "out")
    assert all(torch.equal(have, want) for have, want in zip(gates, decided, strict=True))
    assert (gates.tokens.sum() == 0) == (bias < 0) and gates.heads[..., 0].all() and gates.groups[..., 0].all()
    close(table(*(part[1:2] for part in inputs)), want[1:2], 1e-5, "one sample")


def test_logistic_noise():
    draws = gates_module.logistic_noise(torch.empty(100_000))
    assert abs(float(draws.mean())) < 0.03 and abs(float(draws.std()) / (torch.pi / 3**0.5) - 1) < 0.02


def test_target():
    assert [gate_target(step, 0.5, 1000) for step in (0, 99, 100, 500, 1000, 5000)] == [1, 1, 0.95, 0.75, 0.5, 0.5]


def test_bad_input(model):
    with pytest.raises(CheckpointError, match="expected the weights of DyDiT, these look like SparseDiT"):
        load_dydit(load_file(DATA / "sparse_a.state-1of2.safetensors"), num_heads=4)
    with pytest.raises(ConfigError, match="num_heads, 5"):
        load_dydit(load_file(DATA / "dydit_a.state.safetensors"), num_heads=5)
    for share in (0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=rf"the share of open gates must be in \(0, 1\], got {share}"):
            model.tabulate([5], share)
    with pytest.raises(ConfigError, match="has depth 2, the DiT to start from has 3"):
        DyDiT.from_dit(PlainDiT(DyDiTConfig(**TINY | {"depth": 3})), DyDiTConfig(**TINY))
    with pytest.raises(ConfigError, match="has num_heads 2, the DiT to start from has 4"):  # of equal shapes
        DyDiT.from_dit(PlainDiT(DyDiTConfig(**TINY | {"num_heads": 4})), DyDiTConfig(**TINY))
    x, t, y = torch.zeros(1, 4, 16, 16), torch.tensor([7]), torch.tensor([0])
    with pytest.raises(ValueError, match="t must be one of the 2 timesteps that were tabulated, got 7"):
        model.tabulate([5, 6])(x, t, y)
    with pytest.raises(ValueError, match="complete pass has no gates"):
        model(x, t, y, return_gates=True, complete=True)
    with safe_open(DATA / "dydit_a.io.safetensors", "pt") as file:
        assert json.loads(file.metadata()["threshold"]) == 0.5
