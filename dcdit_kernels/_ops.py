"""One `Operator` for each public operator: its back-ends and, where it has gradients, its schema and its fake.

Who calls whom, where the back-end is a class with `forward` and `backward`, and where it is a function:

    eager, forward      class      `forward`; as a `_Node` where a gradient is wanted
                        function   the function, which PyTorch differentiates
    eager, backward     class      `_Node.backward` → `backward`; the gradient of a gradient raises
                        function   PyTorch's graph
    traced, forward     `_library.call` → dcdit::NAME → `forward` or the function
    traced, backward    class      dcdit::NAME_backward → `backward`
                        function   dcdit::NAME_backward → the function once more, and PyTorch's graph of it

A call is traced where torch.compile, torch.export or make_fx records it. Eager calls do without torch.library, which
costs the host more than a small kernel takes, and remember the back-end by devices and dtypes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _library
from ._autograd import TRANSFORMS, KernelFunction, connect
from ._check import all_tensors, dense, floating, one_device, traced, with_memory
from ._dispatch import BACKENDS, BackendError, current, requested_backend
from ._triton_support import assume_constant, elsewhere


@dataclass(frozen=True)
class Backend:
    """Where an operator is implemented, and why it cannot run.

    `target` is "module:name", imported on first use: a function that PyTorch differentiates, or a class with `forward`
    and `backward`. `why_not(device, dtypes)` is a reason, or None where the back-end can run.
    """

    target: str
    why_not: Callable[[torch.device, tuple[torch.dtype, ...]], str | None] = lambda device, dtypes: None

    @functools.cached_property
    def implementation(self) -> Any:
        """The function or class."""
        module, name = self.target.split(":")
        return getattr(importlib.import_module(module), name)


class Operator:
    """A name and its back-ends; `dcdit_kernels.reference` has every operator, and `backends` are the others.

    `describe(…)` of `explain`'s arguments returns the lines that it adds about a choice inside of a back-end.
    """

    def __init__(self, name: str, *, describe: Callable[..., list[str]] | None = None, **backends: Backend) -> None:
        self.name, self.describe = name, describe
        self.backends = {"reference": Backend(f"dcdit_kernels.reference:{name}"), **backends}
        OPERATORS[name] = self

    def choose(self, backend: str | None, *tensors: torch.Tensor | None) -> str:
        """Name of the back-end for tensors of these devices and dtypes; BackendError if a requested one cannot run."""
        given = [t for t in tensors if t is not None]
        return _chosen(self.name, requested_backend(backend), backend is None, given[0].device,
                       tuple([t.dtype for t in given]))  # fmt: skip

    def why_not(self, backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """Why `backend` cannot run tensors of this device and these dtypes, or None."""
        if backend not in self.backends:
            return f"{self.name} has no {backend} implementation"
        return self.backends[backend].why_not(device, dtypes)

    def run(self, backend: str | None, tensor: torch.Tensor, *args: Any) -> Any:
        """Call the function of the back-end asked for, chosen by its first argument, with autocast off."""
        chosen = self.choose(backend, tensor)
        if chosen != "reference":
            with_memory(self.name, {"the first tensor": tensor})
            if torch._C._are_functorch_transforms_active():
                raise BackendError(f"{self.name}: {TRANSFORMS}")
        function = self.backends[chosen].implementation
        return _full_precision(function, tensor.device, tensor, *args)


OPERATORS: dict[str, Operator] = {}
# (operator, request, devices and dtypes) → the choice, by name, or the implementation for tensors that pass the checks.
_known: dict[tuple[Any, ...], Any] = {}


@assume_constant
def _chosen(op: str, asked: str, everywhere: bool, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """`everywhere`: asked of all operators, so that one without such a back-end takes another."""
    key = (op, asked, everywhere, device, dtypes)
    if key not in _known:
        _known[key] = _choose(*key)
    return _known[key]


def _choose(op: str, asked: str, everywhere: bool, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    operator, reason = OPERATORS[op], None
    if everywhere and asked not in operator.backends:
        asked = "auto"
    for name in BACKENDS if asked == "auto" else (asked,):
        reason = operator.why_not(name, device, dtypes)
        if asked == "auto" and name == "triton" and device.type != "cuda":
            reason = "the interpreter is for tests"
        if reason is None:
            return name
    raise BackendError(f"{op}: backend {asked!r} cannot run: {reason}")


def _full_precision(function: Callable[..., Any], device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """Call it with autocast off: operators state their precision, and autocast would accumulate in half of it."""
    if not torch.is_autocast_enabled(device.type):
        return function(*args, **kwargs)
    with torch.autocast(device.type, enabled=False):
        return function(*args, **kwargs)


def on_device(function: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call it with the tensor's GPU as the current one."""
    if not elsewhere(tensor):
        return function(*args, **kwargs)
    with torch.cuda.device(tensor.device):
        return function(*args, **kwargs)


class Differentiable(Operator):
    """An operator with gradients, which torch.compile sees as `dcdit::NAME`.

    `tensors` and `constants` are fragments of its schema, such as "Tensor x, Tensor? residual" and "float sigma".
    `fake(**inputs)` gets all arguments by name and returns the outputs, a tuple where `outputs` is above 1. `plan` says
    whether it takes one. `integers` are the tensors without gradient. Of the tensors `unread`, large ones, a backward
    needs shape and dtype alone.
    """

    def __init__(
        self,
        name: str,
        tensors: str,
        constants: str,
        fake: Callable[..., Any],
        *,
        outputs: int = 1,
        plan: bool = True,
        integers: tuple[str, ...] = (),
        unread: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        self.fake, self.outputs, self.plan, self.integers, self.unread = fake, outputs, plan, integers, unread
        self.tensors, self.constants = (
            tuple(part.split()[-1] for part in schema.split(",") if part) for schema in (tensors, constants)
        )
        self.required = tuple(part.split()[-1] for part in tensors.split(",") if "?" not in part)
        _library.define(self, tensors, constants)

    def __call__(self, backend: str | None, /, **inputs: Any) -> Any:
        """Run the back-end asked for on the arguments by name."""
        tensors = [inputs[name] for name in self.tensors]
        if traced(tensors[0]):
            self._check(inputs)
            return _library.call(self, self.choose(backend, *tensors), inputs)
        plan = inputs["plan"] if self.plan else None
        key: list[Any] = [self.name, backend, current.eager, plan and plan.cu_seqlens.device]
        try:
            for tensor in tensors:
                key += (None,) if tensor is None else (type(tensor), tensor.dtype, tensor.device, tensor.layout)
        except AttributeError:  # of what is no tensor, which the check names
            self._check(inputs)
            raise
        known = tuple(key)
        found = _known.get(known)
        if found is None:
            dense(self.name, **{name: inputs[name] for name in self.tensors})
            self._check(inputs)
            chosen = self.choose(backend, *tensors)
            if chosen != "reference":
                with_memory(self.name, {name: inputs[name] for name in self.tensors})
            found = _known[known] = chosen, self.backends[chosen].implementation, self.has_backward(chosen)
        chosen, implementation, own_backward = found
        if chosen != "reference" and torch._C._are_functorch_transforms_active():
            raise BackendError(f"{self.name}: {TRANSFORMS}")
        if not own_backward:
            return _full_precision(implementation, tensors[0].device, **inputs)
        graph = torch.is_grad_enabled() and any([tensor is not None and tensor.requires_grad for tensor in tensors])
        if graph or forward_ad._current_level >= 0:
            return _Node.apply(self, implementation, inputs, *tensors)
        if elsewhere(tensors[0]):
            return on_device(implementation.forward, tensors[0], **inputs)
        return implementation.forward(**inputs)

    def _check(self, inputs: dict[str, Any]) -> None:
        """Raise unless all tensors are there, of dtypes that operators take, and on one device."""
        named = {name: inputs[name] for name in self.tensors}
        all_tensors(self.name, **{name: named[name] for name in self.required})
        floating(self.name, **{name: tensor for name, tensor in named.items() if name not in self.integers})
        plan = inputs["plan"] if self.plan else None
        one_device(self.name, named[self.tensors[0]], named if plan is None else {**named, "plan": plan.cu_seqlens})

    def has_backward(self, backend: str) -> bool:
        """Whether this back-end brings its own backward."""
        return hasattr(self.backends[backend].implementation, "backward")

    def forward(self, backend: str, inputs: dict[str, Any]) -> Any:
        """Run this back-end, and leave no node where it brings its own backward. A traced call may have named any."""
        self.choose(backend, *(inputs[name] for name in self.tensors))
        implementation, first = self.backends[backend].implementation, inputs[self.tensors[0]]
        if self.has_backward(backend):
            return on_device(implementation.forward, first, **inputs)
        return _full_precision(implementation, first.device, **inputs)

    def backward(self, backend: str, grads: tuple[torch.Tensor, ...], needs: Any, inputs: dict[str, Any]) -> Any:
        """The gradients of the tensors, by a back-end that brings its own backward."""
        return on_device(self.backends[backend].implementation.backward, grads[0], *grads, needs, **inputs)


class _Node(KernelFunction):
    """An eager call of a back-end that brings its own backward."""

    @staticmethod
    def forward(ctx, operator, implementation, inputs, *tensors):
        ctx.operator, ctx.implementation, ctx.unread = operator, implementation, {}
        ctx.rest = {name: inputs[name] for name in operator.constants}
        if operator.plan:
            ctx.rest["plan"] = inputs["plan"]
        kept = list(tensors)
        for name in operator.unread:
            place = operator.tensors.index(name)
            if tensors[place] is not None:
                kept[place], ctx.unread[name] = None, (tensors[place].shape, tensors[place].dtype)
        ctx.save_for_backward(*kept)
        return on_device(implementation.forward, tensors[0], **inputs)

    @staticmethod
    def backward(ctx, *grads):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        inputs = dict(zip(ctx.operator.tensors, saved, strict=True)) | ctx.rest
        for name, (shape, dtype) in ctx.unread.items():
            inputs[name] = torch.empty(shape, dtype=dtype, device="meta")
        with torch.no_grad():
            got = on_device(ctx.implementation.backward, grads[0], *grads, needs, **inputs)
        got = [grad if need else None for grad, need in zip(got, needs, strict=True)]
        if torch.is_grad_enabled():
            got = connect(got, (*grads, *saved))
        return None, None, None, *got
