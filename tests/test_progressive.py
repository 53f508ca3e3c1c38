"""Coarse grids first: the expansion has the right signal and noise, and every other part of a policy goes with it."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.nn import functional as F

from bench.digits.progressive import shrink
from dcdit.errors import ConfigError
from dcdit.integrations.transformer import DCDiTTransformer2DModel
from dcdit.model import DCDiT, PlainDiT
from dcdit.model.dit_config import DyDiTConfig
from dcdit.model.flops import dcdit_flops
from dcdit.sampling import Policy, sample
from dcdit.sampling.progressive import CoarseStart, cosines
from dcdit.sampling.schedulers import make_scheduler

OPTIONS = {"objective": "flow", "steps": 6, "guidance": 2.0, "batch_size": 2}


@pytest.fixture(scope="module")
def digits():
    return DCDiT.from_pretrained("digits")


def start(share=0.5, above=400.0, full=(14, 12), stride=1, steps=10):
    return CoarseStart.plan(share, above, full, stride, make_scheduler("auto", "flow", steps)[0])


def test_cosines_are_orthonormal():
    for side in (1, 5, 8):
        matrix = cosines(side)
        assert torch.allclose(matrix @ matrix.T, torch.eye(side, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(matrix[0], torch.full((side,), side**-0.5, dtype=torch.float64))


def test_expansion():
    """(1 − σ_c)·small + σ_c·noise becomes (1 − σ)·large + σ·white noise, where small has large's low frequencies."""
    coarse = start()
    assert coarse.size == (7, 6) and coarse.steps == 6 and coarse.sigma == pytest.approx(0.4)
    assert coarse.sigmas[0] == 1 and coarse.sigmas[-1] == pytest.approx(0.4 / (2 - 0.4))
    torch.manual_seed(0)
    small = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    spectrum = 2 * cosines(7) @ small @ cosines(6).T
    large = cosines(14).T @ F.pad(spectrum, (0, 6, 0, 7)) @ cosines(12)
    assert torch.allclose(large.mean((2, 3)), small.mean((2, 3)))  # as bright
    assert torch.allclose(shrink(large, (7, 6)), small)
    zero = torch.zeros_like(large)
    out = coarse.expand((1 - coarse.sigmas[-1]) * small, zero)
    assert torch.allclose(out, (1 - coarse.sigma) * large)
    noise, fresh = torch.randn(4000, 1, 7, 6, dtype=torch.float64), torch.randn(4000, 1, 14, 12, dtype=torch.float64)
    out = coarse.expand(coarse.sigmas[-1] * noise, fresh).flatten(1)
    covariance = out.T @ out / len(out)
    assert float((covariance - 0.16 * torch.eye(168)).abs().max()) < 0.02
    assert float(covariance.diag().mean()) == pytest.approx(0.16, rel=0.01)


def test_plans():
    scheduler = make_scheduler("auto", "flow", 10)[0]
    assert start(above=999.9).steps == 1 and start(above=1.0).steps == 9  # the last step is on the full grid
    assert CoarseStart.plan(0.5, 400, (14, 14), 2, scheduler).size == (8, 8)
    assert CoarseStart.plan(0.99, 400, (14, 14), 1, scheduler) is None
    shifted = make_scheduler("auto", "flow", 10, shift=3.0)[0]
    plan = CoarseStart.plan(0.5, 400, (8, 8), 1, shifted)
    times = plan.scheduler().timesteps[: plan.steps]
    assert torch.allclose(times, plan.timesteps, rtol=1e-5) and plan.sigma == float(shifted.sigmas[plan.steps])
    assert isinstance(shifted, FlowMatchEulerDiscreteScheduler)


def test_sizes_times_and_costs(digits):
    """Coarse forwards at shifted times, full ones as ever; FLOPs are those of each step's grid."""
    seen = []
    hook = digits.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[2:], float(inputs[1][0]))))
    try:
        trace = sample(digits, [3], **OPTIONS, policy="grid=0.5:500").trace
    finally:
        hook.remove()
    nominal = [1000 * (6 - i) / 6 for i in range(6)]
    want = [t / (2 - t / 1000) if t > 500.001 else t for t in nominal]
    assert [size for size, _ in seen] == [(7, 7)] * 3 + [(14, 14)] * 3
    assert [t for _, t in seen] == pytest.approx(want, rel=1e-5) and trace.timesteps.tolist() == [t for _, t in seen]
    tokens = float(trace.tokens[0, 0]), float(trace.uncond_tokens[0, 0])
    coarse = type(digits.config)(**{**digits.config.to_dict(), "input_size": (7, 7)})
    flops = sum(dcdit_flops(coarse, m)["total"] for m in tokens)
    assert float(trace.gflops(digits.config)[0]) == pytest.approx(flops)
    assert trace.decided["rows"][:, 0].tolist() == [7] * 3 + [14] * 3 and "rows" in trace.table()


@pytest.mark.parametrize(
    "policy", ["grid=0.5:500 & budget=40", "grid=0.6:500 & reuse=2 & teacache=0.2", "grid=0.5:300"]
)
def test_with_other_parts(digits, policy):
    """A picture does not depend on its batch; tokens of a budget are an equal share of a coarse grid."""
    whole = sample(digits, [0, 1, 3], **OPTIONS, policy=policy)
    alone = sample(digits, [3], indices=[2], **OPTIONS, policy=policy)
    assert torch.allclose(alone.latents, whole.latents[2:], atol=1e-4) and whole.latents.shape == (3, 4, 14, 14)
    if "budget" in policy:
        assert whole.trace.tokens[:, 0].tolist() == [10] * 3 + [40] * 3
    other = sample(digits, [0, 1, 3], **OPTIONS).latents
    assert 0.01 < float((other - whole.latents).square().mean().sqrt()) < 1.0


def test_bad_input(digits):
    for text in ("grid=1:500", "grid=0.5:1000", "grid=0:500"):
        with pytest.raises(ConfigError, match=r"grid must be a share in \(0, 1\) and a timestep in \(0, 1000\)"):
            Policy.of(text)
    plain = PlainDiT(DyDiTConfig(input_size=(8, 8), num_classes=4, learn_sigma=False, depth=1)).eval()
    for model, arguments, words in (
        (plain, {}, "grid is of a DC-DiT, which takes any size, and of whole pictures, got a PlainDiT"),
        (digits, {"scheduler": "flow-heun"}, "grid is of the scheduler flow-euler, got FlowMatchHeunDiscrete"),
        (digits, {"gflops_per_image": 5.0}, "gflops_per_image and a policy's grid exclude each other"),
    ):
        with pytest.raises(ConfigError, match=words):
            sample(model, [0], **OPTIONS | arguments, policy="grid=0.5:500")
    with pytest.raises(ConfigError, match=r"grid is of dcdit\.sampling\.sample, a pipeline has one size"):
        DCDiTTransformer2DModel.from_dcdit(digits).set_policy("grid=0.5:500", [900.0])
