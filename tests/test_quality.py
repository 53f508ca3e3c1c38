"""The study of quality: rivals train and sample as DC-DiT does, runs resume, and tables come from the result file."""

import json

import numpy as np
import pytest
import torch
from test_idx import IMAGES, LABELS, content

from bench import quality, quality_pictures, quality_tables, quality_where
from bench.rivals import GridRouter, RandomRouter, make_rival
from dcdit.model.config import DCDiTConfig
from dcdit.model.routing import Routing
from dcdit.sampling.sampler import sample

# With a channel to a group nothing in front of a GroupNorm has a gradient: it subtracts what the conditioning adds.
TINY = DCDiTConfig(
    input_size=(6, 8),
    num_classes=3,
    hidden_size=32,
    depth=1,
    num_heads=1,
    encoder_width=32,
    norm_groups=8,
    learn_sigma=False,
)


@pytest.mark.parametrize("kind", ["random", "grid", "plain"])
def test_rivals_keep_as_many_and_learn(kind):
    """1/N of the cells for each sample; an output of zero at first, gradients everywhere once that has moved."""
    net = make_rival(TINY, kind)
    x, t, y = torch.randn(2, 4, 6, 8), torch.tensor([100.0, 900.0]), torch.tensor([0, 3])
    out, routing = net(x, t, y, return_routing=True)
    assert routing.plan.lengths.tolist() == [12, 12] and not out.any()
    torch.nn.init.normal_(net.head.weight if kind == "plain" else net.final.linear.weight)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    net(x, t, y).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert sample(net, [0, 1], objective="flow", steps=2, guidance=2.0).latents.isfinite().all()


def test_boundaries():
    h = torch.randn(3, 48, 32)
    prob = GridRouter(TINY)(h, None).view(3, 6, 8)
    assert prob[:, ::2, ::2].all() and prob.sum() == 3 * 12
    first, second = (RandomRouter(TINY)(h, None) for _ in range(2))
    assert (first.sum(1) == 12).all() and not torch.equal(first, second) and not torch.equal(first[0], first[1])


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 200), ("t10k", 40)):
        (tmp_path / f"{name}{IMAGES}").write_bytes(content(rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)))
        (tmp_path / f"{name}{LABELS}").write_bytes(content((np.arange(count) % 10).astype(np.uint8)))
    return tmp_path


def test_a_run_has_one_line(data, tmp_path, monkeypatch, capsys):
    results, page = tmp_path / "quality.jsonl", tmp_path / "quality.md"
    words = [
        "quality",
        "mended",
        "--steps",
        "2",
        "--samples",
        "10",
        "--data",
        str(data),
        "--runs",
        str(tmp_path / "runs"),
    ]
    monkeypatch.setattr("sys.argv", [*words, "--results", str(results)])
    monkeypatch.setattr(quality, "SAMPLES", {**quality.SAMPLES, "steps": 2})
    monkeypatch.setattr("bench.judge.fit", lambda images, labels, **_: quality.judge.ConvClassifier(10).eval())
    quality.main()
    quality.main()
    (line,) = map(json.loads, results.read_text().splitlines())
    assert line["variant"] == "mended" and line["train_cpu_seconds"] > 0 and len(line["sampling_kept"]) == 2
    assert {"validation_loss", "frechet", "frechet_patches", "recognised", "commit", "machine"} <= set(line)

    page.write_text(f"before\n{quality_tables.BEGIN}\nold\n{quality_tables.END}\nafter\n")
    results.write_text("".join(json.dumps({**line, "seed": seed, "recognised": seed}) + "\n" for seed in (0, 1)))
    monkeypatch.setattr(quality_tables, "RESULTS", results)
    monkeypatch.setattr(quality_tables, "PAGE", page)
    quality_tables.main()
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "50.0% (0.0% to 100.0%)" in text and "| mended |" in text and "| 0, 1 |" in text

    monkeypatch.setattr("sys.argv", ["where", *words[1:4], *words[6:]])
    quality_where.main()
    rows = capsys.readouterr().out.splitlines()[-len(quality_where.TIMES) :]
    assert [row.split()[1] for row in rows] == [str(t) for t in quality_where.TIMES]
    monkeypatch.setattr("sys.argv", ["pictures", *words[1:4], *words[8:]])
    monkeypatch.setattr(quality_pictures, "TARGET", tmp_path / "quality.png")
    quality_pictures.main()
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_where_tokens_and_errors_are():
    """Two pictures of white and black halves, and a model that keeps the white cells and predicts nothing."""
    white = torch.full((2, 1, 12, 16), -1.0)
    white[..., 8:] = 1.0

    def model(x, t, y, return_routing):
        prob = torch.zeros(2, 6, 8)
        prob[..., 4:] = 1.0
        return torch.zeros_like(x), Routing.of(prob.flatten(1), (6, 8))

    for t, loss, front, back, front_loss, back_loss in quality_where.lines(model, white, torch.zeros(2)):
        assert (front, back) == (1.0, 0.0)
        assert loss == pytest.approx((front_loss + back_loss) / 2, abs=1e-5) and 1.5 < loss < 2.5, t
