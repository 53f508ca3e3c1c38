"""PatchDiT: scale 1 is the DiT; resizes, third differences, choices, thresholds, training and bad input."""

import json
import math

import pytest
import torch
from test_rival_macs import counted

from dcdit.checkpoints.dit import to_dit
from dcdit.checkpoints.folder import load_checkpoint, save_checkpoint
from dcdit.cli import main
from dcdit.errors import CheckpointError, ConfigError
from dcdit.model import DiTConfig, PatchDiT, PatchDiTConfig, PlainDiT
from dcdit.model.dit_config import DyDiTConfig
from dcdit.model.patch_dit import bilinear
from dcdit.model.rival_macs import dydit_macs, patch_dit_macs
from dcdit.sampling import sample
from dcdit.sampling.calibration import calibrate
from dcdit.sampling.patches import PatchChoice, roughness, third_difference
from dcdit.training.config import load_config
from dcdit.training.run import train

SIZES = {"hidden_size": 32, "num_heads": 2, "num_classes": 4, "input_size": (16, 8), "depth": 2}
OPTIONS = {"objective": "flow", "steps": 8, "guidance": 2.0}


def dit(**sizes):
    torch.manual_seed(4)
    config = DyDiTConfig(**SIZES | {"learn_sigma": False} | sizes)
    net = PlainDiT(config, config.patch)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return net.eval()


def patched(base=None, rank=3, **sizes):
    base = base or dit(**sizes)
    return PatchDiT.from_dit(base, PatchDiTConfig(**SIZES | {"learn_sigma": False} | sizes, rank=rank)).eval()


def batch(count=2):
    torch.manual_seed(5)
    return torch.randn(count, 4, 16, 8), torch.linspace(900, 100, count), torch.arange(count)


@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_scale_1_is_the_dit(learned):
    base = dit(learn_sigma=learned)
    model = patched(base, learn_sigma=learned)
    for parameter in model.parameters():
        if parameter.requires_grad:  # whatever was learned
            torch.nn.init.normal_(parameter)
    assert torch.equal(model(*batch()), base(*batch()))
    for scale in (2, 4):
        assert model(*batch(), scale).shape == (2, 8 if learned else 4, 16, 8)
    want = sample(base, [0, 3], **OPTIONS).latents if not learned else None
    if not learned:
        assert torch.equal(sample(model, [0, 3], **OPTIONS).latents, want)
        assert torch.equal(sample(model, [0, 3], **OPTIONS, policy="patches=0").latents, want)


@pytest.mark.parametrize("side,larger", [(1, 2), (2, 4), (2, 8)])
@torch.no_grad()
def test_resized_embedding_and_output(side, larger):
    """A resized patch has the old patch's token; the new output is the old one resized."""
    scale, sizes = larger // side, {"patch": side}
    base = dit(**sizes)
    part = patched(base, **sizes).coarse[str(scale)]
    small = torch.randn(3, 4, side, side)
    large = torch.nn.functional.interpolate(small, (larger, larger), mode="bilinear")
    assert torch.allclose(part.stem(large), base.stem(small), atol=1e-5)
    old = base.head(torch.ones(32)).view(1, 4, side, side)
    new = part.head(torch.ones(32)).view(1, 4, larger, larger)
    assert torch.allclose(new, torch.nn.functional.interpolate(old, (larger, larger), mode="bilinear"), atol=1e-5)
    assert torch.allclose(bilinear(side, larger).sum(1), torch.ones(larger**2, dtype=torch.float64))


def test_positions_are_the_middles():
    model = patched()
    table = model.pos_embed.view(8, 4, 32)
    coarse = model.coarse["2"].pos_embed.view(4, 2, 32)
    angle = (torch.arange(4) * 2 + 0.5)[:, None] * 10000.0 ** (-torch.arange(8) / 8)
    assert torch.allclose(coarse[:, 0, 16:24], angle.sin(), atol=1e-5)
    lone = (table[::2, ::2] + table[1::2, 1::2]) / 2  # of slow codes the mean of both corners
    assert torch.allclose(coarse[..., 20:24], lone[..., 20:24], atol=0.05)


def test_third_difference_and_its_trap():
    """0 on parabolas, 6·h³ on a cubic; the regrouping (Δ − Δ) − (Δ − Δ) of equal neighbours would be 0 on all."""
    t = torch.arange(4.0).view(4, 1, 1, 1, 1)
    shape = torch.randn(1, 2, 4, 4)
    parabola = list((3 * t**2 - t + 1) * shape)
    assert torch.allclose(third_difference(parabola), torch.zeros_like(shape), atol=1e-5)
    assert torch.allclose(third_difference(list(t**3 * shape)), 6 * shape, atol=1e-5)
    z = [torch.randn(1, 2, 4, 4, dtype=torch.float64) for _ in range(6)]
    assert torch.allclose(third_difference(z), z[5] - 3 * z[4] + 3 * z[3] - z[2])
    assert third_difference(z).abs().max() > 0.1


def test_roughness_by_hand():
    config = PatchDiTConfig(**SIZES)
    z = [torch.randn(2, 4, 16, 8, dtype=torch.float64) for _ in range(4)]
    change = (z[3] - 3 * z[2] + 3 * z[1] - z[0]).numpy()
    found = roughness(z, config)
    for scale, side in ((2, 4), (4, 8)):
        for image in range(2):
            cut = [change[image, :, i : i + side, j : j + side] for i in range(0, 16, side) for j in range(0, 8, side)]
            values = sorted(part.std() for part in cut)
            place = 0.4 * (len(values) - 1)
            low = math.floor(place)
            want = values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])
            assert float(found[scale][image]) == pytest.approx(want, rel=1e-5)
    assert roughness(z[:3], config) == {}


def test_each_sample_chooses_alone():
    """The largest smooth scale; the first three steps at scale 1; pictures do not depend on the batch."""
    model = patched()
    rough = []
    history = []

    def look(step):
        history.append(step.x)
        rough.append(roughness(history, model.config))

    options = OPTIONS | {"guidance_interval": (0, 700)}
    probe = sample(model, [0, 1, 3], callback=look, **options | {"policy": "patches=0"})
    assert (probe.trace.tokens == 32).all()
    tau = float(torch.stack([row[2] for row in rough[3:]]).median())
    history.clear()
    rough.clear()
    whole = sample(model, [0, 1, 3], callback=look, **options, policy=f"patches={tau}")
    assert (whole.trace.tokens[:3] == 32).all()
    for tokens, row in zip(whole.trace.tokens[3:], rough[3:], strict=True):
        want = torch.where(row[4] < tau, 2.0, torch.where(row[2] < tau, 8.0, 32.0))
        assert torch.equal(tokens, want)
    assert len(whole.trace.tokens.unique()) > 1
    alone = sample(model, [3], indices=[2], **options, policy=f"patches={tau} & teacache=0")
    assert torch.allclose(alone.latents, whole.latents[2:], atol=1e-5)
    assert torch.equal(alone.trace.tokens[:, 0], whole.trace.tokens[:, 2])
    costs = {
        2.0: patch_dit_macs(model.config, 4),
        8.0: patch_dit_macs(model.config, 2),
        32.0: patch_dit_macs(model.config),
    }
    macs = torch.tensor([[costs[float(m)] for m in row] for row in whole.trace.tokens]).mean(1).double()
    halves = 1 + (whole.trace.uncond_tokens[:, 0] > 0).double()
    assert torch.allclose(whole.trace.gflops(model.config), 2e-9 * macs * halves, rtol=1e-6)


def test_macs():
    config = PatchDiTConfig(**SIZES, rank=8)
    plain = DyDiTConfig(**SIZES)
    assert patch_dit_macs(config) == dydit_macs(plain, routers=False) == counted(PlainDiT(plain))
    model = PatchDiT(config)
    for scale in (2, 4):
        assert counted(model, scale) == patch_dit_macs(config, scale)


def test_calibrated_speed():
    """The τ that is found has the speed that is told, near the wished one."""
    model = patched()
    options = OPTIONS | {"steps": 10, "batch_size": 2}
    plain, classes = None, [0, 1, 2, 3]
    for wished in (1, 1.5):
        tau, reached = calibrate(model, classes, wished, **options)
        cost = sample(model, classes, **options, policy=f"patches={tau}").trace.gflops(model.config).sum()
        plain = cost if plain is None else plain
        assert float(plain / cost) == pytest.approx(reached) and abs(reached / wished - 1) < 0.05
    most = float(plain / (0.3 * plain + 0.7 * plain * patch_dit_macs(model.config, 4) / patch_dit_macs(model.config)))
    with pytest.raises(ConfigError, match=f"speed must be from 1 to {most:.4g} over 10 steps, got 9"):
        calibrate(model, classes, 9, **options)
    with_cache = options | {"policy": "patches=7 & teacache=0.3"}
    tau, reached = calibrate(model, classes, 1.4, **with_cache)
    costs = [
        sample(model, classes, **options, policy=f"patches={value} & teacache=0.3").trace.gflops(model.config).sum()
        for value in (0, tau)
    ]
    assert float(costs[0] / costs[1]) == pytest.approx(reached) and costs[0] < plain
    with pytest.raises(ConfigError, match="rho is of a model with a router, this one is a PatchDiT"):
        calibrate(model, classes, 1.4, **options | {"policy": "rho=0.2"})


def run_config(path, *overrides):
    file = path / "run.yaml"
    file.write_text("model: {preset: digits}\noptim: {ema_decay: 0.5, lr: 3e-3}\n")
    small = ["model.hidden_size=32", "model.num_heads=2", "model.depth=2", "batch_size=4", "log_every=1"]
    small += ["spend.patch=1", "spend.scales=[1, 2]", f"output={path / 'out'}", "optim.cosine=false"]
    return load_config(file, [*small, *overrides])


def test_training_and_calibration(tmp_path, capsys):
    """Resumed; the DiT's own weights stay; the distance from it falls; τ goes with the checkpoint."""
    config = run_config(tmp_path, "kind=patches")
    torch.manual_seed(0)
    base = PlainDiT(config.model, 1)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"ema": to_dit(base)}, tmp_path / "dit.pt")
    options = ["kind=patches", f"from={tmp_path / 'dit.pt'}"]
    train(run_config(tmp_path, *options, "steps=2"))
    folder = train(run_config(tmp_path, *options, "steps=8"))
    model, _ = load_checkpoint(folder)
    assert type(model) is PatchDiT and "fresh" not in capsys.readouterr().out
    for key, value in base.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and lines[0]["kept"] == 0.25
    torch.manual_seed(1)
    x, t, y = torch.randn(32, 4, 14, 14), torch.linspace(0, 1000, 32), torch.arange(32) % 10
    with torch.no_grad():
        nets = PatchDiT.from_dit(base, model.config), model
        before, after = (float((net(x, t, y, 2) - base(x, t, y)).square().mean()) for net in nets)
    assert after < 0.9 * before
    words = ["calibrate-patches", str(folder), "--speed", "1.5", "--steps", "8", "--classes", "0-1", "--cpu"]
    weights = (folder / "model.safetensors").read_bytes()
    assert not main([*words, "--save", "--precision", "bfloat16"])
    assert (folder / "model.safetensors").read_bytes() == weights
    out = capsys.readouterr().out
    policy = json.loads((folder / "config.json").read_text())["policy"]
    assert policy.startswith("patches=") and policy in out
    assert main([*words[:3], "9", *words[4:]]) == 2
    assert "speed must be from 1 to" in capsys.readouterr().err


def test_bad_input(tmp_path):
    for sizes, words in (
        ({"scales": (1, 3)}, r"scales must be 1 and then 2, 4 or both, got \(1, 3\)"),
        ({"input_size": (14, 14)}, r"scale 2: patches of 4 cells do not fill the grid \(14, 14\)"),
        ({"rank": 0}, "rank must be an integer of 1 or more, got 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            PatchDiTConfig(**SIZES | sizes)
    model = patched()
    for scale in (3, 2.0, "2", None):
        with pytest.raises(ConfigError, match=f"scale must be one of 1, 2, 4, got {scale}"):
            model(*batch(), scale)
    with pytest.raises(ConfigError, match="depth 2, the DiT to start from has 3"):
        patched(dit(depth=3))
    for net, text, words in (
        (dit(), "patches=1", "patches is of a PatchDiT, this model is a PlainDiT"),
        (model, "patches=-1", "patches must be a threshold of at least 0, got -1"),
        (model, "density=0.5", "density is of a SparseDiT, this model is a PatchDiT"),
        (model, "patches=0.1 & density=0.5", "density is of a SparseDiT, this model is a PatchDiT"),
        (model, "patches=0.1 & reuse=2", "reuse is of a model with a router, this one is a PatchDiT"),
        (model, "patches=much", "policy patches must look like patches=0.02"),
    ):
        with pytest.raises(ConfigError, match=words):
            sample(net, [0], **OPTIONS, policy=text)
    with pytest.raises(ConfigError, match="patches is of a PatchDiT, this model is a PlainDiT"):
        calibrate(dit(), [0], 2, **OPTIONS)
    for overrides, words in (
        (["spend.scales=[1, 4]", "from=x"], r"scale 4: patches of 4 cells do not fill the grid \(14, 14\)"),
        ([], "kind patches learns from a DiT: name it, from=…"),
        (["spend.scales=1", "from=x"], r"spend\.scales needs a scale beside 1, got \[1\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(run_config(tmp_path, "kind=patches", *overrides))
    save_checkpoint(tmp_path / "saved", model, {"objective": "flow"})
    file = tmp_path / "saved" / "config.json"
    values = json.loads(file.read_text())
    assert values["kind"] == "patches" and torch.equal(
        load_checkpoint(tmp_path / "saved")[0](*batch()), model(*batch())
    )
    for change, words in (({"scales": [2]}, "scales must be 1"), ({"depth": 7}, "config.json says depth 7")):
        file.write_text(json.dumps(values | {"model": values["model"] | change}))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path / "saved")
    assert issubclass(PatchDiTConfig, DiTConfig) and PatchChoice(model, 1).threshold == 1
