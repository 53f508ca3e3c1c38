"""The demo's instruments: the classifier, the plain DiT, the count of kept ink, the table, and the command itself."""

import dataclasses
import html
import re
from types import SimpleNamespace as Space

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dcdit.checkpoints.dit import load_dit
from dcdit.checkpoints.folder import save_checkpoint
from dcdit.cli import main
from dcdit.codecs import PixelUnshuffle
from dcdit.commands.demo import PLAIN_DITS
from dcdit.data.sources import load_digits
from dcdit.model.blocks import MainNetwork
from dcdit.model.config import DCDiTConfig, preset
from dcdit.model.dcdit import DCDiT
from dcdit.model.flops import dit_flops
from dcdit.model.plain_dit import PlainDiT
from dcdit.pictures import demo
from dcdit.pictures.classifier import DigitClassifier
from dcdit.sampling.trace import Trace
from dcdit_kernels import plan_chunks

DIGITS = DCDiTConfig(
    input_size=(14, 14), num_classes=10, hidden_size=32, depth=1, num_heads=1, encoder_width=32, learn_sigma=False
)


@pytest.fixture(scope="module")
def classifier():
    return DigitClassifier()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DCDiT(DIGITS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model.eval()


def test_classifier_knows_digits_it_has_not_seen(classifier):
    assert classifier.accuracy >= 0.97
    images, labels, held_out = load_digits()
    assert (classifier(images[held_out][::25]) == labels[held_out][::25]).mean() >= 0.9
    assert held_out.sum() == 500


def test_plain_dit_is_the_backbone_on_all_tokens():
    """Its blocks, with the backbone's weights, equal MainNetwork where every cell is kept."""
    torch.manual_seed(0)
    config = DCDiTConfig(hidden_size=32, depth=2, num_heads=2, encoder_width=32)
    backbone, plain = MainNetwork(32, 2, 2, 4.0), PlainDiT(config)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain.blocks.load_state_dict(backbone.blocks.state_dict())
    backbone, plain = backbone.double(), plain.double()
    h, c = torch.randn(2, 12, 32).double(), torch.randn(2, 32).double()
    plan = plan_chunks(torch.full((2, 12), 0.9), (3, 4))
    expected = backbone(h.reshape(24, 32), c, plan).view(2, 12, 32)
    out = h
    for block in plain.blocks:
        out = block(out, c)
    torch.testing.assert_close(backbone.norm(out), expected)


@pytest.mark.parametrize("patch, tokens", [(2, 49), (1, 196)])
def test_plain_dit_costs_what_is_said(patch, tokens):
    config = preset("digits")
    model, t, y = PlainDiT(config, patch), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no fused CPU attention
        out = model(torch.randn(1, 4, 14, 14), t, y)
    assert out.shape == (1, 4, 14, 14)
    # The counter also sees the embedders; the formula counts 2×2 patches at the ends.
    assert dit_flops(config, tokens) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.03)
    assert demo.plain_dit_cost(model, 20) == (6, tokens, pytest.approx(20 * dit_flops(config, tokens)))


def test_seconds_are_medians_of_turns():
    """Two draws of 4 and 2 images: the first one's turns take 8, 80 and 4 seconds, the second one's half of it."""
    order, taken = [], iter([8.0, 4.0, 80.0, 40.0, 4.0, 2.0])

    def draw(name, images, steps):
        order.append((name, steps))
        return Space(latents=torch.zeros(images, 1), trace=Space(seconds=torch.full((steps,), next(taken) / steps)))

    draws = [lambda steps: draw("a", 4, steps), lambda steps: draw("b", 2, steps)]
    assert demo.seconds_in_turns(draws, 50) == pytest.approx([10.0, 10.0])  # 8 s of 4 images, 10 of 50 steps
    assert order == [("a", 10), ("b", 10)] * 3


def test_a_budget_counts_ink_shares_and_hits(model, monkeypatch):
    """Masks chosen here: late in sampling all the ink is kept and a quarter of the blank cells."""
    latents = torch.full((4, 4, 14, 14), -1.0)
    latents[:, 2, :, :10] = 1.0
    late = torch.zeros(2, 14, 14, dtype=torch.bool)
    late[:, :, :11] = True

    def fake_sample(model, classes, drop_fraction, callback, steps):
        for first in (0, 2):
            for number in range(steps):
                routing = Space(boundary_mask=(late if number >= 8 else ~late).flatten(1))
                callback(Space(number=number, steps=steps, indices=torch.arange(first, first + 2), routing=routing))
        trace = Trace(torch.zeros(steps), torch.full((steps,), 0.4), torch.full((steps, 4), 49.0), None)
        return Space(latents=latents, trace=trace)

    monkeypatch.setattr(demo, "sample", fake_sample)
    classes = np.array([1, 2, 3, 4])
    codec = PixelUnshuffle(2)
    budget = demo.run_budget(model, codec, lambda images: np.array([1, 2, 3, 0]), 0.2, classes, steps=10)
    assert (budget.ink, budget.blank, budget.share, budget.recognised) == (1.0, 0.25, 0.25, 3)
    assert budget.images.shape == (4, 28, 28, 3)
    text = demo.table([budget], [(6, 49, 8.25, "2 of 4"), (10, 196, 33.0, "–")], [1.0, 0.5, 2.0], 196)
    assert (
        "49.0 (25.0%)" in text
        and [line.split()[-4] for line in text.splitlines()[1:3]] == ["1.000", "0.500"]
        and "3 of 4" in text
        and "2 of 4" in text
        and "plain DiT, 10 blocks" in text
        and "196 (100.0%)" in text
    )


@pytest.mark.parametrize("depth", PLAIN_DITS)
def test_the_shipped_plain_dits_draw_digits(depth):
    model, codec = load_dit(PLAIN_DITS[depth], dataclasses.replace(preset("digits"), depth=depth)), PixelUnshuffle(2)
    classes, options = np.arange(20) % 10, {"objective": "flow", "seed": 0, "batch_size": 20}
    row, images = demo.run_plain_dit(model, codec, DigitClassifier(), classes, 1.0, 8, **options)
    assert row[:3] == (depth, 49, pytest.approx(8 * dit_flops(model.config, 49))) and images.shape == (20, 28, 28, 3)
    assert int(row[3].split()[0]) >= 16, row


def test_demo_command(model, tmp_path, capsys):
    extra = {"objective": "flow", "codec": {"kind": "pixel_unshuffle", "factor": 2}}
    save_checkpoint(tmp_path / "model", model, extra)
    out = tmp_path / "out"
    words = ["demo", "--checkpoint", str(tmp_path / "model"), "--samples", "10", "--steps", "3", "--cpu"]
    assert main([*words, "--drop-fractions", "0", "0.5", "--output", str(out)]) == 0
    names = {file.name for file in out.iterdir()}
    pictures = {"digits.png", "trajectory.png", "maps.png", "budgets.png", "curves.png", "digits.gif"}
    assert names == {*pictures, "table.txt", "index.html"}
    page = (out / "index.html").read_text(encoding="utf-8")
    assert re.search(r"are \d+% of this model&#x27;s FLOPs at 1/N, and 10% of DC-DiT-XL&#x27;s", page)
    assert set(re.findall(r'<img src="([^"]+)"', page)) == pictures
    assert html.escape((out / "table.txt").read_text(encoding="utf-8").strip()) in page
    with Image.open(out / "digits.gif") as animation:
        assert animation.n_frames == 3 + 1  # a frame a step, and the images
    printed = capsys.readouterr().out
    assert (out / "table.txt").read_text().strip() in printed
    assert "nan%" not in printed and "0.0% of the blank ones.\n" in printed  # none, so no ratio to it
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize(
    "words, mention",
    [
        ("--steps 0", "steps must be in [1, 1000], got 0"),
        ("--drop-fractions 0 1", "drop fractions must be in [0, 1), got 1"),
        ("--batch-size 0", "a batch size of at least 1, got 200, 0"),
    ],
)
def test_demo_refuses_before_it_fits_a_classifier(tmp_path, capsys, words, mention):
    assert main(["demo", "--cpu", "--output", str(tmp_path / "out"), *words.split()]) == 2
    printed = capsys.readouterr()
    assert mention in printed.err and not printed.out


def test_demo_wants_digits(tmp_path, capsys):
    torch.manual_seed(0)
    save_checkpoint(
        tmp_path / "model",
        DCDiT(DCDiTConfig(**{**DIGITS.to_dict(), "input_size": (6, 6)})),
        {"objective": "flow", "codec": {"kind": "pixel_unshuffle", "factor": 2}},
    )
    assert main(["demo", "--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "out")]) == 2
    assert "28×28 digits" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["--guidance", "nan"], ["--seed", "-1"], ["--steps", "0"], ["--drop-fractions", "1"]]
)
def test_options_are_checked_before_the_work(words, tmp_path, capsys):
    assert main(["demo", *words, "--cpu", "--output", str(tmp_path / "out")]) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and f"got {float(words[1]):g}" in seen.err
