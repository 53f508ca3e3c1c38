"""What `dcdit calibrate` measures: seconds of steps in sampling and in training, and the router's own tokens over t."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

from ..model.config import DCDiTConfig
from ..model.routing import least_tokens
from .sampler import sample
from .step_times import StepTimes, name_of

TIMES = 21  # of the router's average, evenly from t = 0 to 1000


def measure(model: Any, rows: list[int], points: int = 6, rounds: int = 5) -> StepTimes:
    """The medians of `rounds` steps of each number of rows and of `points` numbers of tokens, from least to all cells.

    Whole trajectories run over the numbers in turn, so that a machine that is slow for a while is so for all.
    """
    config, weight = model.config, next(model.parameters())
    tokens, table = _numbers(config, points), []
    for count in rows:
        steps = tokens * (rounds + 1)
        taken = sample(model, [0] * count, objective="flow", steps=len(steps), tokens=steps, batch_size=count).trace
        each = taken.seconds.view(rounds + 1, len(tokens))[1:].T.tolist()  # the first round warms up
        table.append([statistics.median(column) for column in each])
    return StepTimes(name_of(config, weight.device, weight.dtype), rows, tokens, table)


def measure_training(model: Any, rows: list[int], points: int = 6, rounds: int = 5) -> StepTimes:
    """As `measure`, for the forward and backward of a training step of `rows` samples, without the optimiser's."""
    config, weight = model.config, next(model.parameters())
    tokens, table = _numbers(config, points), []
    for count in rows:
        x = torch.randn(count, config.in_channels, *config.input_size, device=weight.device)
        t = torch.linspace(0, 1000, count, device=weight.device)
        y = torch.zeros(count, dtype=torch.long, device=weight.device)
        taken: list[list[float]] = [[] for _ in tokens]
        for _ in range(rounds + 1):
            for number, seconds in zip(tokens, taken, strict=True):
                begin = time.perf_counter()
                model(x, t, y, budget=count * number).square().mean().backward()
                if weight.is_cuda:
                    torch.cuda.synchronize(weight.device)
                seconds.append(time.perf_counter() - begin)
                model.zero_grad(set_to_none=True)
        table.append([statistics.median(seconds[1:]) for seconds in taken])  # the first round warms up
    return StepTimes(name_of(config, weight.device, weight.dtype, training=True), rows, tokens, table)


def _numbers(config: DCDiTConfig, points: int) -> list[int]:
    """So many numbers of tokens, evenly from least to all cells."""
    least = least_tokens(config.input_size, config.keep_grid)
    return sorted({int(n) for n in np.linspace(least, config.cells, points).round()})


def router_average(model: Any, objective: str, count: int = 16, steps: int = 20) -> list[float]:
    """The share of cells that the router keeps at ρ = 0, mean over `count` images, at TIMES times from 0 to 1000."""
    classes = torch.arange(count) % model.config.num_classes
    trace = sample(model, classes, objective=objective, steps=steps).trace
    times, shares = trace.timesteps.numpy()[::-1], trace.tokens.mean(1).numpy()[::-1] / model.config.cells
    return np.interp(np.linspace(0, 1000, TIMES), times, shares).round(4).tolist()
