"""torch.library operators `dcdit::NAME` and `dcdit::NAME_backward`, for torch.compile, make_fx and opcheck.

An operator is a function of its inputs; its backward is a function of the gradients and the inputs. A plan travels
as its tensors and sizes. A back-end that is a function recomputes the forward to differentiate it: the price of
torch.compile on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ._autograd import refuse_second
from .chunk_plan import ChunkPlan
from .packing import Packing

if TYPE_CHECKING:
    from ._ops import Differentiable

PACKING_TENSORS = ("cu_seqlens", "sample_index")
PLAN_TENSORS = (*PACKING_TENSORS, "token_index", "nearest", "member_offsets", "member_index", "overflow")

_library = torch.library.Library("dcdit", "DEF")
_operators: dict[str, Differentiable] = {}


def implement(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Define `dcdit::schema` with one implementation for every device, and `fake` for fake tensors."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Where a graph breaks at an operator, torch.compile would go on inside it.
    _library.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dcdit::{name}", fake, lib=_library)
    return f"dcdit::{name}"


def define(operator: Differentiable, tensors: str, constants: str) -> None:
    """Make `dcdit::NAME` and its backward."""
    _operators[operator.name] = operator
    tail = ", ".join(filter(None, (tensors, "Tensor[] plan, SymInt[] sizes", constants, "str backend")))
    returns = "Tensor" if operator.outputs == 1 else "(" + ", ".join(["Tensor"] * operator.outputs) + ")"
    implement(
        f"{operator.name}({tail}) -> {returns}",
        lambda *args: _forward(operator, args),
        lambda *args: operator.fake(**_named(operator, args)),
    )
    gradients = ", ".join(f"Tensor grad{i}" for i in range(operator.outputs))
    first = operator.outputs + 1
    backward = implement(
        f"{operator.name}_backward({gradients}, bool[] needs, {tail}) -> Tensor[]",
        lambda *args: _backward(operator, args),
        lambda *args: _like(args[first - 1], args[first : first + len(operator.tensors)]),
    )
    torch.library.register_autograd(backward, refuse_second, lib=_library)


def call(operator: Differentiable, backend: str, inputs: dict[str, Any]) -> Any:
    """Call `dcdit::NAME` with its backward, by a name that torch.compile can follow."""
    parts, sizes = flat_plan(inputs.get("plan"))
    constants = (sizes, *(inputs[name] for name in operator.constants), backend)
    tensors = [inputs[name] for name in operator.tensors]
    tensors = [_distinct(tensor, tensors[:i]) for i, tensor in enumerate(tensors)]
    return _Call.apply(operator.name, constants, *tensors, *parts)


def flat_plan(plan: Packing | None) -> tuple[list[torch.Tensor], list[int]]:
    """The tensors and the sizes that a plan travels as."""
    if plan is None:
        return [], []
    names, grid = (PLAN_TENSORS, plan.grid) if isinstance(plan, ChunkPlan) else (PACKING_TENSORS, ())
    return [getattr(plan, name) for name in names], [plan.max_seqlen, *grid]


def _whole_plan(parts: list[torch.Tensor], sizes: list[int]) -> Packing | None:
    if not parts:
        return None
    kind, names = (ChunkPlan, PLAN_TENSORS) if len(sizes) > 1 else (Packing, PACKING_TENSORS)
    tensors = dict(zip(names, parts, strict=True))
    batch, capacity = tensors["cu_seqlens"].shape[0] - 1, tensors["sample_index"].shape[0]
    grid = {"grid": tuple(sizes[1:])} if kind is ChunkPlan else {}
    return kind.unchecked(batch_size=batch, capacity=capacity, max_seqlen=sizes[0], exact=False, **grid, **tensors)


def _distinct(tensor: torch.Tensor | None, before: list[torch.Tensor | None]) -> torch.Tensor | None:
    """A view where the tensor came before: torch.compile wants no input of an autograd.Function twice."""
    return tensor.view_as(tensor) if tensor is not None and any(tensor is other for other in before) else tensor


class _Call(torch.autograd.Function):
    """The operator and its backward, each one call."""

    @staticmethod
    def forward(ctx, op, constants, *tensors):
        ctx.op, ctx.constants = op, constants
        ctx.save_for_backward(*tensors)
        count = len(_operators[op].tensors)
        return getattr(torch.ops.dcdit, op)(*tensors[:count], list(tensors[count:]), *constants)

    @staticmethod
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors
        count = len(_operators[ctx.op].tensors)
        needs = [bool(need) for need in ctx.needs_input_grad[2 : 2 + count]]
        operator = getattr(torch.ops.dcdit, f"{ctx.op}_backward")
        got = operator(*grads, needs, *tensors[:count], list(tensors[count:]), *ctx.constants)
        got = [grad if need else None for grad, need in zip(got, needs, strict=True)]
        return None, None, *got, *[None] * (len(tensors) - count)


def _named(operator: Differentiable, args: tuple[Any, ...]) -> dict[str, Any]:
    """The operator's own arguments by name, with the plan put together again; without `backend`."""
    count = len(operator.tensors)
    values = (*args[:count], *args[count + 2 : -1])
    named = dict(zip((*operator.tensors, *operator.constants), values, strict=True))
    return {**named, "plan": _whole_plan(args[count], args[count + 1])} if operator.plan else named


def _forward(operator: Differentiable, args: tuple[Any, ...]) -> Any:
    out = operator.forward(args[-1], _named(operator, args))
    # An operator must not return one of its inputs.
    return out.clone() if any(out is arg for arg in args) else out


def _backward(operator: Differentiable, args: tuple[Any, ...]) -> list[torch.Tensor]:
    grads, needs, args = args[: operator.outputs], args[operator.outputs], args[operator.outputs + 1 :]
    inputs, backend = _named(operator, args), args[-1]
    if operator.has_backward(backend):
        got = operator.backward(backend, grads, needs, inputs)
    else:
        got = _differentiate(operator, backend, grads, needs, inputs)
    like = _like(needs, args[: len(needs)])
    # The outputs of an operator may share no memory with each other or with the inputs.
    memory = {grad.untyped_storage().data_ptr() for grad in grads}
    return [_own(have, made, memory) if need else made for have, need, made in zip(got, needs, like, strict=True)]


def _own(grad: torch.Tensor, like: torch.Tensor, memory: set[int]) -> torch.Tensor:
    """`grad` in the layout of `like`, copied where its memory is among `memory`, which it then joins."""
    grad = grad.contiguous(memory_format=_layout(like))
    if grad.untyped_storage().data_ptr() in memory:
        grad = grad.clone()
    memory.add(grad.untyped_storage().data_ptr())
    return grad


def _differentiate(operator: Differentiable, backend: str, grads: Any, needs: Any, inputs: dict[str, Any]) -> Any:
    names = operator.tensors
    # A compiled graph may run its operators below autograd; here it is needed.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd, torch.enable_grad():
        leaves = {n: inputs[n].detach().requires_grad_() for n, need in zip(names, needs, strict=True) if need}
        out = operator.forward(backend, {**inputs, **leaves})
        outs = out if isinstance(out, tuple) else (out,)
        # Without a token an output may depend on nothing.
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
        got = tuple(torch.zeros_like(leaf) for leaf in leaves.values())
        if pairs:
            used, weights = zip(*pairs, strict=True)
            got = torch.autograd.grad(used, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    own = iter(got)
    return [next(own) if need else None for need in needs]


def _layout(t: torch.Tensor) -> torch.memory_format:
    """Channels-last features stay channels-last: convolutions would convert any other layout back."""
    last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _like(needs: list[bool], tensors: tuple[Any, ...]) -> list[torch.Tensor]:
    """A gradient for each input, without elements where none is needed."""
    first = tensors[0]
    return [
        torch.empty_like(t, memory_format=_layout(t)) if need else first.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    ]
