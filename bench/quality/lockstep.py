"""Trainers of several models on one GPU, step by step together.

A batch is made once for all, and the CUDA graphs of their steps run at once, each on its own stream: the step of a
small model alone leaves most of a GPU idle. Every model gets the bits that it has when it is trained alone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dcdit.errors import DCDiTError
from dcdit.training.batches import batches
from dcdit.training.parts import moved
from dcdit.training.trainer import Trainer
from dcdit_kernels._plan_input import NaNError

SHARES = 32  # of the cells: captures wait for the whole GPU, spare rows cost one model little


def train_together(trainers: Sequence[Trainer], until: float = math.inf) -> list[Trainer]:
    """Train to the last step, or to the first that begins after `until` (`time.time()`), and save.

    The trainers have equal data, seed, batch, step and steps, one drop fraction, and `cuda_graph`. Returns those that
    have not diverged.
    """
    first = trainers[0]
    config, cuda = first.config, first.device.type == "cuda"
    streams = {trainer: torch.cuda.Stream() if cuda else None for trainer in trainers}
    for trainer in trainers:
        trainer.graphs.shares = SHARES
    begin, since, running = time.monotonic(), first.step, None
    for step, batch in enumerate(_until(first, until), first.step):
        # A model's next replay is launched before the host waits for those of the others.
        log = running and (step % config.log_every == 0 or step == config.steps)
        given = inputs = None
        if batch is not None:
            given = {key: moved(value, first.device) for key, value in batch.items()}
            inputs = (first.codec.encode(given["image"]), given["noise"], given["t"], given["y"])
        for trainer, stream in list(streams.items()):
            try:
                with torch.cuda.stream(stream):
                    if running:
                        values = trainer.train_step(running[0])
                        trainer.step += 1
                        trainer.updating = False
                    if log:
                        rate = (step - since) / (time.monotonic() - begin)
                        trainer.log({"step": step, **trainer._reduced(values), "steps_per_s": rate})
                    if inputs is not None:
                        if stream is not None:
                            stream.wait_stream(torch.cuda.default_stream())
                        trainer.graphs.launch(inputs, config.drop_fractions[0])
            except (DCDiTError, NaNError) as error:
                print(f"{trainer.output} diverged: {error}", flush=True)
                del streams[trainer]
        if log:
            begin, since = time.monotonic(), step
        running = inputs and (given, inputs)  # kept: a stream may not have copied them yet
    if cuda:
        torch.cuda.synchronize()
    for trainer in streams:
        trainer._save()
        print(trainer.graphs.summary(), flush=True)
    return list(streams)


def _until(trainer: Trainer, until: float) -> Iterator[dict[str, Any] | None]:
    """The batches of the steps that begin before `until`, then None."""
    config = trainer.config
    pin = trainer.device.type == "cuda"
    shares = batches(trainer.stream, trainer.step, config.steps, workers=config.data.workers, pin_memory=pin)
    with contextlib.closing(shares):
        for batch in shares:
            yield batch
            if time.time() > until:
                break
    yield None
