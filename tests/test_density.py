"""The sparse grid over t."""

import pytest

from dcdit.errors import ConfigError
from dcdit.model.density import Density


def test_constant_then_linear():
    density = Density(0.5, 0.75)
    assert [density.left_out(t) for t in (0, 249, 250, 625, 1000)] == [0.5, 0.5, 0.5, 0.625, 0.75]
    assert density.size(0, (16, 16)) == (11, 11) and density.size(1000, (16, 16)) == (8, 8)
    assert density.size(1000, (16, 6)) == (8, 3) and Density(0.99, 0.99).size(0, (4, 4)) == (1, 1)
    assert Density(0, 0).size(500, (7, 9)) == (7, 9)


def test_bad_input():
    for least, most in ((0.5, 0.4), (-0.1, 0.5), (0.5, 1.0)):
        with pytest.raises(ConfigError, match="0 <= least <= most < 1"):
            Density(least, most)
