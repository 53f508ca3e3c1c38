"""Training of SparseDiT, DyDiT and PatchDiT, from a DiT; of the first two from fresh weights as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoints.dit import check_source, load_dit
from ..errors import ConfigError
from ..model.density import Density
from ..model.dydit import DyDiT
from ..model.layers import init_linears
from ..model.patch_dit import PatchDiT
from ..model.plain_dit import PlainDiT
from ..model.rival_macs import dydit_on, gate_rates, patch_on, sparse_on
from ..model.sparse_dit import SparseDiT
from ..sampling.policy import Policy
from .batches import DensityStream, TrainingStream
from .config import TrainConfig
from .gate_loss import gate_loss, gate_target
from .gated import DrawnGates
from .trainer import Trainer


class SystemTrainer(Trainer):
    """Training of a model without a router. The metrics' `kept` is the share that a subclass spends."""

    def __init__(self, config: TrainConfig, allow: Sequence[str] = ()) -> None:
        if config.upcycle.source:
            check_source(config.upcycle.source)  # before the data is looked for
        super().__init__(config, allow)

    def make_net(self) -> Any:
        net, source = self.blank(), self.config.upcycle.source
        if source:
            dit = load_dit(source, self.config.model, self.config.upcycle.teacher)
            for name, ours, theirs in (
                ("patch", net.patch, dit.patch),
                ("num_classes", net.class_embed.num_embeddings - 1, dit.class_embed.num_embeddings - 1),
                ("learn_sigma", net.config.learn_sigma, dit.config.learn_sigma),
            ):
                if ours != theirs:
                    raise ConfigError(f"{source} has {name} {theirs}, the run's model {ours}")
            self.started = f"the DiT {source}"
        else:
            dit = fresh(PlainDiT(self.config.model))
        return type(net).from_dit(dit, net.config)

    def losses(self, x0, noise, t, y, rho, **limits: int) -> Any:
        """The loss of latents (B, C, H, W), its parts, and the share that was spent; no routing."""
        x = self.objective.add_noise(x0, noise, t)
        values = self.parts((x, t, y), lambda out: self.objective.loss(out.float(), x0, noise, t).mean())
        return values, None

    def parts(self, inputs: tuple[torch.Tensor, ...], diffusion) -> dict[str, torch.Tensor]:
        """The losses of the model's answer to `inputs` by their names, and the share that is `kept`."""
        raise NotImplementedError


class SparseTrainer(SystemTrainer):
    """A SparseDiT at the densities of `config.spend`: one sparse grid for each batch."""

    def blank(self) -> Any:
        return SparseDiT(sparse_on(self.config.model))

    @property
    def policy(self) -> str:  # type: ignore[override]
        """The densities that were trained, for sampling."""
        return str(Policy(density=self.density))

    @property
    def density(self) -> Density:
        """The density over t of this run."""
        return Density(self.config.spend.least, self.config.spend.most)

    def make_stream(self, *args: Any, **options: Any) -> TrainingStream:
        return DensityStream(self.density, sparse_on(self.config.model).grid, *args, **options)

    def parts(self, inputs, diffusion) -> dict[str, torch.Tensor]:
        size = self.density.size(float(inputs[1][0]), self.net.grid)
        loss = diffusion(self.model(*inputs, size))
        kept = loss.new_tensor(size[0] * size[1] / self.net.config.tokens)
        return {"loss": loss, "diffusion_loss": loss, "kept": kept}


class DyTrainer(SystemTrainer, DrawnGates):
    """A DyDiT: the gated pass, the complete pass beside it, and the FLOPs loss (arXiv 2410.03456 section 3.4)."""

    def blank(self) -> Any:
        return DyDiT(dydit_on(self.config.model))

    def parts(self, inputs, diffusion) -> dict[str, torch.Tensor]:
        spend, sizes = self.config.spend, self.net.config
        with self.draws():
            out, gates = self.model(*inputs, return_gates=True)
        gated, complete = diffusion(out), diffusion(self.model(*inputs, complete=True))
        rate = gate_rates(gates, sizes.tokens, sizes.hidden_size, sizes.mlp_ratio).mean()
        flops = gate_loss(rate, gate_target(self.step, spend.rate, spend.warmup))
        values = {"diffusion_loss": gated, "complete_loss": complete, "flops_loss": flops, "kept": rate}
        return {"loss": gated + complete + flops, **values}


class PatchTrainer(SystemTrainer):
    """A PatchDiT on a frozen DiT: every coarse scale learns to predict as the DiT does (arXiv 2602.16968)."""

    def __init__(self, config: TrainConfig, allow: Sequence[str] = ()) -> None:
        spend = config.spend
        self.sizes = patch_on(config.model, spend.patch, spend.scales)
        if not config.upcycle.source:
            raise ConfigError("kind patches learns from a DiT: name it, from=…")
        if len(self.sizes.scales) < 2:
            raise ConfigError(f"spend.scales needs a scale beside 1, got {list(spend.scales)}")
        super().__init__(config, allow)

    def blank(self) -> Any:
        return PatchDiT(self.sizes)

    def parts(self, inputs, diffusion) -> dict[str, torch.Tensor]:
        with torch.no_grad(), self.accelerator.autocast():
            target = self.net(*inputs).float()
        scales = self.net.config.scales[1:]
        outs = [self.model(*inputs, scale).float() for scale in scales]
        loss = torch.stack([(out - target).square().mean() for out in outs]).mean()
        with torch.no_grad():
            values = {"diffusion_loss": torch.stack([diffusion(out) for out in outs]).mean()}
        kept = loss.new_tensor(sum(scale**-2 for scale in scales) / len(scales))
        return {"loss": loss, **values, "kept": kept}


def fresh(dit: PlainDiT) -> PlainDiT:
    """DiT's own initialisation."""
    init_linears(dit, ("adaln.1", "head"))
    nn.init.xavier_uniform_(dit.stem.weight.flatten(1))
    nn.init.zeros_(dit.stem.bias)
    nn.init.normal_(dit.class_embed.weight, std=0.02)
    return dit


TRAINERS = {"sparse": SparseTrainer, "dydit": DyTrainer, "patches": PatchTrainer}
