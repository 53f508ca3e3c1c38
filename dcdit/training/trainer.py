"""The training loop: one objective, the ratio loss, multi-budget ρ, AdamW and EMA, on accelerate."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dcdit_kernels._plan_input import NaNError

from ..checkpoints.folder import FILES, check_place, save_checkpoint
from ..codecs import make_codec
from ..data.sources import check_codec, make_source, pixels_of_a_cell
from ..errors import ConfigError, DCDiTError
from ..files import check_folder, expanded, locked
from ..interrupts import held_back
from ..model.dcdit import DCDiT
from ..model.mixed import Samples, by_size
from ..model.precision import float32_products
from ..model.routing import Routing, least_tokens
from .batches import TrainingStream, batches, check_latents, check_split, check_tokens, draw_drop_fraction
from .config import TrainConfig, learning_rate
from .launch import make_accelerator
from .objectives import SUB_BATCH, make_objective, ratio_loss
from .parts import in_parts, moved, weights_of
from .progress import Progress
from .resume import Change, check_allowed, describe_data, diverged, saved_run
from .run_output import average, look, place, say_saved, use
from .state import EMA, Metrics, load_state, save_state
from .step_graphs import StepGraphs
from .validation import Validation
from .warm_start import start_from


class Trainer:
    """One run. Everything random about a step is a function of (seed, step), see `dcdit.training.batches`."""

    policy: str | None = None  # by which a trained model is sampled, where that is known

    def __init__(self, config: TrainConfig, allow: Sequence[str] = ()) -> None:
        self.config = config
        check_allowed(allow, config.to_dict())
        pictures = config.data.path if config.data.kind == "folder" else ""
        self.output = check_folder(expanded(config.output), pictures)
        self.accelerator = make_accelerator(config)
        self.device, self.ranks = self.accelerator.device, self.accelerator.num_processes
        check_split(0 if config.tokens_per_batch else config.batch_size, self.ranks, config.accumulate)
        self.objective = make_objective(config.objective, config.model.learn_sigma, config.time_shift, config.min_snr)
        self.source = make_source(config.data, config.model)
        check_codec(self.source, config.codec.options())
        self.codec = None if self.source.encoded else make_codec(**config.codec.options())
        self.stream = self.make_stream(
            self.source,
            self.objective,
            (config.model.in_channels, *config.model.input_size),
            config.model.num_classes,
            seed=config.seed,
            batch_size=config.batch_size,
            label_drop=config.label_drop,
            flip=config.data.flip,
            skip_broken=config.data.skip_broken,
            tokens=config.tokens_per_batch,
            unit=pixels_of_a_cell(self.source, self.codec, config.model, config.data.buckets),
        )
        check_tokens(self.stream, self.ranks * config.accumulate)
        check_latents(self.stream[0], self.codec)
        self.last, self.data = self.output / "last.safetensors", describe_data(self.source)
        saved_run(self.last, config, allow, self.data)  # refused before the model is made
        self.validation = None
        if config.validation.every:
            self.validation = Validation(config, self.objective, self.codec, self.source.class_names, self.stream.unit)

        torch.manual_seed(config.seed)
        self.started = "fresh weights"
        self.net = self.make_net().to(self.device)
        if config.checkpointing:
            self.net.main.gradient_checkpointing = True
        if config.channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        compiled = torch.compile(self.net, fullgraph=True, dynamic=True) if config.compile else self.net
        self.model = self.accelerator.prepare(compiled)
        self.parameters = list(self.net.parameters())  # once: finding them takes the host long
        self.emas = [EMA(self.net, decay) for decay in config.optim.ema_decay]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optim.lr,
            betas=(0.9, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )

        self.graphs = None
        if config.cuda_graph:
            if self.ranks > 1:
                raise ConfigError(f"cuda_graph is for a single process, got {self.ranks}; leave it out")
            self.graphs = StepGraphs(self.losses, self.parameters, config.model.cells, config.accumulate)

        for decay in config.optim.ema_decay:
            check_place(place(self, decay))  # as each save will: the steps before it would be lost
        self.held = contextlib.ExitStack()
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            self.held.enter_context(locked(self.output))
        try:
            self._resume(allow)
        except BaseException:
            self.held.close()
            raise

    def _resume(self, allow: Sequence[str]) -> None:
        """Load what the output holds, and open the metrics. Raises ConfigError for a run of another configuration."""
        config = self.config
        self.step, self.changes = 0, list[Change]()
        saved = saved_run(self.last, config, allow, self.data)
        if saved is not None:
            header, self.changes = saved
            load_state(self.last, self.net, self.emas, self.optimizer)
            self.step = header["step"]
            if self.graphs:
                self.graphs.rows = header.get("rows", {})
        self.saved, self.updating = self.step, False
        self.metrics = None
        if self.accelerator.is_main_process:
            for copy in self.output.glob(".model*"):  # of a run that was killed in the middle of a save
                shutil.rmtree(copy, ignore_errors=True)
            self.metrics = Metrics(self.output, self.step)
        if config.log_with:
            values = {
                key: value if isinstance(value, int | float | str) else str(value)
                for key, value in config.to_dict().items()
            }
            purge = {"tensorboard": {"purge_step": self.step + 1}}
            self.accelerator.init_trackers("dcdit", config=values, init_kwargs=purge)

    def make_stream(self, *args: Any, **options: Any) -> TrainingStream:
        """The training set, of `TrainingStream`'s arguments."""
        return TrainingStream(*args, **options)

    def make_net(self) -> DCDiT:
        """The model before its first step."""
        net, config = self.blank(), self.config
        if config.init:
            use = {"objective": config.objective, "codec": config.codec.options()}
            self.started = start_from(net, config.init, self.source.class_names, use)
        return net

    def blank(self) -> DCDiT:
        """A model of this run's kind, for averaged weights to be put into."""
        return DCDiT(self.config.model)

    def teach(
        self, diffusion: torch.Tensor, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, routing: Routing
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This step's loss beside the ratio loss, and its further parts by their names in metrics.jsonl.

        `inputs` are the model's: x_t, t and y.
        """
        return diffusion, {}

    def run(self) -> Path:
        """Train to the last step, or to `max_minutes`; save, and return the directory of the EMA model."""
        config, main = self.config, self.accelerator.is_main_process
        rank, workers = self.accelerator.process_index, config.data.workers
        start = since = time.monotonic()
        progress, images = Progress(self.step, config.steps, main), 0
        with contextlib.closing(progress), float32_products("high" if config.precision == "bf16" else None):
            pin = self.device.type == "cuda"
            shares = batches(self.stream, self.step, config.steps, rank, self.ranks, workers, pin)
            for batch, items in zip(shares, self.stream.steps(self.step, config.steps), strict=True):
                # The first process saves the step that it is in; the others stay for it until they are ended.
                with held_back(ignore=not main):
                    values = self._guarded_step(batch, len(items))
                    self.step += 1
                    self.updating = False
                    images += len(items)
                    progress.advance()
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        numbers = self._reduced(values)
                        now = time.monotonic()
                        self._report(progress, {"step": self.step, **numbers, "images_per_s": images / (now - since)})
                        since, images = now, 0
                    if self.step % config.save_every == 0:
                        self._save()
                    look(self)
                if config.max_minutes and self._time_is_up(start):
                    break
        models = [place(self, decay) for decay in config.optim.ema_decay]
        if self.saved != self.step or not all((model / file).exists() for model in models for file in FILES):
            self._save()
        self.accelerator.wait_for_everyone()
        if self.graphs:
            self.accelerator.print(self.graphs.summary())
        self.accelerator.print(f"EMA model after step {self.step}: {self.output / 'model'}")
        # Not after a failure: where the other ranks wait for this one, NCCL would wait for them.
        self.accelerator.end_training()
        return self.output / "model"

    def save_interrupted(self) -> None:
        """Save the steps since the last save, not half an update, and say so."""
        if self.saved != self.step and not self.updating:
            self._save()
        say_saved(self.accelerator, self.saved, self.output)

    def close(self) -> None:
        """Let others have the output, and end the trackers."""
        self.held.close()
        if self.accelerator.is_main_process:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def train_step(self, batch: dict[str, Any], whole: int = 0) -> dict[str, torch.Tensor | float]:
        """One optimiser step on this rank's slice of `whole` samples (0: of equal slices); returns the metrics."""
        config, count = self.config, self.config.accumulate
        drawn = draw_drop_fraction(config.seed, self.step, config.budgets or config.drop_fractions, config.drop_warmup)
        lr = learning_rate(config.optim, self.step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        whole, sums = whole or len(batch["t"]) * self.ranks, dict[str, torch.Tensor]()
        for number, part in enumerate(in_parts(batch, count)):
            # The last part's backward adds up the gradients of all ranks.
            alone = self.accelerator.no_sync(self.model) if number + 1 < count else contextlib.nullcontext()
            with alone:
                weights = weights_of(len(part[2]), whole, self.ranks * count)
                values = self._backward(*(moved(given, self.device) for given in part), drawn, weights)
            for key, value in values.items():
                sums[key] = sums.get(key, 0) + value.detach() / count
        # No clipping is clipping at infinity: the norm is still measured.
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optim.grad_clip or math.inf)
        self.updating = True  # until the step is counted
        self.optimizer.step()
        for ema in self.emas:
            ema.update(self.step)
        return {**sums, "budget" if config.budgets else "drop_fraction": drawn, "grad_norm": norm, "lr": lr}

    def _backward(
        self, image: Samples, noise: Samples, t: torch.Tensor, y: torch.Tensor, drawn: float, weights: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of one part of the batch to the others'; returns its losses."""
        x0 = image if self.codec is None else by_size(self.codec.encode, image)
        if self.graphs:
            return self.graphs.backward((x0, noise, t, y), drawn)
        # A tensor, because a compiled graph would be made anew for each number.
        budget = self._tokens(x0, drawn) if self.config.budgets and drawn else {}
        rho = 0.0 if budget else torch.full((), drawn, device=self.device)
        values, _ = self.losses(x0, noise, t, y, rho, **weights, **budget)
        self.accelerator.backward(values["loss"] / self.config.accumulate)
        return values

    def _tokens(self, x0: Samples, share: float) -> dict[str, Any]:
        """The budget of a part: exactly this share of its cells, of each sample's where their sizes differ."""
        rows = [max(round(share * x[0].numel()), least_tokens(x.shape[1:], self.config.model.keep_grid)) for x in x0]
        if isinstance(x0, torch.Tensor):
            return {"budget": sum(rows)}
        return {"budget_per_sample": torch.tensor(rows).to(self.device)}

    def losses(
        self,
        x0: Samples,
        noise: Samples,
        t: torch.Tensor,
        y: torch.Tensor,
        rho: torch.Tensor | float,
        weights: tuple[float, float] = (1.0, 1.0),
        **limits: int,
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """The loss of latents, its parts, and the share of the cells that was kept, at drop fraction ρ; the routing.

        `weights` are a part's in the batch's means over samples and over sub-batches; `limits` are those of the model;
        beside a budget ρ is the number 0.
        """
        config, n = self.config, self.config.model.target_ratio
        x = by_size(self.objective.add_noise, x0, noise, t)
        if config.channels_last and isinstance(x, torch.Tensor):
            x = x.contiguous(memory_format=torch.channels_last)
        output, routing = self.model(x, t, y, drop_fraction=rho, return_routing=True, **limits)
        output = by_size(torch.Tensor.float, output)
        each = by_size(self.objective.loss, output, x0, noise, t)
        diffusion = (torch.stack(each) if isinstance(each, list) else each).mean() * weights[0]
        # Cells that are always kept are among the share 1/N.
        natural = routing.natural_mask | routing.boundary_mask if config.model.keep_grid else routing.natural_mask
        ratio = ratio_loss(routing.boundary_prob, natural, n, SUB_BATCH, routing.valid) * weights[1]
        taught, parts = self.teach(diffusion, (x, t, y), output, routing)
        loss = taught + config.ratio_weight * ratio
        kept = routing.kept.mean() * weights[0]
        return {"loss": loss, "diffusion_loss": diffusion, "ratio_loss": ratio, **parts, "kept": kept}, routing

    def _reduced(self, values: dict[str, torch.Tensor | float]) -> dict[str, float]:
        """Means over the ranks, as numbers. Raises DCDiTError where training has diverged."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        stacked = torch.stack([torch.as_tensor(v, dtype=wide).to(self.device) for v in values.values()])
        numbers = dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
            raise self._diverged(f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']}")
        return numbers

    def _guarded_step(self, batch: dict[str, Any], whole: int) -> dict[str, torch.Tensor | float]:
        """`train_step`, where the operators' complaint about NaN is the news that training has diverged."""
        try:
            return self.train_step(batch, whole)
        except NaNError as error:
            raise self._diverged(str(error)) from error

    def _diverged(self, how: str) -> DCDiTError:
        return diverged(how, self.step, self.saved)

    def _report(self, progress: Progress, values: dict[str, float]) -> None:
        self.log(values)
        progress.report(f"loss {values['loss']:.4f}, kept {values['kept']:.1%}, {values['images_per_s']:.1f} images/s")

    def log(self, values: dict[str, float]) -> None:
        """Write numbers of a step to metrics.jsonl and the trackers."""
        if self.metrics:
            self.metrics.write(values)
        if self.config.log_with:
            self.accelerator.log(
                {key: value for key, value in values.items() if key != "step"}, step=int(values["step"])
            )

    def _save(self) -> None:
        """Raises DCDiTError, before anything is written, where training has diverged since the last log."""
        if not all(value.isfinite().all() for value in (*self.parameters, *self.emas[0].values)):
            raise self._diverged("weights that are not finite")
        if self.accelerator.is_main_process:
            for decay, ema in zip(self.config.optim.ema_decay, self.emas, strict=True):
                save_checkpoint(place(self, decay), average(self, ema), use(self))
            # Last, so that a run killed between the two comes back to an older step and writes both again.
            header = {"step": self.step, "config": self.config.to_dict(), "data": self.data, "changes": self.changes}
            header |= {"rows": self.graphs.rows} if self.graphs else {}
            save_state(self.last, header, self.net, self.emas, self.optimizer)
        self.saved = self.step

    def _time_is_up(self, start: float) -> bool:
        # The ranks must agree, or one waits for ever.
        late = torch.tensor(float(time.monotonic() - start > 60 * self.config.max_minutes), device=self.device)
        return self.accelerator.reduce(late, "sum").item() > 0
