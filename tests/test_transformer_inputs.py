"""What chunked transformers are told beside their tokens: grids, positions, budgets of a pass; bad ones are named."""

import pytest
import torch

pytest.importorskip("diffusers")
from transformer_families import FAMILIES, make, run

from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking

SHAPES = "need one picture a sample, of one shape .frames, height, width., in img_shapes"
SIDES = "need num_frames, height and width, positive integers; got"


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("flux", {"img_ids": None}, r"the grid from img_ids \(tokens, 3\), got a NoneType"),
        ("flux", {"img_ids": torch.zeros(35, 2)}, r"the grid from img_ids \(tokens, 3\), got shape \(35, 2\)"),
        ("flux", {"img_ids": torch.zeros(0, 3)}, r"the grid from img_ids \(tokens, 3\), got shape \(0, 3\)"),
        ("flux", {"img_ids": torch.full((35, 3), torch.nan)}, "img_ids must be one grid of tokens, got 35 for 0×0"),
        ("sd3", {"hidden_states": torch.zeros(2, 8, 8)}, r"latents \(B, C, height, width\), got \(2, 8, 8\)"),
        ("wan", {"hidden_states": torch.zeros(2, 4, 6, 8)}, r"latents \(B, C, frames, height, width\), got \(2, 4, 6"),
        ("z-image", {"x": []}, "take a list of latents, got list of 0"),
        ("qwen-image", {"img_shapes": [[1, 5, 7]] * 2}, SHAPES),
        ("qwen-image", {"img_shapes": [(5, 7)]}, SHAPES),
        ("qwen-image", {"img_shapes": [[(1, -5, -7)]] * 2}, SHAPES),
        ("qwen-image", {"img_shapes": torch.tensor([[1, 5, 7]])}, SHAPES),
        ("ltx", {"num_frames": 5.0}, SIDES),
        ("ltx", {"height": -1, "width": -7}, SIDES),
        ("ltx", {"video_coords": torch.zeros(2, 35, 3)}, r"video_coords must be \(2, 3, 35\), .* got \(2, 35, 3\)"),
    ],
)
def test_grids(family, change, words):
    family = FAMILIES[family]
    model = make(family)
    add_dynamic_chunking(model)
    with pytest.raises(ConfigError, match=words):
        run(model, {**family.inputs(), **change})


def test_positions_that_change_in_place_are_read_again():
    """A known tensor is not looked at again, unless it was written to."""
    family = FAMILIES["flux"]
    model, inputs = make(family), family.inputs((5, 7))
    chunking = add_dynamic_chunking(model)
    run(model, inputs)
    assert chunking.grid == (5, 7)
    inputs["img_ids"].copy_(family.inputs((7, 5))["img_ids"])
    run(model, inputs)
    assert chunking.grid == (7, 5)
    with torch.inference_mode():  # such tensors do not count their changes
        run(model, family.inputs((5, 7)))
    assert chunking.grid == (5, 7)


@pytest.mark.parametrize(
    ("uncond", "words"),
    [
        ({"dropfraction": 0.9}, "unknown uncond key 'dropfraction'; did you mean 'drop_fraction'"),
        (0.9, "uncond must be a dict such as {'drop_fraction': 0.9}, got 0.9"),
    ],
)
def test_the_budget_of_the_unconditional_pass(uncond, words):
    family = FAMILIES["flux"]
    model = make(family)
    chunking = add_dynamic_chunking(model)
    chunking.uncond = uncond
    for name in ("cond", "uncond"):
        with model.cache_context(name), pytest.raises(ConfigError, match=words):
            run(model, family.inputs())
    with pytest.raises(ConfigError, match=words):
        run(model, family.inputs())


def test_a_call_without_latents_is_the_forwards_to_refuse():
    model = make(FAMILIES["flux"])
    add_dynamic_chunking(model)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'hidden_states'"):
        model(img_ids=torch.zeros(35, 3))


def test_a_model_that_is_none_of_the_known_is_named_before_its_options():
    with pytest.raises(ConfigError, match=r"model must be one of Flux.* got Linear, which has none"):
        add_dynamic_chunking(torch.nn.Linear(2, 2), grid=(4, 4))
