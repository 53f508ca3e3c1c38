"""Training of SparseDiT and DyDiT: from a DiT, resumed to the bit, saved, loaded and sampled."""

import json

import numpy as np
import pytest
import torch

from dcdit.checkpoints.dit import to_dit
from dcdit.checkpoints.folder import load_checkpoint, save_checkpoint
from dcdit.cli import main
from dcdit.errors import CheckpointError, ConfigError
from dcdit.model import DCDiT, Density, DyDCDiT, DyDiT, PlainDiT, SparseDiT
from dcdit.model.rival_macs import dydit_on, gate_rates
from dcdit.sampling import sample
from dcdit.training.batches import DensityStream
from dcdit.training.config import load_config
from dcdit.training.gate_loss import gate_loss
from dcdit.training.objectives import FlowMatching
from dcdit.training.run import train

SMALL = [
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.depth=6",
    "batch_size=4",
    "optim.cosine=false",
    "log_every=1",
]


def config(path, *overrides):
    file = path / "run.yaml"
    file.write_text("model: {preset: digits}\noptim: {ema_decay: 0.5, lr: 1e-3}\n")
    return load_config(file, [f"output={path / 'out'}", *SMALL, *overrides])


@pytest.mark.parametrize("kind", ["sparse", "dydit"])
def test_from_a_dit_and_resumed(tmp_path, kind):
    """Three steps and one more after a resumption are four steps, and the model is one that can be sampled."""
    settings = config(tmp_path, f"kind={kind}")
    torch.manual_seed(1)
    dit = PlainDiT(dydit_on(settings.model))
    torch.save({"ema": to_dit(dit)}, tmp_path / "dit.pt")
    options = [f"kind={kind}", f"from={tmp_path / 'dit.pt'}"]
    train(config(tmp_path, *options, "steps=3"))
    folder = train(config(tmp_path, *options, "steps=4"))
    once = train(config(tmp_path, *options, "steps=4", f"output={tmp_path / 'once'}"))
    model, use = load_checkpoint(folder)
    assert type(model) is {"sparse": SparseDiT, "dydit": DyDiT}[kind] and use["objective"] == "flow"
    for key, value in load_checkpoint(once)[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(np.isfinite(line["loss"]) for line in lines)
    if kind == "dydit":  # every gate begins open but for the noise, and the target is 1
        assert lines[0]["kept"] > 0.8 and {"complete_loss", "flops_loss"} <= lines[0].keys()
    else:
        assert {round(49 * line["kept"]) for line in lines} <= {16, 25}
        assert use["policy"] == "density=0.5:0.75"
    if kind == "sparse":
        drawn = tmp_path / "drawn"
        assert not main(["sample", str(folder), "--classes", "0,1", "--steps", "2", "--cpu", "--output", str(drawn)])
        assert json.loads((drawn / "sampling.json").read_text())["policy"] == "density=0.5:0.75"
    latents = sample(model, [0, 1], objective="flow", steps=2, guidance=2.0).latents
    assert latents.shape == (2, 4, 14, 14)


def test_gates_in_a_dcdit(tmp_path):
    """From a DC-DiT, open: both passes have about one loss in the first step; resumed to the bit; sampled."""
    torch.manual_seed(1)
    save_checkpoint(tmp_path / "dcdit", DCDiT(config(tmp_path).model), {"objective": "flow"})
    options = ["kind=dydit", f"init={tmp_path / 'dcdit'}", "spend.rate=0.1", "spend.warmup=1"]
    train(config(tmp_path, *options, "steps=2"))
    folder = train(config(tmp_path, *options, "steps=3"))
    once, use = load_checkpoint(train(config(tmp_path, *options, "steps=3", f"output={tmp_path / 'once'}")))
    model = load_checkpoint(folder)[0]
    assert type(model) is DyDCDiT and use["objective"] == "flow"
    for key, value in once.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rate"] > 0.8 and first["complete_loss"] == pytest.approx(first["diffusion_loss"], rel=0.05)
    whole = first["diffusion_loss"] + first["complete_loss"] + 0.03 * first["ratio_loss"] + first["flops_loss"]
    assert first["loss"] == pytest.approx(whole, rel=1e-5)
    assert first["flops_loss"] == pytest.approx(2 * (first["rate"] - 1) ** 2, abs=1e-6)
    assert sample(model, [0, 1], objective="flow", steps=2).latents.isfinite().all()


def test_dydit_comes_down_to_its_rate(tmp_path):
    """With the FLOPs loss alone at work the rate follows the target; the gates' gradients reach every router."""
    settings = config(tmp_path, "kind=dydit")
    model = DyDiT(dydit_on(settings.model)).train()
    routers = [p for name, p in model.named_parameters() if "routers" in name]
    optimizer = torch.optim.Adam(routers, lr=1.0)
    x, t, y = torch.randn(4, 4, 14, 14), torch.linspace(50, 950, 4), torch.zeros(4, dtype=torch.long)
    for _ in range(60):
        rate = gate_rates(model(x, t, y, return_gates=True)[1], 49, 32).mean()
        optimizer.zero_grad()
        gate_loss(rate, 0.5).backward()
        optimizer.step()
    assert all(p.grad is not None for p in routers)
    assert abs(float(rate) - 0.5) < 0.15


def test_density_stream(tmp_path):
    """All samples of a step ask for one sparse grid; over many steps the times are the objective's."""

    class Source:
        def __len__(self):
            return 5

        def load(self, index, flip):
            return np.zeros((1, 2, 2), np.float32), 0

    density, grid, objective = Density(0.3, 0.9), (7, 7), FlowMatching()
    stream = DensityStream(density, grid, Source(), objective, (1, 2, 2), 1, batch_size=4)
    times = [[float(stream[step * 4 + i]["t"]) for i in range(4)] for step in range(200)]
    sizes = [{density.size(t, grid) for t in row} for row in times]
    assert all(len(row) == 1 for row in sizes) and len(set.union(*sizes)) > 2
    again = DensityStream(density, grid, Source(), objective, (1, 2, 2), 1, batch_size=4)
    assert float(again[7 * 4 + 2]["t"]) == np.float32(times[7][2])
    drawn = np.sort([objective.draw_time(np.random.default_rng(i)) for i in range(800)])
    assert np.abs(np.sort(np.ravel(times)) - drawn).mean() < 40


def test_bad_input(tmp_path, capsys):
    with pytest.raises(ConfigError, match="compile is of kind dcdit, this run has sparse"):
        config(tmp_path, "kind=sparse", "compile=true")
    with pytest.raises(ConfigError, match="init is of kind dcdit and dydit, this run has sparse"):
        config(tmp_path, "kind=sparse", "init=digits")
    with pytest.raises(ConfigError, match=r"data\.buckets is of kind dcdit, this run has dydit"):
        config(tmp_path, "kind=dydit", "data.kind=folder", "data.path=x", "data.buckets=16")
    with pytest.raises(ConfigError, match="kind must be one of dcdit, sparse, dydit, patches"):
        config(tmp_path, "kind=flexdit")
    with pytest.raises(ConfigError, match=r"spend\.rate must be in"):
        config(tmp_path, "kind=dydit", "spend.rate=0")
    for kind, key, of in (
        ("sparse", "rate=0.7", "dydit"),
        ("dydit", "patch=1", "patches"),
        ("patches", "most=0.6", "sparse"),
        ("dcdit", "warmup=3", "dydit"),
    ):
        words = rf"spend\.{key.split('=')[0]} is of kind {of}, this run has {kind}"
        with pytest.raises(ConfigError, match=words):
            config(tmp_path, f"kind={kind}", f"spend.{key}")
    settings = config(tmp_path, "kind=dydit", "steps=1", f"from={tmp_path / 'dit.pt'}", "model.num_classes=12")
    torch.save({"ema": to_dit(PlainDiT(dydit_on(config(tmp_path).model)))}, tmp_path / "dit.pt")
    with pytest.raises((ConfigError, CheckpointError), match="num_classes 10, the run's model 12"):
        train(settings)
    model = DyDiT(dydit_on(settings.model))
    use = {"objective": "flow", "codec": {"kind": "pixel_unshuffle", "factor": 2}}
    save_checkpoint(tmp_path / "saved", model, use)
    with pytest.raises(ConfigError, match=r"saved is a DyDiT, expected a DC-DiT"):
        train(config(tmp_path, "kind=dydit", "steps=1", f"init={tmp_path / 'saved'}"))
    with pytest.raises(CheckpointError, match=r"expected a plain DiT, a \.pt or a folder of diffusers, found a DyDiT"):
        train(config(tmp_path, "kind=sparse", "steps=1", f"from={tmp_path / 'saved'}"))
    with pytest.raises(ConfigError, match="a SparseDiT has a depth of at least 6, got 4"):
        train(config(tmp_path, "kind=sparse", "steps=1", "model.depth=4"))
    assert main(["visualize", str(tmp_path / "saved"), "--cpu", "--output", str(tmp_path / "maps")]) == 2
    assert "chunk maps are of a DC-DiT" in capsys.readouterr().err
    file = tmp_path / "saved" / "config.json"
    values = json.loads(file.read_text())
    for change, words in (
        ({"kind": "flexdit"}, "unknown kind key 'flexdit'"),
        ({"model": values["model"] | {"depth": 7}}, "config.json says depth 7, the weights have 6 blocks"),
        ({"model": values["model"] | {"hidden_size": 64}}, "expected shape"),
    ):
        file.write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path / "saved")
