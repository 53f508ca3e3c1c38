"""Samplers against formulas worked out by hand and against data whose answer is known; noise, budgets, processes."""

import copy
import itertools
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcdit.checkpoints.folder import save_checkpoint
from dcdit.cli import main
from dcdit.commands.options import parse_classes, parse_drop_fraction
from dcdit.errors import ConfigError, DCDiTError
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.model.precision import cast_weights
from dcdit.sampling.drop_fraction import drop_table
from dcdit.sampling.sampler import sample
from dcdit.sampling.schedulers import SCHEDULERS, make_scheduler
from dcdit.sampling.trajectory import guide, image_generator

ROUNDING = 1e-3  # of float32, which the first x_0 = (x − …)/√ᾱ magnifies by 160
SIZES = {"input_size": (6, 5), "in_channels": 3, "num_classes": 4, "hidden_size": 32, "depth": 1, "num_heads": 1}


def tiny(learn_sigma=True):
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(**SIZES, encoder_width=32, learn_sigma=learn_sigma))
    for parameter in model.parameters():  # nothing zero, so that class, time and ρ all show
        torch.nn.init.normal_(parameter, std=0.08)
    torch.nn.init.zeros_(model.router.score.bias)
    torch.nn.init.normal_(model.class_embed.weight)
    return model.eval()


@pytest.fixture(scope="module")
def ddpm():
    return tiny()


@pytest.fixture(scope="module")
def flow():
    return tiny(learn_sigma=False)


def predict(model, x, t, y, rho):
    with torch.no_grad():
        return model(x, torch.full((len(x),), float(t)), y, drop_fraction=rho)


def initial(seed, indices, generators=None):
    generators = generators or [image_generator(seed, i) for i in indices]
    return torch.stack([torch.randn(3, 6, 5, generator=g) for g in generators])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_noise_is_bit_equal_whatever_the_batch_and_order(flow, batch_size):
    order, seen = [4, 0, 7, 2, 5], {}

    def look(step):
        if step.number == 0:
            seen.update(zip(step.indices.tolist(), step.x, strict=True))

    options = {"objective": "flow", "steps": 1, "seed": 5, "callback": look}
    sample(flow, [0] * 5, indices=order, batch_size=batch_size, **options)
    for index in order:
        assert torch.equal(seen[index], initial(5, [index])[0])
    assert not torch.equal(seen[4], initial(6, [4])[0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_batch_size_and_order_do_not_change_the_images(ddpm, flow, scheduler):
    """Step noise included: "ddpm" draws some at every step."""
    objective = SCHEDULERS[scheduler]
    model = flow if objective == "flow" else ddpm
    options = {"objective": objective, "scheduler": scheduler, "steps": 6, "guidance": 1.5, "drop_fraction": 0.3}
    one = sample(model, [0, 1, 2, 3, 0], batch_size=5, **options).latents
    two = sample(model, [0, 3, 2, 1, 0], indices=[4, 3, 2, 1, 0], batch_size=2, **options).latents.flip(0)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_seeds_of_a_run_never_meet():
    seeds = {image_generator(seed, i).initial_seed() for seed in range(4) for i in range(10_000)}
    assert len(seeds) == 40_000


def test_flow_euler_and_lite_cfg_by_hand(flow):
    """x ← x − v/S on the grid t = 1000, …, 1000/S, the two halves run apart, each with its own ρ."""
    steps, guidance, y = 5, 3.0, torch.tensor([1, 3])
    x = initial(0, [0, 1])
    for i in range(steps):
        t = 1000 * (1 - i / steps)
        cond, uncond = predict(flow, x, t, y, 0.2), predict(flow, x, t, torch.tensor([4, 4]), 0.9)
        x = x - (uncond + guidance * (cond - uncond)) / steps
    options = {"steps": steps, "guidance": guidance, "drop_fraction": 0.2, "uncond_drop_fraction": 0.9}
    got = sample(flow, y, objective="flow", **options)
    torch.testing.assert_close(got.latents, x, rtol=1e-4, atol=1e-4)
    assert (got.trace.uncond_tokens < got.trace.tokens).all()


def spaced(steps):
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    times = [round(999 * i / (steps - 1)) for i in range(steps)][::-1]
    return times, [float(alpha_bar[t]) for t in times] + [1.0]


def test_ddpm_with_learned_variance_by_hand(ddpm):
    """Ancestral sampling in float64 from arXiv 2006.11239 eq. 7 and 2102.09672 eq. 15, S not a divisor of 1000.

    Guidance moves the noise of all channels; the variance is the conditional one.
    """
    y = torch.tensor([2, 0])
    generators = [image_generator(3, i) for i in range(2)]
    x = initial(3, None, generators).double()
    times, alpha_bar = spaced(7)
    for t, now, then in zip(times, alpha_bar[:-1], alpha_bar[1:], strict=True):
        cond = predict(ddpm, x.float(), t, y, 0.0).double()
        uncond = predict(ddpm, x.float(), t, torch.tensor([4, 4]), 0.0).double()
        eps, v = uncond[:, :3] + 2.5 * (cond[:, :3] - uncond[:, :3]), cond[:, 3:]
        beta = 1 - now / then
        x0 = ((x - (1 - now) ** 0.5 * eps) / now**0.5).clamp(-1, 1)
        mean = (then**0.5 * beta * x0 + (now / then) ** 0.5 * (1 - then) * x) / (1 - now)
        x = mean
        if then < 1:
            log_variance = (v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(beta * (1 - then) / (1 - now))
            x = mean + torch.exp(log_variance / 2) * initial(0, None, generators)
    got = sample(ddpm, y, objective="ddpm", steps=7, guidance=2.5, seed=3, clip=True).latents.double()
    torch.testing.assert_close(got, x, rtol=1e-4, atol=ROUNDING)


def test_ddim_by_hand(ddpm):
    y = torch.tensor([2, 0])
    x = initial(0, [0, 1]).double()
    times, alpha_bar = spaced(7)
    for t, now, then in zip(times, alpha_bar[:-1], alpha_bar[1:], strict=True):
        eps = predict(ddpm, x.float(), t, y, 0.0)[:, :3].double()
        x0 = ((x - (1 - now) ** 0.5 * eps) / now**0.5).clamp(-1, 1)
        x = then**0.5 * x0 + (1 - then) ** 0.5 * eps
    got = sample(ddpm, y, objective="ddpm", scheduler="ddim", steps=7, clip=True).latents.double()
    torch.testing.assert_close(got, x, rtol=1e-4, atol=ROUNDING)


def test_ddim_with_noise_by_hand(ddpm):
    """σ of arXiv 2010.02502 eq. 16, in float64; the noise of each image is its own."""
    y, eta = torch.tensor([2, 0]), 0.7
    generators = [image_generator(1, i) for i in range(2)]
    x = initial(1, None, generators).double()
    times, alpha_bar = spaced(5)
    for t, now, then in zip(times, alpha_bar[:-1], alpha_bar[1:], strict=True):
        eps = predict(ddpm, x.float(), t, y, 0.0)[:, :3].double()
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        x = then**0.5 * x0 + (1 - then - sigma**2) ** 0.5 * eps + sigma * initial(0, None, generators)
    options = {"scheduler": "ddim", "steps": 5, "eta": eta, "seed": 1}
    got = sample(ddpm, y, objective="ddpm", **options).latents.double()
    torch.testing.assert_close(got, x, rtol=1e-4, atol=ROUNDING * float(x.abs().max()))


def test_heun_and_the_shift_by_hand(flow):
    """The mean of the velocities at both ends of a step; the last step, to σ = 0, is Euler's."""
    steps, y, shift = 4, torch.tensor([1, 3]), 3.0
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigmas = [*(shift * even / (1 + (shift - 1) * even)).tolist(), 0.0]
    x, calls = initial(0, [0, 1]).double(), []

    def velocity(x, sigma):
        calls.append(1000 * sigma)
        return predict(flow, x.float(), 1000 * sigma, y, 0.2).double()

    for now, then in itertools.pairwise(sigmas):
        first = velocity(x, now)
        second = velocity(x + (then - now) * first, then) if then else first
        x = x + (then - now) * (first + second) / 2
    options = {"scheduler": "flow-heun", "steps": steps, "drop_fraction": 0.2, "shift": shift}
    got = sample(flow, y, objective="flow", **options)
    torch.testing.assert_close(got.latents.double(), x, rtol=1e-4, atol=1e-4)
    assert got.trace.timesteps.tolist() == pytest.approx(calls) and len(calls) == 2 * steps - 1
    euler = sample(flow, y, objective="flow", steps=steps, shift=shift).trace.timesteps
    assert euler.tolist() == pytest.approx([1000 * sigma for sigma in sigmas[:-1]])


def test_guidance_of_some_channels_in_an_interval_by_hand(flow):
    """Channels past the second are the conditional ones; outside the interval the unconditional half does not run."""
    steps, y = 5, torch.tensor([1, 3])
    x, null, rows = initial(0, [0, 1]), torch.tensor([4, 4]), []
    for i in range(steps):
        t = 1000 * (1 - i / steps)
        out = predict(flow, x, t, y, 0.0)
        if 300 <= t <= 800:
            uncond = predict(flow, x, t, null, 0.0)
            out = torch.cat([(uncond + 3 * (out - uncond))[:, :2], out[:, 2:]], dim=1)
        x = x - out / steps
    hook = flow.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    options = {"steps": steps, "guidance": 3.0, "guidance_channels": 2, "guidance_interval": (300, 800)}
    got = sample(flow, y, objective="flow", **options)
    hook.remove()
    torch.testing.assert_close(got.latents, x, rtol=1e-4, atol=1e-4)
    assert rows == [2, 4, 4, 4, 2]
    assert got.trace.uncond_tokens.isnan().any(1).tolist() == [True, False, False, False, True]
    both, one = got.trace.gflops(flow.config)[1:4], got.trace.gflops(flow.config)[4:]
    assert (both > one.max()).all() and got.trace.gflops(flow.config).isfinite().all()


def test_the_release_guides_three_channels(tmp_path):
    """`convert` says so, and `dcdit sample` obeys it: the fourth channel is the conditional one."""
    from dcdit.checkpoints.folder import read_release

    model, use = read_release("tests/data/dcdit_tiny_release.pt")
    assert use["guidance_channels"] == 3 and model.use == use
    x, t, y = torch.randn(2, 4, *model.config.input_size), torch.full((4,), 500.0), torch.tensor([0, 1, 5, 5])
    y[2:] = model.config.num_classes
    with torch.no_grad():
        out = model(torch.cat([x, x]), t, y)

    cond, uncond = out.chunk(2)
    guided = guide(out, 4.0, use["guidance_channels"])
    torch.testing.assert_close(guided[:, :3], uncond[:, :3] + 4 * (cond[:, :3] - uncond[:, :3]))
    assert torch.equal(guided[:, 3:], cond[:, 3:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_are_an_error(bad):
    """In the last step too, which no router sees."""
    model = Gaussian("flow", False)
    forward, calls = model.forward, []

    def poisoned(x, *args, **options):
        calls.append(1)
        out, routing = forward(x, *args, **options)
        return (out + bad if len(calls) == 3 else out), routing

    model.forward = poisoned
    with pytest.raises(DCDiTError, match="sampling diverged: latents that are not finite"):
        sample(model, [0], objective="flow", steps=3)


class Gaussian(torch.nn.Module):
    """The best possible prediction for data of N(0.5, 0.3²): every sampler must give that distribution back."""

    mean, std = 0.5, 0.3

    def __init__(self, objective, learn_sigma):
        super().__init__()
        self.objective, self.scale = objective, torch.nn.Parameter(torch.ones(()))
        self.config = DCDiTConfig(**SIZES, encoder_width=32, learn_sigma=learn_sigma)
        self.alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def forward(self, x, t, y, drop_fraction, return_routing):
        time = float(t[0])
        if self.objective == "flow":
            data, noise = 1 - time / 1000, time / 1000
        else:
            data, noise = float(self.alpha_bar[int(time)]) ** 0.5, float(1 - self.alpha_bar[int(time)]) ** 0.5
        centred = (x - data * self.mean) / (data**2 * self.std**2 + noise**2)
        out = noise * centred
        if self.objective == "flow":
            out = out - (self.mean + data * self.std**2 * centred)
        if self.config.learn_sigma:  # v = −1: the posterior variance
            out = torch.cat([out, -torch.ones_like(out)], dim=1)
        mask = torch.ones(len(x), 30, dtype=torch.bool)
        plan = types.SimpleNamespace(lengths=torch.full((len(x),), 30))
        return out, types.SimpleNamespace(boundary_prob=mask, boundary_mask=mask, natural_mask=mask, plan=plan)


@pytest.mark.parametrize("scheduler, learned", [*((s, False) for s in SCHEDULERS), ("ddpm", True)])
def test_known_data_comes_out(scheduler, learned):
    """Time scale, directions and step sizes: a wrong one moves the mean or the spread of Gaussian data."""
    objective = SCHEDULERS[scheduler]
    model = Gaussian(objective, learned)
    result = sample(model, [0] * 64, objective=objective, scheduler=scheduler, steps=300)
    if scheduler == "ddpm":
        assert float(result.latents.mean()) == pytest.approx(0.5, abs=0.02)  # 5760 draws: 4 standard errors are 0.016
        assert float(result.latents.std()) == pytest.approx(0.3, rel=0.05)
    else:  # the probability-flow ODE maps noise z to 0.5 + 0.3·z
        torch.testing.assert_close(result.latents, 0.5 + 0.3 * initial(0, range(64)), rtol=0, atol=0.02)


def test_budgets_as_number_tensor_list_and_function(flow):
    options = {"objective": "flow", "steps": 4, "guidance": 1.0}
    natural = []
    each = torch.tensor([0.0, 0.5, 0.9])

    def look(step):
        natural.append(step.routing.natural_mask.sum(1))

    trace = sample(flow, [0, 1, 2], drop_fraction=each, callback=look, **options).trace
    natural = torch.stack(natural)
    assert torch.equal(trace.tokens.long(), natural - (natural * each).floor().long())
    assert trace.uncond_tokens is None and trace.seconds.shape == (4,)
    ramp = sample(flow, [0, 1], drop_fraction=lambda t: 0.9 * (1 - t / 1000), **options)
    listed = sample(flow, [0, 1], drop_fraction=[0.0, 0.225, 0.45, 0.675], **options)
    torch.testing.assert_close(ramp.latents, listed.latents)
    assert (ramp.trace.tokens[0] > ramp.trace.tokens[-1]).all()


def half(model, dtype):
    return model if dtype is None else cast_weights(copy.deepcopy(model), dtype)


def test_half_precision_casts_no_weight_while_it_samples(flow):
    """Router and residual path stay in float32, with their own weights."""

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                seen.append(args[0].data_ptr())
            return function(*args, **(kwargs or {}))

    model = half(flow, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.router.parameters(), flow.router.parameters(), strict=True))
    assert {p.dtype for p in model.residual_proj.parameters()} == {torch.float32}
    assert model.pos_embed.dtype == model.main.blocks[0].qkv.weight.dtype == torch.bfloat16
    seen, weights = [], {p.data_ptr() for p in model.parameters() if p.dim() > 1}
    with Casts():
        got = sample(model, [0, 1, 2], objective="flow", steps=3, batch_size=2).latents
    want = sample(flow, [0, 1, 2], objective="flow", steps=3, batch_size=2).latents
    assert not seen and got.dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()


def test_products_in_float32_may_be_tf32_beside_half_precision(flow):
    seen = []
    hook = flow.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    for precision in (None, torch.bfloat16, torch.float16):
        sample(half(flow, precision), [0], objective="flow", steps=1)
    hook.remove()
    assert seen == ["highest", "high", "high"] and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_tf32_may_be_asked_for_by_its_newer_name(flow, precision):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        sample(half(flow, precision), [0], objective="flow", steps=1)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_a_short_list_gives_each_number_an_equal_share_of_the_steps():
    timesteps = torch.linspace(1000, 100, 5)
    table = drop_table([0.6, 0.0], timesteps, 2)
    torch.testing.assert_close(table, torch.tensor([0.6, 0.6, 0.6, 0.0, 0.0])[:, None].expand(5, 2))
    torch.testing.assert_close(drop_table(0.3, timesteps, 2), torch.full((5, 2), 0.3))


def test_guidance_1_runs_one_half(flow):
    rows = []
    hook = flow.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    sample(flow, [0, 1], objective="flow", steps=1)
    sample(flow, [0, 1], objective="flow", steps=1, guidance=2)
    hook.remove()
    assert rows == [2, 4]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"classes": [0, 4]}, r"class id 4 is outside \[0, 3\]"),
        ({"classes": [-1]}, r"class id -1 is outside \[0, 3\]"),
        ({"classes": []}, "list of class ids"),
        ({"classes": [0.5]}, "list of class ids"),
        ({"classes": ["1"]}, r"list of class ids, got \['1'\]"),
        ({"drop_fraction": 1.0}, r"must be in \[0, 1\), got 1"),
        ({"drop_fraction": float("nan")}, "got nan"),
        ({"guidance": 2, "uncond_drop_fraction": -0.1}, "got -0.1"),
        ({"drop_fraction": [0.1, 0.2, 0.3, 0.4]}, r"over 3 steps must be 1 to 3 numbers, got shape \(4,\)"),
        ({"drop_fraction": []}, "must be 1 to 3 numbers"),
        ({"drop_fraction": lambda t: t / 1000}, r"must be in \[0, 1\), got 1"),
        ({"drop_fraction": None}, "must be numbers, got None"),
        ({"drop_fraction": "0.5"}, "must be numbers, got '0.5'"),
        ({"drop_fraction": lambda t: torch.zeros(2)}, r"must be numbers, got \[tensor"),
        ({"drop_fraction": torch.zeros(3)}, "for each image needs 2 values, got 3"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"steps": 0}, r"steps must be in \[1, 1000\], got 0"),
        ({"steps": 4.0}, "steps must be an integer, got 4.0"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"seed": 2**32}, r"seed must be in \[0, 2\*\*32\), got 4294967296"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"guidance": [1.0, 2.0]}, r"guidance must be a number of at least 0, got \[1\.0, 2\.0\]"),
        ({"guidance_channels": 4}, r"guidance_channels must be in \[1, 3\], got 4"),
        ({"eta": 0.5}, "is of the scheduler ddim, got 0.5 and auto"),
        ({"eta": 2, "scheduler": "ddim"}, r"eta must be in \[0, 1\]"),
        ({"shift": 0}, "shift must be positive and finite, got 0"),
        ({"shift": 2, "objective": "ddpm"}, "shift is of flow matching, this model was trained by ddpm"),
        ({"scheduler": "ddim"}, "ddim integrates ddpm, this model was trained by flow: use flow-euler"),
        ({"scheduler": "ddimm"}, "did you mean 'ddim'"),
        ({"indices": [1]}, "one entry for each of the 2"),
    ],
)
def test_bad_input_is_named(flow, arguments, words):
    with pytest.raises(ConfigError, match=words):
        sample(flow, **{"classes": [0, 1], "objective": "flow", "steps": 3, **arguments})


def test_one_step_starts_from_pure_noise():
    for objective, top in (("flow", 1000), ("ddpm", 999)):
        assert make_scheduler("auto", objective, 1)[1].tolist() == [top]


def test_parse_classes():
    assert parse_classes("0-2, 7,9-9", 10) == [0, 1, 2, 7, 9]
    for text, words in (
        ("0-10", r"10 is outside \[0, 9\]"),
        ("3-1", "backwards"),
        ("a", "0-9 or 1,3"),
        ("1,,2", "0-9"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_classes(text, 10)


def test_classes_by_name():
    names = ["cat", "dog", "7", "big, red"]
    assert parse_classes("dog, cat,0-1", 4, names) == [1, 0, 0, 1]
    assert parse_classes("7", 4, names) == [2] and parse_classes("big, red", 4, names) == [3]
    with pytest.raises(ConfigError, match="unknown class key 'dgo'; did you mean 'dog'"):
        parse_classes("dgo", 4, names)
    with pytest.raises(ConfigError, match="must look like 0-9 or 1,3,5, got ''"):
        parse_classes("", 4)


def test_parse_drop_fraction():
    assert parse_drop_fraction("0.3") == 0.3 and parse_drop_fraction("0, .3,0.6") == [0.0, 0.3, 0.6]
    for text in ("", "a", "0.1,,0.2"):
        with pytest.raises(ConfigError, match=r"0\.3 or 0,0\.3,0\.6, got"):
            parse_drop_fraction(text)


def test_a_schedule_on_the_command_line(tmp_path, capsys):
    words = ["sample", "dcdit/assets/digits", "--classes", "3", "--steps", "4", "--guidance", "1", "--cpu", "--output"]
    shares = []
    for rho in ("0", "0,0.9", "0.9"):
        assert main([*words, str(tmp_path / rho), "--drop-fraction", rho]) == 0
        shares.append(float(capsys.readouterr().out.split("%")[0].split()[-1]))
    assert shares[0] > shares[1] > shares[2]


@pytest.mark.parametrize("kind", ["--cpu", "--multi_gpu"])
def test_two_processes_write_the_same_images(tmp_path, kind):
    """`accelerate launch` shares the images out, without a GPU too; the files are those of one process."""
    model = DCDiT(DCDiTConfig(**{**SIZES, "in_channels": 4}, encoder_width=32, learn_sigma=False))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    codec = {"kind": "pixel_unshuffle", "factor": 2}
    save_checkpoint(tmp_path / "model", model, {"objective": "flow", "codec": codec})
    # A process that ends within its group is aborted at times.
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch, dcdit.cli\ncode = dcdit.cli.main()\nsys.exit(code or torch.distributed.is_initialized())"
    )
    words = [str(script), "sample", str(tmp_path / "model"), "--num", "7", "--steps", "3", "--batch-size", "2"]
    words += ["--format", "npz", "png", "grid", "--output"]
    launch = ["-m", "accelerate.commands.launch", kind, "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    launch += ["--main_process_port", "0"]
    runs = {"one": [sys.executable], "two": [sys.executable, *launch]}
    options = {
        "stdout": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    }
    running = [subprocess.Popen([*run, *words, str(tmp_path / name)], **options) for name, run in runs.items()]
    printed = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert [text.count("7 images in") for text in printed] == [1, 1]
    one, two = (np.load(tmp_path / name / "samples.npz") for name in runs)
    assert one["arr_0"].shape == (7, 12, 10, 3) and one["arr_0"].dtype == np.uint8
    assert one["arr_1"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    # A value on the edge between two levels may round either way.
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in runs]
    assert names[0] == names[1] and len(names[0]) == 10


def test_another_size_by_hand(flow):
    """Two steps of Euler with guidance on an 8×4 grid, from each image's own noise."""
    options = {"objective": "flow", "steps": 2, "guidance": 3.0, "seed": 4}
    got = sample(flow, [1, 2], size=(8, 4), **options).latents
    x = torch.cat([torch.randn(1, 3, 8, 4, generator=image_generator(4, i)) for i in range(2)])
    y = torch.tensor([1, 2, 4, 4])
    for t in (1000.0, 500.0):
        with torch.no_grad():
            cond, uncond = flow(torch.cat([x, x]), torch.full((4,), t), y).chunk(2)
        x = x - 0.5 * (uncond + 3 * (cond - uncond))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)
    assert torch.equal(sample(flow, [1], size=(6, 5), **options).latents, sample(flow, [1], **options).latents)


@pytest.mark.parametrize("size", [(8,), (8, 0), (8.0, 4), 8])
def test_sizes_that_cannot_be_are_named(flow, size):
    with pytest.raises(ConfigError, match=r"size must be two positive integers \(H, W\), got"):
        sample(flow, [1], objective="flow", size=size)
