"""Benches and examples refuse in one line what cannot be used: a GPU that is not there, files that are not there."""

import importlib
import json
import subprocess
import sys

import pytest
import torch


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        ("bench.profile", ["step"], "--device: cuda needs a GPU, and torch finds none"),
        ("bench.savings", ["--device", "cuda"], "--device: cuda needs a GPU, and torch finds none"),
        ("bench.quality.study", ["learned", "--device", "cuda"], "--device: cuda needs a GPU, and torch finds none"),
        ("bench.report", ["--results", "absent"], "--results: there is nothing at absent"),
        ("bench.report", ["--results", "."], "no results in .: expected the JSON of python -m bench.run"),
        ("bench.quality.farm", ["absent.txt", "--limit", "1"], "list: there is nothing at absent.txt"),
        ("examples.captioned.__main__", ["out", "--device", "cuda"], "--device cuda needs a GPU, and torch finds none"),
        ("examples.captioned.__main__", ["out", "--config", "absent.yaml"], "No such file or directory: 'absent.yaml'"),
        (
            "examples.captioned.__main__",
            ["out", "--digits", "absent"],
            "there is no file absent/train-images-idx3",
        ),
        ("bench.warm", ["--device", "cpu", "--cases", "decisive,absent"], "unknown list absent; known: "),
        ("bench.compare", ["HEAD", "--groups", "plam"], "unknown group plam; known: "),
        ("examples.encode_captions", ["pipe", "in", "out", "--device", "cuda:1"], "--device cuda:1 needs a GPU"),
        ("examples.digits_curves", ["metrics.jsonl", "out.png"], "from metrics.jsonl, a metrics.jsonl of dcdit train"),
        ("examples.upcycle_digits", ["draw", "."], "No such file or directory: 'scratch.json'"),
        ("bench.errors", ["--device", "cpu"], "unrecognized arguments: --device cpu"),
        ("bench.transformers", ["--quick"], "unrecognized arguments: --quick"),
    ],
)
def test_one_line(module, words, says, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pytest.importorskip("diffusers")
    main = importlib.import_module(module).main
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("hello\n")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"metrics.jsonl", "out"}


def test_files_that_are_missed_later_are_one_line():
    """As `python -m bench.…` runs; a fault of the bench keeps its traceback."""
    for code, lines in (("open('absent')", ["[Errno 2] No such file or directory: 'absent'"]), ("1 / 0", None)):
        words = [sys.executable, "-c", f"import sys; sys.argv[0] = '-m'; import bench; {code}"]
        said = subprocess.run(words, capture_output=True, text=True)
        assert said.returncode == 1
        assert said.stderr.splitlines() == lines if lines else "Traceback" in said.stderr


def test_curves_of_a_run_with_held_out_losses(tmp_path):
    pytest.importorskip("matplotlib")
    from examples.digits_curves import draw_curves

    lines = [{"step": 10, "diffusion_loss": 1.0, "kept": 0.3}, {"step": 10, "validation_loss": 1.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "out.png")
    assert (tmp_path / "out.png").exists()
