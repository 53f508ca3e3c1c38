"""Without a GPU Triton's kernels run in its interpreter; the choice must stand before they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
