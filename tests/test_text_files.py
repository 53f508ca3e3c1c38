"""Text that a person may have written is read with a byte order mark in front, as some editors leave it."""

import json

import numpy as np
import pytest
import torch
from small_sampling import tiny

from dcdit.checkpoints.folder import load_checkpoint, save_checkpoint, store_use
from dcdit.checkpoints.looks import own_folder
from dcdit.data.encode import _begin
from dcdit.data.sources import Latents
from dcdit.errors import CheckpointError, DataError
from dcdit.sampling.picture_run import PictureRun
from dcdit.sampling.step_times import StepTimes, load_times, name_of
from dcdit.training.config import load_config

USE = {"objective": "flow", "codec": {"kind": "pixel_unshuffle", "factor": 1}}


def mark(file):
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def test_a_training_configuration(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("output: there\n", encoding="utf-8-sig")
    assert load_config(file).output == "there"


def test_config_json_of_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "model", tiny(), USE)
    mark(tmp_path / "model" / "config.json")
    assert load_checkpoint(tmp_path / "model")[1]["objective"] == "flow"
    assert own_folder(tmp_path / "model") == "DC-DiT"
    store_use(tmp_path / "model", {"policy": "reuse=2"})
    assert load_checkpoint(tmp_path / "model")[1]["policy"] == "reuse=2"


def test_dataset_json_of_latents(tmp_path):
    for name in ("a_features", "a_labels"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "a_features" / "0.npy", np.zeros((4, 2, 2), np.float32))
    np.save(tmp_path / "a_labels" / "0.npy", np.array(0))
    settings, file = {"class_names": ["cat"], "codec": {"kind": "x"}}, tmp_path / "dataset.json"
    file.write_text(json.dumps({**settings, "finished": True}), encoding="utf-8-sig")
    assert Latents(tmp_path, (4, 2, 2)).class_names == ["cat"]
    _begin(file, settings)
    for content in ("[1]", "[" * 100_000):
        file.write_text(content)
        with pytest.raises(DataError, match=r"dataset\.json is not what dcdit data encode writes"):
            _begin(file, settings)
        with pytest.raises(DataError, match=r"dataset\.json is not what dcdit data encode writes"):
            Latents(tmp_path, (4, 2, 2))


def test_sampling_json(tmp_path):
    run = PictureRun(tmp_path, [0], 1, {"seed": 3}, ["png"])
    run.begin()
    run.save(0, np.zeros((2, 2, 3), np.uint8))
    mark(tmp_path / "sampling.json")
    assert PictureRun(tmp_path, [0], 1, {"seed": 3}, ["png"]).done(0)


def test_the_table_of_calibrate(tmp_path):
    config, cpu, file = tiny().config, torch.device("cpu"), tmp_path / "table.json"
    StepTimes(name_of(config, cpu, torch.float32), [1, 2], [9, 30], [[1.0, 2.0]] * 2).save(file)
    mark(file)
    assert load_times(config, cpu, torch.float32, file).tokens == [9, 30]


def test_deep_json_is_refused(tmp_path):
    save_checkpoint(tmp_path / "model", tiny(), USE)
    (tmp_path / "model" / "config.json").write_text("[" * 100_000)
    assert own_folder(tmp_path / "model") is None
    with pytest.raises(CheckpointError, match="is not a dcdit config: it is nested too deeply"):
        load_checkpoint(tmp_path / "model")
