"""Budgets, guidance and gates as parts of a policy; what was decided when; policies in both pipelines."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler
from test_pipeline import quiet, record_tokens, transformer, vae  # noqa: F401

from bench.digits.policies import measure
from dcdit.checkpoints.folder import save_checkpoint
from dcdit.cli import main
from dcdit.errors import ConfigError
from dcdit.integrations.pipeline import DCDiTPipeline
from dcdit.integrations.transformer import DCDiTTransformer2DModel
from dcdit.model import DCDiT, DyDCDiT, DyDiT, DyDiTConfig, PlainDiT
from dcdit.sampling import Policy, sample
from dcdit.sampling.policy import Ramp

SIZES = {"hidden_size": 32, "num_heads": 4, "num_classes": 4, "input_size": (12, 8), "learn_sigma": False}
OPTIONS = {"objective": "flow", "steps": 4, "guidance": 2.0}
CLASSES = [0, 3, 1]


@pytest.fixture(scope="module")
def net():
    return transformer(learn_sigma=False).model


def dydit():
    torch.manual_seed(2)
    model = DyDiT(DyDiTConfig(**SIZES, depth=3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_parts_are_the_arguments_of_sample(net):
    """rho, budget and guidance equal drop_fraction, tokens and guidance_interval, to the bit."""
    for policy, arguments in (
        ("rho=0.2:0.6", {"drop_fraction": lambda t: 0.2 + 0.4 * t / 1000}),
        ("budget=20:8", {"tokens": lambda t: round(20 - 12 * t / 1000)}),
        ("budget=9; guidance=200:600", {"tokens": 9, "guidance_interval": (200, 600)}),
    ):
        want, got = sample(net, CLASSES, **OPTIONS, **arguments), sample(net, CLASSES, **OPTIONS, policy=policy)
        assert torch.equal(got.latents, want.latents) and torch.equal(got.trace.tokens, want.trace.tokens)


@pytest.mark.parametrize(
    "policy", ["budget=20:8 & teacache=0.1", "budget=9:20 & reuse=2", "budget=9 & reuse=2 & teacache=0.1"]
)
def test_budgets_compose(net, policy):
    """Every computed step has exactly its tokens; a picture does not depend on its batch."""
    options = OPTIONS | {"steps": 6}
    budget = Policy.of(policy).budget
    whole = sample(net, CLASSES, **options, policy=policy)
    for t, tokens in zip(whole.trace.timesteps.tolist(), whole.trace.tokens, strict=True):
        assert set(tokens.tolist()) <= {0.0, float(round(budget.at(t)))}
    assert (whole.trace.tokens[[0, -1]] > 0).all()
    alone = sample(net, CLASSES[1:2], indices=[1], **options, policy=policy)
    assert torch.allclose(alone.latents, whole.latents[1:2], atol=1e-5)


@torch.no_grad()
def test_gates():
    """A share of heads and groups, the likeliest; at 1 the complete pass, to the bit."""
    model = dydit()
    x, t, y = torch.randn(2, 4, 12, 8), torch.full((2,), 500.0), torch.tensor([0, 1])
    assert torch.equal(model.tabulate([500.0], 1)(x, t, y), model(x, t, y, complete=True))
    table = model.tabulate([500.0, 100.0], 0.5)
    gates = table(x, t, y, return_gates=True)[1]
    te = model.time_embed(torch.tensor([500.0]))
    logits = torch.stack([block.routers.heads(te)[0] for block in model.blocks])
    assert gates.heads[0].sum() == gates.groups[0].sum() == 6 and (gates.heads[:, :, 0] == 1).all()
    on = gates.heads[0, :, 1:] > 0
    assert logits[on].min() > logits[~on].max()
    assert torch.allclose(table(x, t, y), model(x, t, y, gates=gates), atol=1e-5)
    runs = [sample(model, CLASSES, **OPTIONS, policy=f"gates={share}").trace for share in (0.25, 0.5, 1)]
    costs = [float(run.gflops(model.config).sum()) for run in runs]
    assert costs[0] < costs[1] < costs[2] and (runs[2].tokens == 24).all()
    assert (runs[2].decided["gates"] == 1).all() and (runs[0].decided["gates"] < 0.5).all()
    chunked = DyDCDiT.from_dcdit(DCDiT.from_pretrained("digits"))
    x = torch.randn(2, 4, 14, 14)
    assert torch.equal(chunked.tabulate([500.0], 1)(x, t, y), chunked(x, t, y, complete=True))
    whole = sample(chunked, [3], **OPTIONS | {"steps": 2}, policy="gates=1").latents
    assert not torch.equal(sample(chunked, [3], **OPTIONS | {"steps": 2}, policy="gates=0.5").latents, whole)


def test_table(net):
    """A line for each step; images that differ show the least and the most."""
    options = OPTIONS | {"steps": 6, "policy": "budget=20:8 & reuse=2 & teacache=0.1 & guidance=0:700"}
    trace = sample(net, CLASSES, **options).trace
    lines = [line.split("  ") for line in trace.table().splitlines()]
    lines = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert lines[0] == ["step", "t", "guidance", "budget", "router", "computed", "tokens", "without class"]
    assert len(lines) == 7 and lines[1] == ["0", "1000", "1", "8", "1", "1", "8", "–"]
    assert lines[3][2] == "2" and lines[6][5] == "1" and lines[6][6] == "18"
    assert trace.decided["router"][0].tolist() == [1, 1, 1]
    assert trace.decided["computed"].isfinite().all() and (trace.decided["computed"] == (trace.tokens > 0)).all()
    plain = sample(net, CLASSES, **OPTIONS | {"guidance": 1.0}).trace
    assert plain.table().splitlines()[0].split() == ["step", "t", "tokens"]


@pytest.mark.parametrize("policy", ["rho=0.5:0.1", "budget=20:8 & reuse=2", "teacache=0.1 & guidance=100:800"])
def test_our_pipeline_is_our_sampler(net, policy):
    start = []
    want = sample(net, CLASSES, **OPTIONS | {"steps": 6}, policy=policy, callback=lambda step: start.append(step.x))
    model = DCDiTTransformer2DModel.from_dcdit(net)
    pipe = quiet(DCDiTPipeline(model, FlowMatchEulerDiscreteScheduler()))
    options = {"guidance_scale": 2.0, "num_inference_steps": 6, "latents": start[0], "output_type": "latent"}
    images = pipe(CLASSES, policy=policy, **options).images
    torch.testing.assert_close(images, want.latents, rtol=0, atol=1e-5)
    tokens = pipe.policy_run.decided.values["tokens"]
    assert torch.equal(tokens, want.trace.tokens) and len(pipe.policy_run.table().splitlines()) == 7
    assert model.policy_run is None
    free = pipe(CLASSES, **options).images
    assert not torch.equal(free, images)


def test_dit_pipeline_under_a_policy(vae):  # noqa: F811
    """diffusers' own pipeline: set for its timesteps, the policy decides in each call anew."""
    model = transformer()
    rows = record_tokens(model)
    pipe = quiet(DiTPipeline(transformer=model, vae=vae, scheduler=DDIMScheduler()))
    pipe.scheduler.set_timesteps(4)
    run = model.set_policy("budget=30:9 & guidance=0:600", pipe.scheduler.timesteps)
    options = {"guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "np"}
    first = pipe([1, 2], generator=torch.manual_seed(0), **options).images
    times = pipe.scheduler.timesteps.tolist()
    want = [round(30 - 21 * t / 1000) for t in times]
    assert rows == [[n] * (4 if t <= 600 else 2) for n, t in zip(want, times, strict=True)]
    assert run.decided.values["both halves"][:, 0].tolist() == [t <= 600 for t in times]
    again = pipe([1, 2], generator=torch.manual_seed(0), **options).images
    assert (first == again).all() and len(rows) == 8
    model.set_policy(None)
    assert pipe([1, 2], generator=torch.manual_seed(0), **options).images.shape == first.shape


def test_saved_with_a_checkpoint(net, tmp_path, capsys):
    """`dcdit sample` and a pipeline follow the policy that was saved; --table prints it."""
    codec = {"kind": "pixel_unshuffle", "factor": 2}
    net.use = {"objective": "flow", "codec": codec, "policy": "budget=12 & teacache=0.1"}
    try:
        save_checkpoint(tmp_path / "net", net)
        model = DCDiTTransformer2DModel.from_dcdit(net)
    finally:
        net.use = {}
    DCDiTPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "pipe")
    words = ["sample", str(tmp_path / "net"), "--classes", "0,1", "--steps", "3", "--cpu", "--table"]
    assert not main([*words, "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "budget" in out and "computed" in out
    assert json.loads((tmp_path / "out" / "sampling.json").read_text())["policy"] == "budget=12 & teacache=0.1"
    pipe = quiet(DCDiTPipeline.from_pretrained(tmp_path / "pipe"))
    pipe([1], num_inference_steps=3, output_type="latent")
    assert (pipe.policy_run.decided.values["budget"] == 12).all()


def test_text():
    policy = Policy.of("budget=64:32; guidance=200:800 & gates=0.5")
    assert policy == Policy(budget=Ramp(64, 32), guidance=(200, 800), gates=0.5)
    assert str(policy) == "budget=64:32 & guidance=200:800 & gates=0.5" and Policy.of(str(policy)) == policy
    assert str(Policy.of("rho=0.25")) == "rho=0.25" and Ramp(64, 32).at(250) == 56


def test_bad_input(net):
    for text, words in (
        ("rho=0.2 & budget=3", "rho and budget exclude each other, got rho=0.2 & budget=3"),
        ("rho=1", r"rho must be in \[0, 1\), got 1"),
        ("budget=0", "budget must be whole numbers of tokens, at least 1, got 0"),
        ("budget=9:4.5", r"budget must be whole numbers of tokens, at least 1, got 9:4\.5"),
        ("guidance=800:200", "guidance must be timesteps 0 <= low <= high <= 1000, got 800:200"),
        ("gates=0", r"gates must be a share in \(0, 1\], got 0"),
        ("budget=few", "policy budget must look like budget=64:32, got 'budget=few'"),
        ("grid=0.5", "policy grid must look like grid=0.5:700, got 'grid=0.5'"),
        ("guidance=200", "policy guidance must look like guidance=200:800, got 'guidance=200'"),
        (["reuse=2"], r"a policy must be a Policy or text such as .*, got \['reuse=2'\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            Policy.of(text)
    for parts in ({"rho": 0.2}, {"budget": 64}, {"guidance": 5}, {"grid": ("a", 1)}, {"density": 0.5}, {"gates": "a"}):
        name, value = next(iter(parts.items()))
        with pytest.raises(
            ConfigError, match=re.escape(f"{name} of a policy must be as") + ".*" + re.escape(repr(value))
        ):
            Policy(**parts)
    plain = PlainDiT(DyDiTConfig(**SIZES, depth=1)).eval()
    for model, policy, arguments, words in (
        (net, "rho=0.2", {"drop_fraction": 0.1}, "the policy has rho already, rho=0.2: leave one of them out"),
        (net, "budget=9", {"tokens": 3}, "the policy has budget already"),
        (net, "guidance=1:2", {"guidance_interval": (0, 500)}, "the policy has guidance already"),
        (net, "budget=99", {}, "tokens of a step must be whole numbers from 2 to 36, got 99"),
        (
            net,
            "teacache=0.1",
            {"gflops_per_image": 1.0},
            "gflops_per_image is for a DC-DiT without a policy, got a TeaCache",
        ),
        (net, "gates=0.5", {}, "gates are of a DyDiT, this model is a DCDiT"),
        (plain, "rho=0.2", {}, "rho is of a model with a router, this one is a PlainDiT"),
        (plain, "budget=9", {}, "a budget of tokens is for a model with a router, got a PlainDiT"),
    ):
        with pytest.raises(ConfigError, match=words):
            sample(model, [0], **OPTIONS, **arguments, policy=policy)
    model = DCDiTTransformer2DModel.from_dcdit(net)
    with pytest.raises(ConfigError, match="set_policy needs the timesteps of a run"):
        model.set_policy("reuse=2")
    with pytest.raises(ConfigError, match=r"got shape \(0,\)"):
        model.set_policy("reuse=2", [])
    model.set_policy("rho=0.5", [900.0, 10.0])
    x, y = torch.randn(2, 4, 6, 6), torch.tensor([1, 2])
    with pytest.raises(ConfigError, match="the policy is for 2 timesteps from 900 to 10, got 500"):
        model(x, torch.full((2,), 500.0), y)
    with pytest.raises(ConfigError, match="the policy has rho already"):
        model(x, torch.full((2,), 900.0), y, 0.25)
    assert isinstance(net, DCDiT)


def test_the_bench_measures_policies(net):
    """No policy is no distance; a policy's row has its share of forwards, its FLOPs and the recognised images."""
    rows = list(
        measure(
            net, lambda z: z[:, :3], lambda images: np.zeros(len(images)), np.array([0, 3]), ["teacache=9"], **OPTIONS
        )
    )
    assert [row.policy for row in rows] == ["none", "teacache=9"] and all(row.recognised == 1 for row in rows)
    assert rows[0].distance == 0 and rows[0].computed == 1 and rows[1].distance > 0
    assert rows[1].computed == 0.5 and rows[1].gflops == pytest.approx(rows[0].gflops / 2, rel=0.2)
