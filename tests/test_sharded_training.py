"""Blocks sharded by FSDP2, and the model copied by DDP: two processes on the CPU give one process's numbers."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_training import CASES, make_model, two_steps
from test_training import subprocess_environment


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    file = tmp_path_factory.mktemp("sharded") / "results.pt"
    command = [sys.executable, str(Path(__file__).with_name("sharded_training.py")), str(file), str(port)]
    subprocess.run(command, env=subprocess_environment(), check=True, timeout=300)
    return torch.load(file)


@pytest.mark.parametrize("kind, router", CASES)
def test_two_processes_train_as_one(kind, router, results):
    (losses, gradients), (want, want_gradients) = results[kind, router], two_steps(make_model(router))
    # bf16 keeps 8 bits of weights and features.
    tolerance = {"rtol": 0.02, "atol": 0.02} if "bf16" in kind else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(losses, want, **tolerance)
    assert gradients.keys() == want_gradients.keys()
    if "bf16" in kind:
        assert all(grad.isfinite().all() for grad in gradients.values())
        return
    for name, grad in gradients.items():
        torch.testing.assert_close(grad, want_gradients[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")
