"""The comparison of trained rivals: its stand-in for diffusers, its costs, a part from training to pictures, tables."""

import json
import lzma
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

from bench import euler
from bench.digits import parts, show, tables
from bench.digits.rivals import wait_for
from dcdit import DCDiT
from dcdit.checkpoints.dit import to_dit
from dcdit.model import PlainDiT, preset
from dcdit.model.flops import dcdit_flops
from dcdit.model.rival_macs import dydit_macs, dydit_on
from dcdit.sampling import sample, trajectory

SIZES = preset("digits")


def options(folder, **changes):
    values = {"dit": folder / "dit.pt", "out": folder, "data": None, "device": "cpu", "steps": 1, "per_class": 1}
    values |= {
        "sampling_steps": 2,
        "batch": 10,
        "guidance": 2.0,
        "seed": 0,
        "set": ["batch_size=4"],
        "end": time.time() + 900,
        "drawing": 0,
    }
    return Namespace(**(values | changes))


def test_euler_is_that_of_diffusers(monkeypatch):
    torch.manual_seed(0)
    model = PlainDiT(dydit_on(SIZES)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    ask = {"objective": "flow", "steps": 5, "guidance": 1.5}
    want = sample(model, [1, 2], **ask)
    monkeypatch.setattr(trajectory, "make_scheduler", euler.make_euler)
    have = sample(model, [1, 2], **ask)
    assert torch.allclose(have.trace.timesteps, want.trace.timesteps)
    assert torch.allclose(have.latents, want.latents, atol=1e-5) and have.latents.std() > 0.5


@torch.no_grad()
def test_finer():
    """Cells that are alike in each patch have the patch's token, and tokens alike in it predict its mean."""
    torch.manual_seed(0)
    coarse = PlainDiT(dydit_on(SIZES))
    fine = parts.finer(coarse)
    means = torch.randn(2, 4, 7, 7)
    tokens = coarse.stem(means.repeat_interleave(2, 2).repeat_interleave(2, 3))
    blocks = fine.stem(means.repeat_interleave(2, 2).repeat_interleave(2, 3)).unfold(2, 2, 2).unfold(3, 2, 2)
    torch.testing.assert_close(blocks, tokens[..., None, None].expand_as(blocks))
    h = torch.randn(2, 1, SIZES.hidden_size)
    want = coarse.head(h).unflatten(2, (4, 4)).mean(3)
    torch.testing.assert_close(fine.head(h), want)
    assert fine.pos_embed.shape == (196, 96) and torch.equal(fine.blocks[0].qkv.weight, coarse.blocks[0].qkv.weight)


def test_costs():
    """The plain DiT by the formula of its release; a DC-DiT with the parts that the paper leaves out."""
    ask = {"objective": "flow", "steps": 2, "guidance": 2.0}
    model = PlainDiT(dydit_on(SIZES)).eval()
    plain = 2e-9 * dydit_macs(dydit_on(SIZES), routers=False)
    assert parts.gflop(model, sample(model, [1], **ask).trace) == pytest.approx(4 * plain)
    model = DCDiT.from_pretrained("digits")
    trace = sample(model, [1], **ask).trace
    tokens = torch.stack([trace.tokens, trace.uncond_tokens]).flatten().tolist()
    costs = [dcdit_flops(SIZES, number) for number in tokens]
    assert parts.gflop(model, trace) == pytest.approx(sum(c["total"] + c["uncounted"] for c in costs))


def test_a_part(tmp_path, monkeypatch):
    """Trained for the steps that there is time for, drawn by each run, and its weights come back."""
    monkeypatch.setattr(parts, "PROBE", 3)
    torch.save({"ema": to_dit(PlainDiT(dydit_on(SIZES)))}, tmp_path / "dit.pt")
    parts.work("dydit", options(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [(line["policy"], line["steps"]) for line in lines] == [
        (policy, 1 if steps == 25 else 2) for policy, steps in parts.PARTS["dydit"].runs
    ]
    assert all(line["trained"] == line["of"] == 1 and line["kept"] > 0.9 for line in lines)
    drawn = parts.load_pictures(tmp_path / lines[0]["pictures"])
    assert drawn.shape == (10, 28, 28) and drawn.dtype == np.uint8
    back = parts.load("dydit", tmp_path, tmp_path / "dit.pt")
    x, t, y = torch.randn(1, 4, 14, 14), torch.tensor([500.0]), torch.tensor([3])
    assert back(x, t, y).isfinite().all() and all(p.dtype == torch.float32 for p in back.parameters())
    late = options(tmp_path, end=time.time() - 1, steps=1000)  # no time: one step, and nothing is drawn
    parts.work("plain-longer", late)
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == len(lines)


def test_drawn_again_and_judged(tmp_path):
    """Without guidance the shipped model's digits are another set, at half of the cost; both are judged."""
    folder, line = tmp_path, {"part": "dcdit", "policy": "rho=0.5", "steps": 2, "gflop": 1.0, "pictures": "a.npy.xz"}
    with lzma.open(folder / "a.npy.xz", "wb") as packed:
        np.save(packed, np.full((10, 28, 28), 7, np.uint8))
    both = [line, line | {"pictures": "b.npy.xz", "policy": "rho=0.7"}]
    (folder / "b.npy.xz").write_bytes((folder / "a.npy.xz").read_bytes())
    (folder / "lines.jsonl").write_text("".join(json.dumps(each) + "\n" for each in both))
    tables.free(folder, folder / "none.pt", [3, 4], 1)
    first = (folder / "free" / "lines-3.jsonl").read_text().splitlines()[0]
    (folder / "free" / "lines-5.jsonl").write_text(first + "\n")  # cut off: its pictures are left out
    seen = []

    def judge(pictures, labels):
        seen.append((len(pictures), pictures.mean(), labels.tolist()))
        return {"recognised": 0.5}

    found, _ = tables.judged(folder, judge)
    assert found["recognised"] == found["free"]["recognised"] == 0.5 and found["free"]["cpu_seconds"] > 0
    model = DCDiT.from_pretrained("digits")
    trace = sample(model, range(10), objective="flow", steps=2, policy="rho=0.5", seed=3).trace
    assert found["free"]["gflop"] == pytest.approx(parts.gflop(model, trace), rel=0.1)
    assert seen[0] == (10, 7, list(range(10))) and seen[1][0] == 20 and seen[1][2] == 2 * list(range(10))


def test_a_failed_part_runs_again(tmp_path, monkeypatch):
    """Once, without kernels; then it counts as not finished."""
    tries = []

    class Process:
        def __init__(self, returncode):
            self.returncode = returncode

        def poll(self):
            return self.returncode

    def start(name, argv, end, out, **environment):
        tries.append((name, environment))
        return Process(int(name == "bad" or (name == "kernels" and not environment)))

    monkeypatch.setattr("bench.digits.rivals.start", start)
    assert wait_for(["good", "kernels", "bad"], [], time.time() + 60, tmp_path) == ["bad"]
    again = {"DCDIT_BACKEND": "reference"}
    assert sorted(tries, key=str) == sorted(
        [("good", {}), ("kernels", {}), ("kernels", again), ("bad", {}), ("bad", again)], key=str
    )


def test_equal_costs():
    """A curve has the runs of one knob; between two of them the line is straight, beyond its ends there is nothing."""
    line = {"part": "dcdit", "steps": 50, "policy": ""}
    lines = [
        line | {"gflop": 12.0, "recognised": 1.0, "frechet": 1.0},
        line | {"gflop": 6.0, "steps": 25, "recognised": 0.9, "frechet": 9.0},
        line | {"gflop": 8.0, "policy": "rho=0.5", "recognised": 0.8, "frechet": 3.0},
        line | {"gflop": 4.0, "policy": "rho=0.3 & teacache=0.1", "recognised": 0.7, "frechet": 5.0},
    ]
    dropped = show.curve(lines, *show.CURVES["DC-DiT, ρ"])
    assert [entry["gflop"] for entry in dropped] == [8.0, 12.0]
    assert show.at_equal(9.0, dropped) == "85.0%, 2.5" and show.at_equal(7.0, dropped) == "–"
    assert [e["gflop"] for e in show.curve(lines, *show.CURVES["DC-DiT, fewer steps"])] == [6.0, 12.0]
    assert "| 4.00 | 70.0%, 5.0 | – | – | – | – | – | – |" in show.equal_table(lines)
    lines[0]["free"] = {"gflop": 6.0, "cpu_seconds": 0.25, "recognised": 0.875, "frechet": 21.3}
    table = show.main_table(lines).splitlines()
    assert len(table) == 3 + len(lines) and all(row.count("|") == 10 for row in table)
    assert table[3] == "| DC-DiT | – | 50 | 12.00 | 100.0% | 6.00 | 0.250 | 87.5% | 21.3 |"
