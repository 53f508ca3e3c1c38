"""Patch scales of FLUX and Wan: scale 1 is the untouched model, a coarse call that of a model with larger patches."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch.nn import functional as F
from transformer_families import Flux, Wan

from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking, remove_dynamic_chunking
from dcdit.integrations.patches import add_patch_scales
from dcdit.sampling.patches import roughness

GRID = (4, 8)


def inputs(family, **options):
    torch.manual_seed(3)
    if family is Flux:
        return Flux().inputs(GRID, **options)
    given = Wan().inputs((4, 8), **options)  # two frames of 2×8 patches
    return {**given, "hidden_states": torch.randn(*given["hidden_states"].shape[:3], 8, 16)}


def model_of(family):
    torch.manual_seed(2)
    model = family().model().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def call(model, given):
    return model(**given, return_dict=False)[0]


@pytest.mark.parametrize("family", [Flux, Wan])
def test_scale_1_is_the_untouched_model(family):
    model, given = model_of(family), inputs(family)
    want = call(model, given)
    patches = add_patch_scales(model, rank=3)
    for parameter in model.parameters():
        if parameter.requires_grad:  # whatever was learned
            torch.nn.init.normal_(parameter)
    assert torch.equal(call(model, given), want)
    for scale in (2, 4):
        with patches.at(scale):
            out = call(model, given)
        assert out.shape == want.shape and out.isfinite().all()
    assert torch.equal(call(model, given), want)


@torch.no_grad()
def test_flux_is_one_of_larger_tokens():
    """A coarse call is a FLUX of 4×4 cells a token, at the positions of the middles."""
    model, given = model_of(Flux), inputs(Flux)
    patches = add_patch_scales(model, (1, 2), rank=3)
    torch.nn.init.normal_(patches.stems["2"].bias)
    with patches.at(2):
        got = call(model, given)
    large = type(model)(**{**model.config, "in_channels": 32, "out_channels": None}).eval()
    state = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    state = {key: value for key, value in state.items() if "patches" not in key}
    state |= {f"x_embedder.{name}": getattr(patches.stems["2"], name).flatten(1 if name == "weight" else 0)
              for name in ("weight", "bias")}  # fmt: skip
    state |= {f"proj_out.{name}": getattr(patches.heads["2"], name) for name in ("weight", "bias")}
    large.load_state_dict(state)
    fold = lambda x, grid, side: F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), side)  # noqa: E731
    tokens = F.pixel_unshuffle(fold(given["hidden_states"], GRID, 2), 4).flatten(2).transpose(1, 2)
    ids = torch.stack([torch.tensor([0, 2 * i + 0.5, 2 * j + 0.5]) for i in range(2) for j in range(4)])
    want = call(large, {**given, "hidden_states": tokens, "img_ids": ids})
    assert torch.allclose(fold(got, GRID, 2), fold(want, (2, 4), 4), atol=1e-5)


@torch.no_grad()
def test_wan_is_one_of_larger_patches():
    """A coarse call is a Wan of patches (1, 4, 4); attention sees distances of positions alone, every second one."""
    model, given = model_of(Wan), inputs(Wan)
    patches = add_patch_scales(model, (1, 2), rank=3)
    with patches.at(2):
        got = call(model, given)
    large = type(model)(**{**model.config, "patch_size": (1, 4, 4)}).eval()
    state = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    state = {key: value for key, value in state.items() if "patches" not in key}
    stem, head = patches.stems["2"], patches.heads["2"]
    state |= {"patch_embedding.weight": stem.weight, "patch_embedding.bias": stem.bias}
    order = torch.arange(64).view(4, 16).T.flatten()  # (channel, cell) → (cell, channel)
    state |= {"proj_out.weight": head.weight[order], "proj_out.bias": head.bias[order]}
    large.load_state_dict(state)
    whole = model.rope.forward(given["hidden_states"])
    thin = [part.unflatten(1, (2, 4, 8))[:, :, ::2, ::2].flatten(1, 3) for part in whole]
    large.rope.forward = lambda _: thin
    assert torch.allclose(got, call(large, given), atol=1e-5)


def test_choice_by_history():
    """Four steps of history, both passes of guidance in one step, the smallest scale of the samples, runs apart."""
    model = model_of(Flux)
    patches = add_patch_scales(model, rank=2)
    given, seen, pictures = inputs(Flux), [], []
    base = given["hidden_states"]
    xs = [base + 0.3 * torch.randn_like(base) for _ in range(6)]
    for x in xs:
        pictures.append(F.pixel_shuffle(x.transpose(1, 2).unflatten(2, GRID), 2))
    rough = [roughness(pictures[: i + 1], patches) for i in range(6)]
    tau = float(rough[4][2].max()) * 1.0001
    patches.threshold = tau
    for _ in range(2):  # two runs are alike
        chosen = []
        for i, x in enumerate(xs):
            for _ in range(2):
                call(model, {**given, "hidden_states": x, "timestep": torch.full((2,), 1 - i / 10)})
            chosen.append(patches.scale)
        seen.append(chosen)
    want = [1, 1, 1]
    for row in rough[3:]:
        fitting = torch.ones(2)
        for scale in (2, 4):
            fitting[row[scale] < tau] = scale
        want.append(int(fitting.min()))
    assert seen == [want, want] and want[4] >= 2


@pytest.mark.parametrize("family", [Flux, Wan])
def test_distillation(family):
    """Only the new parts are trained, and come nearer to the model at scale 1."""
    model, given = model_of(family), inputs(family)
    patches = add_patch_scales(model, (1, 2), rank=4)
    target, losses = call(model, given), []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all("patches" in name for name in names)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(8):
        with patches.at(2):
            loss = (model(**given, return_dict=False)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is not None for parameter in trained)
    assert torch.equal(call(model, given), target)


@pytest.mark.parametrize("family", [Flux, Wan])
def test_in_its_pipeline(family):
    """The first three steps at scale 1, the others as smooth as τ has it."""
    model = model_of(family)
    patches, calls = add_patch_scales(model, (1, 2), rank=2), []
    pipe = family().pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    model.register_forward_hook(lambda *_: calls.append(patches.scale))
    patches.threshold = 1e9
    torch.manual_seed(0)
    options = {"height": 32, "width": 32, "num_inference_steps": 5, "output_type": "latent", "guidance_scale": 3.5}
    out = pipe(**family().prompts(), **options)
    once = len(calls) // 5
    assert calls == [1] * 3 * once + [2] * 2 * once
    assert (out.images if family is Flux else out.frames).isfinite().all()


def test_bad_input():
    with pytest.raises(
        ConfigError, match="patch scales are for FluxTransformer2DModel, WanTransformer3DModel, got Lin"
    ):
        add_patch_scales(torch.nn.Linear(2, 2))
    model, given = model_of(Flux), inputs(Flux)
    with pytest.raises(ConfigError, match=r"scales must be 1 and then 2, 4 or both, got \(1, 3\)"):
        add_patch_scales(model, (1, 3))
    with pytest.raises(ConfigError, match="rank must be an integer of at least 1, got 0"):
        add_patch_scales(model, rank=0)
    with pytest.raises(ConfigError, match=r"router must be a module or one of .*, got 5"):
        add_dynamic_chunking(model, router=5)
    add_dynamic_chunking(model)
    with pytest.raises(ConfigError, match="the model has dynamic chunking, which plans for patches of one size"):
        add_patch_scales(model)
    remove_dynamic_chunking(model)
    patches = add_patch_scales(model, [1, 2, 4], rank=2)
    with pytest.raises(ConfigError, match="model has patch scales"):
        add_dynamic_chunking(model)
    with pytest.raises(ConfigError, match=r"the model has adapters already \(patches\): fuse them first"):
        add_patch_scales(model)
    for threshold in (-1, float("nan"), float("inf"), "0.1"):
        with pytest.raises(ConfigError, match=f"patches must be a threshold of at least 0, got {threshold!r}"):
            patches.threshold = threshold
    with pytest.raises(ConfigError, match=r"scale must be one of 1, 2, 4, got 2\.0"), patches.at(2.0):
        pass
    with pytest.raises(ConfigError, match="scale must be one of 1, 2, 4, got 3"), patches.at(3):
        pass
    with patches.at(4), pytest.raises(ConfigError, match="scale 4 does not divide the grid of 6×8 patches"):
        call(model, Flux().inputs((6, 8)))
    with pytest.raises(ConfigError, match="takes its inputs by keyword"):
        model(given["hidden_states"])
    with pytest.raises(ConfigError, match="img_ids must be those of one picture"):
        call(model, {**given, "img_ids": given["img_ids"][:-1]})
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ConfigError, match="a cache keeps tokens of one patch size"):
        call(model, given)
