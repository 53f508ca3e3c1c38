"""Attention of the installed torch takes the arguments that are given to it."""

import inspect

import pytest
import torch
from attention_stand_ins import (
    ATEN,
    CU_K,
    CU_Q,
    dtype_of,
    rows,
)

import dcdit_kernels as K
from dcdit_kernels import flash, flash_calls


def test_heads_that_do_not_divide():
    q, kv = torch.randn(9, 4, 8), torch.randn(9, 3, 8)
    with pytest.raises(ValueError, match="heads of k must divide those of q, 4, got 3"):
        K.varlen_attention(q, kv, kv, CU_Q, CU_Q, 5, 5)


def test_torch_varlen_takes_our_keywords():
    """The installed torch, not a stand-in; nothing is run."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10 has no varlen_attn")
    signature = inspect.signature(varlen.varlen_attn)
    bound = signature.bind(**dict.fromkeys(flash.TORCH_KEYWORDS))
    missing = [p.name for p in signature.parameters.values() if p.default is p.empty and p.name not in bound.arguments]
    assert not missing
    assert isinstance(flash._find("torch.nn.attention.varlen", "varlen_attn", flash.TORCH_KEYWORDS), tuple)


@pytest.mark.parametrize("name", ATEN)
def test_aten_operators_take_our_arguments(name):
    """The installed torch, on tensors without values: its schema, and its derivative in C++."""
    library = next(x for x in flash.LIBRARIES if x.name == name)
    operator = getattr(torch.ops.aten, library.function).default
    assert set(library.keywords) <= {argument.name for argument in operator._schema.arguments}
    taken = [p.name for p in inspect.signature(ATEN[name]).parameters.values()]
    assert taken == [*[a.name for a in operator._schema.arguments][: len(taken) - 1], "scale"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(flash._found, (library.module, library.function), (operator, frozenset()))
        q, k, v = torch.empty(9, 3, 2, 72, dtype=dtype_of(name), device="meta", requires_grad=True).unbind(1)
        cu = torch.empty(4, dtype=torch.int32, device="meta")
        out = flash_calls.attend(library, None, False, q, k, v, cu, cu, 8, 8, 0.3)
        assert out.shape == q.shape and out.dtype == q.dtype
    nodes = [out.grad_fn]
    for node in nodes:
        nodes += [further for further, _ in node.next_functions if further is not None and further not in nodes]
    derivative = library.function.replace("_forward", "_backward").replace("_", "")
    assert any(derivative in type(node).__name__.lower() for node in nodes), nodes


@pytest.mark.parametrize("bound", [4, None, 40.0, -1])
def test_a_bound_below_the_longest_sample(bound):
    q, k, v = rows(torch.float32)
    with pytest.raises(
        ValueError, match=r"max_seqlen_q (is 4, the longest sample has 5|must be a number of rows, got)"
    ):
        K.varlen_attention(q, k, v, CU_Q, CU_K, bound, 6)
    with pytest.raises(ValueError, match="max_seqlen_k"):
        K.varlen_attention(q, k, v, CU_Q, CU_K, 5, 5 if bound == 4 else bound)
