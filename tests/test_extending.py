"""The toy operator and the toy router of docs/extending.md run; the helpers that they use notice a wrong kernel."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import dcdit_kernels as K
from dcdit_kernels.testing import EXAMPLES, Example, compare, complaint, make_scene, poisoned_buffers

ROOT = pathlib.Path(__file__).parent.parent
FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", (ROOT / "docs/extending.md").read_text(), re.M | re.S))


def run(folder, name, **changes):
    for file, text in FILES.items():
        (folder / file).write_text(text)
    for file, (before, after) in changes.items():
        path = folder / f"{file}.py"
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, name], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_operator_fits(tmp_path):
    assert "row_scale fits" in run(tmp_path, "try_row_scale.py").stdout


@pytest.mark.parametrize(
    "change",
    [
        ("(1 + scale)", "(1.0001 + scale)"),
        ("column, x * (1 + scale), mask=column < width)", "column, x * (1 + scale), mask=column < live)"),
    ],
)
def test_a_wrong_kernel_is_noticed(tmp_path, change):
    """A value that is off, and spare rows that nobody writes."""
    result = run(tmp_path, "try_row_scale.py", row_scale_triton=change)
    assert result.returncode == 1 and "AssertionError" in result.stderr


def test_the_router_runs(tmp_path):
    result = run(tmp_path, "try_router.py")
    assert result.returncode == 0, result.stderr
    assert "tensor([" in result.stdout


def test_complaints():
    want = [torch.tensor([1.0, 100.0], dtype=torch.float64), torch.tensor([3, 4])]
    good = [want[0].float(), torch.tensor([3, 4])]
    assert complaint(good, want, good, 1) is None
    assert "result 0 is off by 0.5" in complaint([good[0] + 0.5, good[1]], want, good, 1)
    assert "result 0 is off by nan" in complaint([good[0] * torch.nan, good[1]], want, good, 1)
    assert "result 1 differs at 1 of 2 places" in complaint([good[0], torch.tensor([3, 5])], want, good, 1)
    assert "result 0 has shape (1,), expected (2,)" in complaint([good[0][:1], good[1]], want, good, 1)


def test_examples_are_of_their_operators():
    """Each runs on the reference, and a call's result has no NaN of a spare row."""
    for name, make in EXAMPLES.items():
        example = make(make_scene((5, 7)))
        assert hasattr(K, name.split(",")[0])
        assert isinstance(example, Example)
        assert compare(example, "reference", torch.float32, 35) is None, name


def test_poisoned_buffers_end():
    with poisoned_buffers():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
        assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
    torch.empty(3).fill_(1)
    assert torch.empty.__name__ == "empty"
