"""Chunked transformers whose router chooses the tokens anew after a number of blocks."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")
from test_upcycle_transformers import configuration
from transformer_families import FAMILIES, close, every_family, make, picture, run

from dcdit.cli import main
from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking, chunking_of, load_dynamic_chunking
from dcdit.integrations.distillation import distillation_loss
from dcdit.model.forward_graphs import GraphedForward
from dcdit.training.config import load_config
from dcdit.training.transformers import TransformerConfig
from dcdit.training.transformers.student import keep_a_share


def scattered(model, share=0.5, **options):
    """Chunked with a router that keeps about half of the cells, others in each group."""
    torch.manual_seed(3)
    chunking = add_dynamic_chunking(model, **options)
    torch.nn.init.normal_(chunking.router.score.weight)
    chunking.drop_fraction = share
    return chunking


@every_family
def test_all_kept_is_the_untouched_model(family):
    """Text goes from group to group as rows, and its padding stays out."""
    model, inputs = make(family), family.inputs()
    inputs = family.masked(inputs) if hasattr(family, "masked") else inputs
    want = run(model, inputs)
    chunking = add_dynamic_chunking(model, group=1)
    torch.nn.init.constant_(chunking.router.score.bias, 20.0)
    close(run(model, inputs), want, 1e-5)
    assert len(chunking.routings) == len(chunking.stack) and chunking.routings[-1] is chunking.routing


def test_two_groups_are_two_stacks():
    """FLUX's second double block and first single one, then the other single ones: each as a model chunked there."""
    family = FAMILIES["flux"]
    model, inputs, between = make(family), family.inputs(), []
    parts = [copy.deepcopy(model) for _ in range(2)]
    chunking = scattered(model, blocks=slice(1, 5), group=2)
    first, second = (scattered(part, blocks=slice(a, a + 2)) for part, a in zip(parts, (1, 3), strict=True))
    first.register_forward_hook(lambda module, given, out: between.append(out))
    second.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args, {**kwargs, "encoder_hidden_states": between[0][0], "hidden_states": between[0][1]}
        ),
        with_kwargs=True,
    )  # fmt: skip
    run(parts[0], inputs)
    want = run(parts[1], inputs)
    assert torch.equal(run(model, inputs), want)
    masks = [routing.boundary_mask for routing in chunking.routings]
    assert torch.equal(masks[0], first.routing.boundary_mask) and torch.equal(masks[1], second.routing.boundary_mask)
    assert not torch.equal(*masks)


@every_family
def test_it_trains(family):
    """Flow matching's gradient and the distillation's reach the router by every group and each block."""
    model, inputs = make(family), family.inputs()
    teacher = copy.deepcopy(model)
    chunking = scattered(model, group=2)
    for loss in (lambda: picture(model, inputs).square().mean(), lambda: distillation_loss(model, teacher, **inputs)):
        value = loss()
        own = [routing.boundary_prob for routing in chunking.routings]
        grads = torch.autograd.grad(value, [*own[:-1], *(next(block.parameters()) for block in chunking.stack)])
        assert all(g.isfinite().all() and g.any() for g in grads)
    assert len(own) == -(-len(chunking.stack) // 2)


def test_saved_copied_and_not_replayed(tmp_path):
    family = FAMILIES["wan"]
    model, inputs = make(family), family.inputs()
    chunking = scattered(model, blocks=slice(1, None), group=1)
    want = run(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = load_dynamic_chunking(tmp_path)
    for part in (copy.deepcopy(model), loaded):
        wrapped = next(m for m in part.modules() if type(m) is type(chunking))
        assert wrapped.group == 1 and wrapped.routings == ()
        wrapped.drop_fraction = chunking.drop_fraction
        assert torch.equal(run(part, inputs), want)
    graphs = GraphedForward(model, capture=lambda *_: pytest.fail("captured"))
    assert torch.equal(graphs(**inputs).sample, want)
    assert dict(graphs.eager) == {"tokens are chosen anew by groups": 1}


@pytest.mark.parametrize("group", [0, -1, True, 1.5, "two"])
def test_bad_group(group):
    with pytest.raises(ConfigError, match="group must be a number of blocks, or None for all of them, got "):
        add_dynamic_chunking(make(FAMILIES["ltx"]), group=group)


def test_upcycling_by_groups(tmp_path):
    """Every group has its part in the ratio loss; the model that is written says its groups."""
    main([*configuration(tmp_path), "group=2", "blocks=[1,5]"])
    chunking = chunking_of(load_dynamic_chunking(tmp_path / "run/model"))
    assert (chunking.group, len(chunking.stack)) == (2, 4)
    with pytest.raises(ConfigError, match="group must not be negative, got -1"):
        load_config(tmp_path / "config.yaml", ["group=-1", "source=a"], TransformerConfig)


def test_a_fresh_router_keeps_a_share_of_all_groups_together():
    model = make(FAMILIES["flux"])
    chunking = scattered(model, share=0.0, group=1)
    run(model, FAMILIES["flux"].inputs())
    scores = torch.cat([routing.boundary_prob for routing in chunking.routings]).logit()
    bias = chunking.router.score.bias.item()
    with torch.no_grad():
        keep_a_share(chunking, 4)
    kept = (scores + (chunking.router.score.bias.item() - bias) > 0).float().mean()
    assert scores.shape == (5 * 2, 35) and kept == pytest.approx(0.25, abs=0.01)
