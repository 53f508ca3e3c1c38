"""`fsdp` of `dcdit upcycle --family`: two processes that share the weights give one process's numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from safetensors.torch import load_file
from test_training import subprocess_environment
from test_upcycle_transformers import configuration, trainer

from dcdit.errors import ConfigError
from dcdit.integrations.attention import load_dynamic_chunking
from dcdit.training.config import load_config
from dcdit.training.transformers import TransformerConfig, train_transformer

# Each process takes the most probable cells of its own samples: two make one where all cells are kept. No distillation
# then: student and teacher agree.
ALL = ["target_ratio=1.0001", "ratio_weight=0", "distill_steps=0"]
CASES = {
    "copied": [],
    "split": ["fsdp=true", "checkpointing=true"],
    "all": ["fsdp=true", *ALL],
    "lora": ["fsdp=true", "lora=2", *ALL],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    command = configuration(folder, batch_size=4, save_every=3, drop_fractions=[0.0])
    script = str(Path(__file__).with_name("sharded_upcycling.py"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    cases = [":".join([name, *overrides]) for name, overrides in CASES.items()]
    done = subprocess.run(
        [*launcher, "--main_process_port=0", script, command[5], command[2], str(folder), *cases],
        env=subprocess_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def alike(ours, want):
    """Losses to 1e-6, and norms of gradients, which are sums over all weights, to 1e-5."""
    rows = []
    for folder in (ours, want):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        names = ("distillation_loss", "velocity_loss", "grad_norm")
        rows.append([torch.tensor([line[name] for line in lines if name in line]) for name in names])
    for found, wanted, bound in zip(*rows, (1e-6, 1e-6, 1e-5), strict=True):
        torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)


def test_split_and_copied_weights_train_alike(folder):
    """A quarter of the cells kept; the split run was interrupted, and resumed from what both processes had."""
    alike(folder / "split", folder / "copied")
    for file in ("last.safetensors", "model/diffusion_pytorch_model.safetensors"):
        ours, want = (load_file(folder / name / file) for name in ("split", "copied"))
        assert ours.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(ours[key], want[key], rtol=1e-4, atol=1e-5)
    assert load_dynamic_chunking(folder / "split/model") is not None


@pytest.mark.parametrize("case", ["all", "lora"])
def test_two_processes_train_as_one(case, folder):
    given = [f"source={folder}/source", f"output={folder}/one-{case}", *CASES[case][1:]]
    train_transformer(load_config(folder / "config.yaml", given, TransformerConfig))
    alike(folder / case, folder / f"one-{case}")


def test_one_process_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="fsdp needs several processes, of accelerate launch --num_processes; got one"
    ):
        trainer(tmp_path, fsdp=True)


@pytest.mark.parametrize(
    "asked, version, message", [(False, "2", "set fsdp there"), (True, "1", "use --fsdp_version 2")]
)
def test_the_launcher_and_the_configuration_agree(asked, version, message, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, fsdp=asked)
