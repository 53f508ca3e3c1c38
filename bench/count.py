"""python -m bench.count DC-DiT-S/N4 --batch 1 8 64: launches, bytes and FLOPs of a forward pass, without a GPU.

The forward runs on tensors without memory, on the operators of a GPU. Each call of PyTorch is taken for one launch, a
convolution's bias for one more; each tensor for read or written once. A launch takes at least GAP and the larger of its
bytes over COPY and its FLOPs over RATES: the floor is their sum.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dcdit import DCDiT, DCDiTConfig, preset
from dcdit.model import embedders, layers
from dcdit_kernels import _triton_support, use_backend

from .arguments import known, positive
from .models import cast_net

COPY = 3.0e12  # bytes a second of an H100
RATES = {torch.bfloat16: 600e12, torch.float32: 250e12}  # FLOPs a second of large products; float32 in TF32
GAP = 1.5e-6  # seconds from one launch to the next in a CUDA graph
# Launches of an operator, where there is more than one kernel, and how often it moves its operands.
LAUNCHES = {"plan_chunks": 3, "dechunk": 2, "boundary_predictability": 2, "group_norm_silu": 2}
PASSES = {"boundary_predictability": 2}
VIEWS = {
    "view", "_unsafe_view", "expand", "slice", "select", "transpose", "permute", "t", "split", "chunk", "unsqueeze",
    "squeeze", "detach", "alias", "unbind", "as_strided", "empty", "empty_like", "promote_types", "sym_size", "device",
}  # fmt: skip


@dataclasses.dataclass
class Count:
    """Launches, bytes, FLOPs and the floor in seconds."""

    launches: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    floor: float = 0.0

    def add(self, launches: int, bytes: float, flops: float, rate: float) -> None:
        self.launches += launches
        self.bytes += bytes
        self.flops += flops
        self.floor += max(bytes / COPY, flops / rate) + launches * GAP


class Counter(TorchDispatchMode):
    """Adds up calls, separately for each value of `part`."""

    def __init__(self, lengths: float) -> None:
        super().__init__()
        self.lengths, self.part, self.parts = lengths, "scaffold", {"scaffold": Count(), "main": Count()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        space, name = function._schema.name.split("::")
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        if (space == "aten" and name in VIEWS) or not isinstance(out, torch.Tensor | tuple | list):
            return out
        outs = [out] if isinstance(out, torch.Tensor) else [t for t in out if isinstance(t, torch.Tensor)]
        moved = PASSES.get(name, 1) * sum(t.nbytes for t in tensors) + sum(t.nbytes for t in outs)
        count, launches = self.parts[self.part], LAUNCHES.get(name, 1)
        if name == "embedding":
            moved = 2 * outs[0].nbytes
        count.add(launches, moved, self.flops(name, args, outs), RATES.get(outs[0].dtype, math.inf))
        if name == "convolution" and args[2] is not None:
            count.add(1, 2 * outs[0].nbytes, 0, 1)
        return out

    def flops(self, name: str, args, outs) -> float:
        """2 per multiply-add."""
        if name in ("addmm", "mm"):
            return 2 * outs[0].numel() * args[-2].shape[1]
        if name == "convolution":
            return 2 * outs[0].numel() * args[1][0].numel()
        if name == "varlen_attention":
            return 4 * args[0].numel() * self.lengths
        return 0.0


def count(config: DCDiTConfig, batch: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Count]:
    """Of a forward without gradients: `scaffold`, everything outside the blocks, and `main`, the blocks.

    `tokens` are the retained tokens of each sample. Weights and features are in `dtype`; what is always float32 stays.
    """
    with patch.object(layers.Conv3x3, "channels_last_on", ("cpu",)):  # as they are on a GPU
        net = cast_net(DCDiT(config), dtype).eval()
    net._check = lambda *args: None  # it looks at values
    counter, table = Counter(tokens), torch.empty(128)
    net.main.register_forward_pre_hook(lambda *_: setattr(counter, "part", "main"))
    net.main.register_forward_hook(lambda *_: setattr(counter, "part", "scaffold"))
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        # One kernel on a GPU; a LayerNorm, which PyTorch does not take apart on a CPU, moves the same bytes.
        patch.object(F, "rms_norm", lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps)),
        patch.object(embedders, "frequencies", lambda like: table),  # kept since the first call
        patch.object(layers, "onednn_takes", lambda x: False),  # the same count on every CPU
        patch.object(_triton_support, "INTERPRETED_WRONGLY", ()),
        patch.object(_triton_support, "_interpreted", lambda: True),
        use_backend("triton"),
        torch.no_grad(),
    ):
        x = torch.empty(batch, config.in_channels, *config.input_size, dtype=dtype)
        t, y = torch.empty(batch), torch.zeros(batch, dtype=torch.long)
        with counter:
            net(x, t, y, 0.0, capacity=batch * tokens)
    return counter.parts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.count", description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="+", type=known(preset))
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 8, 64])
    parser.add_argument("--stride", type=positive, default=1, help="encoder_stride")
    args = parser.parse_args(argv)
    print("| model | B | launches outside, in the blocks | MB | GFLOP | floor, ms | fused DiT/2, ms |\n|" + "---|" * 7)
    for name in args.presets:
        config = dataclasses.replace(preset(name), encoder_stride=args.stride)
        patches = config.cells // 4
        for batch in args.batch:
            parts = count(config, batch, patches // 2)
            dit = count(config, batch, patches)["main"]
            columns = [
                " + ".join(f"{getattr(part, field) / unit:{form}}" for part in parts.values())
                for field, unit, form in (
                    ("launches", 1, ".0f"), ("bytes", 1e6, ".0f"), ("flops", 1e9, ".0f"), ("floor", 1e-3, ".2f"),
                )
            ]  # fmt: skip
            print(f"| {name} | {batch} | " + " | ".join(columns) + f" | {1e3 * dit.floor:.2f} |", flush=True)


if __name__ == "__main__":
    main()
