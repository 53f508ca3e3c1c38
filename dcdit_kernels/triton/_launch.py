"""Launches of Triton kernels that keep the compiled kernel.

Triton's own launch binds, describes and looks up its arguments anew each time; a small kernel takes less time than that
takes the host. A `Kernel` keeps the compiled kernel under a key of everything that Triton specialises on: the device;
the constants; of a tensor its dtype and whether its address is a multiple of 16 bytes; of an integer whether it is 1 or
a multiple of 16; None. Triton's own launch serves new keys, integers beyond 32 bits, launch hooks, the interpreter,
AMD's GPUs, and any Triton with another way to launch compiled kernels than `_is_known` knows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def _is_known() -> bool:
    """Whether this Triton launches compiled kernels as `Kernel` does; for AMD it looks at sizes of tensors as well."""
    try:
        source = "".join(inspect.getsource(JITFunction.run).split())
    except (OSError, TypeError):
        return False
    call = (
        "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
        "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())"
    )
    return call in source and torch.version.hip is None


KNOWN = _is_known()


def _hooked() -> bool:
    """Whether somebody watches launches; a chain of hooks is empty where nobody does."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    try:
        return bool(enter.calls or leave.calls)
    except AttributeError:
        return bool(enter or leave)


class Kernel:
    """A jitted function with its launches: `kernel[grid](*arguments, **constants)`, as Triton writes them.

    Of the parameters, tensors are named `…_ptr` and come first, then numbers, then constants.
    """

    def __init__(self, function: Any, **constants: Any) -> None:
        self.function, self.constants = function, constants
        self.bound: dict[tuple[Any, ...], Kernel] = {}
        if KNOWN and isinstance(function, JITFunction):  # the interpreter's is another
            if all([p.name in constants for p in function.params if p.is_constexpr]):
                self.launch = _direct(function, constants)  # type: ignore[method-assign]

    def bind(self, **constants: Any) -> Kernel:
        """This kernel with more constants. A caller that keeps it spares each launch a look-up of the constants."""
        return Kernel(self.function, **self.constants, **constants)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launch on the current device and stream."""
        if constants:
            key = (*constants, *constants.values())
            bound = self.bound.get(key)
            if bound is None:
                bound = self.bound[key] = self.bind(**constants)
            bound.launch(grid, *args)
        else:
            self.function[grid](*args, **self.constants)


# `Kernel.launch` written out for a kernel's own parameters, as Triton writes its binder: a loop over them would take
# the host longer than all the rest.
DIRECT = """
def launch(grid, {arguments}):
    if hooked() or {beyond}:
        return function[grid]({arguments}, **constants)
    active = driver.active
    device = active.get_current_device()
    {addresses}
    key = device, {kinds}, not ({together}) & 15 or ({apart})
    try:
        run, handle, metadata = kept[key]
    except KeyError:
        compiled = function[grid]({arguments}, **constants)
        if isinstance(compiled, CompiledKernel):
            kept[key] = compiled.run, compiled.function, compiled.packed_metadata
        return
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, active.get_current_stream(device), handle, metadata, None, None, None, {passed}, *rest)
"""


def _direct(function: Any, constants: dict[str, Any]) -> Callable[..., None]:
    """`Kernel.launch` of a kernel that has all its constants."""
    names = {"function": function, "constants": constants, "kept": {}, "driver": driver, "hooked": _hooked}
    names |= {"rest": [constants[p.name] for p in function.params if p.is_constexpr], "CompiledKernel": CompiledKernel}
    exec(_code(function), names)
    return names["launch"]


@functools.cache
def _code(function: Any) -> Any:
    given = [p for p in function.params if not p.is_constexpr]
    tensors = [p.name for p in given if p.name.endswith("_ptr")]
    numbers = [p for p in given if not p.name.endswith("_ptr")]
    assert [*tensors, *(p.name for p in numbers)] == [p.name for p in given], function
    kinds = [f"None if {name} is None else {name}.dtype" for name in tensors]
    for p in numbers:
        special = f"not {p.name} & 15 or {p.name} == 1 and '1'"
        kind = f"{p.name}.__class__"
        kinds.append(kind if p.do_not_specialize else f"({special}) if {kind} is int else {kind}")
    source = DIRECT.format(
        arguments=", ".join(p.name for p in given),
        beyond=" or ".join(f"{p.name} >= {2**31}" for p in numbers) or "False",
        addresses="; ".join(f"at_{name} = 0 if {name} is None else {name}.data_ptr()" for name in tensors),
        kinds=", ".join(kinds),
        together=" | ".join(f"at_{name}" for name in tensors),
        apart=", ".join(f"at_{name} & 15" for name in tensors) + ",",
        passed=", ".join([*(f"at_{name}" for name in tensors), *(p.name for p in numbers)]),
    )
    return compile(source, f"<launch of {function.__name__}>", "exec")


def jit_kernel(**options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates a kernel for launches from the host: `triton.jit` with these options, as a `Kernel`."""
    return lambda function: Kernel(triton.jit(function, **options))
