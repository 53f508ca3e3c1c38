"""The study of quality: rivals train and sample as DC-DiT does, runs resume, and tables come from the result file."""

import argparse
import functools
import json
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from graph_stand_in import run_again
from PIL import Image
from safetensors.torch import load_file
from test_idx import IMAGES, LABELS, content

import dcdit.training.trainer
from bench.quality import collect, curves, farm, judge, lockstep, maps, pictures, places, sets, study, tables, where
from bench.quality.rivals import RivalTrainer, make_rival
from dcdit.model.flops import dcdit_flops, dit_flops
from dcdit.model.routing import Routing
from dcdit.training.config import load_config
from dcdit.training.step_graphs import StepGraphs


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 200), ("t10k", 40)):
        (tmp_path / f"{name}{IMAGES}").write_bytes(content(rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)))
        (tmp_path / f"{name}{LABELS}").write_bytes(content((np.arange(count) % 10).astype(np.uint8)))
    return tmp_path


@pytest.mark.parametrize("scale", study.DEPTHS)
def test_the_plain_dit_has_about_as_many_flops(scale, data):
    args = argparse.Namespace(data=data, runs=data, steps=1, seed=0, device="cpu")
    args.width, args.ratio, args.cell = scale
    ours, plain = (study.configuration(name, args).model for name in ("direct", "plain"))
    least = dcdit_flops(ours, ours.cells / args.ratio)["total"]
    assert least < dit_flops(plain, plain.cells / 4) < 1.1 * least
    if args.cell == 2:
        latents = study.configuration("latents", args).model
        router = make_rival(latents, "latents").router
        assert least < dcdit_flops(latents, latents.cells / args.ratio, router)["total"] < 1.15 * least


def test_a_run_has_one_line(data, tmp_path, monkeypatch, capsys):
    results, page = tmp_path / "quality.jsonl", tmp_path / "quality.md"
    key = f"mended --steps 2 --data {data} --runs {tmp_path}/runs".split()
    words = ["quality", *key, "--samples", "10", "--results", str(results)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(study, "SAMPLES", {**study.SAMPLES, "steps": 2})
    monkeypatch.setattr("bench.quality.judge.fit", lambda images, labels, **_: study.judge.ConvClassifier(10).eval())
    study.main()
    study.main()
    (line,) = map(json.loads, results.read_text().splitlines())
    assert line["variant"] == "mended" and line["train_cpu_seconds"] > 0 and len(line["sampling_kept"]) == 2
    assert {"validation_loss", "frechet", "frechet_patches", "recognised", "commit", "machine"} <= set(line)

    drawn = tmp_path / study.DRAWN
    monkeypatch.setattr("sys.argv", [*words, "--drop-fractions", "0", "0.5", "--guidances", "1", "1.5"])
    study.main()
    study.main()
    again = {(row["drop_fraction"], row["guidance"]): row for row in map(json.loads, drawn.read_text().splitlines())}
    assert len(again) == len(drawn.read_text().splitlines()) == 4
    judged = ("frechet", "frechet_patches", "recognised", "sampling_kept")
    assert [again[0.0, 1.5][key] for key in judged] == [line[key] for key in judged]
    assert again[0.0, 1.0]["frechet"] != line["frechet"] and again[0.5, 1.5]["gflop"] < again[0.0, 1.5]["gflop"]

    marks = (tables.BEGIN, tables.END, tables.BEGIN_DRAWN, tables.END_DRAWN)
    page.write_text("before\n{}\nold\n{}\nbetween\n{}\nold\n{}\nafter\n".format(*marks))
    results.write_text("".join(json.dumps({**line, "seed": seed, "recognised": seed}) + "\n" for seed in (0, 1)))
    monkeypatch.setattr(tables, "RESULTS", results)
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["tables", "--least-steps", "3"])
    tables.main()
    assert "50.0%" not in page.read_text()
    monkeypatch.setattr("sys.argv", ["tables", "--least-steps", "2"])
    tables.main()
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and "\nbetween\n" in text and text.endswith("after\n")
    assert text.count(" | 4 | 2 | 2 | 0 | mended | 10 | ") == 4 and "at guidance" not in text
    (joined,) = tables.joined([line], list(again.values()))
    assert "_at_" not in str(tables.joined([{**line, "ratio": 16}], list(again.values())))
    assert {key: joined[key] for key in joined if "_at_" in key} == {
        "frechet_at_1": again[0.0, 1.0]["frechet"],
        "frechet_at_1.5": again[0.0, 1.5]["frechet"],
    }
    text = tables.tables([joined])
    assert " | at guidance 1 | " in text and f"{joined['frechet_at_1']:.2f}" in text

    monkeypatch.setattr(where, "RESULTS", results)
    monkeypatch.setattr("sys.argv", ["where", *key])
    where.main()
    rows = capsys.readouterr().out.splitlines()[-len(places.TIMES) :]
    assert [row.split()[1] for row in rows] == [str(t) for t in places.TIMES]
    monkeypatch.setattr("sys.argv", ["pictures", *key])
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    pictures.main()
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_a_coloured_set(tmp_path, monkeypatch):
    """A folder as examples/datasets.py writes it: colours, sizes, classes and their shares are the set's own."""
    rng = np.random.default_rng(0)
    for half, counts in (("train", (12, 24)), ("test", (4, 8))):
        for name, count in zip("ab", counts, strict=True):
            (tmp_path / "set" / half / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / half / name / f"{i}.png")
    results, data = tmp_path / "quality.jsonl", tmp_path / "set"
    drawn = sets.classes_to_draw(data, 36)
    assert np.bincount(drawn).tolist() == [12, 24] and len(set(drawn[:12])) == 2
    words = f"quality mended --steps 2 --device cpu --samples 12 --data {data} --runs {tmp_path}/runs"
    monkeypatch.setattr("sys.argv", [*words.split(), "--results", str(results)])
    monkeypatch.setattr(study, "SAMPLES", {**study.SAMPLES, "steps": 2})
    monkeypatch.setattr("bench.quality.judge.fit", lambda images, labels, **_: study.judge.ConvClassifier(2).eval())
    study.main()
    (line,) = map(json.loads, results.read_text().splitlines())
    assert line["set"] == "set" and all(np.isfinite(line[key]) for key in ("frechet", "frechet_patches", "recognised"))
    args = argparse.Namespace(data=data, runs=tmp_path / "runs", width=96, steps=2, seed=0, device="cpu", **sets.SCALE)
    config = study.configuration("mended", args)
    assert (config.model.in_channels, config.model.input_size, config.model.num_classes) == (12, (8, 8), 2)
    fine = study.configuration("direct-free", argparse.Namespace(**{**vars(args), "ratio": 16, "cell": 1}))
    assert (fine.model.in_channels, fine.model.input_size, fine.model.target_ratio) == (3, (16, 16), 16)
    assert fine.output.endswith("-n16-c1") and fine.codec.factor == 1 and fine.model.keep_grid == 0
    patches = judge.Patches(3)(torch.arange(3 * 64, dtype=torch.uint8).view(1, 3, 8, 8))
    assert patches.shape == (4, 48) and (patches[1] * 255).round().tolist()[15:18] == [31, 68, 69]

    monkeypatch.setattr(maps, "IMAGES", tmp_path)
    monkeypatch.setattr("sys.argv", f"maps mended --steps 2 --device cpu --data {data} --runs {tmp_path}/runs".split())
    maps.main()
    assert (tmp_path / "quality-maps.png").stat().st_size > 1000

    def right_half(x, t, y, return_routing):
        assert (t == 100).all() and x.shape == (4, 12, 8, 8)
        return x, Routing.of(torch.arange(8).ge(4).float().expand(4, 8, 8).flatten(1), (8, 8))

    monkeypatch.setattr(maps, "trained", lambda name, args: right_half)
    white = maps.kept("mended", np.full((4, 16, 16, 3), 255, np.uint8), np.zeros(4), args)
    assert (white[:, :, 32:, 2] < 110).all() and (white[:, 4:, :31, 2] > 180).all()


OPTIONS = {
    "--samples must be at least 0, got -1": ["--samples", "-1"],
    "--samples must be at least 1, got 0": ["--samples", "0", "--guidances", "1"],
    r"--drop-fractions must be in [0, 1), got 1.0": ["--drop-fractions", "0.5", "1"],
    "--guidances must be finite, got nan": ["--guidances", "nan"],
    "must be trained before it is drawn again": ["--guidances", "1"],
}


@pytest.mark.parametrize("message", OPTIONS)
def test_options_that_cannot_be_used(message, data, tmp_path, monkeypatch, capsys):
    words = ["quality", "learned", "--device", "cpu", "--data", str(data), "--runs", str(tmp_path / "none")]
    monkeypatch.setattr("sys.argv", [*words, "--results", str(tmp_path / "lines"), *OPTIONS[message]])
    with pytest.raises(SystemExit) as end:
        study.main()
    assert message in f"{end.value}{capsys.readouterr().err}"


def test_real_pictures_are_judged(data, tmp_path, monkeypatch, capsys):
    """Of a test set that is the training set, as many pictures of each class are at no distance from it."""
    for name in (IMAGES, LABELS):
        shutil.copy(data / f"train{name}", data / f"t10k{name}")
    monkeypatch.setattr("bench.quality.judge.fit", lambda images, labels, **_: judge.ConvClassifier(10).eval())
    words = f"judge --samples 200 --draws 2 --data {data} --runs {tmp_path}/runs"
    monkeypatch.setattr("sys.argv", words.split())
    judge.main()
    said = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()}
    assert abs(said["frechet"]) < 1e-4 and said["coverage"] == 1 and said["recognised"] == said["recognised_reference"]
    monkeypatch.setattr("sys.argv", [*words.split(), "--samples", "50"])
    judge.main()
    assert float(capsys.readouterr().out.split()[1]) > said["frechet"] + 1e-4


def test_what_a_farm_brought(tmp_path, monkeypatch):
    """Lines are appended, losses become means; the curves are drawn of them."""
    results = tmp_path / "quality.jsonl"
    results.write_text('{"old": 1}\n')
    for name, offset in (("plain", 0.0), ("grid", 0.5)):
        run = tmp_path / "runs" / "0" / "fashion-mnist" / f"{name}-96-400-0"
        run.mkdir(parents=True)
        rows = [{"step": step, "diffusion_loss": offset + step, "kept": 0.25, "lr": 1} for step in range(1, 401)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "runs" / "0" / "quality.jsonl").write_text('{"new": 1}\n')
    (tmp_path / "runs" / "0" / study.DRAWN).write_text('{"drawn": 1}\n')
    monkeypatch.setattr(collect, "RESULTS", results)
    monkeypatch.setattr("sys.argv", ["collect", str(tmp_path)])
    collect.main()
    assert results.read_text() == '{"old": 1}\n{"new": 1}\n'
    assert (tmp_path / study.DRAWN).read_text() == '{"drawn": 1}\n'
    monkeypatch.setattr(curves, "RESULTS", results)
    monkeypatch.setattr(curves, "IMAGES", tmp_path)
    monkeypatch.setattr("sys.argv", ["curves", "grid", "--steps", "400", "--panels", *["fashion-mnist/0"] * 2])
    read = argparse.Namespace(width=96, steps=400)
    assert curves.losses("grid", "fashion-mnist/0", read)[[0, 99]].tolist() == [[2.5, 3.0], [398.5, 399.0]]
    curves.main()
    assert (tmp_path / "quality-losses.png").stat().st_size > 1000


@pytest.fixture
def stand_in(monkeypatch):
    """CUDA graphs on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(dcdit.training.trainer, "StepGraphs", functools.partial(StepGraphs, capture=run_again))
    monkeypatch.setattr(study, "ON_GPU", ["cuda_graph=true", "log_every=1"])


def trainer_of(kind, output, data, *changes):
    tiny = ["model.hidden_size=32", "model.depth=1", "model.num_heads=1", "batch_size=4", "optim.lr=0.01", "steps=6"]
    tiny += ["model.norm_groups=8", "cuda_graph=true", "log_every=2", f"data.path={data}/train", "validation.every=0"]
    trainer = RivalTrainer.__new__(RivalTrainer)
    trainer.kind = kind
    trainer.__init__(load_config(study.CONFIG, [*tiny, f"output={output}", *changes]))
    return trainer


def test_together_as_alone(data, tmp_path, stand_in, monkeypatch):
    """Weights, averages and losses have the bits of runs of their own; a plain DiT is replayed as well."""
    monkeypatch.setattr(lockstep, "SHARES", 128)  # as the trainer's own: other capacities, other orders of sums
    kinds = ["learned", "grid", "plain"]
    trainers = [trainer_of(kind, tmp_path / f"{kind}-together", data) for kind in kinds]
    diverging = trainer_of("learned", tmp_path / "diverging", data, "optim.lr=1.0e+30")
    assert lockstep.train_together([diverging, *trainers]) == trainers
    for kind in kinds:
        alone = trainer_of(kind, tmp_path / kind, data)
        alone.run()
        assert alone.graphs.replays >= 2
        one, other = (load_file(tmp_path / name / "last.safetensors") for name in (kind, f"{kind}-together"))
        assert all(torch.equal(one[key], other[key]) for key in one)
        losses = [
            [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in (kind, f"{kind}-together")
        ]
        assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_call_on_a_gpu(data, tmp_path, stand_in, monkeypatch):
    """Variants together, and a line for each with the step that was reached in time."""
    monkeypatch.setattr("bench.quality.judge.fit", lambda images, labels, **_: study.judge.ConvClassifier(10).eval())
    monkeypatch.setattr(study, "SAMPLES", {**study.SAMPLES, "steps": 2})
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(study, "add_device", lambda parser: parser.add_argument("--device"))  # takes a GPU not there
    results = tmp_path / "quality.jsonl"
    words = f"quality grid plain --device cuda --steps 3 --until 0 --samples 10 --data {data} --runs {tmp_path}/runs"
    monkeypatch.setattr("sys.argv", [*words.split(), "--results", str(results)])
    study.main()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["variant"], line["steps"], line["together"]) for line in lines] == [("grid", 1, 2), ("plain", 1, 2)]
    assert all(line["frechet"] > 0 and line["running_loss"] > 0 for line in lines)


def test_farm(tmp_path, monkeypatch, capsys):
    """As many steps as fit by the rates of a few; a call that fails is taken apart, one that does not end killed."""
    stub = """
import json, pathlib, sys, time
words = sys.argv
after = lambda flag: words[words.index(flag) + 1]
steps, runs = int(after("--steps")), pathlib.Path(after("--runs"))
names = words[1:words.index("--seed")]
if "broken" in names and len(names) > 1:
    sys.exit(3)
time.sleep(60 * ("stuck" in names and "runs" in runs.parts))
for name in names:
    folder = runs / "set" / name
    folder.mkdir(parents=True)
    rows = [{"steps_per_s": rate} for rate in (1, 5000, 5000, 5000, 9000)]
    (folder / "metrics.jsonl").write_text("\\n".join(map(json.dumps, rows)))
(runs / "quality.jsonl").write_text(f"{names} {steps}")
"""
    (tmp_path / "stub.py").write_text(stub)
    calls = ["# calls", "a b --seed 0 --steps N", "a b --seed 1 --steps 0.5N  # half", "a broken --seed 2 --steps N"]
    (tmp_path / "list").write_text("\n".join([*calls, "stuck --seed 3 --steps 0.1N"]))
    monkeypatch.setattr(farm, "CALL", (sys.executable, str(tmp_path / "stub.py")))
    monkeypatch.setattr(farm, "START", 0)
    words = ["farm", f"{tmp_path}/list", "--limit", "5", "--judging", "1", "--out", f"{tmp_path}/out"]
    monkeypatch.setattr("sys.argv", words)
    farm.main()
    said = capsys.readouterr().out
    most = int(said.split("N = ")[1].split(":")[0])
    assert 5000 <= most <= 20000 and most % 100 == 0 and "5 calls" in said
    assert f"runs 0: 0 after 0 s, a b --seed 0 --steps {most}" in said and f"--seed 1 --steps {most // 2}" in said
    assert f"broken --seed 2 --steps {most}" in said and "runs 4: killed" in said
    with tarfile.open(tmp_path / "out" / "quality.tar.gz") as archive:
        assert archive.extractfile("runs/3/quality.jsonl").read().decode() == f"['broken'] {most}"
        assert {"runs/0/set/b/metrics.jsonl", "runs/4.log", "probe/2.log"} <= set(archive.getnames())


@pytest.mark.parametrize("cell", [1, 2])
@pytest.mark.parametrize("colours", [1, 3])
def test_where_tokens_and_errors_are(colours, cell):
    """Two pictures of a striped and a plain half, and a model that keeps the striped cells and predicts nothing."""
    striped = torch.full((2, colours, 12, 16), -1.0 if colours == 1 else 1.0)
    striped[:, -1, :, 8::2] *= -1

    def model(x, t, y, return_routing):
        prob = torch.zeros(2, *x.shape[2:])
        prob[..., x.shape[3] // 2 :] = 1.0
        return torch.zeros_like(x), Routing.of(prob.flatten(1), tuple(x.shape[2:]))

    for t, loss, front, back, front_loss, back_loss in places.lines(model, striped, torch.zeros(2), cell):
        assert (front, back) == (1.0, 0.0)
        assert loss == pytest.approx((front_loss + back_loss) / 2, abs=1e-5) and 1.5 < loss < 2.5, t
