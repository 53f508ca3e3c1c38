"""Digits for whoever asks, from one model and one asyncio loop: each request joins the batch at its next step.

    python examples/serve.py

Ten callers ask at random moments. Each gives a class, a seed, a number of steps and a number of tokens. A web
framework's handlers would call `Server.picture` in the place of `caller`.
"""

import argparse
import asyncio
import random
import time

from dcdit import Batcher
from dcdit.sampling import open_checkpoint


class Server:
    """A Batcher whose steps run in a thread of their own while there are requests."""

    def __init__(self, batcher):
        self.batcher, self.arrived = batcher, asyncio.Queue()

    async def picture(self, label, **options):
        """The latent (C, H, W) of a request, or its error raised. Cancelling the caller cancels the request."""
        request, answer = self.batcher.submit(label, **options), asyncio.get_running_loop().create_future()
        await self.arrived.put((request, answer))
        try:
            return await answer
        finally:
            request.cancel()

    async def run(self):
        """Step for ever. A step ends before the next request is looked at."""
        waiting = []
        while True:
            if not waiting:
                waiting.append(await self.arrived.get())
            while not self.arrived.empty():
                waiting.append(self.arrived.get_nowait())
            await asyncio.to_thread(self.batcher.step)
            for request, answer in waiting:
                if not answer.done() and request.error is not None:
                    answer.set_exception(request.error)
                elif not answer.done() and request.latent is not None:
                    answer.set_result(request.latent)
            waiting = [(request, answer) for request, answer in waiting if not answer.done()]


async def caller(server, label, moment):
    """One request after `moment` seconds: its picture, and the seconds that it took."""
    await asyncio.sleep(random.Random(label).random() * moment)
    begin = time.perf_counter()
    latent = await server.picture(label, seed=label, steps=10 + label, tokens=40 + 5 * label)
    return latent, time.perf_counter() - begin


async def main(moment=2.0):
    """Ten digits: uint8 (10, 28, 28, 3)."""
    import torch

    from dcdit.pictures.images import to_uint8

    model, objective, codec = open_checkpoint("digits")
    server = Server(Batcher(model, objective=objective, guidance=2.0))
    stepping = asyncio.create_task(server.run())
    answers = await asyncio.gather(*(caller(server, label, moment) for label in range(10)))
    stepping.cancel()
    for label, (_, seconds) in enumerate(answers):
        print(f"{label}: {seconds:.2f} s")
    return to_uint8(codec.decode(torch.stack([latent for latent, _ in answers])))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    asyncio.run(main())
