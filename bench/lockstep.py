"""Trainers of several models on one GPU, step by step together.

A batch is made once for all, and the CUDA graphs of their steps run at once, each on its own stream: a small model's
step keeps a GPU busy with launches alone. Every model gets the bits that it has when it is trained alone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence

import torch

from dcdit.training.parts import moved
from dcdit.training.stream import batches
from dcdit.training.trainer import Trainer

SHARES = 32  # of the cells: captures wait for the whole GPU, spare rows cost one model little


def train_together(trainers: Sequence[Trainer], until: float = math.inf) -> None:
    """Train to the last step, or to the first step that is done after `until` (`time.time()`), and save.

    The trainers have equal data, seed, batch and steps, one drop fraction, and `cuda_graph`.
    """
    first = trainers[0]
    config, cuda = first.config, first.device.type == "cuda"
    streams = [torch.cuda.Stream() if cuda else None for _ in trainers]
    for trainer in trainers:
        trainer.graphs.shares = SHARES
    begin, since = time.monotonic(), first.step
    with contextlib.closing(batches(first.stream, first.step, config.steps, 0, 1, config.data.workers, cuda)) as shares:
        for batch in shares:
            given = {key: moved(value, first.device) for key, value in batch.items()}
            inputs = (first.codec.encode(given["image"]), given["noise"], given["t"], given["y"])
            for trainer, stream in zip(trainers, streams, strict=True):
                if stream is not None:
                    stream.wait_stream(torch.cuda.default_stream())
                with torch.cuda.stream(stream):
                    trainer.graphs.launch(inputs, config.drop_fractions[0])
            log = (first.step + 1) % config.log_every == 0 or first.step + 1 == config.steps
            for trainer, stream in zip(trainers, streams, strict=True):
                with torch.cuda.stream(stream):
                    values = trainer.train_step(given)
                    trainer.step += 1
                    trainer.updating = False
                    if log:
                        rate = (trainer.step - since) / (time.monotonic() - begin)
                        trainer.log({"step": trainer.step, **trainer._reduced(values), "steps_per_s": rate})
            if log:
                begin, since = time.monotonic(), first.step
            if time.time() > until:
                break
    if cuda:
        torch.cuda.synchronize()
    for trainer in trainers:
        trainer._save()
        print(trainer.graphs.summary(), flush=True)
