"""Policies of sampling: off they change no bit; on, each step has the cost that was asked for, sample by sample."""

import dataclasses

import pytest
import torch

from dcdit.errors import ConfigError
from dcdit.model import DCDiT, Density, DyDiT, DyDiTConfig, PlainDiT, SparseDiT, SparseDiTConfig, preset
from dcdit.model.rival_macs import dydit_macs, sparse_dit_macs
from dcdit.sampling import Policy, sample
from dcdit.sampling.paced import RoutingReuse, TeaCache

SIZES = {"hidden_size": 32, "num_heads": 2, "num_classes": 4, "input_size": (12, 8), "learn_sigma": False}
OPTIONS = {"objective": "flow", "steps": 6, "guidance": 2.0, "batch_size": 2}
CLASSES = [0, 1, 3]


def dense(kind):
    torch.manual_seed(2)
    if kind is SparseDiT:
        net = SparseDiT(SparseDiTConfig(**SIZES, pooling=1, groups=1, sparse=1, top=1, sparse_size=(3, 2)))
    else:
        net = kind(DyDiTConfig(**SIZES, depth=2))
    for name, parameter in net.named_parameters():
        if "routers" not in name:
            torch.nn.init.normal_(parameter, std=0.08)
    return net.eval()


@pytest.fixture(scope="module")
def digits():
    return DCDiT.from_pretrained("digits")


@pytest.mark.parametrize("kind", [PlainDiT, SparseDiT, DyDiT])
def test_grid_models_are_sampled(kind):
    """Whatever the batch, and at TeaCache's threshold 0 to the bit."""
    net = dense(kind)
    whole = sample(net, CLASSES, **OPTIONS)
    assert torch.equal(sample(net, CLASSES, **OPTIONS, policy="teacache=0").latents, whole.latents)
    alone = sample(net, CLASSES[2:], indices=[2], **OPTIONS)
    assert torch.allclose(alone.latents, whole.latents[2:], atol=1e-5)
    tokens = {PlainDiT: 24, SparseDiT: 6, DyDiT: 24}[kind]
    assert (whole.trace.tokens == tokens).all() and (whole.trace.uncond_tokens == tokens).all()
    macs = sparse_dit_macs(net.config) if kind is SparseDiT else dydit_macs(net.config)
    assert torch.allclose(whole.trace.gflops(net.config), torch.tensor(4e-9 * macs, dtype=torch.float64))


def test_a_dit_of_a_dcdits_sizes():
    """As `load_dit` makes it; and a subclass with its own routing, called as it is."""
    from bench.quality.rivals import PlainRival

    config = preset("digits")
    for kind in (PlainDiT, PlainRival):
        trace = sample(kind(config).eval(), CLASSES, **OPTIONS).trace
        assert (trace.tokens == 49).all()


def test_density_over_the_steps():
    net, density = dense(SparseDiT), Density(0.1, 0.9)
    trace = sample(net, CLASSES, **OPTIONS, policy=Policy(density=density)).trace
    want = [density.size(t, net.grid) for t in trace.timesteps.tolist()]
    assert trace.tokens[:, 0].tolist() == [h * w for h, w in want] and len(set(want)) > 2
    full = sample(net, CLASSES, **OPTIONS, policy="density=0:0").latents
    assert not torch.allclose(full, sample(net, CLASSES, **OPTIONS).latents, atol=1e-3)


@pytest.mark.parametrize("policy", ["teacache=0.3", "reuse=2", "reuse=2 & teacache=0.3"])
def test_each_sample_decides_alone(digits, policy):
    """A picture and its cost do not depend on the batch, the guidance's interval changing the batch on the way."""
    options = OPTIONS | {"steps": 8, "drop_fraction": 0.2, "guidance_interval": (0, 700), "policy": policy}
    whole = sample(digits, CLASSES, **options | {"batch_size": 3})
    for index in range(3):
        alone = sample(digits, [CLASSES[index]], indices=[index], **options)
        assert torch.allclose(alone.latents, whole.latents[index : index + 1], atol=1e-4)
        assert torch.equal(alone.trace.tokens[:, 0], whole.trace.tokens[:, index])


def test_off_is_the_untouched_model(digits):
    plain = sample(digits, CLASSES, **OPTIONS).latents
    for policy in ("reuse=1", "teacache=0", "reuse=1 & teacache=0", Policy()):
        assert torch.equal(sample(digits, CLASSES, **OPTIONS, policy=policy).latents, plain)


def test_reuse_asks_the_router_at_every_second_step(digits):
    calls = []
    hook = digits.router.register_forward_hook(lambda *_: calls.append(1))
    options = OPTIONS | {"guidance": 1.0, "batch_size": 3}
    try:
        sample(digits, CLASSES, **options | {"steps": 7}, policy="reuse=2")
    finally:
        hook.remove()
    assert len(calls) == 4
    pair = (sample(digits, CLASSES, **options | {"steps": 12}, policy=policy).latents for policy in (None, "reuse=2"))
    one, two = pair
    assert 0 < float((one - two).square().mean().sqrt()) < 0.1  # of pictures of rms 0.96


@torch.no_grad()
def test_reuse_keeps_the_regular_cells():
    """Cells that the configuration keeps whatever the router says are in a reused plan too."""
    torch.manual_seed(3)
    net = DCDiT(dataclasses.replace(preset("digits"), keep_grid=4)).eval()
    reuse = RoutingReuse(net, 2)
    reuse.begin(torch.tensor([900.0, 500.0]))
    x, y = torch.randn(2, 4, 14, 14), torch.tensor([0, 1])
    masks = [reuse(x, torch.full((2,), t), y)[1].boundary_mask for t in (900.0, 500.0)]
    assert torch.equal(*masks) and masks[0].sum() > 4


def test_other_sizes(digits):
    """A DC-DiT's policies serve any size of picture; a DiT says which one it has."""
    options = OPTIONS | {"size": (6, 10), "batch_size": 3}
    plain = sample(digits, CLASSES, **options).latents
    assert plain.shape[2:] == (6, 10)
    for policy in ("reuse=2", "teacache=0.5", "reuse=2 & teacache=0.5"):
        other = sample(digits, CLASSES, **options, policy=policy).latents
        assert 0 < float((other - plain).square().mean().sqrt()) < 0.3
    with pytest.raises(ConfigError, match=r"size must be \(12, 8\), that of the SparseDiT, got \(6, 10\)"):
        sample(dense(SparseDiT), CLASSES, **options)


def test_teacache_skips(digits):
    """First and last step are computed, and of the others fewer at a higher threshold."""
    runs = [
        sample(digits, CLASSES, **OPTIONS | {"steps": 12}, policy=f"teacache={th}").trace for th in (0, 0.1, 0.3, 1e9)
    ]
    computed = [(trace.tokens > 0).sum(0) for trace in runs]
    assert (computed[0] == 12).all() and (computed[3] == 2).all()
    assert (computed[0] >= computed[1]).all() and (computed[1] > computed[2]).all() and (computed[2] > 2).all()
    assert (runs[3].tokens[[0, -1]] > 0).all()
    assert runs[2].gflops(digits.config).sum() < runs[0].gflops(digits.config).sum()


def test_accumulated_change():
    """By hand: the changes 0.1, 0.2, 0.3 add up to the threshold 0.55 at the fourth call."""

    class Model(torch.nn.Module):
        config, calls = None, 0

        def condition(self, t, y):
            return t[:, None], None

        def forward(self, x, t, y, rho, return_routing):
            from dcdit.model import Routing

            self.calls += 1
            return x * 0 + self.calls, Routing.of(torch.ones(len(x), 4), (2, 2))

    cache = TeaCache(Model(), 0.55)
    cache.begin(torch.tensor([1.0, 1.1, 1.32, 1.716, 1.8, 1.8, 0.5]))
    x, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)
    answers = []
    for t in (1.0, 1.1, 1.32, 1.716, 1.8, 0.5):
        out, _ = cache(x, torch.full((2,), t), y)
        answers.append((float(out[0, 0, 0, 0]), float(cache.spent[0])))
    assert answers == [(1, 4), (1, 0), (1, 0), (2, 4), (2, 0), (3, 4)]


def test_text_and_composition():
    policy = Policy.of("reuse=2; density = 0.5:0.75 & teacache=0.15")
    assert policy == Policy(density=Density(0.5, 0.75), reuse=2, teacache=0.15)
    assert str(policy) == "density=0.5:0.75 & reuse=2 & teacache=0.15" and Policy.of(str(policy)) == policy
    assert Policy(reuse=2) & Policy(teacache=0.1) == Policy(reuse=2, teacache=0.1)
    assert Policy.of(None) == Policy.of("") == Policy()


def test_bad_input(digits):
    for text, words in (
        ("budgets=3", "unknown policy key 'budgets'"),
        ("reuse=two", "policy reuse must look like reuse=2, got 'reuse=two'"),
        ("reuse=2 & reuse=3", "has reuse once"),
        ("density=0.9:0.1", "0 <= least <= most < 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            Policy.of(text)
    for net, text, words in (
        (digits, "density=0.5", "density is of a SparseDiT, this model is a DCDiT"),
        (digits, "reuse=0", "reuse must be an integer of 1 or more, got 0"),
        (digits, "teacache=-1", "teacache must be a number of at least 0"),
        (dense(DyDiT), "reuse=2", "reuse is of a model with a router, this one is a DyDiT"),
        (dense(PlainDiT), "rho=0.2", "rho is of a model with a router, this one is a PlainDiT"),
    ):
        with pytest.raises(ConfigError, match=words):
            sample(net, [0], **OPTIONS, policy=text)
    with pytest.raises(ConfigError, match="drop_fraction is of a model with a router, this one is a PlainDiT"):
        sample(dense(PlainDiT), [0], **OPTIONS, drop_fraction=0.5)
    assert RoutingReuse(digits, 2).every == 2
