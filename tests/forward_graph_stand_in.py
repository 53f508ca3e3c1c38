"""Transformers of diffusers with the stand-in for CUDA's graphs, for the tests of enable_cuda_graph."""

import copy
import functools

import pytest
import torch
from graph_stand_in import run_again
from test_transformer_no_host import attention, no_host  # noqa: F401
from transformer_families import make

from dcdit.integrations.attention import add_dynamic_chunking
from dcdit.model.forward_graphs import GraphedForward


@pytest.fixture(name="enable")
def enabling(attention):  # noqa: F811
    def enable(model, mode=no_host, **options):
        model.requires_grad_(False).forward = GraphedForward(
            model, capture=functools.partial(run_again, mode=mode), **options
        )
        return model.forward

    return enable


def both(family, enable, mode=no_host, **options):
    """A wrapped model, a copy of it with graphs, and the chunking of each."""
    model = make(family)
    own = add_dynamic_chunking(model, **options)
    other = copy.deepcopy(model)
    chunking = next(m for m in other.modules() if type(m) is type(own))
    return model, own, other, chunking, enable(other, mode)


def assert_same(own, chunking):
    for name in ("token_index", "nearest", "cu_seqlens"):
        assert torch.equal(getattr(own.routing.plan, name), getattr(chunking.routing.plan, name))
