"""Continuous batching beside one picture at a time: python -m bench.serving [--requests N] [--steps N]

Requests for digits come at random moments within a quarter of the time that they take one by one, with a class and a
seed of their own. Both servers are run on one thread and timed by the processor's time. A queue's clock adds the times
up, and jumps to the next request where nothing is under way.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np
import torch

from dcdit import Batcher
from dcdit.sampling import open_checkpoint, sample

from .arguments import positive


def one_by_one(model, asked: list[dict], options: dict) -> tuple[list[torch.Tensor], list[float]]:
    """The latents, and the seconds of each."""
    latents, seconds = [], []
    for request in asked:
        begin = time.process_time()
        seed, label, index = request["seed"], request["label"], request["index"]
        latents.append(sample(model, [label], indices=[index], seed=seed, **options).latents[0])
        seconds.append(time.process_time() - begin)
    return latents, seconds


def batched(model, asked: list[dict], moments: list[float], options: dict) -> tuple[list, list[float], list[int]]:
    """The latents, the moments at which they are there, and the requests in each forward."""
    batcher, clock, requests, ends, sizes = Batcher(model, **options), 0.0, [], [0.0] * len(asked), []
    while len(requests) < len(asked) or len(batcher):
        begin = time.process_time()
        if not len(batcher):
            clock = max(clock, moments[len(requests)])
        while len(requests) < len(asked) and moments[len(requests)] <= clock:
            requests.append(batcher.submit(**asked[len(requests)]))
        missing = [i for i, request in enumerate(requests) if request.latent is None]
        batcher.step()
        clock += time.process_time() - begin
        sizes.append(len(missing))
        ends = [clock if i in missing and requests[i].latent is not None else end for i, end in enumerate(ends)]
    return [request.latent for request in requests], ends, sizes


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=positive, default=32)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--float64", action="store_true", help="weights and features; the time is then no measure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, objective, _ = open_checkpoint("digits")
    model = model.double() if args.float64 else model
    options = {"objective": objective, "steps": args.steps, "guidance": 2.0}
    draw = random.Random(0)
    asked = [{"label": draw.randrange(10), "seed": draw.randrange(2**32), "index": i} for i in range(args.requests)]
    batched(model, asked[:2], [0.0, 0.0], options)  # warm
    wanted, seconds = one_by_one(model, asked, options)
    moments = sorted(draw.random() * sum(seconds) / 4 for _ in asked)
    latents, ends, sizes = batched(model, asked, moments, options)
    clock, alone = 0.0, []
    for moment, own in zip(moments, seconds, strict=True):
        clock = max(clock, moment) + own
        alone.append(clock)
    waits = [np.mean(np.subtract(done, moments)) for done in (alone, ends)]
    apart = sorted(float((a - b).abs().max()) for a, b in zip(latents, wanted, strict=True))
    for name, last, wait, forwards in (
        ("one by one", alone[-1], waits[0], args.requests * args.steps),
        ("batched", max(ends), waits[1], len(sizes)),
    ):
        print(f"{name:12}{last:8.2f} s to the last, {wait:6.2f} s from request to picture, {forwards} forwards")
    print(f"{'ratio':12}{max(ends) / alone[-1]:8.2f}, {np.mean(sizes):.1f} requests in a forward")
    print(f"{'latents':12}{apart[len(apart) // 2]:8.1e} apart at the median, {apart[-1]:.1e} at most")


if __name__ == "__main__":
    main()
