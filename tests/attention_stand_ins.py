"""Stand-ins for attention libraries, each with the signature of its release."""

import math

import torch

from dcdit_kernels import reference

CU_Q, CU_K = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 4, 4, 9], [0, 2, 5, 11]))


def math_of(q, k, v, cu_q, cu_k, scale, dirty, causal=False):
    """Attention in float64. With `dirty`, rows past the last live one are NaN, in the output and in the gradients."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    live_q, live_k = int(cu_q[-1]), int(cu_k[-1])
    rows = [Dirty.apply(x, n) if dirty else x for x, n in ((q, live_q), (k, live_k), (v, live_k))]
    rows = [x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in rows]
    out = reference.varlen_attention(*rows, cu_q, cu_k, 0, 0, scale, causal).to(q.dtype)
    return out + torch.where(torch.arange(len(out)) < live_q, 0.0, math.nan)[:, None, None].to(out) if dirty else out


class Dirty(torch.autograd.Function):
    """x; its gradient is NaN past the live rows, as an empty buffer may be."""

    @staticmethod
    def forward(ctx, x, live):
        ctx.live = live
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.live :] = math.nan
        return grad, None


# The signatures of the releases, in order, without the rest.
def flash_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
            seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
            learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            return_lse=False):  # fmt: skip
    assert seqused_q is seqused_k is page_table is learnable_sink is None
    assert not any(x.isnan().any() for x in (q, k, v)), "loads past a sample's end"
    return math_of(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, True, causal), None


def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False):  # fmt: skip
    assert seqused_q is seqused_k is qv is None
    assert not any(x.isnan().any() for x in (q, k, v)), "loads past a sample's end"
    return math_of(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, True, causal)


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None):  # fmt: skip
    assert dropout_p == 0.0 and alibi_slopes is None
    return math_of(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, True, causal)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert return_aux is None and query.shape[1] == key.shape[1]
    return math_of(query, key, value, cu_seq_q, cu_seq_k, None, True, is_causal)


def torch_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert return_aux is seqused_k is block_table is None and query.shape[1] == key.shape[1]
    return math_of(query, key, value, cu_seq_q, cu_seq_k, scale, True, {(-1, -1): False, (-1, 0): True}[window_size])


# Operators of PyTorch, with the parameters that `test_aten_operators_take_our_arguments` finds in the installed one.
def aten_flash(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
               scale=None):  # fmt: skip
    assert dropout_p == 0.0 and not return_debug_mask and (max_q > 1 or query.shape[1] == key.shape[1])
    out = math_of(query, key, value, cum_seq_q, cum_seq_k, scale, True, is_causal)
    return out, *(torch.empty(0) for _ in range(4))


def aten_efficient(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                   custom_mask_type, compute_log_sumexp=False, *, scale=None):  # fmt: skip
    assert bias is None and dropout_p == 0.0 and query.shape[2] == key.shape[2]
    assert custom_mask_type == 0 or (custom_mask_type == 1 and cu_seqlens_q is cu_seqlens_k)
    assert 1 <= max_seqlen_q <= query.shape[1] and 1 <= max_seqlen_k <= key.shape[1], "its backward demands it"
    assert compute_log_sumexp == query.requires_grad, "the backward reads it, the forward alone does not"
    assert all(x.dim() == 4 and x.shape[0] == 1 and x.stride(3) == 1 for x in (query, key, value))
    assert all(step % 4 == 0 for x in (query, key, value) for step in (*x.stride()[1:3], x.storage_offset()))
    rows = (x.squeeze(0) for x in (query, key, value))
    out = math_of(*rows, cu_seqlens_q, cu_seqlens_k, scale, True, custom_mask_type == 1)[None]
    return out, *(torch.empty(0) for _ in range(3)), max_seqlen_q, max_seqlen_k


ATEN = {"torch FlashAttention": aten_flash, "torch efficient attention": aten_efficient}
STAND_INS = {
    "flash-attn 4": ("flash_attn.cute", "flash_attn_varlen_func", flash_4),
    "flash-attn 3": ("flash_attn_interface", "flash_attn_varlen_func", flash_3),
    "flash-attn 2": ("flash_attn", "flash_attn_varlen_func", flash_2),
    "torch varlen_attn": ("torch.nn.attention.varlen", "varlen_attn", torch_2_12),
    "torch 2.10": ("torch.nn.attention.varlen", "varlen_attn", torch_2_10),
}


def rows(dtype=torch.float16, head_dim=8):
    """q, and k, v of a fused tensor, NaN past the live rows."""
    torch.manual_seed(0)
    q, kv = torch.randn(12, 2, head_dim).to(dtype), torch.randn(13, 2, 2, head_dim).to(dtype)
    q[9:], kv[11:] = math.nan, math.nan
    return q, *kv.unbind(1)


def dtype_of(name):
    return torch.float32 if "efficient" in name else torch.float16


def value_and_gradients(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    weight = torch.linspace(-1, 2, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]
