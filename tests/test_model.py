"""Sizes and FLOPs of the presets, the model's contract, its checkpoints, and its errors for bad input."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from dcdit.checkpoints.folder import load_checkpoint, save_checkpoint
from dcdit.commands.info import count_parameters
from dcdit.errors import CheckpointError, ConfigError
from dcdit.model.config import PRESETS, DCDiTConfig, preset
from dcdit.model.dcdit import DCDiT
from dcdit.model.embedders import sincos_2d
from dcdit.model.flops import dcdit_flops, dit_flops
from dcdit.model.layers import RMSNorm, gelu_tanh
from dcdit.model.routing import Routing

TINY = DCDiTConfig(
    input_size=(7, 9), in_channels=3, num_classes=5, hidden_size=64, depth=2, num_heads=2, encoder_width=32
)

# METHOD section 3: parameters without and with the 256 px position table, GFLOP at M = 256 in total and by part.
TABLE = {
    "S": (34_367_241, 34_760_457, 15.1, (1.27, 1.27, 0.42, 12.1), 3.02),
    "B": (136_343_049, 137_129_481, 57.9, (5.06, 5.06, 1.66, 46.0), 11.46),
    "L": (468_563_977, 469_612_553, 182.5, (8.99, 8.99, 2.95, 161.4), None),
    "XL": (688_409_865, 689_589_513, 264.0, (11.4, 11.4, 3.74, 237.3), 59.00),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DCDiT(TINY)
    for parameter in model.parameters():  # nothing zero, so that every part shows in the output
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_compiles_into_one_graph(model):
    """Forward and backward of the whole model, whatever the router keeps."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rho in (0.0, 0.6):
        grads = []
        for run in (compiled, model):
            model.zero_grad()
            out = run(*batch(), drop_fraction=torch.tensor(rho))
            out.square().mean().backward()
            grads.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_segment_means_and_norm_groups():
    """A token depends on all cells that it refills, and the options pass through config.json."""
    config = DCDiTConfig.from_dict({**TINY.to_dict(), "segment_mean": True, "norm_groups": 8})
    assert config.to_dict()["segment_mean"] and TINY.norm_groups == 32
    torch.manual_seed(0)
    mean, own = DCDiT(config), DCDiT(TINY)
    assert {norm.num_groups for norm in mean.modules() if isinstance(norm, torch.nn.GroupNorm)} == {8}
    seen = {}
    for name, net in (("mean", mean), ("own", own)):
        net.main.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        h = torch.randn(1, net.config.cells, net.config.hidden_size, requires_grad=True)
        prob = (torch.arange(net.config.cells) % 9 == 4).float()[None]
        routing = Routing.of(prob, net.config.input_size)
        net.encode = lambda x, c, h=h: h
        x, t, y = batch(1)
        net(x, t, y, routing=routing)
        (grad,) = torch.autograd.grad(seen[name].sum(), h)
        assert int((grad[0].abs().sum(1) > 0).sum()) == (net.config.cells if name == "mean" else int(prob.sum()))


@pytest.mark.parametrize("grid", [TINY.input_size, (6, 5)])
def test_positions_are_means_over_segments(grid):
    """As cells are, token by token; of the configuration's grid and of another."""
    config = DCDiTConfig.from_dict({**TINY.to_dict(), "segment_mean": True, "mean_positions": True})
    model, cells = DCDiT(config).double(), math.prod(grid)
    h = torch.randn(2, cells, config.hidden_size, dtype=torch.float64)
    routing = Routing.of((torch.arange(2 * cells).view(2, cells) % 7 == 3).double(), grid)
    placed = (h + sincos_2d(config.hidden_size, grid).double()).flatten(0, 1)
    owner = routing.plan.nearest.flatten()
    want = torch.stack([placed[owner == token].mean(0) for token in range(int(routing.boundary_mask.sum()))])
    torch.testing.assert_close(model.gather(h, routing)[: len(want)], want, rtol=0, atol=1e-12)
    assert model.gather(h.bfloat16(), routing).dtype == torch.bfloat16


@pytest.mark.parametrize("meta", [False, True])
def test_a_direct_start(meta):
    """Each cell reaches the decoder from the first step, as strong as nine taps would make it."""
    config = DCDiTConfig.from_dict({**TINY.to_dict(), "direct_init": True})
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        direct = DCDiT(config)
    if meta:
        direct.to_empty(device="cpu").init_weights()
    torch.manual_seed(0)
    usual, x = DCDiT(TINY), torch.randn(8, config.in_channels, *config.input_size)
    apart = x.clone()
    apart[..., 0, 0] += 1
    changed = (direct.stem(apart) - direct.stem(x)).detach().abs().amax((0, 1)) > 1e-6
    assert changed[0, 0] and changed.sum() == 1
    h = torch.randn(2, config.hidden_size)
    torch.testing.assert_close(direct.residual_proj(h), h)
    ratio = direct.stem(x).var() / usual.stem(x).var()
    assert 0.5 < ratio < 2 and not usual.residual_proj.weight.any()


def test_a_regular_grid_is_kept():
    """Besides the router's cells and the caller's, but for banned cells; a drop takes none of the grid."""
    torch.manual_seed(0)
    net = DCDiT(DCDiTConfig.from_dict({**TINY.to_dict(), "keep_grid": 3}))
    grid = torch.zeros(7, 9, dtype=torch.bool)
    grid[::3, ::3] = True
    grid = grid.flatten().expand(3, -1)
    keep, ban = torch.zeros(2, 3, 63, dtype=torch.bool)
    keep[1, 5], ban[2, 27], ban[2, 28] = True, True, True
    for rho in (0.0, 0.9):
        routing = net(*batch(), drop_fraction=rho, return_routing=True, keep=keep, ban=ban)[1]
        want = (grid | keep) & ~ban
        assert (routing.boundary_mask & want).equal(want)
        left = routing.boundary_mask & ~want
        assert not (left & ~routing.natural_mask).any()


def test_a_graph_may_break_at_an_operator(model):
    """torch.compile without fullgraph stops at the plan, of a size by the data, and does not go on inside it."""
    torch._dynamo.reset()
    out = torch.compile(model, backend="eager")(*batch())
    assert torch.equal(out, model(*batch()))


def batch(n=3):
    torch.manual_seed(1)
    return torch.randn(n, 3, 7, 9), torch.rand(n) * 1000, torch.arange(n) % 6


@pytest.mark.parametrize("size", TABLE)
def test_preset_matches_the_paper(size):
    parameters, with_table, total, parts, tera_per_image = TABLE[size]
    config = preset(f"DC-DiT-{size}/N4")
    trainable, table = count_parameters(config)
    assert (trainable, trainable + table) == (parameters, with_table)
    flops = dcdit_flops(config, 256)
    assert flops["total"] == pytest.approx(total, rel=0.01)
    assert [flops[p] for p in ("encoder", "decoder", "router", "main")] == pytest.approx(
        parts,
        rel=0.01,
        abs=0.005,  # the table rounds to hundredths
    )
    if tera_per_image:  # the paper's plain DiT/2: 250 steps, 256 tokens
        assert dit_flops(config, 256) * 250 / 1000 == pytest.approx(tera_per_image, rel=0.01)


def test_presets_by_name():
    assert {f"DC-DiT-{s}/N{n}{px}" for s in TABLE for n in (4, 16) for px in ("", "-512")} < set(PRESETS)
    assert preset("DC-DiT-XL/N16-512").input_size == (64, 64)
    assert preset("DC-DiT-B/N16").target_ratio == 16


def test_forward_shapes_and_routing(model):
    x, t, y = batch()
    out, routing = model(x, t, y, drop_fraction=0.5, return_routing=True)
    assert out.shape == (3, 6, 7, 9) and torch.equal(out, model(x, t, y, drop_fraction=0.5))
    for field in (routing.boundary_prob, routing.boundary_mask, routing.natural_mask):
        assert field.shape == (3, 63)
    natural, kept = routing.natural_mask.sum(1), routing.boundary_mask.sum(1)
    assert torch.equal(kept, natural - (natural * 0.5).floor().long())
    assert torch.equal(kept, routing.plan.lengths)
    assert not (routing.boundary_mask & ~routing.natural_mask).any()


def test_gelu_takes_no_memory_where_no_gradient_is_wanted():
    x = torch.randn(3, 5)
    want, leaf = F.gelu(x, approximate="tanh"), x.clone().requires_grad_()
    with torch.no_grad():
        place = x.data_ptr()
        assert gelu_tanh(x).data_ptr() == place and torch.equal(x, want)
    out = gelu_tanh(leaf)
    assert torch.equal(out, want) and out.data_ptr() != leaf.data_ptr()


def test_norm_stays_in_the_dtype_of_its_input():
    norm, x = RMSNorm(8, eps=1e-5), torch.randn(3, 8).bfloat16()
    torch.nn.init.normal_(norm.weight)
    got = norm(x)
    wide = x.double()
    want = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=0)
    got.sum().backward()
    assert norm.weight.grad.dtype == torch.float32


def test_capacity_changes_nothing_while_there_is_room(model):
    """Output and gradients, whatever is spare; past it the least probable cells of the batch go, and are counted."""
    want, exact = model(*batch(), return_routing=True)
    live = exact.plan.capacity
    for capacity in (live, live + 50):
        got, routing = model(*batch(), return_routing=True, capacity=capacity)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert routing.plan.capacity == capacity and not routing.plan.overflow
    grads = [
        torch.autograd.grad(model(*batch(), capacity=capacity).square().mean(), list(model.parameters()))
        for capacity in (None, live + 50)
    ]
    for got, want_grad in zip(*grads, strict=True):
        torch.testing.assert_close(got, want_grad, rtol=1e-4, atol=1e-5)
    short, routing = model(*batch(), return_routing=True, capacity=live - 5)
    assert int(routing.plan.overflow) == 5 and short.isfinite().all()
    kept, prob = routing.plan.boundary_mask, exact.boundary_prob
    lost = exact.plan.boundary_mask & ~kept
    assert lost.sum() == 5 and kept.sum() == live - 5 and prob[lost].max() <= prob[kept].min()
    touched = lost.any(1)
    torch.testing.assert_close(short[~touched], want[~touched], rtol=1e-4, atol=1e-5)
    assert not any(torch.allclose(a, b) for a, b in zip(short[touched], want[touched], strict=True))


def test_samples_do_not_see_each_other(model):
    """Each sample alone gives its result in the batch, with its own ρ."""
    x, t, y = batch()
    model, x = model.double(), x.double()
    rho = torch.tensor([0.0, 0.4, 0.9])
    together = model(x, t, y, drop_fraction=rho)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1], drop_fraction=float(rho[i]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("router", ["predictability", "cosine"])
def test_every_parameter_learns(router):
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(**{**TINY.to_dict(), "router": router, "hidden_size": 128, "encoder_width": 64}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model(*batch()).square().mean().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


def test_fresh_router_keeps_few(model):
    """The last bias of a fresh predictability router is -log(N - 1): p is about 1 / N."""
    prob = DCDiT(preset("digits"))(torch.randn(2, 4, 14, 14), torch.ones(2), torch.zeros(2).long(), 0.0, True)[1]
    assert prob.boundary_prob.mean().item() == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 7, 9)}, r"x must have shape \(B, 3, H, W\), got \(3, 4, 7, 9\)"),
        ({"x": torch.zeros(3, 3, 7, 9).long()}, "x must be torch.float32 as the model is, got torch.int64"),
        ({"x": torch.zeros(3, 3, 7, 9).half()}, "x must be torch.float32 as the model is, got torch.float16"),
        ({"t": torch.zeros(2)}, r"t must have shape \(3,\), got \(2,\)"),
        ({"y": torch.tensor([0, 1, 6])}, r"class ids must be in \[0, 5\], got 0 to 6"),
        ({"y": torch.zeros(3)}, "y must hold integer class ids, got torch.float32"),
        ({"drop_fraction": 1.0}, r"drop_fraction must be in \[0, 1\), got 1.0"),
        ({"drop_fraction": torch.zeros(2)}, r"drop_fraction must have shape \(3\), got \(2,\)"),
    ],
)
def test_bad_input(model, change, message):
    x, t, y = batch()
    with pytest.raises(ValueError, match=message):
        model(**{"x": x, "t": t, "y": y, **change})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 64}, "unknown model key 'hiden_size'; did you mean 'hidden_size'"),
        ({"preset": "DC-DiT-M/N4"}, "unknown preset name 'DC-DiT-M/N4'; did you mean 'DC-DiT-"),
        ({"num_heads": 5}, "hidden_size 384 is not a multiple of num_heads 5"),
        ({"router": "magic"}, "router must be one of"),
        ({"preset": "dc-dit-xl/n4"}, "did you mean 'DC-DiT-XL/N4'"),
        ({"input_size": (4, 4, 4)}, "input_size must be two positive integers"),
        ({"input_size": "32"}, "input_size must be two positive integers"),
        ({"input_size": [8.5, 8]}, "input_size must be two positive integers"),
        ({"mlp_ratio": "4"}, "mlp_ratio must be a number, got '4'"),
        ({"sigma": None}, "sigma must be a number, got None"),
        ({"learn_sigma": "no"}, "learn_sigma must be true or false, got 'no'"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"depth": True}, "depth must be a positive integer, got True"),
        ({"num_classes": 2**63}, r"num_classes must be less than 2\*\*31, got 9223372036854775808"),
        ({"target_ratio": 1}, "target_ratio N must be greater than 1"),
        ({"norm_groups": 64}, "must be multiples of norm_groups 64, got 384 and 96"),
        ({"keep_grid": -1}, "keep_grid must be an integer of at least 0, got -1"),
        ({"direct_init": 1}, "direct_init must be true or false, got 1"),
        ({"segment_mean": 1}, "segment_mean must be true or false, got 1"),
        ({"mean_positions": True}, "mean_positions needs segment_mean: true"),
    ],
)
def test_bad_config(values, message):
    with pytest.raises(ConfigError, match=message):
        DCDiTConfig.from_dict(values)


def test_checkpoint_round_trip(model, tmp_path):
    save_checkpoint(tmp_path / "a", model, {"objective": "flow"})
    save_checkpoint(tmp_path / "a", model, {"objective": "ddpm"})  # over an old one
    loaded, extra = load_checkpoint(tmp_path / "a")
    assert loaded.config == TINY and extra == {"objective": "ddpm"}
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "link").symlink_to("a")
    save_checkpoint(tmp_path / "link", model)
    assert load_checkpoint(tmp_path / "a")[1] == {} and (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "link"]


def test_failed_write_leaves_the_old_checkpoint(model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a", model)
    before = (tmp_path / "a" / "model.safetensors").read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "a", model)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_bad_checkpoints(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_checkpoint(tmp_path / "none")
    save_checkpoint(tmp_path / "a", model)
    weights, config = tmp_path / "a" / "model.safetensors", tmp_path / "a" / "config.json"
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file, expected a folder of config\.json and"):
        load_checkpoint(weights)
    whole, values = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load_checkpoint(tmp_path / "a")
    weights.write_bytes(whole)
    values["model"]["depth"] = 3
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json says depth 3, the weights have 2 blocks"):
        load_checkpoint(tmp_path / "a")
    values["model"].update(depth=2, num_classes=7)
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"class_embed.weight: expected shape \(8, 64\), found \(6, 64\)"):
        load_checkpoint(tmp_path / "a")
    for text in ("[]", "{}", '{"model": 3}'):
        config.write_text(text)
        with pytest.raises(CheckpointError, match="is not a dcdit config: expected a mapping"):
            load_checkpoint(tmp_path / "a")


def test_info_prints_the_table(capsys):
    from dcdit.cli import main

    assert main(["info", "DC-DiT-S/N4"]) == 0
    out = capsys.readouterr().out
    assert "34,367,241" in out and "34,760,457" in out
    assert main(["info", "DC-DiT-S/N5"]) == 2
    assert "did you mean 'DC-DiT-S/N4'" in capsys.readouterr().err
