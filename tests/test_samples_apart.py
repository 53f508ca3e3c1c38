"""A sample's outputs and gradients are its own: equal bits in every batch, beside NaN and inf too."""

import itertools
import math

import pytest
import torch

import dcdit_kernels as K
from dcdit_kernels._ops import OPERATORS as IMPLEMENTED
from dcdit_kernels.triton import dechunk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID, WIDTH = (7, 9), 24
CELLS = math.prod(GRID)
TILED = (5, 7)  # for the cosine score: tiles of 2×2 cells, inner and ragged
SHARES = (0.4, 0.0, 0.8)  # kept cells of each sample


def draw():
    """name → tensor (samples, …) of one batch; the packed ones are on the grid, and packed by the operators below."""
    batch, random = len(SHARES), lambda *shape: torch.randn(*shape, device=DEVICE)
    noise = torch.rand(batch, CELLS, device=DEVICE)
    share = torch.tensor(SHARES, device=DEVICE)[:, None]
    return {
        "prob": torch.where(noise < share, 0.55 + 0.4 * noise, 0.05 + 0.4 * noise),
        "x": random(batch, CELLS, WIDTH),
        "y": random(batch, CELLS, WIDTH),
        "features": random(batch, 8, *GRID),
        "gate": random(batch, WIDTH),
        "shift": random(batch, WIDTH),
        "scale": random(batch, WIDTH),
    }


def rows(t, plan):
    return t.flatten(0, 1)[plan.token_index.long()]


def vectors(*shape):
    return torch.linspace(-1, 1, math.prod(shape), device=DEVICE).view(shape)


def attention(q, k, plan, backend):
    q, k = (part.view(-1, 2, WIDTH // 2) for part in (q, k))
    cu, longest = plan.cu_seqlens, plan.max_seqlen
    return K.varlen_attention(q, k, k, cu, cu, longest, longest, backend=backend)


OPERATORS = {
    "chunk": lambda b, plan, t: K.chunk(t["x"], plan, vectors(CELLS, WIDTH), backend=b),
    "chunk, mean": lambda b, plan, t: K.chunk(t["x"], plan, vectors(CELLS, WIDTH), "mean", backend=b),
    "adaln_modulate": lambda b, plan, t: K.adaln_modulate(rows(t["x"], plan), t["shift"], t["scale"], plan, backend=b),
    "adaln_modulate, unpacked": lambda b, plan, t: K.adaln_modulate(t["x"], t["shift"], t["scale"], backend=b),
    "gate_residual": lambda b, plan, t: K.gate_residual(
        rows(t["x"], plan), rows(t["y"], plan), t["gate"], plan, backend=b
    ),
    "gate_residual_modulate": lambda b, plan, t: K.gate_residual_modulate(
        rows(t["x"], plan), rows(t["y"], plan), t["gate"], t["shift"], t["scale"], plan, backend=b
    ),
    "gate_residual_modulate, RMS": lambda b, plan, t: K.gate_residual_modulate(
        rows(t["x"], plan),
        rows(t["y"], plan),
        t["gate"],
        t["shift"],
        t["scale"],
        plan,
        norm="rms",
        norm_weight=vectors(WIDTH),
        backend=b,
    ),
    "varlen_attention": lambda b, plan, t: attention(rows(t["x"], plan), rows(t["y"], plan), plan, b),
    "ema_smooth": lambda b, plan, t: K.ema_smooth(rows(t["x"], plan), t["prob"], plan, backend=b),
    "boundary_cosine": lambda b, plan, t: K.boundary_cosine(
        t["x"][:, : math.prod(TILED)], t["y"][:, : math.prod(TILED)], vectors(WIDTH, 3, 3), TILED, backend=b
    ),
    "boundary_cosine, 1D": lambda b, plan, t: K.boundary_cosine(t["x"][:, :35], t["y"][:, :35], backend=b),
    "boundary_cosine, packed": lambda b, plan, t: K.boundary_cosine(
        rows(t["x"], plan), rows(t["y"], plan), cu_seqlens=plan.cu_seqlens, backend=b
    ),
    "group_norm_silu": lambda b, plan, t: K.group_norm_silu(
        t["features"], *vectors(2, 8).unbind(), 2, t["gate"][:, :8], vectors(8), backend=b
    ),
    "boundary_predictability": lambda b, plan, t: K.boundary_predictability(
        t["features"], *vectors(3, 8).unbind(), vectors(1), groups=2, backend=b
    ),
    **{
        f"dechunk, {smoothing}": lambda b, plan, t, smoothing=smoothing: K.dechunk(
            rows(t["x"], plan), t["prob"], plan, t["y"], 1.0, smoothing, backend=b
        )
        for smoothing in ("gaussian", "ema", None)
    },
}
CASES = [
    (name, backend)
    for name in OPERATORS
    for backend in IMPLEMENTED[name.split(",")[0]].backends
    if backend != "native" or DEVICE == "cpu"  # native operators on features are for CPUs
]

# PyTorch's own operators choose the order of their sums by sizes. The native dechunk's EMA is theirs, and so is the
# native cosine score where a gradient is wanted.
COSINES = [name for name in OPERATORS if name.startswith("boundary_cosine")]
PYTORCHS = [(name, "reference") for name in OPERATORS] + [(name, "native") for name in ("dechunk, ema", *COSINES)]


@pytest.fixture(autouse=True)
def deterministic():
    """On a GPU PyTorch's own sums, in the reference, are otherwise in no fixed order."""
    torch.use_deterministic_algorithms(DEVICE == "cuda")
    yield
    torch.use_deterministic_algorithms(False)


def run(operator, backend, tensors):
    """Outputs and gradients of a batch as a list for each sample."""
    plan = K.plan_chunks(tensors["prob"].nan_to_num(0.9), GRID, backend="reference")
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    outs = OPERATORS[operator](backend, plan, leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    weights = torch.linspace(-1, 2, CELLS * WIDTH, device=DEVICE)
    first, total = plan.cu_seqlens.tolist(), 0
    samples = [[] for _ in range(plan.batch_size)]
    for out in outs:
        for b, sample in enumerate(samples):
            own = out[first[b] : first[b + 1]] if out.shape[0] == plan.capacity != plan.batch_size else out[b]
            sample.append(own.detach())
            total = total + (own * weights[: own.numel()].view(own.shape)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for b, sample in enumerate(samples):
        sample.extend(grad[b] for grad in gradients if grad is not None)
    return samples


def same(first, second):
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(first, second, strict=True))


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU that few programs fill: launch rules that look at the whole batch decide differently for one sample."""
    for module in ("_rows", "boundary_cosine", "group_norm"):
        monkeypatch.setattr(f"dcdit_kernels.triton.{module}.FILL", 8)


@pytest.mark.parametrize(("operator", "backend"), [case for case in CASES if case not in PYTORCHS])
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(operator, backend, small_gpu):
    tensors = draw()
    together = run(operator, backend, tensors)
    for b in range(len(SHARES)):
        (alone,) = run(operator, backend, {name: t[b : b + 1] for name, t in tensors.items()})
        assert same(alone, together[b]), f"sample {b}"


def test_the_native_cosine_score_of_a_sample_alone():
    q, k, weight = torch.randn(3, 35, WIDTH), torch.randn(3, 35, WIDTH), vectors(WIDTH, 3, 3).cpu()
    together = K.boundary_cosine(q, k, weight, TILED, backend="native")
    for b in range(3):
        assert torch.equal(
            K.boundary_cosine(q[b : b + 1], k[b : b + 1], weight, TILED, backend="native")[0], together[b]
        )


@pytest.mark.parametrize("grid", [None, (3, 7)])
def test_wide_rows_of_the_cosine_score(grid, small_gpu):
    """Rows of several blocks of columns; the tile's size decides how many."""
    q, k = torch.randn(2, 4, 21, 264, device=DEVICE)
    kernel = None if grid is None else vectors(264, 3, 3)
    together = K.boundary_cosine(q, k, kernel, grid, backend="triton")
    for b in range(4):
        assert torch.equal(
            K.boundary_cosine(q[b : b + 1], k[b : b + 1], kernel, grid, backend="triton")[0], together[b]
        )


@pytest.mark.parametrize(("operator", "backend"), CASES)
def test_a_poisoned_sample_is_alone_with_it(operator, backend):
    """In any of its tensors, at any cell: first, last or in the middle, next to each of its neighbours."""
    tensors = draw()
    clean = run(operator, backend, tensors)
    for victim, poison in itertools.product((0, 2), (math.inf, math.nan)):
        poisoned = {name: t.clone() for name, t in tensors.items()}
        for name, t in poisoned.items():
            if name == "prob":
                t[victim, t[victim] > 0.5] = 0.9 if math.isinf(poison) else poison  # the plan stays as it was
            else:
                t[victim] = poison
        got = run(operator, backend, poisoned)
        assert all(same(got[b], clean[b]) for b in range(len(SHARES)) if b != victim), f"victim {victim}, {poison}"


@pytest.mark.parametrize("images", [1, 2, 3])
def test_dechunk_takes_some_images_at_a_time(images, monkeypatch, launches):
    """As many as fit into SCRATCH_BYTES, with equal bits and in so many more launches."""
    tensors = draw()
    whole = run("dechunk, gaussian", "triton", tensors)
    at_once = len(launches) if launches else 0
    capacity = int((tensors["prob"] > 0.5).sum())
    monkeypatch.setattr(dechunk, "SCRATCH_BYTES", -(-capacity * WIDTH * 4 * images // len(SHARES)))
    assert dechunk.images_at_once(len(SHARES), capacity, WIDTH) == images
    parts = run("dechunk, gaussian", "triton", tensors)
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))
    if launches is not None:
        passes = -(-len(SHARES) // images)
        assert len(launches) - at_once == at_once + (passes - 1) * (2 + 3)


@pytest.mark.parametrize(
    ("batch", "width", "images"), [(64, 1152, 64), (256, 1152, 128), (300, 1152, 150), (512, 384, 512), (1, 9, 1)]
)
def test_images_at_once(batch, width, images):
    """At 256 px and a quarter kept: batches below 256 MiB take one pass."""
    assert dechunk.images_at_once(batch, 256 * batch, width) == images
