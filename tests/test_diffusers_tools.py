"""Tools of diffusers, peft, accelerate and PyTorch, applied to DC-DiT."""

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import nn
from transformer_families import cache

from dcdit import DCDiT, DCDiTConfig
from dcdit.errors import ConfigError
from dcdit.integrations.pipeline import DCDiTPipeline
from dcdit.integrations.transformer import DCDiTTransformer2DModel

DEPTH = 3


def transformer(router="predictability"):
    torch.manual_seed(0)
    sizes = {"num_classes": 10, "hidden_size": 64, "depth": DEPTH, "num_heads": 2, "encoder_width": 32}
    model = DCDiT(DCDiTConfig(input_size=6, learn_sigma=False, router=router, **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    return DCDiTTransformer2DModel.from_dcdit(model.eval())


def batch(size=3):
    torch.manual_seed(1)
    return torch.randn(size, 4, 6, 6), 1000 * torch.rand(size), torch.arange(size)


def predict(model, drop_fraction=0.3):
    with torch.no_grad():
        return model(*batch(), drop_fraction).sample


def test_gradient_checkpointing():
    model, gradients = transformer().train(), []
    for _ in range(2):
        out = model(*batch(), 0.3).sample
        gradients.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
        model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing and model.model.main.gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_compiled_blocks():
    torch._dynamo.reset()
    model = transformer()
    want = [predict(model, rho) for rho in (0.3, 0.0, 0.8)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.compile_repeated_blocks(backend=backend, fullgraph=True, dynamic=True)
    for rho, out in zip((0.3, 0.0, 0.8), want, strict=True):
        torch.testing.assert_close(predict(model, rho), out, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2  # the first block has nothing pending; all others share a graph, whatever is retained


def test_lora_is_trained_saved_and_loaded(tmp_path):
    model = transformer()
    model.requires_grad_(False)
    before = predict(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["qkv", "fc1", "fc2", "blocks.0.proj"]))
    assert torch.equal(predict(model), before)  # a fresh adapter adds nothing
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * (3 * DEPTH + 1)
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(8):
        loss = model(*batch(), 0.3).sample.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained) and losses[-1] < 0.9 * losses[0]
    model.save_lora_adapter(tmp_path)
    again = transformer()
    again.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(predict(again), predict(model)) and not torch.allclose(predict(again), before)
    again.disable_lora()
    assert torch.equal(predict(again), before)


@pytest.mark.parametrize("router", ["predictability", "cosine"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_accelerate_offloads_every_weight(offload, router, tmp_path):
    model = transformer(router)
    want = predict(model)
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(predict(model), want)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(kind):
    model = transformer()
    want = predict(model)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), offload_type=kind, **blocks)
    assert torch.equal(predict(model), want)


def test_layerwise_casting():
    """Weights of linears and convolutions stored in float8; router, residual path and norms as they were."""
    model = transformer()
    rounded = copy.deepcopy(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert "model.main.blocks.0.qkv.weight" in stored and "model.stem.weight" in stored
    assert not any("router" in name or "norm" in name or "residual" in name for name in stored)
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            if name in stored:
                p.copy_(p.to(torch.float8_e4m3fn).float())
    assert torch.equal(predict(model), predict(rounded))


def test_dynamic_quantisation():
    model = transformer().model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces that torchao will take this over
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.main.blocks[0].qkv) is not nn.Linear
    x, t, y = batch()
    with torch.no_grad():
        want, routing = model(x, t, y, return_routing=True)
        got = quantised(x, t, y, routing=routing)
    assert 0 < (got - want).square().mean().sqrt() < 0.05 * want.std()


def trajectory(steps=5):
    """x, t, y and ρ of each step; the retained tokens change from one to the next."""
    x, _, y = batch()
    noise = torch.randn_like(x)
    return [(x + 0.1 * i * noise, torch.full((len(x),), 900.0 - 40 * i), y, 0.1 * i) for i in range(steps)]


def spend(model):
    """The number of blocks run in each step, and the outputs."""
    runs, outs = [], []
    count = [block.register_forward_hook(lambda *_: runs.append(len(outs))) for block in model.model.main.blocks]
    with torch.no_grad(), model.cache_context("test"):
        for x, t, y, rho in trajectory():
            outs.append(model(x, t, y, rho).sample)
    for handle in count:
        handle.remove()
    return [runs.count(step) for step in range(len(outs))], outs


def spread(tokens, plan):
    """Packed tokens on the grid (B, 36, D): each cell has the nearest retained cell's, found by its distance."""
    cells = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    distance = (cells[:, None] - cells).square().sum(2)
    out = []
    for rows, mask in zip(tokens.split(plan.lengths.tolist()), plan.boundary_mask, strict=True):
        out.append(rows[distance[:, mask.nonzero().flatten()].argmin(1)])
    return torch.stack(out)


def steps_by_hand(model):
    """Of each step: the hidden states after 0, 1 and all blocks on the grid, and how they become the prediction."""
    net, steps = model.model, []
    for x, t, y, rho in trajectory():
        c, outer = net.condition(t, y)
        h = net.encode(x, outer)
        routing = net.route(h, c, rho)
        tokens = routing.chunk(h, net.pos_embed)
        net.main.record = []
        net.main(tokens, c, routing.plan)
        hidden = [spread(part, routing.plan) for part in (tokens, net.main.record[0], net.main.record[-1])]
        net.main.record = None

        def predict(grid, h=h, routing=routing, outer=outer):
            return net.decode(net.main.norm(grid[routing.boundary_mask]), h, routing, outer)

        steps.append((hidden, predict))
    return steps


def first_block(steps):
    """The last blocks' residual of step 0, added to the first block's output."""
    (_, first, last), _ = steps[0]
    return [predict(hidden[1] + last - first) for hidden, predict in steps]


def taylor(steps):
    """Steps 2 and 4 take the backbone's change along the line through the two computed before."""
    change = [hidden[2] - hidden[0] for hidden, _ in steps]
    change[2] = 2 * change[1] - change[0]
    change[4] = change[3] + (change[3] - change[1]) / 2
    return [predict(hidden[0] + grid) for (hidden, predict), grid in zip(steps, change, strict=True)]


def mag(steps):
    """A skipped step takes the last computed change of the backbone."""
    change = [steps[i][0][2] - steps[i][0][0] for i in (0, 0, 0, 3, 3)]
    return [predict(hidden[0] + grid) for (hidden, predict), grid in zip(steps, change, strict=True)]


TAYLOR = {"cache_interval": 2, "disable_cache_before_step": 2, "max_order": 1, "taylor_factors_dtype": torch.float32}
MAG = {"mag_ratios": torch.ones(5), "num_inference_steps": 5, "threshold": 9.0, "max_skip_steps": 2}


@pytest.mark.parametrize(
    "name, options, expected, by_hand",
    [
        ("FirstBlock", {"threshold": 0.0}, [DEPTH] * 5, lambda steps: [predict(h[2]) for h, predict in steps]),
        ("FirstBlock", {"threshold": 1e6}, [DEPTH, 1, 1, 1, 1], first_block),
        ("TaylorSeer", TAYLOR, [DEPTH, DEPTH, 0, DEPTH, 0], taylor),
        ("Mag", MAG, [DEPTH, 0, 0, DEPTH, 0], mag),
    ],
    ids=["none skipped", "first block", "taylor", "mag"],
)
def test_caches_on_changing_tokens(name, options, expected, by_hand):
    model, config = transformer(), cache(f"{name}CacheConfig", **options)
    all_blocks, want = spend(model)
    assert all_blocks == [DEPTH] * 5
    model.enable_cache(config)
    runs, outs = spend(model)
    assert runs == expected
    model.disable_cache()
    with torch.no_grad():
        for got, out in zip(outs, by_hand(steps_by_hand(model)), strict=True):
            torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(got, out) for got, out in zip(spend(model)[1], want, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_pipeline_with_a_cache(guidance):
    """Each call begins anew, also with another number of images."""
    model = transformer()
    pipe = DCDiTPipeline(model, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images(classes):
        options = {"num_inference_steps": 5, "drop_fraction": [0.5, 0.0], "output_type": "latent"}
        return pipe(classes, guidance, generator=torch.manual_seed(1), **options).images

    want = images([1, 2, 3])
    model.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    first = images([1, 2, 3])
    assert images([4]).isfinite().all()
    assert torch.equal(images([1, 2, 3]), first) and not torch.equal(first, want)
    model.disable_cache()
    assert torch.equal(images([1, 2, 3]), want)


def test_caches_that_it_refuses():
    model = transformer()
    with pytest.raises(ConfigError, match=r"other caches keep tokens.*got FasterCacheConfig"):
        model.enable_cache(FasterCacheConfig())
    del model.model.main.blocks[1:]
    with pytest.raises(ConfigError, match="a cache needs two blocks or more, got 1"):
        model.enable_cache(FirstBlockCacheConfig())


def test_every_field_of_the_configuration_reaches_the_diffusers_model():
    fields = {"input_size": (6, 4), "in_channels": 3, "num_classes": 7, "hidden_size": 96, "depth": 2, "num_heads": 3}
    fields |= {
        "encoder_width": 64,
        "mlp_ratio": 2.0,
        "target_ratio": 8.0,
        "router": "cosine",
        "sigma": 2.0,
        "encoder_stride": 2,
        "norm_groups": 16,
        "segment_mean": True,
        "mean_positions": True,
        "keep_grid": 3,
        "direct_init": True,
        "predict_clean": True,
    }
    config = DCDiTConfig(**fields, learn_sigma=False, cond_norm=True)
    default = DCDiTConfig()
    assert all(value != default.to_dict()[key] for key, value in config.to_dict().items())
    model = DCDiTTransformer2DModel.from_dcdit(DCDiT(config))
    assert DCDiTTransformer2DModel.from_config(model.config).model.config == config
