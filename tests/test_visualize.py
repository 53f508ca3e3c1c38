"""Chunk maps show the cells that were kept and who refills whom; pictures are written and have the right size."""

import numpy as np
import pytest
import torch
from PIL import Image

from dcdit.codecs import PixelUnshuffle
from dcdit.errors import DataError
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.pictures.images import enlarge, grid, to_uint8
from dcdit.pictures.trajectory import TINT, chunk_map, draw_budgets, draw_chunk_maps, draw_curves, draw_poster, record
from dcdit.sampling.trace import Trace

CONFIG = DCDiTConfig(
    input_size=(6, 5), num_classes=4, hidden_size=32, depth=1, num_heads=1, encoder_width=32, learn_sigma=False
)


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    model = DCDiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return record(model, [0, 1, 2], count=4, objective="flow", steps=9, guidance=2.0)


def test_snapshots_are_spread_and_name_the_nearest_kept_cell(run):
    samples, snapshots = run
    assert [shot.timestep for shot in snapshots] == pytest.approx([1000 * (1 - i / 9) for i in (0, 3, 5, 8)], rel=1e-5)
    place = np.indices((6, 5)).reshape(2, -1).T
    for i, shot in zip((0, 3, 5, 8), snapshots, strict=True):
        assert shot.mask.sum((1, 2)).tolist() == samples.trace.tokens[i].tolist()
        for mask, source in zip(shot.mask.reshape(3, -1), shot.source.reshape(3, -1), strict=True):
            kept = np.flatnonzero(mask)
            away = ((place[:, None] - place[kept]) ** 2).sum(-1)
            assert (kept[away.argmin(1)] == source).all()


def test_chunk_map_tints_kept_cells_and_outlines_the_rest():
    mask = np.zeros((2, 3), dtype=bool)
    mask[0, 0] = mask[1, 2] = True
    source = np.array([[0, 0, 5], [0, 5, 5]])
    picture = chunk_map(np.full((4, 6, 3), 100, dtype=np.uint8), mask, source, side=40)
    assert picture.shape == (40, 60, 3)
    tinted = np.abs(picture - (0.35 * 100 + 0.65 * TINT)).max(2) < 1
    assert (tinted == mask.repeat(20, 0).repeat(20, 1)).all()
    plain = (picture == 75).all(2)
    assert plain[1:20, 21:40].all() and not plain[1:19, 40].any() and not plain[20, 21:39].any()


def test_to_uint8_and_grid():
    levels = to_uint8(torch.tensor([-1.0, 0.0, 1.0, 7.0]).view(4, 1, 1, 1).expand(4, 1, 2, 3))
    assert levels.shape == (4, 2, 3, 3) and levels[:, 0, 0, 0].tolist() == [0, 128, 255, 255]
    sheet = grid(levels, columns=3, gap=1)
    assert sheet.shape == (2 * 3 + 1, 3 * 4 + 1, 3)
    assert (sheet[1:3, 5:8] == 128).all() and (sheet[4:6, 1:4] == 255).all() and (sheet[4:6, 5:8] == 40).all()
    assert enlarge(levels, 5).shape == (4, 4, 6, 3)
    with pytest.raises(DataError, match=r"\(N, 1 or 3, H, W\), got \(1, 2, 4, 4\)"):
        to_uint8(torch.zeros(1, 2, 4, 4))


def test_pictures_are_written(run, tmp_path):
    samples, snapshots = run
    codec = PixelUnshuffle(2)
    images = to_uint8(codec.decode(samples.latents))
    draw_chunk_maps(tmp_path / "maps.png", samples, snapshots, codec)
    draw_poster(tmp_path / "poster.png", samples, snapshots[-1], codec)
    draw_budgets(tmp_path / "budgets.png", {"ρ = 0": images, "ρ = 0.5": images})
    draw_curves(tmp_path / "curves.png", {"one": samples.trace, "two": samples.trace}, CONFIG)
    sizes = {file.stem: Image.open(file).size for file in tmp_path.iterdir()}
    assert sizes["poster"] == (3 * (140 + 6) + 6, 2 * (168 + 6) + 6)
    wide, high = sizes["maps"]
    assert len(sizes) == 4 and wide == pytest.approx(140 * (5 * 1.27 + 0.17), abs=2) and high > wide / 2


def test_gflops_of_a_trace_add_up_both_halves():
    from dcdit.model.flops import dcdit_flops

    tokens, uncond = torch.tensor([[4.0, 8.0], [6.0, 6.0]]), torch.tensor([[2.0, 2.0], [2.0, 4.0]])
    cost = {m: dcdit_flops(CONFIG, m)["total"] for m in (2, 4, 6, 8)}
    both = Trace(torch.zeros(2), torch.zeros(2), tokens, uncond).gflops(CONFIG)
    expected = [(cost[4] + cost[8]) / 2 + cost[2], cost[6] + (cost[2] + cost[4]) / 2]
    assert both.tolist() == pytest.approx(expected)
    one = Trace(torch.zeros(2), torch.zeros(2), tokens, None).gflops(CONFIG)
    assert float(one[1]) == pytest.approx(cost[6])
