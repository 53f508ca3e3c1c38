"""Distillation by block of diffusers' transformers."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")
from transformer_families import FAMILIES, every_family, make

from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking
from dcdit.integrations.distillation import distillation_loss


@every_family
def test_a_copy_has_nothing_to_learn_and_a_quarter_of_it_has(family):
    """Zero with all cells kept; with few, gradients reach every chunked block, and none the teacher."""
    model, inputs = make(family), family.inputs((4, 6))
    teacher = copy.deepcopy(model)
    chunking = add_dynamic_chunking(model, blocks=slice(1, -1))
    rounding = distillation_loss(model, teacher, **copy.copy(inputs)).detach()
    chunking.drop_fraction = 0.75
    loss = distillation_loss(model, teacher, **copy.copy(inputs))
    loss.backward()
    assert chunking.routing.plan.lengths.tolist() == [6, 6] and rounding < min(1e-9, 0.01 * loss)
    assert all(any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in chunking.stack)
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(block._forward_hooks for block in chunking.stack)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_activation_checkpointing_changes_nothing(name):
    model, inputs = make(FAMILIES[name]), FAMILIES[name].inputs((4, 6))
    teacher = copy.deepcopy(model)
    chunking, found = add_dynamic_chunking(model.train()), []
    chunking.drop_fraction = 0.5
    for _ in range(2):
        distillation_loss(model, teacher, **inputs).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        model.enable_gradient_checkpointing()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_each_block_counts_alike():
    """A last block whose output is off in one channel adds a quarter of the square of that over the variance."""
    family = FAMILIES["ltx"]
    model, inputs = make(family), family.inputs((4, 6))
    teacher, seen = copy.deepcopy(model), []
    teacher.transformer_blocks[3].register_forward_hook(lambda *a: seen.append(a[2]))
    chunking = add_dynamic_chunking(model)
    gate = chunking.blocks[3].scale_shift_table[5]
    chunking.blocks[3].ff.net[2].bias[7] += 0.5
    modulators = model.time_embed(inputs["timestep"], hidden_dtype=torch.float32, batch_size=2)[0].view(2, 6, -1)[
        :, 5, 7
    ]
    loss = distillation_loss(model, teacher, **inputs)
    off = (0.5 * (gate[7] + modulators)).square().mean() / seen[0].shape[2]
    torch.testing.assert_close(loss, off / seen[0].var() / 4, rtol=1e-3, atol=0)


def test_what_it_refuses():
    model, inputs = make(FAMILIES["wan"]), FAMILIES["wan"].inputs()
    with pytest.raises(ConfigError, match="needs a wrapped model and a teacher that is not"):
        distillation_loss(model, model, **inputs)
    add_dynamic_chunking(model)
    with pytest.raises(ConfigError, match="must have the model's blocks, got 0 of 4"):
        distillation_loss(model, torch.nn.Linear(1, 1), **inputs)
