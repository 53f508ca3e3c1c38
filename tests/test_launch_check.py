"""The check of reads and writes finds each kind of fault."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which no GPU uses")


@triton.jit
def shift(x_ptr, out_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """out[i·STEP] = x[i + 1]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i * STEP, tl.load(x_ptr + i + 1, mask=i < n, other=0), mask=i < n)


def test_a_good_kernel_passes(launches):
    x, out = torch.arange(9.0), torch.zeros(16)
    shift[(2,)](x, out, 8, STEP=2, BLOCK=4)
    assert launches == [("shift", 2)] and torch.equal(out[::2], x[1:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, out: shift[(2,)](x, out, 9, STEP=1, BLOCK=8), "reads outside"),
        (lambda x, out: shift[(2,)](x, out[:14], 8, STEP=2, BLOCK=4), "writes outside"),
        (lambda x, out: shift[(2,)](x, out, 8, STEP=0, BLOCK=4), "writes an address twice"),
        (lambda x, out: shift[(2,)](out, out, 8, STEP=1, BLOCK=4), "reads what it writes"),
    ],
    ids=["out of bounds, read", "out of bounds, written", "two writers", "a reader of what is written"],
)
def test_a_bad_kernel_fails(launches, wrong, message):
    with pytest.raises(AssertionError, match=message):
        wrong(torch.arange(9.0), torch.zeros(16))
