"""bench.count against the FLOPs of the configuration, and the launches that a forward may not exceed."""

import pytest

from bench.count import count, main
from dcdit.model.config import DCDiTConfig
from dcdit.model.flops import dcdit_flops

CONFIG = DCDiTConfig(input_size=(8, 8), hidden_size=128, depth=2, num_heads=2, encoder_width=32, num_classes=5)


@pytest.mark.parametrize(("stride", "outside"), [(1, 74), (2, 78)])
def test_counts(stride, outside):
    config = DCDiTConfig(**{**CONFIG.to_dict(), "encoder_stride": stride})
    parts, flops = count(config, 3, 16), dcdit_flops(config, 16)
    main_flops = flops.pop("main")
    assert parts["main"].flops == pytest.approx(3e9 * main_flops)
    # dechunk's M² is the paper's way to count; its kernels are not products.
    rest = flops["total"] - main_flops - flops["dechunk"] + flops["uncounted"]
    assert parts["scaffold"].flops == pytest.approx(3e9 * rest, rel=0.01)
    assert parts["scaffold"].launches <= outside
    # silu, RMSNorm and the last gated residual; per block 9.
    assert parts["main"].launches <= 4 + 9 * 2


def test_bytes_grow_with_the_batch():
    """Features are counted once a sample, weights once."""
    one, two, three = (count(CONFIG, batch, 16)["scaffold"].bytes for batch in (1, 2, 3))
    assert three - two == pytest.approx(two - one, rel=1e-3) and two < 2 * one


def test_table(capsys):
    main(["digits", "--batch", "2", "--stride", "2"])
    assert capsys.readouterr().out.splitlines()[2].startswith("| digits | 2 | ")
