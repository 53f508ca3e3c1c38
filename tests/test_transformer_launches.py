"""Launches of a chunked block of FLUX on the Triton path, beside those of the untouched block."""

import pytest
import torch

pytest.importorskip("diffusers")
import torch.nn.functional as F
from test_launches import Launches
from transformer_families import FAMILIES, make, run

from dcdit.integrations.attention import add_dynamic_chunking
from dcdit_kernels import attention, flash, flash_calls, use_backend


def counted(block, launched, counts):
    """Note what each forward of the block launches: kernels of Triton, and operators of PyTorch that compute."""
    forward = block.forward

    def call(*args, **kwargs):
        before = len(launched)
        with Launches() as operators:
            out = forward(*args, **kwargs)
        for interpreters in ("set_", "copy_"):
            del operators.names[interpreters]
        counts.append((len(launched) - before, operators.names))
        return out

    block.forward = call


def test_a_double_block_of_flux_launches_no_more_than_the_untouched_one(monkeypatch, launches):
    """Attention is one launch in both, and so is a norm of the untouched block, as on a GPU."""
    if launches is None:
        pytest.skip("launches are counted where Triton is interpreted")
    monkeypatch.setattr(flash, "choose", lambda *_, **__: flash.LIBRARIES[-1])
    monkeypatch.setattr(attention, "_chosen", {})
    one = lambda library, q, k, v, *_: torch.addcmul(v, q, k)  # noqa: E731
    monkeypatch.setitem(flash_calls.CALLS, flash.LIBRARIES[-1].keywords, one)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: x * weight)
    family = FAMILIES["flux"]
    model, inputs, counts = make(family), family.inputs((3, 4), batch=1), []
    counted(model.transformer_blocks[1], launches, counts)
    run(model, inputs)
    del model.transformer_blocks[1].forward
    chunking = add_dynamic_chunking(model)
    chunking.drop_fraction = 0.5
    counted(chunking.blocks[1], launches, counts)
    with use_backend("triton"):
        run(model, inputs)
    (none, untouched), (kernels, operators) = counts
    assert none == 0 and kernels >= 6
    assert kernels + operators.total() <= untouched.total(), (kernels, operators, untouched)
