"""Without a GPU Triton's kernels run in its interpreter; the choice must stand before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)
