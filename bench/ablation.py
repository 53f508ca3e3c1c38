"""Choices inside an operator, timed side by side: `bench.run --cases ablation`. One entry of a table is one variant.

A variant is the shipped operator under a context that changes one constant (`under`), or a function of the case's
inputs. Each passes the gate of its group before it is timed. A choice that this tree or this machine lacks fails alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

import dcdit_kernels as K
from dcdit import DCDiT
from dcdit_kernels import flash, flash_calls

from .cases import Case
from .operators import planned
from .problem import Family, Problem, Variant, Work


def under(target: str, value: object) -> Callable:
    """A context with `target`, such as "dcdit_kernels.triton._rows.FILL", set to `value`."""
    return functools.partial(patch, target, value)


SHIPPED = ("triton", "dcdit")
# group → variant → context of the shipped Triton operator.
CONTEXTS: dict[str, dict[str, Callable]] = {
    # Rows of a sample in one program of the backward: more suit large batches, and leave SMs idle in small ones.
    "modulate": {f"slabs of {n}": under("dcdit_kernels.triton.modulate.SLAB", n) for n in (8, 32)},
}
# group → variants that are functions of their own.
MASKS = ("no mask", "a mask for each plan", "a mask for each call")
LIBRARIES = tuple(library.name for library in flash.LIBRARIES)
FUNCTIONS = {"attention": (*MASKS, "max_seqlen 1024", *LIBRARIES)}


def attention(case: Case, device: str, problem: Problem) -> dict[str, Callable]:
    """name → attention of qkv (T, 3, heads, head_dim) by each library, under a loose bound of the lengths, and with the
    mask that rows past the last live one need. The problem hears which library cannot run."""
    prob, plan, _ = planned(case, device)
    spare = K.plan_chunks(prob, plan.grid, capacity=plan.capacity)
    lengths = plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen

    def attend(qkv, lengths=lengths, **options):
        return K.varlen_attention(*qkv.unbind(1), *lengths, backend="native", **options)

    def by(library, qkv):
        return flash_calls.attend(library, None, True, *qkv.unbind(1), *lengths, None)

    options = {"exact": True}, {"packing": spare}, {}
    found = {name: functools.partial(attend, **how) for name, how in zip(MASKS, options, strict=True)}
    found["max_seqlen 1024"] = functools.partial(attend, lengths=(*lengths[:2], 1024, 1024), exact=True)
    for library in flash.LIBRARIES:
        wrong = flash.why_not(library, *problem.inputs[0].unbind(1), gradients=case.backward)
        if wrong:
            problem.absent[library.name] = wrong
        else:
            found[library.name] = functools.partial(by, library)
    return found


def variants(case: Case, device: str, problem: Problem) -> dict[str, Variant]:
    """The variants of the case's group, beside the shipped one and in its family."""
    shipped = next((problem.variants[name] for name in SHIPPED if name in problem.variants), None)
    contexts = CONTEXTS.get(case.group, {}) if shipped else {}
    found = {name: dataclasses.replace(shipped, around=around) for name, around in contexts.items()}
    if case.group == "attention":
        found |= {name: Variant(run) for name, run in attention(case, device, problem).items()}
    return found


def scaffold_problem(case: Case, device: str, compiled: bool) -> Problem:
    """The model's encoder and its decoder on the latent grid, (B, e, H, W) and the conditioning (B, D) → (B, L, e)."""
    from .models import Nets, make_net

    master, config = make_net(DCDiT, case, device), case.config
    x = torch.randn(case.batch, config.encoder_width, case.side, case.side, device=device).to(case.torch_dtype)
    c = torch.randn(case.batch, config.hidden_size, device=device).to(case.torch_dtype)

    def chain(nets: Nets, stack: Callable, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        net = nets[x.dtype]
        h = stack(net.encoder, x, c).transpose(1, 2).unflatten(2, config.input_size)
        return stack(net.decoder, h, c)

    def plain(layout: torch.memory_format, stack, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """A ConvStack in PyTorch's own layers."""

        def silu(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
            return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))

        x = x.contiguous(memory_format=layout)
        for block in stack.blocks:
            h = F.conv2d(silu(block.norm1, x), block.conv1.weight, block.conv1.bias, padding=1)
            h = h + block.cond(c)[:, :, None, None]
            skip = x if isinstance(block.skip, nn.Identity) else F.conv2d(x, block.skip.weight, block.skip.bias)
            x = F.conv2d(silu(block.norm2, h), block.conv2.weight, block.conv2.bias, padding=1) + skip
        return stack.norm(x.flatten(2).transpose(1, 2))

    variants = {"dcdit": Variant(functools.partial(chain, Nets(master), lambda stack, x, c: stack(x, F.silu(c))))}
    for name, layout in (("plain", torch.contiguous_format), ("plain channels-last", torch.channels_last)):
        nets = Nets(master, lambda net, layout=layout: net.to(memory_format=layout))
        variants[name] = Variant(functools.partial(chain, nets, functools.partial(plain, layout)))
    least = Work(2 * x.nbytes * (1 + case.backward), 0, 0)
    return Problem((x, c), variants, {"": Family("plain", "plain")}, least, case.side**2 * 32, case.backward)
