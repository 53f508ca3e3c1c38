"""Arguments of another kind than the function takes, and values of another form: the answer names both."""

import numpy as np
import pytest
import torch
from torch import nn

from dcdit import DCDiT, DCDiTConfig, DynamicChunking
from dcdit.checkpoints import to_dit
from dcdit.errors import ConfigError
from dcdit.model import (
    DiTConfig,
    DyDiT,
    PatchDiT,
    PlainDiT,
    SparseDiT,
    cast_weights,
    dcdit_flops,
    dit_flops,
    float32_products,
    sampling_dtype,
)
from dcdit.sampling import Policy, make_scheduler
from dcdit.training import TrainConfig, load_config, ratio_loss, train, upcycle
from dcdit.training.launch import make_accelerator

CONFIG = DCDiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=1, encoder_width=32, cond_norm=True)
LINEAR, PROB = nn.Linear(2, 2), torch.full((1, 4), 0.6)

WRONG = {
    "model must be a Module, got a str": lambda: cast_weights("digits", torch.bfloat16),
    "dtype must be a dtype, got a str": lambda: cast_weights(LINEAR, "bfloat16"),
    "dtype must be a floating point one, got torch.int8": lambda: cast_weights(LINEAR, torch.int8),
    "config must be a model's configuration, as model.config, got a Linear": lambda: sampling_dtype(LINEAR, "cpu"),
    "config must be a DCDiTConfig, got a str": lambda: dcdit_flops("digits", 49),
    "tokens must be a number of at least 0, got '49'": lambda: dcdit_flops(CONFIG, "49"),
    "tokens must be a number of at least 0, got -5": lambda: dit_flops(CONFIG, -5),
    "tokens must be a number of at least 0, got nan": lambda: dcdit_flops(CONFIG, float("nan")),
    "overrides must be a list or tuple, got a str; such as ['steps=100']": lambda: load_config("a.yaml", "steps=3"),
    "config must be a DCDiTConfig or DiTConfig, got a str": lambda: PlainDiT("digits"),
    "config must have a depth, as a DCDiTConfig has, got a DiTConfig": lambda: PlainDiT(DiTConfig()),
    "config must be a DyDiTConfig, got a DCDiTConfig": lambda: DyDiT(CONFIG),
    "config must be a SparseDiTConfig, got a DCDiTConfig": lambda: SparseDiT(CONFIG),
    "config must be a PatchDiTConfig, got a DCDiTConfig": lambda: PatchDiT(CONFIG),
    "precision must be highest, high, medium or None, got 'fast'": lambda: float32_products("fast").__enter__(),
    "steps must be in [1, 1000], got '4'": lambda: make_scheduler("flow-euler", "flow", "4"),
    "model must be a PlainDiT, got a str": lambda: to_dit("digits"),
    "teacher must be a PlainDiT, got a str; load_dit reads one": lambda: upcycle("dit.pt", CONFIG),
    "config must be a DCDiTConfig, got a dict": lambda: upcycle(PlainDiT(CONFIG), {}),
    "each of ratio_loss's probabilities and masks must be a Tensor, got a list": lambda: ratio_loss([[0.6]], PROB, 4.0),
    "target_ratio must be a float or int, got a str": lambda: ratio_loss(PROB, PROB > 0.5, "4"),
    "target_ratio N must be greater than 1, got 0.25": lambda: ratio_loss(PROB, PROB > 0.5, 0.25),
    "blocks must be a list of modules, got a Linear": lambda: DynamicChunking(LINEAR, 32, (4,)),
    "grid must be (L,), (H, W) or (F, H, W), got 16": lambda: DynamicChunking([nn.Identity()], 32, 16),
    "sigma must be positive and finite, or None, got -1": lambda: DynamicChunking([LINEAR], 32, (4,), sigma=-1),
    "sigma must be positive and finite, or None, got '1'": lambda: DynamicChunking([LINEAR], 32, (4,), sigma="1"),
    "config must be a TrainConfig, got a str; load_config reads a YAML file": lambda: train("configs/digits.yaml"),
    "data must be a DataConfig, got a dict": lambda: TrainConfig(data={"kind": "digits"}),
    "parts of a policy are joined by & or ;, got 'rho=0.3 and reuse=2'": lambda: Policy.of("rho=0.3 and reuse=2"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_functions_name_what_they_take(message):
    with pytest.raises(ConfigError) as error:
        WRONG[message]()
    assert str(error.value) == message


def test_what_they_take_is_still_taken():
    assert dcdit_flops(CONFIG, np.float64(8)) == dcdit_flops(CONFIG, 8)
    assert ratio_loss(PROB, PROB > 0.5, 4).item() == pytest.approx(2.4)  # 4/3·(3·1·0.6 + 0)
    assert isinstance(upcycle(PlainDiT(CONFIG), CONFIG), DCDiT)


def test_diffusers_classes_name_what_they_take():
    pytest.importorskip("diffusers")
    from dcdit.integrations.attention import remove_dynamic_chunking
    from dcdit.integrations.pipeline import DCDiTPipeline
    from dcdit.integrations.transformer import DCDiTTransformer2DModel

    model = DCDiT(CONFIG)
    for message, call in {
        "model must be a DCDiT, got a str; DCDiT.from_pretrained": lambda: DCDiTTransformer2DModel.from_dcdit("digits"),
        "model must be a DCDiT, got a PlainDiT": lambda: DCDiTTransformer2DModel.from_dcdit(PlainDiT(CONFIG)),
        "model must be a Module, got a str; such as pipe.transformer": lambda: remove_dynamic_chunking("flux"),
        "scheduler must be one of diffusers, got a str": lambda: DCDiTPipeline(
            DCDiTTransformer2DModel.from_dcdit(model), "euler"
        ),
    }.items():
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.ema_decay='0.9, 0.99'", "optim.ema_decay must be a number or a list of them, got '0.9, 0.99'"),
        ("optim.ema_decay=[0.9, much]", "optim.ema_decay must be a number, got 'much'"),
        ("model.input_size=8x8", "model.input_size must be an integer or a list of 2, got '8x8'"),
        ("budgets=half", "budgets must be a number or a list of them, got 'half'"),
    ],
)
def test_a_key_that_takes_a_list_says_so(override, message, tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 1\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "a.yaml", [override])
    assert str(error.value) == message


def test_a_path_in_letters_that_the_locale_does_not_have(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 1\n")
    name = "ü".encode().decode("ascii", "surrogateescape")  # as sys.argv has it under LC_ALL=POSIX
    assert load_config(tmp_path / "a.yaml", [f"output={name}"]).output == name


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"LOCAL_RANK": "x"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "abc"},
    ],
)
def test_a_launcher_s_variables_that_do_not_fit(variables, monkeypatch, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=r"cannot join the processes of .*LOCAL_RANK=.*: .*; a run without a launcher"
    ):
        make_accelerator(TrainConfig(output=str(tmp_path)))
    AcceleratorState._reset_state(reset_partial_state=True)
