"""Untrained routers and a budget for each pass of guidance in diffusers' transformers."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")
from transformer_families import FAMILIES, close, every_family, make, run

from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking, load_dynamic_chunking, remove_dynamic_chunking


def by_cell(x):
    """Wan's (B, C, F, 2·H, 2·W) or LTX's (B, F·H·W, C) as (B, F, H, W, …), a view."""
    if x.dim() == 3:
        return x.unflatten(1, (3, 2, 4))
    return x.unflatten(4, (4, 2)).unflatten(3, (2, 2)).permute(0, 2, 3, 5, 1, 4, 6)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_still_scene_keeps_fewer_tokens_in_later_frames(name):
    """Wan and LTX refill cells from other frames: what stands still is kept once, and later frames are as the first."""
    family = FAMILIES[name]
    model, inputs = make(family), family.inputs((6, 4))
    cells = by_cell(inputs["hidden_states"])
    cells[:, 1:] = cells[:, :1]
    chunking = add_dynamic_chunking(model, router="motion")
    out = by_cell(run(model, inputs))
    kept = chunking.routing.boundary_mask.view(2, 3, 8)
    assert chunking.routing.plan.grid == (3, 2, 4) and kept.sum(2).tolist() == [[8, 0, 0]] * 2
    close(out[:, 1:], out[:, :1].expand_as(out[:, 1:]), 1e-6)
    cells[1, 1, 1, 1] += 3  # one cell, for one frame
    run(model, inputs)
    kept = chunking.routing.boundary_mask.view(2, 3, 8)
    assert kept.sum(2).tolist() == [[8, 0, 0], [8, 1, 1]] and kept[1, 1:, 5].all()
    cells += 0.05 * torch.randn_like(cells)  # noise moves everything a little: the first frame still comes first
    chunking.drop_fraction = 0.5
    run(model, inputs)
    kept = chunking.routing.boundary_mask.view(2, 3, 8)
    assert kept[:, 0].all() and kept[:, 1:].sum((1, 2)).tolist() == [4, 4] and kept[1, 1:, 5].all()


@every_family
def test_each_family_shows_its_predictions(family):
    """Tokens, pictures, videos and lists of them: in the third step the most changed cell comes first."""
    model, inputs = make(family), family.inputs((4, 6))
    chunking = add_dynamic_chunking(model, router="difference")
    seen = []
    for time in (0.9, 0.6, 0.3):
        inputs["t" if "t" in inputs else "timestep"] = torch.full((2,), time)
        seen.append(run(model, inputs))
    change = (seen[1] - seen[0]).square()
    if change.dim() == 3:
        change = change.mean(2)
    else:  # (B, C, …, 2·H, 2·W), frames or not
        change = change.mean(1).unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-1, -3)).flatten(1)
    want = 0.5 + 0.5 * change.sqrt() / change.sqrt().amax(1, keepdim=True)
    torch.testing.assert_close(chunking.routing.boundary_prob, want, rtol=0, atol=1e-5)


def test_difference_over_the_steps_of_a_model():
    """The third step looks where the first two differed; a copy begins anew; removed it watches no more."""
    family = FAMILIES["flux"]
    model, inputs = make(family), family.inputs()
    chunking = add_dynamic_chunking(model, router="difference")
    chunking.drop_fraction = 0.5
    seen = []
    for time in (0.9, 0.6, 0.3):
        inputs["timestep"] = torch.full((2,), time)
        seen.append(run(model, inputs))
    change = (seen[1] - seen[0]).square().mean(2)
    kept = chunking.routing.boundary_mask
    assert kept.sum(1).tolist() == [18, 18]  # of 35, the larger half
    for row, mask in zip(change, kept, strict=True):
        assert row[mask].min() >= row[~mask].max()
    other = copy.deepcopy(model)
    run(other, inputs)
    both = chunking.router, other.transformer_blocks.router
    assert [len(router.history[None]) for router in both] == [2, 1]
    remove_dynamic_chunking(model)
    run(model, inputs)
    assert torch.equal(chunking.router.history[None][1][1], seen[2])


@pytest.mark.parametrize("name", ["flux", "qwen-image", "wan"])
def test_a_budget_for_the_unconditional_pass(name):
    """Pipelines that run the passes one after the other; each pass has its tokens and its history."""
    family = FAMILIES[name]
    model = make(family)
    pipe, prompts = family.pipeline(model), family.prompts()
    if name == "flux":
        prompts |= {f"negative_{key}": torch.randn_like(value) for key, value in prompts.items()}
    guidance = {} if name == "wan" else {"true_cfg_scale": 2.0}
    chunking = add_dynamic_chunking(model, router="difference")
    chunking.drop_fraction, chunking.uncond = 0.25, {"budget_per_sample": 2}
    seen = []
    model.register_forward_hook(lambda *_: seen.append((chunking.passing, int(chunking.routing.plan.lengths[0]))))
    pipe(**{"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"} | prompts | guidance)
    kept = -(-3 * chunking.routing.plan.cells // 4)
    assert seen == [("cond", kept), ("uncond", 2)] * 2
    assert {key: len(value) for key, value in chunking.router.history.items()} == {"cond": 2, "uncond": 2}
    with copy.deepcopy(model).cache_context("uncond"):
        assert chunking.passing is None
    remove_dynamic_chunking(model)
    assert model.cache_context.__func__ is type(model).cache_context


def test_an_untrained_router_is_saved_by_its_name(tmp_path):
    family = FAMILIES["wan"]
    model, inputs = make(family), family.inputs((6, 4))
    add_dynamic_chunking(model, router="motion")
    want = run(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(load_dynamic_chunking(tmp_path), inputs), want)
    with pytest.raises(ConfigError, match=r"one of motion, difference, map, got 'random'"):
        add_dynamic_chunking(make(family), router="random")


class Bright(torch.nn.Module):
    """Keeps the cells whose latents are above zero in the mean, and notes them."""

    def forward(self, h, *, latents):
        self.seen = latents
        return (latents.mean(2) > 0).float()


@every_family
def test_a_router_may_look_at_the_latents(family):
    """Each cell has its patch of the picture, with all channels, whichever form the model takes pictures in."""
    model, inputs = make(family, torch.bfloat16), family.inputs((4, 6), dtype=torch.bfloat16)
    chunking = add_dynamic_chunking(model, router=Bright())
    given = inputs["x" if "x" in inputs else "hidden_states"]
    given = torch.stack(given) if isinstance(given, list) else given
    run(model, inputs)
    seen = chunking.router.seen
    if given.dim() == 3:
        want = given
    else:  # (B, C, …, 2·H, 2·W)
        size = (given[0, 0].numel() // given.shape[-1] // given.shape[-2], given.shape[-2] // 2, given.shape[-1] // 2)
        frames = given.reshape(2, given.shape[1], size[0], *given.shape[-2:])
        cells = [
            frames[:, :, f, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten(1)
            for f, y, x in torch.cartesian_prod(*(torch.arange(n) for n in size)).tolist()
        ]
        want = torch.stack(cells, 1)
    assert seen.dtype == torch.float32 and torch.equal(seen, want.float())
    assert torch.equal(chunking.routing.boundary_mask, want.float().mean(2) > 0)


@pytest.mark.parametrize(("name", "options"), [("sd3", {}), ("z-image", {}), ("ltx", {"height": 32})])
def test_a_batch_of_both_passes_takes_no_budget_of_one(name, options):
    """It was ignored: the unconditional samples kept what the others did."""
    family = FAMILIES[name]
    model = make(family)
    pipe = family.pipeline(model)
    chunking = add_dynamic_chunking(model)
    options = {
        "height": 32,
        "width": 48,
        "num_inference_steps": 1,
        "output_type": "latent",
        **family.prompts(),
        **options,
    }
    chunking.uncond = {"drop_fraction": 0.75}
    with pytest.raises(ConfigError, match=r"both passes share a batch: set drop_fraction .* got uncond \{'drop_fract"):
        pipe(**options)
    chunking.uncond = None
    chunking.drop_fraction = torch.tensor([0.75, 0.25] if name != "z-image" else [0.25, 0.75])
    pipe(**options)
    uncond, cond = chunking.routing.plan.lengths.tolist()[:: -1 if name == "z-image" else 1]
    assert cond == 3 * uncond == 0.75 * chunking.routing.plan.cells
