"""Peak memory of a forward, or of a training step, before it runs: on tensors that have shapes and no memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import DCDiTConfig
from .dcdit import DCDiT

# On a CPU PyTorch differentiates attention sample by sample, and keeps so many times its output for the backward.
KEPT = {"varlen_attention": 2}
# A convolution copies its weights there into another layout, twice, while it runs.
COPIES = 2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, while they live: `now`, and the `peak` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: dict[int, weakref.ref] = {}
        self.kept: dict[str, list[int]] = {name: [] for name in KEPT}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), given)
        name = function._schema.name.removeprefix("dcdit::")
        if name == "aten::convolution":
            self.peak = max(self.peak, self.now + COPIES * args[1].nbytes)
        if name in KEPT and any(tensor.requires_grad for tensor in args[:1]):
            self.kept[name].append(KEPT[name] * out.nbytes)
            self.now += self.kept[name][-1]
        elif self.kept.get(name.removesuffix("_backward")):
            self.now -= self.kept[name.removesuffix("_backward")].pop()
        return out

    def _see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known or key in given:  # a view, or the result of an operator in place
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_bytes(config: DCDiTConfig, batch: int, tokens: int, training: bool = False) -> int:
    """Bytes at the most beside weights and inputs, float32, of a forward of `batch` samples of `tokens` tokens each.

    With `training` of forward and backward, the gradients of the weights among them; an optimiser's state is not.
    Of the scratch memory within operators a CPU's largest parts are counted, KEPT and COPIES.
    """
    with FakeTensorMode():
        model = DCDiT(config).train(training)
        model._check = lambda *_: None  # type: ignore[method-assign]  # it looks at values
        x = torch.empty(batch, config.in_channels, *config.input_size)
        t, y = torch.empty(batch), torch.zeros(batch, dtype=torch.long)
        with torch.set_grad_enabled(training), LiveBytes() as live:
            guess = {"guess": torch.empty_like(x)} if model.takes_guess else {}  # the step before has made it
            out = model(x, t, y, budget=batch * tokens, **guess)
            if training:
                out.square().mean().backward()
            return live.peak
