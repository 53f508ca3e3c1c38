"""The tests' interpreter (`quick_interpreter`) gives the bits of Triton's."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
if not torch.cuda.is_available():
    import quick_interpreter
    from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")


@triton.jit
def uneven(a, x, b, y):
    """Neither commutative nor associative: any other order of combination shows."""
    return a * b + 0.25 * x, b * x - y


@triton.jit
def scan_kernel(a_ptr, x_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    if COLUMNS == 0:
        at = tl.arange(0, ROWS)
    else:
        at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    a, x = tl.associative_scan((tl.load(a_ptr + at), tl.load(x_ptr + at)), AXIS, uneven, reverse=REVERSE)
    tl.store(a_ptr + at, a)
    tl.store(x_ptr + at, x)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("columns", "axis"), [(0, 0), (4, 0), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scans_have_the_same_bits(columns, axis, reverse, dtype, monkeypatch):
    start = torch.randn(2, 8, max(columns, 1)).to(dtype)
    results = []
    for scan in (quick_interpreter.generic_scan, quick_interpreter.scan_by_slices):
        monkeypatch.setattr(interpreter.ScanOps, "generic_scan", scan)
        tensors = start.clone()
        scan_kernel[(1,)](*tensors, 8, columns, axis, reverse)
        results.append(tensors)
    assert torch.equal(*results) and not torch.equal(results[0], start)


def test_dtypes_are_the_same():
    scalars = [tl.int1, tl.int64, tl.uint8, tl.float16, tl.bfloat16, tl.float32, tl.pointer_type(tl.float32)]
    for dtype in [*scalars, *(tl.block_type(scalar, [2, 4]) for scalar in scalars)]:
        assert interpreter._get_np_dtype(dtype) == quick_interpreter.dtype_in_numpy(dtype), dtype


def test_a_launch_leaves_the_language_as_it_was():
    before = {name: getattr(tl, name) for name in ("load", "associative_scan", "range")}
    scan_kernel[(1,)](*torch.ones(2, 8), 8, 0, 0, False)
    assert all(getattr(tl, name) is value for name, value in before.items())
