"""Training of a DyDCDiT, DyDiT's gates in DC-DiT's main network, and the gates' noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..model.dydit_main import DyDCDiT
from ..model.gated_macs import main_rates
from .batches import GATES, generator
from .gate_loss import gate_loss, gate_target
from .trainer import Trainer


class DrawnGates(Trainer):
    """A trainer whose gates' noise is a function of the seed, the step, the process and the part of the batch."""

    drawn, part = -1, 0

    @contextlib.contextmanager
    def draws(self) -> Iterator[None]:
        """The noise of one part, drawn by PyTorch's generators."""
        self.part = self.part + 1 if self.drawn == self.step else 0
        self.drawn = self.step
        place = self.part * self.ranks + self.accelerator.process_index
        seed = int(generator(self.config.seed, GATES, self.step, place).integers(2**63))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


class GatedMainTrainer(DrawnGates):
    """A DyDCDiT from the DC-DiT `config.init`: the gated pass, the complete one of the same routing, the FLOPs loss.

    The metrics' `rate` is the share of the main network's products that the gates leave.
    """

    def blank(self) -> Any:
        return DyDCDiT(self.config.model)

    def losses(self, x0, noise, t, y, rho, weights: tuple[float, float] = (1.0, 1.0), **limits: int) -> Any:
        """As of `Trainer`, with the complete pass's loss and that of the FLOPs."""
        with self.draws():
            values, routing = super().losses(x0, noise, t, y, rho, weights, **limits)
        rate = main_rates(self.net.main.decided, routing.plan, self.config.model).mean()
        x = self.objective.add_noise(x0, noise, t)
        out = self.model(x, t, y, routing=routing, complete=True).float()
        complete = self.objective.loss(out, x0, noise, t).mean() * weights[0]
        spend = self.config.spend
        flops = gate_loss(rate, gate_target(self.step, spend.rate, spend.warmup)) * weights[0]
        values |= {"complete_loss": complete, "flops_loss": flops, "rate": rate * weights[0]}
        return values | {"loss": values["loss"] + complete + flops}, routing
