"""The run of an upcycling: its two stages on accelerate, saved and resumed."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from dcdit_kernels._plan_input import NaNError

from ...data.conditioned import Conditioned
from ...errors import CheckpointError, ConfigError, DataError
from ...files import check_folder, expanded, locked
from ...integrations.attention import add_dynamic_chunking
from ...integrations.velocities import VELOCITIES
from ...interrupts import held_back, raised
from ...model.precision import float32_products
from ..batches import draw_drop_fraction, generator
from ..config import learning_rate
from ..launch import make_accelerator
from ..objectives import FlowMatching
from ..progress import Progress
from ..resume import check_allowed, describe_data, diverged, saved_run
from ..run_output import position, say_saved
from ..state import EMA, Metrics, load_state, save_state, whole
from .config import TransformerConfig
from .lora import Learned, add_lora, merged, save_adapters
from .student import Batch, Student, count_blocks, keep_a_share, read_source, save_model, scores_of

_NOISE, _BATCHES = 5, 6  # streams of random numbers, beside those of dcdit.training.batches


class TransformerUpcycler:
    """One run. Everything random about a step is a function of (seed, step)."""

    def __init__(self, config: TransformerConfig, allow: Sequence[str] = ()) -> None:
        self.config, self.velocity = config, VELOCITIES[config.family]()
        check_allowed(allow, config.to_dict())
        self.output = check_folder(expanded(config.output), config.latents)
        self.accelerator = make_accelerator(config)
        self.device, self.ranks = self.accelerator.device, self.accelerator.num_processes
        if config.batch_size % self.ranks:
            raise ConfigError(f"batch_size must be a multiple of {self.ranks} processes, got {config.batch_size}")
        self.data = Conditioned(config.latents, self.velocity.pooled, self.velocity.ragged)
        self.last, self.described = self.output / "last.safetensors", describe_data(self.data)
        self.depth = count_blocks(config.source, self.velocity)
        saved_run(self.last, config, allow, self.described, self.depth)  # refused before the source is read
        self.objective, self.epochs = FlowMatching(config.time_shift), (-1, [])
        if config.fsdp and self.ranks == 1:
            raise ConfigError("fsdp needs several processes, of accelerate launch --num_processes; got one")
        self.net = read_source(config.source, self.velocity).to("cpu" if config.fsdp else self.device)
        for shapes, file in self.data.kinds.items():
            self.velocity.check(self.net.config, shapes, file)
        shares = config.lora and not config.fsdp  # what is frozen in both
        shared = {id(p): p for p in self.net.parameters()} if shares else {}
        teacher = copy.deepcopy(self.net, shared).eval().requires_grad_(False)
        torch.manual_seed(config.seed)
        self.chunking = add_dynamic_chunking(self.net.train(), blocks=slice(*config.blocks), group=config.group or None)
        for name in self.velocity.text_and_time:
            self.net.get_submodule(name).requires_grad_(False)
        for rank in config.lora:
            add_lora(self.net, self.chunking, rank, config.lora_targets)
        self.learning = Learned(self.net) if config.lora else self.net
        if config.checkpointing:
            self.net.enable_gradient_checkpointing()
        if config.fsdp:
            from .sharding import shard  # not every build of torch has it

            shard(self.net)
            shard(teacher)
        self.student = Student(self.velocity, self.net, teacher, config.target_ratio)
        router = list(self.chunking.router.parameters())
        own = {id(p) for p in router}
        rest = [p for p in self.net.parameters() if p.requires_grad and id(p) not in own]
        self.learned, optim = rest + router, config.optim
        groups = [{"params": rest, "rate": 1.0}, {"params": router, "rate": config.router_rate}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(0.9, optim.beta2), weight_decay=optim.weight_decay, fused=True
        )
        self.step, self.held = 0, contextlib.ExitStack()
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            self.held.enter_context(locked(self.output))
        try:
            self._start(allow)
        except BaseException:
            self.held.close()
            raise

    def _start(self, allow: Sequence[str]) -> None:
        """Resume, or let the fresh router keep 1/N of the first batch."""
        config, self.changes = self.config, []
        saved = saved_run(self.last, config, allow, self.described, self.depth)
        if saved is None:
            with torch.no_grad(), self.accelerator.autocast():
                batch = self._share(0)
                try:
                    self.student(batch, distil=False, share=None)
                except NaNError as error:
                    raise CheckpointError(f"{config.source} makes NaN of the first batch: {error}") from error
                if config.fsdp:
                    self.net.reshard()
                scores = self.accelerator.gather(scores_of(self.chunking).float())
                keep_a_share(self.chunking, config.target_ratio, scores)
        self.emas = [EMA(self.learning, decay) for decay in config.optim.ema_decay]
        if saved is not None:
            header, self.changes = saved
            load_state(self.last, self.learning, self.emas, self.optimizer)
            self.step = header["step"]
        self.saved, self.updating = self.step, False
        self.metrics = Metrics(self.output, self.step) if self.accelerator.is_main_process else None
        if config.log_with:
            self.accelerator.init_trackers("dcdit")

    def batch(self, step: int, first: int, last: int) -> Batch:
        """The samples [first, last) of a step's batch."""
        epoch, place = divmod(step, self.data.batches(self.config.batch_size))
        indices = self._epoch(epoch)[place]
        samples, noises, sigmas = [self.data[int(i)] for i in indices[first:last]], [], []
        for place, sample in enumerate(samples, start=first):
            rng = generator(self.config.seed, _NOISE, step, place)
            sigmas.append(self.objective.draw_time(rng) / 1000)
            noises.append(torch.from_numpy(rng.standard_normal(tuple(sample["latents"].shape), dtype="float32")))
        clean, noise = (torch.stack(parts).to(self.device) for parts in ([s["latents"] for s in samples], noises))
        sigma = torch.tensor(sigmas, device=self.device)
        wide = sigma.view(-1, *[1] * (clean.dim() - 1))
        batch = {"x": clean + wide * (noise - clean), "target": noise - clean, "sigma": sigma}
        batch["texts"] = [sample["text"].to(self.device) for sample in samples]
        if self.velocity.pooled:
            batch["pooled"] = torch.stack([sample["pooled"] for sample in samples]).to(self.device)
        return batch | ({"guidance": self.config.guidance} if self.config.family == "flux" else {})

    def _share(self, step: int) -> Batch:
        """This process's part of a step's batch."""
        count = self.config.batch_size // self.ranks
        first = count * self.accelerator.process_index
        return self.batch(step, first, first + count)

    def _epoch(self, number: int) -> list:
        """The batches of an epoch."""
        if self.epochs[0] != number:
            rng = generator(self.config.seed, _BATCHES, number)
            self.epochs = number, self.data.epoch(self.config.batch_size, rng)
        return self.epochs[1]

    def run(self) -> Path:
        """Train to the last step; save, and return the folder of the model."""
        config, main = self.config, self.accelerator.is_main_process
        since, images = time.monotonic(), 0
        count, shapes = sum(p.numel() for p in self.net.parameters()), len(self.data.buckets)
        place = f"process{'es' * (self.ranks > 1)} on {self.device.type}, {position(self.step, config.steps)}"
        self.accelerator.print(f"{config.family}, {count:,} parameters; {len(self.data)} samples of {shapes} shapes")
        self.accelerator.print(f"{self.ranks} {place}", flush=True)
        progress = Progress(self.step, config.steps, main)
        with contextlib.closing(progress), float32_products("high" if config.precision == "bf16" else None):
            while self.step < config.steps:
                with held_back(ignore=not main):
                    values = self._train_step()
                    self.step, self.updating = self.step + 1, False
                    images += config.batch_size
                    progress.advance()
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        numbers, now = self._reduced(values), time.monotonic()
                        numbers["images_per_s"] = images / (now - since)
                        since, images = now, 0
                        self._report(progress, numbers)
                    if self.step % config.save_every == 0:
                        self.save()
        kinds = {file.suffix for file in (self.output / "model").glob("*")}
        if self.saved != self.step or not {".json", ".safetensors"} <= kinds:
            self.save()
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"model after step {self.step}: {self.output / 'model'}")
        self.accelerator.end_training()
        return self.output / "model"

    def _train_step(self) -> dict[str, torch.Tensor | float]:
        config, distil = self.config, self.step < self.config.distill_steps
        if not distil:
            self.student.teacher = ()
        rate = learning_rate(config.optim, self.step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        rho = draw_drop_fraction(config.seed, self.step, config.drop_fractions, 0)
        batch = self._share(self.step)
        self.optimizer.zero_grad()
        try:
            with self.accelerator.autocast():
                loss, ratio, kept = self.student(batch, distil, (1 - rho) / config.target_ratio)
        except NaNError as error:
            raise diverged(str(error), self.step, self.saved) from error
        self.accelerator.backward(loss + config.ratio_weight * ratio)
        for p in self.learned:  # all have moments, so that a run in its first stage can be resumed
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            # Not by DDP: distillation leaves what is behind the chunked blocks without gradients.
            p.grad = self.accelerator.reduce(grad, "mean") if self.ranks > 1 and not config.fsdp else grad
        norm = whole(nn.utils.clip_grad_norm_(self.learned, config.optim.grad_clip or math.inf))
        self.updating = True  # until the step is counted
        self.optimizer.step()
        for ema in self.emas:
            ema.update(self.step)
        name = "distillation_loss" if distil else "velocity_loss"
        values = {name: loss.detach(), "ratio_loss": ratio.detach(), "kept": kept.detach(), "grad_norm": norm}
        return values | {"drop_fraction": rho, "lr": rate}

    def _reduced(self, values: dict[str, torch.Tensor | float]) -> dict[str, float]:
        """Means over the ranks, as numbers. Raises DCDiTError where training has diverged."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float32).to(self.device) for v in values.values()])
        numbers = dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        if not math.isfinite(sum(numbers.values())):
            raise diverged(str(numbers), self.step, self.saved)
        return numbers

    def _report(self, progress: Progress, numbers: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.write({"step": self.step, **numbers})
        if self.config.log_with:
            self.accelerator.log(numbers, step=self.step)
        name, loss = next(iter(numbers.items()))
        progress.report(f"{name} {loss:.4f}, kept {numbers['kept']:.1%}, {numbers['images_per_s']:.1f} images/s")

    def save(self) -> None:
        """Write OUTPUT/model, of averaged weights where there is an average, and what a run resumes from.

        With adapters OUTPUT/lora has them alone, and OUTPUT/model has them in its weights.
        """
        main = self.accelerator.is_main_process
        if main or self.config.fsdp:
            if not self._finite():
                raise diverged("weights that are not finite", self.step, self.saved)
            weights = {}
            for name, value in (self.net.state_dict() | (self.emas[0].state_dict() if self.emas else {})).items():
                value = whole(value)
                if main:
                    weights[name] = value.cpu()
            if main:
                kind = getattr(diffusers, self.velocity.name)
                self._write("model", lambda folder: save_model(kind, self.net.config, merged(weights), folder))
            if main and self.config.lora:
                self._write("lora", lambda folder: save_adapters(weights, folder))
            header = {"step": self.step, "config": self.config.to_dict(), "data": self.described}
            header["changes"] = self.changes
            save_state(self.last, header, self.learning, self.emas, self.optimizer, write=main)
        self.saved = self.step

    def _finite(self) -> bool:
        """Whether all weights that learn are finite, on all processes that hold parts of them."""
        parts = (p.to_local() if self.config.fsdp else p for p in self.learned)
        finite = torch.tensor(float(all(part.isfinite().all() for part in parts)), device=self.device)
        return bool(self.accelerator.reduce(finite, "mean") == 1) if self.config.fsdp else bool(finite)

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        """OUTPUT/name, whole or as it was."""
        fresh, place = self.output / f".{name}", self.output / name
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            write(fresh)
        except (SafetensorError, OSError) as error:
            shutil.rmtree(fresh, ignore_errors=True)  # a full disk has no room for half a model
            raise CheckpointError(f"cannot write {fresh}: {error}") from error
        shutil.rmtree(place, ignore_errors=True)
        fresh.rename(place)


def train_transformer(config: TransformerConfig, allow: Sequence[str] = ()) -> Path:
    """Train, or resume what `config.output` holds, and return the folder of the model, as diffusers writes it.

    Writes OUTPUT/last.safetensors, OUTPUT/model and OUTPUT/metrics.jsonl. `allow` names keys that may differ from the
    resumed run's. Raises DCDiTError for unusable input.
    """
    with raised():
        run = TransformerUpcycler(config, allow)
        try:
            return run.run()
        except (KeyboardInterrupt, DataError):  # what came before a sample that cannot be read is not lost
            if run.saved != run.step and not run.updating and not config.fsdp:  # split weights need every process
                run.save()
            say_saved(run.accelerator, run.saved, run.output)
            raise
        finally:
            run.held.close()
