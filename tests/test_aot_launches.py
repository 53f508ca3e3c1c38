"""The host's side of a call: the bytes that reach the CUDA driver, and the functions called on the way.

Functions are counted, not seconds: on the machine where this was written one takes 0.12 µs on average.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from dcdit_kernels.triton import _launch

HERE = Path(__file__).parent
# Functions that a call may call, by Python and by C. Triton's own launch would add 60 to each launch.
MOST = {
    "adaln_modulate": 58,
    "gate_residual": 55,
    "gate_residual_modulate": 66,
    "gate_residual_modulate with gradients": 100,
    "chunk": 60,
    "dechunk": 143,
    "ema_smooth": 66,
    "group_norm_silu": 73,
    "boundary_predictability": 92,
    "boundary_cosine": 69,
    "varlen_attention": 60,
    "DC-DiT outside of blocks": 1720,
    "DC-DiT block": 262,
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The output of tests/host_side.py, a process of its own: Triton's interpreter excludes its compiler."""
    if sys.platform != "linux" or torch.version.hip or not shutil.which("cc"):
        pytest.skip("the stand-in for the CUDA driver needs Linux and a C compiler")
    stub = tmp_path_factory.mktemp("stub")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", stub / "libcuda.so.1", HERE / "libcuda_stub.c"], check=True)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_LIBCUDA_PATH": str(stub), "LD_LIBRARY_PATH": str(stub)}
    command = [sys.executable, HERE / "host_side.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_this_triton_is_known():
    """Otherwise every launch goes Triton's way, at four times the cost to the host."""
    assert _launch.KNOWN or torch.version.hip


def test_the_driver_gets_the_same_bytes(told):
    """Grid, block, stream, kernel and arguments, of launches by Triton, new here, and kept."""
    assert told["same"] > 150


def test_hooks_see_every_launch(told):
    assert told["hooked"] == ["chunk_forward"] * 4


@pytest.mark.parametrize("operator", MOST)
def test_functions_called(told, operator):
    assert told["calls"][operator] <= MOST[operator]


def test_another_launcher_is_left_to_triton(monkeypatch):
    """Where a launch is written otherwise, nothing of this module's own is tried."""
    monkeypatch.setattr(_launch.JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: None)
    assert not _launch._is_known()
