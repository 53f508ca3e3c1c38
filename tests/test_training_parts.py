"""Parts of training: the schedule of the rate, the EMA, the split of batches, the shipped configurations."""

from pathlib import Path

import pytest
import torch

from dcdit.model.dcdit import DCDiT
from dcdit.training.batches import check_split
from dcdit.training.config import OptimConfig, learning_rate, load_config
from dcdit.training.state import EMA


def test_learning_rate_schedule():
    optim = OptimConfig(lr=2.0, warmup_steps=10)
    assert [learning_rate(optim, step, 110) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [learning_rate(optim, step, 110) for step in (10, 60, 110)] == pytest.approx([2.0, 1.0, 0.0])
    assert learning_rate(OptimConfig(lr=2.0, cosine=False), 99, 100) == 2.0


def test_ema_ramps_up_to_its_decay():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema, expected = EMA(model, 0.5), 1.0
    for step in range(12):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert ema.state_dict()["weight"].item() == pytest.approx(expected)


def test_batches_split_over_whole_sub_batches_only():
    check_split(48, 1)
    check_split(64, 4)
    with pytest.raises(ValueError, match="batch_size 48 over 2 processes must be a multiple of 32"):
        check_split(48, 2)


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.parent.glob("configs/*.yaml")), ids=lambda f: f.stem)
def test_shipped_configs_fit_together(file):
    config = load_config(file)
    with torch.device("meta"):
        DCDiT(config.model)
    assert config.data.kind != "latents" or config.codec.kind == "autoencoder_kl"
