"""Batcher: each request's picture is its own run's, whatever comes and goes beside it."""

import asyncio
import runpy

import pytest
import torch

from dcdit.errors import ConfigError, DCDiTError
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.model.plain_dit import PlainDiT
from dcdit.sampling import Batcher, sample

SIZES = {"input_size": (6, 5), "in_channels": 3, "num_classes": 4, "hidden_size": 32, "depth": 1, "num_heads": 1}


def tiny(**changes):
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(**SIZES, encoder_width=32, learn_sigma=False, **changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    torch.nn.init.zeros_(model.router.score.bias)
    torch.nn.init.normal_(model.class_embed.weight)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


# Requests that differ in every option, and how many steps of the batch pass before each comes.
STREAM = [
    (0, 1, {"seed": 3, "steps": 6}),
    (1, 0, {"seed": 4, "steps": 3, "guidance": 2.0, "drop_fraction": 0.4}),
    (0, 3, {"seed": 3, "steps": 5, "guidance": 1.5, "tokens": [20, 7]}),
    (2, 2, {"steps": 2, "size": (4, 9), "guidance": 1.5, "drop_fraction": [0.5, 0.0], "uncond_drop_fraction": 0.8}),
    (0, 2, {"seed": 9, "steps": 4, "scheduler": "flow-heun", "guidance": 3.0, "guidance_interval": (300, 1000)}),
    (1, 1, {"seed": 1, "steps": 4, "tokens": 30, "shift": 3.0}),
    (3, 1, {"seed": 2, "steps": 4, "tokens": 11, "size": (8, 3)}),
]


def served(model, stream, **options):
    batcher = Batcher(model, objective="flow", **options)
    requests = []
    for pause, label, own in stream:
        for _ in range(pause):
            batcher.step()
        requests.append(batcher.submit(label, index=len(requests), **own))
    while batcher.step():
        pass
    assert len(batcher) == 0
    return requests


@pytest.mark.parametrize("max_requests", [1, 3, 64])
def test_each_picture_is_its_lone_run(model, max_requests):
    requests = served(model, STREAM, max_requests=max_requests)
    for index, (request, (_, label, own)) in enumerate(zip(requests, STREAM, strict=True)):
        want = sample(model, [label], indices=[index], objective="flow", **own)
        torch.testing.assert_close(request.latent, want.latents[0], rtol=1e-5, atol=1e-5)
        tokens = want.trace.tokens[:, 0].tolist()
        assert [kept[0] for kept in request.tokens] == tokens and request.progress == request.steps == len(tokens)
        if want.trace.uncond_tokens is not None:
            assert [kept[1] for kept in request.tokens if len(kept) == 2] == [
                kept for kept in want.trace.uncond_tokens[:, 0].tolist() if kept == kept
            ]


def test_requests_share_forwards(model):
    """Steps are counted by forwards: 12 requests of 5 steps, one joining at each step, take 16, not 60."""
    calls = []
    hook = model.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    served(model, [(1, 0, {"steps": 5, "guidance": 2.0})] * 12)
    hook.remove()
    assert calls == [2, 4, 6, 8, *[10] * 8, 8, 6, 4, 2]


def test_the_others_go_on_when_one_diverges(model):
    batcher = Batcher(model, objective="flow", steps=4)
    first, bad, last = (batcher.submit(0, index=i) for i in range(3))
    batcher.step()
    batcher.running[1][1].x[:] = torch.nan
    while batcher.step():
        pass
    assert isinstance(bad.error, DCDiTError) and "sampling diverged at t = 750" in str(bad.error)
    assert bad.latent is None and bad.progress == 1
    for index, request in ((0, first), (2, last)):
        want = sample(model, [0], indices=[index], objective="flow", steps=4).latents[0]
        torch.testing.assert_close(request.latent, want, rtol=1e-5, atol=1e-5)


def test_a_request_may_leave(model):
    batcher = Batcher(model, objective="flow", steps=3, max_requests=1)
    under_way, waiting, third = (batcher.submit(0) for _ in range(3))
    assert batcher.step() and len(batcher) == 3
    under_way.cancel()
    waiting.cancel()
    assert [batcher.step() for _ in range(4)] == [True, True, True, False]
    assert third.latent is not None and under_way.latent is None and waiting.progress == 0


def test_bad_requests_are_named(model):
    batcher = Batcher(model, objective="flow", steps=3)
    for label, options, words in [
        (4, {}, r"class id 4 is outside \[0, 3\]"),
        (0, {"drop_fraction": 1.0}, r"must be in \[0, 1\), got 1"),
        (0, {"tokens": 1}, "tokens of a step must be whole numbers from 2 to 30, got 1"),
        (0, {"size": (0, 3)}, r"size must be two positive integers \(H, W\), got \(0, 3\)"),
        (0, {"index": 0.5}, "index must be an integer, got 0.5"),
        # What would only be seen in a step, where it stopped the others' requests.
        (True, {}, "classes must be a list of class ids, got torch.bool"),
        (0, {"guidance": 2.0, "guidance_channels": 1.5}, r"guidance_channels must be in \[1, 3\], got 1.5"),
        (0, {"policy": "reuse=2"}, "unknown request key 'policy'"),
        (0, {"edit": 5}, "edit must be an Edit, got a int"),
    ]:
        with pytest.raises(ConfigError, match=words):
            batcher.submit(label, **options)
    assert not batcher.step()
    with pytest.raises(ConfigError, match="a Batcher is for a DCDiT, got a PlainDiT"):
        Batcher(PlainDiT(model.config, 1), objective="flow")
    with pytest.raises(ConfigError, match="unknown request key 'guidence'; did you mean 'guidance'"):
        Batcher(model, objective="flow", guidence=2.0)
    with pytest.raises(ConfigError, match="a request needs objective"):
        Batcher(model).submit(0)
    with pytest.raises(ConfigError, match="max_requests must be an integer of at least 1, got 0"):
        Batcher(model, max_requests=0)


def test_the_asyncio_example(model):
    """Callers get their own pictures; one that gives up takes its request along; the server then waits for others."""
    server_of = runpy.run_path("examples/serve.py")["Server"]

    async def ask():
        server = server_of(Batcher(model, objective="flow", steps=3))
        stepping = asyncio.create_task(server.run())
        impatient = asyncio.create_task(server.picture(0, steps=1000))
        first = await asyncio.gather(*(server.picture(label, seed=label) for label in range(3)))
        impatient.cancel()
        later = await server.picture(3, seed=3)
        while len(server.batcher):
            await asyncio.sleep(0.001)
        stepping.cancel()
        return [*first, later]

    for label, latent in enumerate(asyncio.run(ask())):
        want = sample(model, [label], seed=label, objective="flow", steps=3).latents[0]
        torch.testing.assert_close(latent, want, rtol=1e-5, atol=1e-5)
