"""The state of a run: a file that `save_state` did not write is refused with one line, and nothing is loaded."""

import json

import pytest
import torch
from safetensors.torch import load, save

from dcdit.errors import CheckpointError
from dcdit.training.state import EMA, Metrics, load_state, read_header, save_state

CONFIG = {"steps": 4, "optim": {"lr": 0.1}}


def parts():
    """A model that has made a step, its average and its optimiser."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, [EMA(model, 0.9)], optimizer


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ([1], {}, "not a training checkpoint"),
        ({"config": CONFIG}, {}, "not a training checkpoint: 'step'"),
        ({"step": None, "config": CONFIG}, {}, "not a training checkpoint"),
        ({"step": 1, "config": 3}, {}, "not a training checkpoint"),
        ({"step": -1, "config": CONFIG}, {}, "not a training checkpoint: its header is none of a run"),
        ({"step": 1, "config": CONFIG, "data": 3}, {}, "not a training checkpoint: its header is none of a run"),
        ({"step": 1, "config": CONFIG, "changes": 5}, {}, "not a training checkpoint: its header is none of a run"),
        ({}, {"model.bias": torch.zeros(1)}, r"model\.bias: expected shape \(2,\), found \(1,\)"),
        ({}, {"optim.weight.exp_avg": torch.zeros(3)}, r"exp_avg: expected shape \(2, 3\), found \(3,\)"),
        ({}, {"optim.weight.step": torch.zeros(2, 3)}, r"step: expected shape \(\), found \(2, 3\)"),
        ({}, {"ema.weight": None}, r"has no tensor ema\.weight"),
        ({}, {"optim.bias.exp_avg_sq": None}, r"has no tensor optim\.bias\.exp_avg_sq"),
    ],
)
def test_states_that_do_not_fit_are_refused(header, tensors, message, tmp_path):
    file = tmp_path / "last.safetensors"
    save_state(file, {"step": 1, "config": CONFIG}, *parts())
    assert read_header(file) == {"step": 1, "config": CONFIG}
    load_state(file, *parts())
    tensors = {key: value for key, value in (load(file.read_bytes()) | tensors).items() if value is not None}
    text = json.dumps(header or {"step": 1, "config": CONFIG})
    file.write_bytes(save(tensors, metadata={"dcdit_training": text}))
    model, emas, optimizer = parts()
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(file)
        load_state(file, model, emas, optimizer)
    assert "\n" not in str(error.value) and torch.equal(model.weight, before)


def test_a_folder_in_the_place_of_a_state_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} is truncated or not a training checkpoint"):
        read_header(tmp_path)


def test_frozen_parameters_have_no_moments(tmp_path):
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    save_state(tmp_path / "last.safetensors", {"step": 1, "config": CONFIG}, model, [EMA(model, 0.9)], optimizer)
    load_state(tmp_path / "last.safetensors", model, [EMA(model, 0.9)], optimizer)


def test_averages_that_the_file_lacks_start_from_the_weights(tmp_path):
    model, emas, optimizer = parts()
    save_state(tmp_path / "last.safetensors", {"step": 1, "config": CONFIG}, model, emas, optimizer)
    other, (first,), again = parts()
    second = EMA(other, 0.5)
    load_state(tmp_path / "last.safetensors", other, [first, second], again)
    assert torch.equal(first.values[0], emas[0].values[0]) and torch.equal(second.values[0], model.weight)


def test_foreign_lines_of_the_metrics_are_dropped(tmp_path):
    lines = ['{"step": 1}', "1", "{}", '{"step": null}', '{"step": 2}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    Metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text().split() == ['{"step":', "1}", '{"step":', "2}"]
