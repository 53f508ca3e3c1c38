"""The problems of the operator groups: our back-ends, the straightforward formulation, and that one compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import dcdit_kernels as K
from dcdit.model.embedders import sincos_2d

from . import baselines
from .cases import Case
from .problem import Family, Problem, Tensors, Variant, Work, as_tuple

OURS = ("native", "triton", "reference")


def routed_prob(case: Case, device: str) -> torch.Tensor:
    """boundary_prob float32 (B, L) with exactly `share` of the cells above 1/2, the first and last among them; all
    values differ, in float32 and by equal amounts, so that every dtype drops the same cells.

    The others are scattered, or `clustered` around one place of each sample, so that few rows refill distant cells.
    """
    cells = case.side**2
    kept = max(2, round(case.share * cells))
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(cells - 2, generator=generator) + 1 for _ in range(case.batch)])
    if case.clustered:
        apart = [cell // case.side + 1j * (cell % case.side) for cell in (order, order[:, :1])]
        order = order.gather(1, (apart[0] - apart[1]).abs().argsort(dim=1, stable=True))
    ends = torch.tensor([0, cells - 1]).expand(case.batch, 2)
    order = torch.cat([ends, order], dim=1)
    rank = torch.arange(cells, dtype=torch.float32)
    prob = torch.where(rank < kept, 0.99 - 0.45 * rank / cells, 0.49 - 0.45 * rank / cells)
    return torch.empty(case.batch, cells).scatter_(1, order, prob.expand(case.batch, -1)).to(device)


def _draw(case: Case, device: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype or case.torch_dtype)


def _problem(
    case: Case,
    inputs: Tensors,
    ours: Callable[..., object],
    plain: Variant,
    work: Work,
    reduction: int,
    compiled: bool,
    result: Callable[[object], Tensors] = as_tuple,
) -> Problem:
    """`ours(backend, *inputs)` on each back-end that runs here, beside `plain`; `result` brings its outputs into the
    common form."""
    variants, absent = {}, {}
    for backend in OURS:
        variant = Variant(lambda *a, backend=backend: ours(backend, *a), result=result)
        try:
            variant.run(*(t.detach() for t in inputs))
        except (K.BackendError, ImportError) as error:
            absent[backend] = str(error)
            continue
        except Exception as error:  # the gate runs it again and records this
            print(f"{case.name}, {backend}: {type(error).__name__}: {error}", flush=True)
        variants[backend] = variant
    variants["plain"] = plain
    if compiled:
        variants["plain compiled"] = Variant(torch.compile(plain.run), plain.prepare, plain.result)
    return Problem(inputs, variants, {"": Family()}, work, reduction, case.backward, absent)


def plan_problem(case: Case, device: str, compiled: bool) -> Problem:
    """probabilities → which cells stay, packed, and who refills whom. Half of the boundaries are dropped."""
    grid, cells, batch = (case.side, case.side), case.side**2, case.batch
    prob = routed_prob(case, device)

    def packed(plan: K.ChunkPlan) -> Tensors:
        return plan.cu_seqlens, plan.token_index, plan.nearest

    def from_padded(padded: baselines.PaddedPlan) -> Tensors:
        starts = torch.nn.functional.pad(padded.valid.sum(1).cumsum(0), (1, 0))
        flat = padded.index + cells * torch.arange(batch, device=prob.device)[:, None]
        return starts, flat[padded.valid], (padded.nearest + starts[:-1, None]).flatten()

    tokens = int(K.plan_chunks(prob, grid, 0.5, backend="reference").cu_seqlens[-1])
    work = Work(4 * (batch * cells * 3 + 3 * tokens), 0, tokens)
    problem = _problem(
        case, (prob,), lambda backend, p: K.plan_chunks(p, grid, 0.5, backend=backend),
        Variant(lambda p: baselines.plan(p, grid, 0.5), result=from_padded), work, 1, compiled, packed,
    )  # fmt: skip
    if "native" in problem.variants:  # an exact plan brings two numbers to the host, one of a fixed capacity none
        limits = {"capacity": tokens, "max_seqlen": tokens // batch}
        fixed = Variant(lambda p: K.plan_chunks(p, grid, 0.5, **limits, backend="native"), result=packed)
        problem.variants["native fixed"] = fixed
        # As many tokens, shared by the batch in place of ρ: other cells, so a family of their own.
        problem.families["budget"] = Family("budget reference", "budget reference")
        for name, backend in (("budget reference", "reference"), ("native batch budget", "native")):
            run = functools.partial(K.plan_chunks, grid=grid, budget=tokens, backend=backend)
            problem.variants[name] = Variant(run, result=packed, family="budget")
    return problem


def planned(case: Case, device: str) -> tuple[torch.Tensor, K.ChunkPlan, baselines.PaddedPlan]:
    """Probabilities, our plan, and both in the layout of the straightforward formulation."""
    prob, grid = routed_prob(case, device), (case.side, case.side)
    return prob, K.plan_chunks(prob, grid), baselines.plan(prob, grid)


def chunk_problem(case: Case, device: str, compiled: bool) -> Problem:
    """h (B, L, D) and its position table → (T, D)."""
    width, cells = case.config.hidden_size, case.side**2
    _, plan, padded = planned(case, device)
    pos = sincos_2d(width, plan.grid).to(device, case.torch_dtype)
    h = _draw(case, device, case.batch, cells, width)
    moved = plan.capacity * width * h.element_size()
    work = Work(2 * moved + (moved + h.nbytes) * case.backward, plan.capacity * width, plan.capacity)
    problem = _problem(
        case, (h,), lambda backend, h: K.chunk(h, plan, pos.to(h.dtype), backend=backend),
        Variant(lambda h: baselines.chunk(h, padded, pos.to(h.dtype)), result=lambda out: (out[padded.valid],)),
        work, 1, compiled,
    )  # fmt: skip
    # Segments' means are other tokens, so a family of their own; the whole of h is read for them.
    problem.families["mean"] = Family("plain mean", "reference mean")
    problem.variants["plain mean"] = Variant(
        lambda h: baselines.segment_means(h, plan.nearest, plan.capacity) + pos.to(h.dtype)[plan.cell_index],
        family="mean",
    )
    for backend in OURS:
        if backend in problem.variants:
            run = functools.partial(K.chunk, plan=plan, reduce="mean", backend=backend)
            problem.variants[f"{backend} mean"] = Variant(
                lambda h, run=run: run(h, pos_embed=pos.to(h.dtype)), family="mean"
            )
    return problem


def dechunk_problem(case: Case, device: str, compiled: bool) -> Problem:
    """(T, D) → (B, L, D): smoothing, plug-back, straight-through confidence, float32 residual.

    The plain formulation finds who refills whom here, by L×M distances; ours has it in the plan.
    """
    width, cells, grid = case.config.hidden_size, case.side**2, (case.side, case.side)
    prob, plan, padded = planned(case, device)
    place = baselines.places(padded)
    refilled = lambda: padded._replace(nearest=baselines.nearest(padded.index, padded.valid, grid))  # noqa: E731
    x = _draw(case, device, plan.capacity, width)
    residual = _draw(case, device, case.batch, cells, width, dtype=torch.float32)
    moved = x.nbytes + prob.nbytes + residual.nbytes + residual.numel() * x.element_size()
    # The least smoothing known, for each kept cell and channel: a window of 6σ axis by axis, 2·13 multiply-adds, or all
    # kept cells where they are fewer.
    flops = x.numel() * min(4 * 13, 2 * plan.max_seqlen)
    least = moved + (moved + x.nbytes + prob.nbytes) * case.backward
    # As docs/kernels.md counts: smoothed rows pass through memory in float32, and the backward smooths once more.
    smoothing, out = x.nbytes + 4 * x.numel(), residual.nbytes + residual.numel() * x.element_size()
    both_ways = smoothing + 4 * x.numel() + out
    if case.backward:
        both_ways += smoothing + out + (x.nbytes + 8 * x.numel()) + (2 * x.nbytes + 4 * x.numel())
    work = Work(least, flops * (1 + 2 * case.backward), plan.capacity, both_ways if device == "cuda" else None)
    return _problem(
        case, (x, prob, residual), lambda backend, x, p, r: K.dechunk(x, p, plan, r, backend=backend),
        Variant(
            lambda x, p, r: baselines.dechunk(x, p, refilled(), r, grid),
            lambda x, p, r: (baselines.pad_rows(x, padded.valid, place), p, r),
        ),
        work, max(width, padded.valid.shape[1]), compiled,
    )  # fmt: skip


def boundary_problem(case: Case, device: str, compiled: bool) -> Problem:
    """The predictability router after its last convolution, which leaves its channels last, (B, D/4, H, W) → (B, L), in
    float32 as in the model."""
    width = case.config.hidden_size // 4
    features = torch.randn(case.batch, width, case.side, case.side, device=device)
    features = features.contiguous(memory_format=torch.channels_last)
    inputs = (features, *(torch.randn(n, device=device) for n in (width, width, width, 1)))
    work = Work(features.nbytes * (1 + 2 * case.backward), 12 * features.numel() * (1 + 2 * case.backward), 0)
    return _problem(
        case, inputs, lambda backend, *a: K.boundary_predictability(*a, backend=backend),
        Variant(baselines.predictability), work, width // 8 * case.side**2, compiled,
    )  # fmt: skip


def cosine_problem(case: Case, device: str, compiled: bool) -> Problem:
    """The cosine router after its projections, q and k (B, L, D) → (B, L), in float32 as in the model."""
    width, grid = case.config.hidden_size, (case.side, case.side)
    q, k = torch.randn(2, case.batch, case.side**2, width, device=device)
    kernel = torch.rand(width, 3, 3, device=device)
    work = Work(2 * q.nbytes * (1 + 2 * case.backward), 26 * q.numel() * (1 + 2 * case.backward), 0)
    return _problem(
        case, (q, k, kernel), lambda backend, *a: K.boundary_cosine(*a, grid, backend=backend),
        Variant(lambda *a: baselines.cosine(*a, grid)), work, width, compiled,
    )  # fmt: skip


def norm_problem(case: Case, device: str, compiled: bool) -> Problem:
    """GroupNorm–SiLU with the conditioning in front, of a block at the backbone's width: (B, D, H, W) channels-last."""
    width = case.config.hidden_size
    features = _draw(case, device, case.batch, width, case.side, case.side).contiguous(
        memory_format=torch.channels_last
    )
    inputs = (features, *(_draw(case, device, width) for _ in range(2)), _draw(case, device, case.batch, width))
    work = Work(features.nbytes * (2 + 3 * case.backward), 12 * features.numel() * (1 + 2 * case.backward), 0)
    return _problem(
        case, inputs, lambda backend, *a: K.group_norm_silu(*a[:3], 32, a[3], backend=backend),
        Variant(baselines.group_norm_silu), work, width // 32 * case.side**2, compiled,
    )  # fmt: skip


def modulate_problem(case: Case, device: str, compiled: bool) -> Problem:
    """The gated residual of one half of a block and the modulation of the next, on (T, D)."""
    width = case.config.hidden_size
    _, plan, _ = planned(case, device)
    x, y = (_draw(case, device, plan.capacity, width) for _ in range(2))
    modulators = _draw(case, device, case.batch, 6 * width)
    sample = plan.sample_index.long()

    def ours(backend: str, x: torch.Tensor, y: torch.Tensor, modulators: torch.Tensor) -> Tensors:
        _, _, gate, shift, scale, _ = modulators.chunk(6, dim=1)
        return K.gate_residual_modulate(x, y, gate, shift, scale, plan, backend=backend)

    work = Work(x.nbytes * (4 + 6 * case.backward), 12 * x.numel() * (1 + 2 * case.backward), plan.capacity)
    plain = Variant(lambda x, y, m: baselines.gate_modulate(x, y, m, sample))
    return _problem(case, (x, y, modulators), ours, plain, work, max(width, plan.max_seqlen), compiled)


def rope_problem(case: Case, device: str, compiled: bool) -> Problem:
    """RMS norm of each head and rotary embedding of packed q and k, (T, heads, head_dim) each."""
    config = case.config
    heads, head = config.num_heads, config.hidden_size // config.num_heads
    _, plan, _ = planned(case, device)
    angle = torch.rand(case.side**2, head // 2, device=device) * 6
    cos, sin, position = angle.cos(), angle.sin(), plan.cell_index
    q, k = (_draw(case, device, plan.capacity, heads, head) for _ in range(2))
    inputs = q, k, *(_draw(case, device, head) for _ in range(2))
    work = Work(
        (q.nbytes + k.nbytes) * (2 + 3 * case.backward), 16 * q.numel() * (1 + 2 * case.backward), plan.capacity
    )
    return _problem(
        case, inputs,
        lambda backend, q, k, *weights: K.qk_norm_rope(q, k, cos, sin, position, *weights, plan, backend=backend),
        Variant(lambda q, k, *weights: tuple(
            baselines.norm_rope(x, weight, cos, sin, position) for x, weight in zip((q, k), weights, strict=True)
        )),
        work, plan.capacity * heads, compiled,
    )  # fmt: skip


def attention_problem(case: Case, device: str, compiled: bool) -> Problem:
    """Attention inside each sample of (T, 3, heads, head_dim)."""
    config = case.config
    _, plan, padded = planned(case, device)
    qkv = _draw(case, device, plan.capacity, 3, config.num_heads, config.hidden_size // config.num_heads)
    pairs = plan.lengths.double().square().sum().item()

    def ours(backend: str, qkv: torch.Tensor) -> torch.Tensor:
        cu, longest = plan.cu_seqlens, plan.max_seqlen
        return K.varlen_attention(*qkv.unbind(1), cu, cu, longest, longest, exact=plan.exact, backend=backend)

    flops = 4 * pairs * config.hidden_size * (3.5 if case.backward else 1)
    work = Work(qkv.nbytes * (4 + 7 * case.backward) / 3, flops, plan.capacity)
    place = baselines.places(padded)
    plain = Variant(lambda qkv: baselines.attention(qkv, padded.valid, place))
    return _problem(case, (qkv,), ours, plain, work, plan.max_seqlen, compiled)


def pad_problem(case: Case, device: str, compiled: bool) -> Problem:
    """unpad_input and pad_input one after the other on (B, L, D), beside flash-attn's own where it is installed."""
    mask = routed_prob(case, device) > 0.5
    tokens, cells = int(mask.sum()), case.side**2
    x = _draw(case, device, case.batch, cells, case.config.hidden_size)

    def ours(backend: str, x: torch.Tensor) -> torch.Tensor:
        if backend == "triton":
            raise K.BackendError("unpad_input and pad_input have no triton implementation")
        with K.use_backend(backend):
            rows, indices, *_ = K.unpad_input(x, mask)
            return K.pad_input(rows, indices, case.batch, cells)

    moved = x.nbytes / (case.batch * cells) * 3 * tokens + x.nbytes
    plain = Variant(lambda x: baselines.unpad_and_pad(x, mask))
    work = Work(moved * (1 + case.backward), 0, tokens)
    problem = _problem(case, (x,), ours, plain, work, 1, compiled)
    try:
        from flash_attn import bert_padding
    except ImportError as error:
        problem.absent["flash-attn"] = str(error)
        return problem

    def flash(x: torch.Tensor) -> torch.Tensor:
        rows, indices, *_ = bert_padding.unpad_input(x, mask)
        return bert_padding.pad_input(rows, indices, case.batch, cells)

    problem.variants["flash-attn"] = Variant(flash)
    return problem


BUILDERS = {
    "plan": plan_problem,
    "chunk": chunk_problem,
    "dechunk": dechunk_problem,
    "boundary": boundary_problem,
    "cosine": cosine_problem,
    "norm": norm_problem,
    "modulate": modulate_problem,
    "rope": rope_problem,
    "attention": attention_problem,
    "pad": pad_problem,
}
