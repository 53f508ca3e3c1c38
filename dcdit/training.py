"""The training loop: one objective, the ratio loss, multi-budget ρ, AdamW and EMA, on accelerate."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from .checkpoints import check_place, save_checkpoint
from .codecs import make_codec
from .data import Source, make_source
from .diffusion import SUB_BATCH, make_objective, ratio_loss
from .errors import ConfigError, DataError, DCDiTError
from .model import DCDiT
from .precision import float32_products
from .ranks import cpu_ranks
from .routing import Routing
from .stream import TrainingStream, batches, draw_drop_fraction
from .train_config import OptimConfig, TrainConfig
from .train_state import EMA, Metrics, load_state, save_state


def train(config: TrainConfig) -> Path:
    """Train, or resume what `config.output` holds, and return the directory of the EMA model.

    Writes OUTPUT/last.safetensors (to resume from), OUTPUT/model (the EMA, for `dcdit sample`) and
    OUTPUT/metrics.jsonl. Raises DCDiTError for input that cannot be used.
    """
    kind = Trainer
    if config.upcycle.source:
        from .upcycle import Upcycler

        kind = Upcycler
    trainer = kind(config)
    try:
        return trainer.run()
    except KeyboardInterrupt:
        trainer.save_interrupted()
        raise
    finally:
        trainer.close()


class Trainer:
    """One run. Everything random about a step is a function of (seed, step), see `dcdit.stream`."""

    def __init__(self, config: TrainConfig) -> None:
        from accelerate import Accelerator

        self.config = config
        self.accelerator = Accelerator(mixed_precision=config.precision, cpu=cpu_ranks())
        self.device, self.ranks = self.accelerator.device, self.accelerator.num_processes
        check_split(config.batch_size, self.ranks, config.accumulate)
        self.objective = make_objective(config.objective, config.model.learn_sigma)
        source = make_source(config.data, config.model)
        _check_encoded(source, config.codec.options())
        self.codec = None if source.encoded else make_codec(**config.codec.options())
        self.stream = TrainingStream(
            source,
            self.objective,
            (config.model.in_channels, *config.model.input_size),
            config.model.num_classes,
            seed=config.seed,
            batch_size=config.batch_size,
            label_drop=config.label_drop,
            flip=config.data.flip,
            skip_broken=config.data.skip_broken,
        )
        self._check_latents()

        torch.manual_seed(config.seed)
        self.net = self.make_net().to(self.device)
        self.net.main.gradient_checkpointing = config.checkpointing
        if config.channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        net = torch.compile(self.net, fullgraph=True, dynamic=True) if config.compile else self.net
        self.model = self.accelerator.prepare(net)
        self.ema = EMA(self.net, config.optim.ema_decay)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(),
            lr=optim.lr,
            betas=(0.9, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )

        self.output = Path(config.output)
        check_place(self.output / "model")  # as each save will: the steps before it would be lost
        self.last = self.output / "last.safetensors"
        self.step = 0
        if self.last.exists():
            self.step = load_state(self.last, config.to_dict(), self.net, self.ema, self.optimizer)
        self.saved, self.updating = self.step, False
        self.metrics = None
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            for copy in self.output.glob(".model.*"):  # of a run that was killed in the middle of a save
                shutil.rmtree(copy, ignore_errors=True)
            self.metrics = Metrics(self.output, self.step, config.tensorboard)

    def make_net(self) -> DCDiT:
        """The model before its first step."""
        return DCDiT(self.config.model)

    def teach(
        self, diffusion: torch.Tensor, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, routing: Routing
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What this step minimises next to the ratio loss, and its further parts by their names in metrics.jsonl.

        `inputs` are those of the model: x_t, t and y.
        """
        return diffusion, {}

    def run(self) -> Path:
        """Train to the last step, or to `max_minutes`; save, and return the directory of the EMA model."""
        from tqdm import tqdm

        config, main = self.config, self.accelerator.is_main_process
        rank, workers = self.accelerator.process_index, config.data.workers
        start, since, since_step = time.monotonic(), time.monotonic(), self.step
        bar = tqdm(initial=self.step, total=config.steps, unit="step", disable=not main, dynamic_ncols=True)
        with bar, float32_products("high" if config.precision == "bf16" else None):
            for batch in batches(self.stream, self.step, config.steps, rank, self.ranks, workers):
                values = self._guarded_step(batch)
                self.step += 1
                self.updating = False
                bar.update()
                if self.step % config.log_every == 0 or self.step == config.steps:
                    numbers = self._reduced(values)
                    now = time.monotonic()
                    speed = (self.step - since_step) * config.batch_size / (now - since)
                    since, since_step = now, self.step
                    self._report(bar, {"step": self.step, **numbers, "images_per_s": speed})
                if self.step % config.save_every == 0:
                    self._save()
                if config.max_minutes and self._time_is_up(start):
                    break
        if self.saved != self.step or not (self.output / "model").exists():
            self._save()
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"EMA model after step {self.step}: {self.output / 'model'}")
        # Not after a failure: where the other ranks wait for this one, NCCL would wait for them.
        self.accelerator.end_training()
        return self.output / "model"

    def save_interrupted(self) -> None:
        """Save the steps since the last save; not half an update, nor where other ranks may have left a step undone."""
        if self.saved != self.step and not self.updating and self.ranks == 1:
            self._save()

    def close(self) -> None:
        """Close the metrics."""
        if self.metrics:
            self.metrics.close()

    def train_step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
        """One optimiser step on this rank's slice of the batch; returns what metrics.jsonl records."""
        config, count = self.config, self.config.accumulate
        rho = draw_drop_fraction(config.seed, self.step, config.drop_fractions, config.drop_warmup)
        lr = learning_rate(config.optim, self.step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        parts = [batch[key].chunk(count) for key in ("image", "noise", "t", "y")]
        sums: dict[str, torch.Tensor] = {}
        for number, part in enumerate(zip(*parts, strict=True)):
            # The last part's backward adds up the gradients of all ranks.
            alone = self.accelerator.no_sync(self.model) if number + 1 < count else contextlib.nullcontext()
            with alone:
                values = self.losses(*(tensor.to(self.device) for tensor in part), rho)
                self.accelerator.backward(values["loss"] / count)
            for key, value in values.items():
                sums[key] = sums.get(key, 0) + value.detach() / count
        # No clipping is clipping at infinity: the norm is still measured.
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), config.optim.grad_clip or math.inf)
        self.updating = True  # until the step is counted
        self.optimizer.step()
        self.ema.update(self.net, self.step)
        return {**sums, "drop_fraction": rho, "grad_norm": norm, "lr": lr}

    def losses(
        self, image: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, y: torch.Tensor, rho: float
    ) -> dict[str, torch.Tensor]:
        """The loss of a batch at drop fraction ρ, its parts, and the share of the cells that was kept."""
        config = self.config
        x0 = image if self.codec is None else self.codec.encode(image)
        x = self.objective.add_noise(x0, noise, t)
        if config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        # A tensor, because a compiled graph would be made anew for each number.
        drop = torch.full((), rho, device=x.device)
        output, routing = self.model(x, t, y, drop_fraction=drop, return_routing=True)
        output = output.float()
        diffusion = self.objective.loss(output, x0, noise, t).mean()
        ratio = ratio_loss(routing.boundary_prob, routing.natural_mask, config.model.target_ratio)
        taught, parts = self.teach(diffusion, (x, t, y), output, routing)
        loss = taught + config.ratio_weight * ratio
        kept = routing.plan.lengths.float().mean() / routing.plan.cells
        return {"loss": loss, "diffusion_loss": diffusion, "ratio_loss": ratio, **parts, "kept": kept}

    def _reduced(self, values: dict[str, torch.Tensor | float]) -> dict[str, float]:
        """Means over the ranks, as numbers. Raises DCDiTError where training has diverged."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64).to(self.device) for v in values.values()])
        numbers = dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
            raise self._diverged(f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']}")
        return numbers

    def _guarded_step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
        """`train_step`, where the operators' complaint about NaN is the news that training has diverged."""
        try:
            return self.train_step(batch)
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            raise self._diverged(str(error)) from error

    def _diverged(self, how: str) -> DCDiTError:
        return DCDiTError(f"training diverged: {how} at step {self.step}; try a smaller optim.lr")

    def _report(self, bar, values: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.write(values)
        bar.set_postfix_str(
            f"loss {values['loss']:.4f}, kept {values['kept']:.1%}, {values['images_per_s']:.1f} images/s"
        )

    def _save(self) -> None:
        """Raises DCDiTError, before anything is written, where training has diverged since the last log."""
        if not all(value.isfinite().all() for value in (*self.net.parameters(), *self.ema.values)):
            raise self._diverged("weights that are not finite")
        if self.accelerator.is_main_process:
            config = self.config.to_dict()
            average = DCDiT(self.config.model)
            average.load_state_dict(self.ema.state_dict() | dict(self.net.named_buffers()))
            extra = {"objective": config["objective"], "codec": self.config.codec.options(), "data": config["data"]}
            save_checkpoint(self.output / "model", average, {**extra, "step": self.step, "training": config})
            # Last, so that a run killed between the two comes back to an older step and writes both again.
            save_state(self.last, self.step, config, self.net, self.ema, self.optimizer)
        self.saved = self.step

    def _time_is_up(self, start: float) -> bool:
        # The ranks must agree, or one waits for ever.
        late = torch.tensor(float(time.monotonic() - start > 60 * self.config.max_minutes), device=self.device)
        return self.accelerator.reduce(late, "sum").item() > 0

    def _check_latents(self) -> None:
        item = self.stream[0]
        latent = item["image"][None]
        if self.codec is not None:
            latent = self.codec.encode(latent)
        if latent[0].shape != item["noise"].shape:
            raise DataError(
                f"the data gives latents of shape {tuple(latent[0].shape)}, "
                f"the model takes {tuple(item['noise'].shape)} (model.in_channels, model.input_size)"
            )


def _check_encoded(source: Source, codec: dict[str, Any]) -> None:
    """Raise ConfigError where latents say that another codec made them."""
    made_by = getattr(source, "codec", None)
    if made_by not in (None, codec):
        raise ConfigError(f"the latents were made by codec {made_by}, the configuration says {codec}")


def check_split(batch_size: int, ranks: int, accumulate: int = 1) -> None:
    """Raise ConfigError unless the parts of a batch give the losses of the whole: whole sub-batches of the ratio loss.

    There are ranks·accumulate parts.
    """
    parts = ranks * accumulate
    if parts > 1 and batch_size % (parts * SUB_BATCH):
        names = [f"{ranks} processes"] * (ranks > 1) + [f"{accumulate} accumulated parts"] * (accumulate > 1)
        raise ConfigError(
            f"batch_size {batch_size} over {' of '.join(names)} must be a multiple of {parts * SUB_BATCH}: "
            f"the ratio loss is taken over {SUB_BATCH} samples"
        )


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0 at the last step (or constant)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if not optim.cosine:
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return optim.lr * (1 + math.cos(math.pi * progress)) / 2
