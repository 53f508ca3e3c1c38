"""torch.library operators `dcdit::NAME` and `dcdit::NAME_backward`: what torch.compile and opcheck see.

Every operator is a function of its inputs, and its backward one of the gradients and the same inputs: nothing else is
saved. A plan travels as its tensors and sizes. Eager calls do without these operators, which cost the host more than a
small kernel takes. Inside one, the reference and native back-ends recompute the forward to differentiate it: the price
of torch.compile on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _dispatch
from ._check import one_device, traced
from .chunk_plan import ChunkPlan
from .native import device_of

PLAN_TENSORS = (
    "cu_seqlens",
    "token_index",
    "sample_index",
    "nearest",
    "member_offsets",
    "member_index",
    "overflow",
)

_library = torch.library.Library("dcdit", "DEF")


@dataclass(frozen=True)
class _Operator:
    tensors: tuple[str, ...]  # in the order of the schema; those that are not floating point get no gradient
    constants: tuple[str, ...]
    outputs: int
    plan: bool
    unread: tuple[str, ...]  # tensors of which a backward needs no more than shape and dtype


_operators: dict[str, _Operator] = {}


def define(
    op: str,
    tensors: str,
    constants: str,
    fake: Callable[..., Any],
    outputs: int = 1,
    plan: bool = True,
    unread: tuple[str, ...] = (),
) -> None:
    """Make `dcdit::op` and its backward from schema fragments such as "Tensor x, Tensor? residual", "float sigma".

    `fake(**inputs)` gets the operator's arguments by name and returns its outputs (a tuple where there are several).
    `plan` says whether the operator takes one; `unread` names the large tensors whose values no backward needs.
    """
    names, constant_names = (tuple(part.split()[-1] for part in s.split(",") if part) for s in (tensors, constants))
    _operators[op] = _Operator(names, constant_names, outputs, plan, unread)
    tail = ", ".join(filter(None, (tensors, "Tensor[] plan, SymInt[] sizes", constants, "str backend")))
    returns = "Tensor" if outputs == 1 else "(" + ", ".join(["Tensor"] * outputs) + ")"
    gradients = ", ".join(f"Tensor grad{i}" for i in range(outputs))
    implement(f"{op}({tail}) -> {returns}", lambda *args: _forward(op, args), lambda *args: fake(**_named(op, args)))
    implement(
        f"{op}_backward({gradients}, bool[] needs, {tail}) -> Tensor[]",
        lambda *args: _backward(op, args),
        lambda *args: _like(args[outputs], args[outputs + 1 : outputs + 1 + len(names)]),
    )


def implement(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `dcdit::schema` with its implementation on every device and what it returns for fake tensors."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Where a graph breaks at an operator, torch.compile would go on inside it.
    _library.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dcdit::{name}", fake, lib=_library)


def run(op: str, backend: str | None, **inputs: Any) -> Any:
    """Call `op` on the back-end asked for; what is traced goes through torch.library."""
    named = {name: inputs[name] for name in _operators[op].tensors}
    plan, tensors = inputs.get("plan"), list(named.values())
    one_device(op, tensors[0], named if plan is None else {**named, "plan": plan.cu_seqlens})
    name = _dispatch.choose(op, backend, **inputs)
    if traced(tensors[0]):
        return _trace(op, name, inputs)
    if name != "triton":
        return _dispatch.call(op, name, **inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Launch.apply(op, inputs, *tensors)
    return _launch(op, inputs)


def _launch(op: str, inputs: dict[str, Any]) -> Any:
    with device_of(inputs[_operators[op].tensors[0]]):
        return _dispatch.load(op, "triton").forward(**inputs)


def _launch_backward(op: str, grads: Any, needs: Any, inputs: dict[str, Any]) -> Any:
    with device_of(grads[0]):
        return _dispatch.load(op, "triton").backward(*grads, needs, **inputs)


class _Launch(torch.autograd.Function):
    """An eager call of the Triton back-end, straight to its launchers."""

    @staticmethod
    def forward(ctx, op, inputs, *tensors):
        spec, ctx.op = _operators[op], op
        ctx.rest = {name: value for name, value in inputs.items() if name not in spec.tensors}
        kept = (
            torch.empty_like(t, device="meta") if name in spec.unread and t is not None else t
            for name, t in zip(spec.tensors, tensors, strict=True)
        )
        ctx.save_for_backward(*kept)
        return _launch(op, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        inputs = dict(zip(_operators[ctx.op].tensors, ctx.saved_tensors, strict=True))
        needs = ctx.needs_input_grad[2:]
        got = _launch_backward(ctx.op, grads, needs, inputs | ctx.rest)
        return None, None, *(grad if need else None for grad, need in zip(got, needs, strict=True))


def _trace(op: str, name: str, inputs: dict[str, Any]) -> Any:
    spec, plan = _operators[op], inputs.get("plan")
    parts = [] if plan is None else [getattr(plan, part) for part in PLAN_TENSORS]
    sizes = [] if plan is None else [plan.max_seqlen, *plan.grid]
    constants = (parts and sizes, *(inputs[c] for c in spec.constants), name)
    tensors = [inputs[t] for t in spec.tensors]
    tensors = [_distinct(tensor, tensors[:i]) for i, tensor in enumerate(tensors)]
    return _Call.apply(op, constants, *tensors, *parts)


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


def _named(op: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """The operator's own arguments by name, with the plan put together again; without `backend`."""
    spec = _operators[op]
    count = len(spec.tensors)
    parts, sizes = args[count], args[count + 1]
    plan = None
    if parts:
        tensors = dict(zip(PLAN_TENSORS, parts, strict=True))
        batch, capacity = tensors["cu_seqlens"].shape[0] - 1, tensors["token_index"].shape[0]
        known = {"grid": tuple(sizes[1:]), "batch_size": batch, "capacity": capacity, "max_seqlen": sizes[0]}
        plan = ChunkPlan.unchecked(**known, **tensors, exact=False)
    named = dict(zip((*spec.tensors, *spec.constants), (*args[:count], *args[count + 2 : -1]), strict=True))
    return {**named, "plan": plan} if spec.plan else named


def _forward(op: str, args: tuple[Any, ...]) -> Any:
    inputs, backend = _named(op, args), args[-1]
    if backend == "triton":
        return _launch(op, inputs)
    # An operator must not return one of its inputs.
    out = _dispatch.call(op, backend, **inputs)
    return out.clone() if any(out is arg for arg in args) else out


def _backward(op: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    spec = _operators[op]
    grads, needs, args = args[: spec.outputs], args[spec.outputs], args[spec.outputs + 1 :]
    inputs, backend = _named(op, args), args[-1]
    if backend == "triton":
        got = _launch_backward(op, grads, needs, inputs)
    else:
        got = _differentiate(op, backend, grads, needs, inputs)
    like = _like(needs, args[: len(needs)])
    # Nor may its outputs share memory, with one another or with what came in.
    memory = {grad.untyped_storage().data_ptr() for grad in grads}
    return [_own(have, memory) if need else none for have, need, none in zip(got, needs, like, strict=True)]


def _own(grad: torch.Tensor, memory: set[int]) -> torch.Tensor:
    """`grad` dense, copied where its memory is among `memory`, which it then joins."""
    grad = grad.contiguous(memory_format=_layout(grad))
    if grad.untyped_storage().data_ptr() in memory:
        grad = grad.clone()
    memory.add(grad.untyped_storage().data_ptr())
    return grad


def _differentiate(op: str, backend: str, grads: Any, needs: list[bool], inputs: dict[str, Any]) -> list[Any]:
    names = _operators[op].tensors
    # A compiled graph may run its operators below autograd; here it is needed.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd, torch.enable_grad():
        leaves = {n: inputs[n].detach().requires_grad_() for n, need in zip(names, needs, strict=True) if need}
        out = _dispatch.call(op, backend, **{**inputs, **leaves})
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
    """Channels-last features stay so: convolutions would put back what came in another layout."""
    last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _like(needs: list[bool], tensors: tuple[Any, ...]) -> list[torch.Tensor]:
    """A gradient for each input, without elements where none is needed."""
    first = tensors[0]
    return [
        torch.empty_like(t, memory_format=_layout(t)) if need else first.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    ]
