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
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Kernel:
    """A jitted function with its launches: `kernel[grid](*arguments, **constants)`, as Triton writes them."""

    def __init__(self, function: Any, **constants: Any) -> None:
        self.function, self.constants = function, constants
        self.bound: dict[tuple[Any, ...], Kernel] = {}
        self.kept: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.direct = KNOWN and isinstance(function, JITFunction)  # the interpreter's is another
        if self.direct:
            # Of each parameter: whether integers are specialised on; None for a constant, which is by its value.
            self.special = [None if p.is_constexpr else not p.do_not_specialize for p in function.params]

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
            return
        if not self.direct or _hooked():
            self.function[grid](*args, **self.constants)
            return
        active = driver.active
        device = active.get_current_device()
        kinds: list[Any] = [device]
        passed = []
        for value, special in zip(args, self.special, strict=False):
            kind = type(value)
            if kind is int:
                if value >= 2**31:
                    self.function[grid](*args, **self.constants)
                    return
                kinds.append(value if special is None else special and (not value & 15 or (value == 1 and "1")))
            elif value is None or kind is float:
                kinds.append(kind)
            else:
                kinds.append(value.dtype)
                value = value.data_ptr()
                kinds.append(not value & 15)
            passed.append(value)
        known = tuple(kinds)
        kept = self.kept.get(known)
        if kept is None:
            compiled = self.function[grid](*args, **self.constants)
            if isinstance(compiled, CompiledKernel):
                rest = [self.constants[name] for name in self.function.arg_names[len(args) :]]
                self.kept[known] = (compiled.run, compiled.function, compiled.packed_metadata, rest)
            return
        run, function, metadata, rest = kept
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *passed, *rest)


def jit_kernel(**options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates a kernel for launches from the host: `triton.jit` with these options, as a `Kernel`."""
    return lambda function: Kernel(triton.jit(function, **options))
