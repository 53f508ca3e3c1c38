"""Less memory for a step: activation checkpointing of the blocks, and a batch in accumulated parts."""

import functools

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from dcdit.errors import ConfigError
from dcdit.model.blocks import DiTBlock, MainNetwork
from dcdit.training.config import load_config
from dcdit.training.trainer import Trainer, check_split
from dcdit_kernels import plan_chunks

TINY = {
    "model": {"input_size": 7, "in_channels": 16, "num_classes": 10, "hidden_size": 32, "depth": 2, "num_heads": 1}
    | {"encoder_width": 32, "learn_sigma": False, "target_ratio": 1.5},
    "codec": {"factor": 4},
    "batch_size": 64,
    "steps": 4,
}


def network():
    torch.manual_seed(0)
    net = MainNetwork(64, 12, 2, 4.0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def by_hand(net):
    net.gradient_checkpointing = True


def wrapped(net):
    apply_activation_checkpointing(
        net,
        functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
        lambda module: isinstance(module, DiTBlock),
    )


def kept_and_gradients(net):
    """Bytes that the graph keeps beside the parameters, each storage once, and all gradients."""
    torch.manual_seed(1)
    plan = plan_chunks(torch.rand(4, 64), (8, 8))
    x, c = torch.randn(plan.capacity, 64, requires_grad=True), torch.randn(4, 64, requires_grad=True)
    own, kept = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x, c, plan)
    before = sum(kept.values())
    gradients = torch.autograd.grad(out.square().sum(), [x, c, *net.parameters()])
    return before, gradients


@pytest.mark.parametrize("checkpointed", [by_hand, wrapped])
def test_checkpointed_blocks_keep_a_third_at_most(checkpointed):
    net = network()
    names = list(net.state_dict())
    whole, want = kept_and_gradients(net)
    checkpointed(net)
    less, got = kept_and_gradients(net)
    assert less <= whole / 3
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert list(net.state_dict()) == names


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Values and gradients of the second step of a run: a function of the changes in its configuration."""
    directory = tmp_path_factory.mktemp("runs")
    (directory / "tiny.yaml").write_text(yaml.safe_dump(TINY))

    @functools.cache
    def run(*changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = Trainer(load_config(directory / "tiny.yaml", [f"output={directory / 'run'}", *changes]))
        batch = torch.utils.data.default_collate([trainer.stream[i] for i in range(64)])
        trainer.train_step(batch)
        trainer.step = 1
        values = trainer.train_step(batch)
        trainer.close()
        return {key: float(value) for key, value in values.items()}, [p.grad for p in trainer.net.parameters()]

    return run


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_trains_as_the_whole(parts, two_steps):
    (values, gradients), (want, want_gradients) = two_steps(f"accumulate={parts}"), two_steps()
    assert values == pytest.approx(want, rel=1e-6)
    for got, whole in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-6)


def test_checkpointing_in_the_configuration_changes_no_bit(two_steps):
    (values, gradients), (want, want_gradients) = two_steps("checkpointing=true"), two_steps()
    assert values == want
    assert all(torch.equal(a, b) for a, b in zip(gradients, want_gradients, strict=True))


def test_a_batch_that_does_not_fall_into_parts():
    check_split(64, 2, 2)
    with pytest.raises(ConfigError, match="batch_size 48 over 2 accumulated parts must be a multiple of 32"):
        check_split(48, 1, 2)
    with pytest.raises(ConfigError, match="96 over 2 processes of 2 accumulated parts must be a multiple of 64"):
        check_split(96, 2, 2)
