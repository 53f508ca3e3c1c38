"""What choosing could be worth, and the paper's curves with the digits: against brute force, and known answers."""

import numpy as np
import pytest

from bench.digits import paper
from bench.quality import blocks
from dcdit.model.routing import Routing

SEED = 20  # of five cells with no cell between two


def error_of(picture, owner):
    """The squared error of the means of the parts that `owner` (S, S) numbers."""
    return sum(np.square(picture[owner == i] - picture[owner == i].mean(0)).sum() for i in np.unique(owner))


def test_errors_of_pieces():
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(8, 8, 3))
    rows, columns = np.indices((8, 8))
    assert blocks.regular(picture, 4) == pytest.approx(error_of(picture, rows // 4 * 2 + columns // 4))
    places, lots = np.stack([rows, columns], 2).reshape(-1, 2), np.random.default_rng(SEED).choice(64, 5, replace=False)
    gaps = np.square(places[:, None] - places[lots]).sum(2)
    assert (np.diff(np.sort(gaps, 1)[:, :2]) > 0).all()  # no cell is as near to another: its owner is known
    whole = blocks.nearest(picture, 5, np.random.default_rng(SEED))
    assert whole == pytest.approx(error_of(picture, gaps.argmin(1).reshape(8, 8)))
    assert blocks.nearest(picture, 64, rng) == pytest.approx(0, abs=1e-9)


def test_a_corner_is_worth_choosing():
    """Detail in one corner of 8×8: 19 squares hold it, 16 regular blocks do not."""
    picture = np.zeros((8, 8, 1))
    picture[:4, :4, 0] = np.random.default_rng(0).normal(size=(4, 4))
    assert blocks.split(picture, 4) == pytest.approx(blocks.regular(picture, 4))
    assert blocks.split(picture, 3) == pytest.approx(error_of(picture, np.zeros((8, 8))))
    assert abs(blocks.split(picture, 19)) < 1e-9 < blocks.regular(picture, 16)


def test_shares_at_larger_grids():
    """The same digits at each side, and noise of time t: a model that keeps cells with ink keeps as large a share."""
    images = np.zeros((2, 28, 28), np.uint8)
    images[:, 8:20, 8:20] = 255

    def inked(x, t, y, return_routing):
        return x, Routing.of((x.mean(1).flatten(1) > 0).float(), tuple(x.shape[2:]))

    for side in (14, 28, 56):
        kept = paper.shares(inked, images, np.zeros(2), side)
        assert kept[0] == pytest.approx(36 / 196, abs=0.01), side
        assert kept[-1] > 0.3  # noise has ink everywhere
