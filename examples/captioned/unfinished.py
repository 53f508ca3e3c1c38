"""A training that a signal ended, in a file, until it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dcdit.files import replacing

Place = tuple[int, float, list[dict]]  # the next step, the seconds that are used, the curve


class Unfinished:
    """`file`, which need not be there, and the generators that the training draws from."""

    def __init__(self, file: Path, generators: Sequence[torch.Generator]) -> None:
        self.file, self.generators = file, generators

    def leave(
        self, learned: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int, used: float, curve: list[dict]
    ) -> None:
        """Write the training."""
        state = {"weights": [p.detach() for p in learned], "optimizer": optimizer.state_dict()}
        state |= {"place": (step, used, curve), "generators": [part.get_state() for part in self.generators]}
        with replacing(self.file) as temporary:
            torch.save(state, temporary)

    def resume(self, learned: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Place:
        """Read what `leave` wrote, in place; the beginning of a training where it wrote nothing."""
        if not self.file.exists():
            return 1, 0.0, []
        state = torch.load(self.file)
        with torch.no_grad():
            for parameter, value in zip(learned, state["weights"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        for generator, value in zip(self.generators, state["generators"], strict=True):
            generator.set_state(value.cpu())
        return state["place"]
