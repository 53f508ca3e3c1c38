"""Multiply-adds against the counts of the public releases, and against PyTorch's counter on the models here."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.savings import cases, half_open
from dcdit.checkpoints.folder import save_checkpoint
from dcdit.cli import main
from dcdit.errors import ConfigError
from dcdit.model import (
    DCDiTConfig,
    DyDCDiT,
    DyDiT,
    DyDiTConfig,
    PatchDiT,
    PatchDiTConfig,
    SparseDiT,
    SparseDiTConfig,
    preset,
)
from dcdit.model.flops import dcdit_flops
from dcdit.model.gated_macs import gated_flops, gated_tokens
from dcdit.model.rival_macs import dydit_macs, dydit_on, patch_dit_macs, patch_on, sparse_dit_macs, sparse_on
from dcdit_kernels import use_backend

MACS = json.loads((Path(__file__).parent / "data" / "systems" / "macs.json").read_text())
XL = {"hidden_size": 1152, "num_heads": 16}
SIZES = {"XL": (1152, 16, 28), "B": (768, 12, 12), "S": (384, 6, 12)}


@pytest.mark.parametrize("row", MACS["sparsedit"], ids=lambda row: row["case"])
def test_sparse_dit_as_released(row):
    """To the multiply-add; the models here take fewer."""
    pooling, groups, top = row["layout"]
    side, inner = (round(row[name] ** 0.5) for name in "NM")
    config = SparseDiTConfig(**XL, input_size=(2 * side,) * 2, pooling=pooling, groups=groups, top=top)
    assert sparse_dit_macs(config, inner, released=True) == row["all_matmuls"]
    saved = 2 * row["N"] * 1152**2 - 2 * 1152**2
    assert sparse_dit_macs(config, inner) == row["pool_as_mean_and_W1_before_upsampling"] - pooling * saved


@pytest.mark.parametrize(
    "row", MACS["plain"] + MACS["dydit"], ids=lambda row: f"{row['model']} {row.get('mode', row['px'])}"
)
def test_dydit_and_plain(row):
    width, heads, depth = SIZES[row["model"].split("-")[1].removesuffix("/2")]
    side = row["px"] // 8
    config = DyDiTConfig(hidden_size=width, num_heads=heads, depth=depth, input_size=(side, side))
    routed = row.get("mode", "").startswith("routers")
    # The release pads nothing and skips nothing: its routers are counted to 1e-4 of the whole.
    assert dydit_macs(config, routers=routed) == pytest.approx(row["all_matmuls"], rel=1e-4)


def test_published_dydit():
    """XL's published GFLOPs at λ 0.7 and 0.5, which the ratio brings about but for routers and gates."""
    config = DyDiTConfig(**XL, depth=28)
    for rate, published in ((0.7, 84.3), (0.5, 57.9)):
        assert dydit_macs(config, rate) / 1e9 == pytest.approx(published, rel=0.04)


def counted(model, *args):
    config = model.config
    x = torch.randn(1, config.in_channels, *config.input_size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.tensor([10.0]), torch.tensor([0]), *args)
    return counter.get_total_flops() / 2


def test_what_runs():
    """A small model of each, by PyTorch's count of its products."""
    sizes = {"hidden_size": 32, "num_heads": 2, "num_classes": 3, "input_size": (12, 8)}
    sparse = SparseDiTConfig(**sizes, pooling=2, groups=1, top=1, sparse_size=(2, 3))
    assert counted(SparseDiT(sparse)) == sparse_dit_macs(sparse)
    assert counted(SparseDiT(sparse), (4, 4)) == sparse_dit_macs(sparse, (4, 4))
    dynamic = DyDiTConfig(**sizes, depth=2)
    assert counted(DyDiT(dynamic)) == dydit_macs(dynamic)


@pytest.mark.parametrize("batch", [1, 2])
def test_savings_bench(batch):
    """`bench.savings` times the models that it counts."""
    forwards, macs = cases("digits", batch)
    names = {"plain", "sparse", "dydit"}  # the digits have 7×7 patches
    assert forwards.keys() == macs.keys() == names and macs["dydit"] < macs["plain"]
    assert all(forward().shape == (batch, 4, 14, 14) for forward in forwards.values())


@torch.no_grad()
def test_savings_bench_opens_half():
    """Every second head and group, and of each block's tokens one half."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 4, 12, 8), torch.full((3,), 500.0), torch.zeros(3, dtype=torch.long)
    config = DyDiTConfig(hidden_size=64, num_heads=4, num_classes=3, input_size=(12, 8), depth=3)
    gates = half_open(DyDiT(config).eval(), inputs).tabulate([500.0])(*inputs, return_gates=True)[1]
    assert (gates.heads == torch.tensor([1, 0, 1, 0.0])).all() and (gates.groups == gates.heads).all()
    assert torch.allclose(gates.tokens.mean((0, 2)), torch.tensor(0.5), atol=0.02)


def test_info(capsys):
    """The rivals beside the plain DiT, in GFLOP."""
    assert main(["info", "DC-DiT-XL/N4"]) in (0, None)
    out = capsys.readouterr().out
    config = preset("DC-DiT-XL/N4")
    assert "SparseDiT, 2 + 4×6 + 2 blocks" in out and "DyDiT" in out
    assert f"{2e-9 * sparse_dit_macs(sparse_on(config), 8):.4g}" in out
    assert f"{2e-9 * dydit_macs(dydit_on(config), 0.5):.4g}" in out
    assert "PatchDiT" in out and f"{2e-9 * patch_dit_macs(patch_on(config), 4):.4g}" in out


def test_info_of_a_checkpoint(tmp_path, capsys):
    """A folder of another system says which one it is, its parameters, and its cost beside the plain DiT's."""
    sizes = {"hidden_size": 32, "num_heads": 2, "num_classes": 3, "input_size": (16, 8)}
    for model, costs in (
        (SparseDiT(SparseDiTConfig(**sizes, pooling=1, sparse=1, top=1, sparse_size=(2, 3))), ["2×1"]),
        (DyDiT(DyDiTConfig(**sizes, depth=2)), ["25%", "50%"]),
        (PatchDiT(PatchDiTConfig(**sizes, depth=2)), ["2×2", "4×4", "8×8"]),
    ):
        folder = tmp_path / type(model).__name__
        save_checkpoint(folder, model, {"objective": "ddpm"})
        assert not main(["info", str(folder)])
        out = capsys.readouterr().out
        plain = dydit_macs(DyDiTConfig(**sizes, depth=model.config.depth), routers=False)
        assert type(model).__name__ in out and f"{sum(p.numel() for p in model.parameters()):,}" in out
        assert all(cost in out for cost in costs) and f"same size: {2e-9 * plain:.4g} GFLOP" in out


def test_info_of_gates_in_dcdit(tmp_path, capsys):
    """The routers of a DyDCDiT's gates are among its parameters, and among the products by PyTorch's own counter."""
    config = DCDiTConfig(hidden_size=64, depth=3, num_heads=4, encoder_width=32, input_size=(6, 8), num_classes=3)
    model = DyDCDiT(config).eval().requires_grad_(False)
    x, t, y = torch.randn(1, 4, 6, 8), torch.tensor([10.0]), torch.tensor([0])
    with use_backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, routing = model(x, t, y, return_routing=True)
    seen = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    want = gated_flops(config, int(routing.plan.lengths))
    gates = [
        flops for name, flops in seen.items() if ".routers." in name and name.endswith(("heads", "groups", "tokens"))
    ]
    assert len(gates) == 9 and sum(gates) == pytest.approx(1e9 * want["gates"])
    assert seen["DyDCDiT.main"] == pytest.approx(1e9 * (want["main"] + want["gates"]))
    folder = tmp_path / "model"
    save_checkpoint(folder, model, {"objective": "ddpm"})
    assert not main(["info", str(folder)])
    out = capsys.readouterr().out
    assert "DyDCDiT" in out and f"{sum(p.numel() for p in model.parameters()):,}" in out
    for name, rate in {"total": 1.0, "total, gates leaving 50%": 0.5}.items():
        flops = gated_flops(config, 24, rate)  # the fourth column: half of the cells
        line = next(line for line in out.splitlines() if line.strip().startswith(name + "  "))
        assert f"{flops['total']:.4g}" in line.split()
    assert main(["info", str(folder), "--budget", "8"]) == 2
    assert "--budget is of a DC-DiT" in capsys.readouterr().err


def test_gates_leave_a_share_of_the_blocks():
    """`gated_flops` and `gated_tokens` are one count; at rate 1 it is DC-DiT's and the routers'."""
    config, whole = preset("digits"), dcdit_flops(preset("digits"), 80)
    for rate in (0.3, 1.0):
        alike = float(gated_tokens(config, torch.tensor([80]), torch.tensor([rate])))
        flops = gated_flops(config, 80, rate)
        assert flops["total"] == pytest.approx(dcdit_flops(config, alike)["total"])
        assert flops["total"] == pytest.approx(
            sum(flops[part] for part in whole if part not in ("total", "uncounted")) + flops["gates"]
        )
    assert flops["main"] == whole["main"]


def test_layouts():
    for name, layout in (
        ("DC-DiT-XL/N4", (2, 4, 2)),
        ("DC-DiT-B/N4", (2, 1, 4)),
        ("DC-DiT-L/N4", (2, 3, 4)),
        ("digits", (0, 1, 0)),
    ):
        config = sparse_on(preset(name))
        assert (config.pooling, config.groups, config.top) == layout and config.depth == preset(name).depth
    with pytest.raises(ConfigError, match="a depth of at least 6, got 3"):
        sparse_on(type(preset("digits"))(depth=3))
