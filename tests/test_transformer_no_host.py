"""Wrapped transformers with a budget that is a number: a forward looks at no tensor's values on the host.

As in `test_no_host` what runs on a CPU alone is left out: looks at indices, offsets and counts, attention's loop over
samples. A plan without a given number of rows waits in C++, where no mode sees it; here it raises.
"""

import contextlib
import sys

import pytest
import torch

pytest.importorskip("diffusers")
import torch.nn.functional as F
from test_no_host import Host, NoHost, raise_
from torch.utils._python_dispatch import _disable_current_modes
from transformer_families import FAMILIES, close, every_family, make, run

from dcdit.integrations.attention import add_dynamic_chunking
from dcdit.model.dynamic_chunking import DynamicChunking
from dcdit_kernels import plan
from dcdit_kernels.cpu import dechunk, modulate

BUDGETS = [{"budget_per_sample": 12}, {"budget": 20}, {"capacity": 30, "max_seqlen": 20, "drop_fraction": 0.5}]


def masked_attention(q, k, v, ends_q, ends_k, *lengths, packing):
    """Each row of q to the keys of its sample."""
    row = torch.arange(len(k), dtype=torch.int32)
    sample = torch.where(row < ends_k[-1], torch.searchsorted(ends_k[1:].contiguous(), row, right=True), -2)
    q, k, v = (rows.transpose(0, 1) for rows in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, packing.sample_index[:, None] == sample).transpose(0, 1)


def unseen(function):
    """The function, out of the mode's sight."""

    def call(*args):
        with _disable_current_modes():
            return function(*args)

    return call


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.setattr("dcdit.integrations.joint.varlen_attention", masked_attention)


@contextlib.contextmanager
def no_host():
    """NoHost, without what is looked at on a CPU alone."""
    rows_of_budget = plan.rows_of_budget

    def given_rows(*args):
        exact, capacity, longest = rows_of_budget(*args)
        return (exact, capacity, longest) if capacity is not None else raise_("number of rows")

    with pytest.MonkeyPatch.context() as patch, NoHost():
        patch.setattr(plan, "rows_of_budget", given_rows)
        patch.setattr("dcdit_kernels.packing.offsets", lambda *_: None)
        patch.setattr("dcdit_kernels.pack._check", lambda *_: None)
        patch.setattr("dcdit_kernels.pack._once", lambda *_: None)
        patch.setattr(sys.modules["dcdit_kernels.qk_norm_rope"], "indices", lambda *_: None)  # the name is a function's
        for module in (modulate, dechunk):
            patch.setattr(module, "live_count", unseen(module.live_count))
        for name in ("tolist", "numpy"):
            patch.setattr(torch.Tensor, name, lambda self, *args, name=name: raise_(name))
        yield


def prepared(family, **budget):
    """A wrapped model and inputs with texts of several lengths; the grid of FLUX has been read."""
    model, inputs = make(family), family.inputs()
    inputs = family.masked(inputs) if hasattr(family, "masked") else inputs
    chunking = add_dynamic_chunking(model)
    for name, value in budget.items():
        setattr(chunking, name, value)
    chunking.see(model, (), inputs)
    return model, inputs


@every_family
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: next(iter(budget)))
def test_a_forward_reads_nothing(family, budget, attention, monkeypatch):
    """And the spare rows of text change nothing."""
    model, inputs = prepared(family, **budget)
    with no_host():
        got = run(model, inputs)
    monkeypatch.setattr(DynamicChunking, "fixed", False)
    close(got, run(model, inputs), 1e-5)


@pytest.mark.parametrize("family", ["flux", "z-image", "qwen-image", "ltx"])
def test_lengths_of_text_are_seen(family, attention, monkeypatch):
    model, inputs = prepared(FAMILIES[family], budget_per_sample=12)
    monkeypatch.setattr(DynamicChunking, "fixed", False)
    with no_host(), pytest.raises(Host):
        run(model, inputs)
