"""A Triton kernel of attention inside each sample, forward alone: short samples in half precision (arXiv 2307.08691).

FlashAttention 2 computes head_dim 72 as 96, and its instructions are the A100's. Here a head is a power of two and a
rest, 72 = 64 + 8, which tensor cores take as 64 + 16, and Triton emits Hopper's wgmma. A program has 64 queries of one
head of one sample and goes through its keys 64 at a time. Tiles begin with the sample and depend on nothing else, so
that a sample's bits are the same in any batch.

Bytes for T rows of H heads, e each: 4·T·H·head_dim·e; keys and values once more for each further 64 queries, from L2.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._launch import Kernel, jit_kernel
from ._rows import cdiv, next_power_of_2

QUERIES = 64
KEYS = 64
LOG2_E = 1.4426950408889634


@triton.jit
def load_part(ptr, stride, live, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST : FIRST + WIDTH of the live rows of a tile, zero elsewhere."""
    row, column = tl.arange(0, live.shape[0]), FIRST + tl.arange(0, WIDTH)
    mask = live[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (column < D)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_part(ptr, stride, live, values, FIRST: tl.constexpr, D: tl.constexpr):
    """The inverse of `load_part`, in the tensor's dtype."""
    row, column = tl.arange(0, live.shape[0]), FIRST + tl.arange(0, values.shape[1])
    mask = live[:, None]
    if FIRST + values.shape[1] > D:
        mask = mask & (column < D)[None, :]
    tl.store(ptr + row[:, None] * stride + column[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@jit_kernel(do_not_specialize=["q_row", "q_head", "k_row", "k_head", "v_row", "v_head"])
def attention_forward(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, out_ptr, q_row, q_head, k_row, k_head, v_row, v_head, scale,
    STEP: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """M queries of a head. Strides are in units of STEP elements: of 8, so that Triton sees loads of 16 bytes."""
    sample, head, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M
    begin_q, begin_k = tl.load(cu_q_ptr + sample).to(tl.int64), tl.load(cu_k_ptr + sample).to(tl.int64)
    queries = (tl.load(cu_q_ptr + sample + 1) - begin_q).to(tl.int32)
    keys = (tl.load(cu_k_ptr + sample + 1) - begin_k).to(tl.int32)
    if first < queries:
        q_ptr += ((begin_q + first) * q_row + head * q_head) * STEP
        k_ptr += head // GROUPS * k_head * STEP
        v_ptr += head // GROUPS * v_head * STEP
        live = first + tl.arange(0, M) < queries
        q0 = load_part(q_ptr, q_row * STEP, live, 0, D0, D)
        most = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        out0 = tl.zeros([M, D0], tl.float32)
        if D1:
            q1 = load_part(q_ptr, q_row * STEP, live, D0, D1, D)
            out1 = tl.zeros([M, D1], tl.float32)
        for start in range(0, keys, N):
            seen = start + tl.arange(0, N) < keys
            k_tile = k_ptr + (begin_k + start) * k_row * STEP
            v_tile = v_ptr + (begin_k + start) * v_row * STEP
            score = tl.dot(q0, tl.trans(load_part(k_tile, k_row * STEP, seen, 0, D0, D)))
            if D1:
                score += tl.dot(q1, tl.trans(load_part(k_tile, k_row * STEP, seen, D0, D1, D)))
            score = tl.where(seen[None, :], score * scale, float("-inf"))
            higher = tl.maximum(most, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            before = tl.exp2(most - higher)
            most = higher
            total = total * before + tl.sum(weight, 1)
            weight = weight.to(q0.dtype)
            out0 = out0 * before[:, None] + tl.dot(weight, load_part(v_tile, v_row * STEP, seen, 0, D0, D))
            if D1:
                out1 = out1 * before[:, None] + tl.dot(weight, load_part(v_tile, v_row * STEP, seen, D0, D1, D))
        share = (1 / tl.where(total == 0, 1.0, total))[:, None]  # without keys the sums are zero
        width = tl.num_programs(1) * D
        out_ptr += (begin_q + first) * width + head * D
        store_part(out_ptr, width, live, out0 * share, 0, D)
        if D1:
            store_part(out_ptr, width, live, out1 * share, D0, D)


@functools.cache
def kernel(head_dim: int, groups: int, step: int) -> Kernel:
    """The kernel for heads of this width, each of k serving `groups` of q."""
    power = max(16, next_power_of_2(head_dim + 1) // 2)
    rest = max(16, next_power_of_2(head_dim - power)) if head_dim > power else 0
    return attention_forward.bind(
        STEP=step, GROUPS=groups, D=head_dim, D0=power, D1=rest, M=QUERIES, N=KEYS, num_warps=4, num_stages=2
    )


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
) -> torch.Tensor:
    """As `dcdit_kernels.varlen_attention` without a causal mask, of float16 or bfloat16; no gradients.

    q (Tq, heads, head_dim), k and v (Tk, heads of k, head_dim) have any strides of rows and heads and 1 inside a head;
    int32 cu_seqlens (B + 1,). Returns (Tq, heads, head_dim), in which rows of no sample keep the memory's old values.
    """
    rows, heads, head_dim = q.shape
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    samples = cu_seqlens_q.shape[0] - 1
    if samples and max_seqlen_q:
        strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
        step = 1 if any([stride % 8 for stride in strides]) else 8
        scale = LOG2_E * (head_dim**-0.5 if scale is None else scale)
        kernel(head_dim, heads // k.shape[1], step)[(samples, heads, cdiv(max_seqlen_q, QUERIES))](
            q, k, v, cu_seqlens_q, cu_seqlens_k, out, *[stride // step for stride in strides], scale
        )
    return out
