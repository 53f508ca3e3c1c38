"""Without a GPU Triton's kernels run in its interpreter; the choice must stand before they are imported."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        import quick_interpreter

        quick_interpreter.install()
# Training is compared bit for bit with itself and with float64, and no GPU computes alike or finely enough.
os.environ["ACCELERATE_USE_CPU"] = "true"
# A process that a test starts runs this checkout, whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))


def pytest_report_teststatus(report):
    """A failure is named at once, so that a run that is killed has named it."""
    if report.failed and report.when == "call":
        reason = next((line for line in report.longreprtext.splitlines() if line.startswith("E ")), "")
        return "failed", f"F\n{report.nodeid}: {reason}\n", "FAILED"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After a fault of the GPU nothing runs in its process any more: beside others of pytest-xdist the process ends."""
    report = yield
    if report.failed and torch.cuda.is_available() and os.environ.get("PYTEST_XDIST_WORKER"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            reason = next((line for line in report.longreprtext.splitlines() if line.startswith("E ")), "")
            os.write(2, f"\n{report.nodeid}: {reason}\n".encode())
            os._exit(1)
    return report


@pytest.fixture(autouse=True, scope="session")
def temporary_files(tmp_path_factory):
    """What tests and their processes leave in the folder of temporary files goes where pytest removes it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("tmp"))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)
    if "accelerate.state" in sys.modules:  # one state per process: a run with another precision needs a new one
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def poisoned():
    """Every buffer that a launcher allocates holds NaN, so that an element nobody writes is seen."""
    from dcdit_kernels.testing import poisoned_buffers

    with poisoned_buffers():
        yield


@pytest.fixture
def launches():
    """Every launch of a Triton kernel is checked for races and bounds (`launch_check`); a GPU has tools of its own."""
    if torch.cuda.is_available():
        yield None
        return
    from launch_check import checked_launches

    with checked_launches() as seen:
        yield seen


@pytest.fixture
def gpu_arithmetic():
    """Triton's interpreter rounds as a GPU does, and takes bfloat16."""
    from bench.gpu_arithmetic import gpu_arithmetic

    with gpu_arithmetic():
        yield
