"""The tests' interpreter (`quick_interpreter`) gives the bits of Triton's."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from quick_interpreter import KNOWN, QUICK, SLOW
from triton.runtime import interpreter

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU"),
    pytest.mark.skipif(not KNOWN, reason=f"the interpreter of Triton {triton.__version__} stays as it is"),
]


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


@triton.jit
def row_kernel(x_ptr, rows, columns, BLOCK: tl.constexpr):
    """Integers of 32 and 64 bits, masks, a loop, sums of either axis, zeros, float16 beside float32."""
    row = tl.arange(0, 4)
    total = tl.zeros([4], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        at = x_ptr + row[:, None].to(tl.int64) * columns + column[None, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x, 1) / (start + 1)
        tl.store(at, (x + tl.sum(x, 0)[None, :] * 0.5 - total[:, None]).to(x_ptr.dtype.element_ty), mask=mask)


@pytest.fixture
def both(monkeypatch):
    """Runs a function on clones of tensors by Triton's interpreter and by the quick one; the bits must agree."""

    def compare(start, launch):
        results = []
        for functions in (SLOW, QUICK):
            for (owner, name), function in functions.items():
                monkeypatch.setattr(owner, name, function)
            results.append(start.clone())
            launch(results[-1])
        assert torch.equal(*results) and not torch.equal(results[0], start)

    return compare


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("columns", "axis"), [(0, 0), (4, 0), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scans_have_the_same_bits(columns, axis, reverse, dtype, both):
    start = torch.randn(2, 8, max(columns, 1)).to(dtype)
    both(start, lambda tensors: scan_kernel[(1,)](*tensors, 8, columns, axis, reverse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_have_the_same_bits(dtype, both):
    both(torch.randn(3, 21).to(dtype), lambda x: row_kernel[(1,)](x, 3, 21, 8))


def test_dtypes_are_the_same():
    scalars = [tl.int1, tl.int64, tl.uint8, tl.float16, tl.bfloat16, tl.float32, tl.pointer_type(tl.float32)]
    for dtype in [*scalars, *(tl.block_type(scalar, [2, 4]) for scalar in scalars)]:
        assert interpreter._get_np_dtype(dtype) == SLOW[interpreter, "_get_np_dtype"](dtype), dtype
        if dtype.is_block():
            assert dtype.shape.values == [2, 4] and dtype.numel == 8 and str(dtype.scalar) in str(dtype)


def test_a_launch_leaves_the_language_as_it_was():
    before = {name: getattr(tl, name) for name in ("load", "associative_scan", "range")}
    scan_kernel[(1,)](*torch.ones(2, 8), 8, 0, 0, False)
    assert all(getattr(tl, name) is value for name, value in before.items())
