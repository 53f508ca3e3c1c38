"""Training with cuda_graph: the losses and weights of eager steps. A stand-in for CUDA's graphs runs the captured
function again and writes into the tensors that the first run returned."""

import functools
import json

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from graph_stand_in import run_again
from safetensors.torch import load_file

import dcdit.training.trainer
from dcdit.errors import ConfigError
from dcdit.training.config import load_config
from dcdit.training.run import train
from dcdit.training.step_graphs import SHARES, SPARE, StepGraphs, room
from dcdit.training.trainer import Trainer

RHO = [0.0, 0.2, 0.4, 0.6]
TINY = {
    "model": {"preset": "digits", "input_size": 7, "in_channels": 16, "hidden_size": 32, "depth": 1, "num_heads": 1}
    | {"target_ratio": 1.5},  # a fresh router then keeps most cells, so that ρ and ragged lengths matter
    "codec": {"factor": 4},
    "steps": 20,
    "batch_size": 32,
    "optim": {"lr": 3e-3, "warmup_steps": 2, "ema_decay": 0.9},
    "drop_warmup": 2,
    "drop_fractions": RHO,
    "log_every": 1,
    "save_every": 7,
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def stand_in(monkeypatch):
    """Graphs on the CPU; a list of the graphs that trainers made."""
    made = []

    def make(*args, **options):
        made.append(StepGraphs(*args, **options, capture=run_again))
        return made[-1]

    monkeypatch.setattr(dcdit.training.trainer, "StepGraphs", make)
    return made


def config(output, *overrides):
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(TINY))
    return load_config(file, [f"output={output}", "cuda_graph=true", *overrides])


class Eager:
    """Equal capacities, and nothing kept from one step to the next."""

    def __init__(self, *args, **options):
        self.graphs = StepGraphs(*args, **options, capture=run_again)
        self.graphs.cache.get = lambda *_: "no graph"

    def __getattr__(self, name):
        return getattr(self.graphs, name)

    def backward(self, inputs, drop_fraction):
        graphs, losses = self.graphs, self.graphs.losses
        rows = graphs.rows.get(str(drop_fraction))
        if rows:
            limits = room(*rows, len(inputs[0]), graphs.cells, SHARES, SPARE)
            with torch.no_grad():
                fits = not losses(*inputs, torch.tensor(drop_fraction), **limits)[1].plan.overflow
            graphs.losses = functools.partial(losses, **limits) if fits else losses
        values = graphs.backward(inputs, drop_fraction)
        graphs.losses = losses
        return values


def metrics(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    one, other = load_file(a / "last.safetensors"), load_file(b / "last.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("precision=bf16", "objective=ddpm", "model.learn_sigma=true", "batch_size=16"),
        ("accumulate=2", "channels_last=true"),
    ],
)
def test_the_bits_of_eager_steps(overrides, stand_in, tmp_path, monkeypatch):
    train(config(tmp_path / "graph", *overrides))
    graphs, parts = stand_in[0], 1 + ("accumulate=2" in overrides)
    assert graphs.replays > 10 * parts and graphs.eager["first step of its ρ"] == len(RHO), graphs.summary()
    assert graphs.replays + sum(graphs.eager.values()) == 20 * parts
    monkeypatch.setattr(dcdit.training.trainer, "StepGraphs", Eager)
    train(config(tmp_path / "eager", *overrides))
    assert_same_run(tmp_path / "graph", tmp_path / "eager")


def test_close_to_training_without_graphs(stand_in, tmp_path):
    """Products of more rows add in another order: the first steps agree up to rounding."""
    for name, use in (("graph", "true"), ("exact", "false")):
        train(config(tmp_path / name, f"cuda_graph={use}", "steps=8", "optim.lr=1e-4"))
    for ours, theirs in zip(metrics(tmp_path / "graph"), metrics(tmp_path / "exact"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert stand_in[0].replays > 2


def test_a_batch_without_room_is_computed_again(stand_in, tmp_path):
    """Its gradients are the eager model's, whatever the replay left behind."""
    trainer = Trainer(config(tmp_path / "run"))
    graphs, stream = stand_in[0], trainer.stream
    batch = torch.utils.data.default_collate([stream[i] for i in range(32)])
    inputs = (trainer.codec.encode(batch["image"]), batch["noise"], batch["t"], batch["y"])
    trainer.losses(*inputs, torch.tensor(0.0))[0]["loss"].backward()
    want = [p.grad.clone() for p in trainer.net.parameters()]
    for rows in ([20, 49], [32 * 49, 1]):  # too few of the batch, too few of a sample
        trainer.net.zero_grad()
        graphs.rows["0.0"] = rows
        values = graphs.backward(inputs, 0.0)
        assert all(torch.equal(p.grad, g) for p, g in zip(trainer.net.parameters(), want, strict=True))
        assert values["kept"] > 0.5 and graphs.rows["0.0"][0] > 20 and graphs.rows["0.0"][1] > 1
    assert graphs.eager == {"more tokens than there was room for": 2} and not graphs.replays
    trainer.net.zero_grad()
    graphs.backward(inputs, 0.0)
    assert graphs.replays == 1 and all(p.grad is g for p, g in zip(graphs.parameters, graphs.grads, strict=True))
    for p, g in zip(trainer.net.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-5)
    trainer.close()


def test_rows_shrink_slowly(stand_in, tmp_path):
    trainer = Trainer(config(tmp_path / "run"))
    graphs = stand_in[0]
    graphs._saw(0.2, [40, 30])
    graphs._saw(0.2, [10, 50])
    graphs.rows["0.4"] = [20480, 49]
    graphs._saw(0.4, [1, 1])
    assert graphs.rows == {"0.2": [70, 50], "0.4": [20460, 49]}
    trainer.close()


def test_a_capture_that_fails_leaves_eager_steps(tmp_path, monkeypatch, capsys):
    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(dcdit.training.trainer, "StepGraphs", functools.partial(StepGraphs, capture=fails))
    for name, use in (("failed", "true"), ("exact", "false")):
        train(config(tmp_path / name, f"cuda_graph={use}", "steps=6", "drop_fractions=0"))
    assert metrics(tmp_path / "failed") == metrics(tmp_path / "exact")
    words = "first step of its ρ (1), cannot be captured: operation not permitted when stream is capturing (5)"
    assert f"0 of 6 backward passes replayed from 0 CUDA graphs, 6 eager: {words}\n" in capsys.readouterr().out


def test_a_resumed_run_takes_the_same_capacities(stand_in, tmp_path):
    """The first steps after a resumption replay as well: the checkpoint knows how many rows each ρ needs."""
    train(config(tmp_path / "whole"))
    whole = stand_in.pop()
    trainer = Trainer(config(tmp_path / "split", "max_minutes=1e-9", "save_every=1"))
    for _ in range(20):
        trainer.run()
        trainer.close()
        trainer = Trainer(config(tmp_path / "split", "max_minutes=1e-9", "save_every=1"))
    assert trainer.step == 20 and trainer.graphs.rows == whole.rows
    trainer.close()
    assert sum(graphs.replays for graphs in stand_in) == whole.replays
    assert_same_run(tmp_path / "whole", tmp_path / "split")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "cuda_graph needs a GPU, the model is on cpu; leave it out"),
        (("compile=true",), "cuda_graph and compile exclude each other"),
        (("checkpointing=true",), "cuda_graph and checkpointing exclude each other"),
        (("upcycle.source=dit.pt",), "cuda_graph is not for upcycling"),
    ],
)
def test_where_it_cannot_work(overrides, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        train(config(tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()
