"""Compilations by Triton's own launcher as batch and tokens change from one step to the next, a number a step.

A process of its own, as compile_kernels is. Needs no GPU: compilations are counted, and nothing is launched.
"""

from types import SimpleNamespace

import compile_kernels  # before triton: it turns the interpreter off
import torch
import triton
from triton.runtime.jit import JITFunction

# (samples, share of cells kept); from 4096 cells on, boundary_cosine takes larger tiles.
STEPS = ((4, 0.3), (4, 0.31), (4, 0.5), (4, 1.0), (4, 0.004), (4, 0.0), (1, 0.3), (1, 0.0), (2, 0.25), (15, 0.1))

keys = set()


def note(function, key, *rest):
    """Stands in for JITFunction._do_compile; without a kernel nothing is launched, nor kept for the next time."""
    keys.add((function.__name__, key))


if __name__ == "__main__":
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: compile_kernels.TARGETS["sm_90"],
    )
    triton.runtime.driver.set_active(driver)
    JITFunction._do_compile = note
    for batch, share in STEPS:
        before = len(keys)
        compile_kernels.launch_everything(torch.bfloat16, (16, 16), 1152, share, batch)
        print(len(keys) - before)
