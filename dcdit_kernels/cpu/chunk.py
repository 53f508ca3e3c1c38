"""chunk on the CPU, in csrc/chunk_cpu.cpp: a retained row is read and written once."""

from __future__ import annotations

from ..extension import unpack_rows
from ..reference._packed import accumulate_dtype, take_rows
from ._rows import TYPES, address, kernel, threads


class Chunk:
    """packed[r] = h[token_index[r]], or the mean over the segment of row r, + pos_embed[cell of r]."""

    @staticmethod
    def forward(h, pos_embed, plan, reduce):
        dtype = h.dtype if h.dtype in TYPES else accumulate_dtype(h)
        wide = h.to(dtype).contiguous()
        if pos_embed is not None:  # rounded to h's dtype first
            pos_embed = pos_embed.to(h.dtype).to(dtype).contiguous()
        out = wide.new_empty(plan.capacity, h.shape[2])
        kernel("chunk", dtype)(
            reduce == "mean", plan.token_index.data_ptr(), plan.member_offsets.data_ptr(), plan.member_index.data_ptr(),
            plan.capacity, plan.cells, h.shape[2], wide.data_ptr(), address(pos_embed), out.data_ptr(), threads(out),
        )  # fmt: skip
        return out.to(h.dtype)

    @staticmethod
    def backward(grad, needs, h, pos_embed, plan, reduce):
        shape = plan.batch_size, plan.cells, h.shape[2]
        own = grad_h = None
        if reduce == "own" or needs[1]:
            own = grad_h = unpack_rows(grad, plan.token_index, shape[0] * shape[1])
        if reduce == "mean" and needs[0]:
            counts = plan.member_offsets.diff().clamp(min=1)[:, None]
            grad_h = take_rows(grad.to(accumulate_dtype(grad)) / counts, plan.nearest).to(grad.dtype)
        total = accumulate_dtype(grad)
        grad_pos = own.view(shape).sum(0, dtype=total).to(pos_embed.dtype) if needs[1] else None
        return grad_h.view(shape), grad_pos
