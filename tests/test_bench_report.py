"""The report: the newest results, contradictions, gaps, and the published figures printed again."""

import dataclasses
import json
from pathlib import Path

import pytest

from bench import report
from bench.cases import Case
from bench.headline import saving

ROOT = Path(__file__).parents[1]


def timed(samples, gflop=None):
    return {"status": "ok", "samples": samples, "seconds": sorted(samples)[len(samples) // 2], "gflop_per_image": gflop}


def test_realised_saving():
    """Half the FLOPs in three quarters of the time: half of the saving was realised."""
    entry = {"variants": {"dcdit": timed([0.75, 1.5], 5.0), "DiT/2": timed([1.0, 2.0], 10.0)}}
    assert saving(entry) == {"time": 0.75, "low": 0.75, "high": 0.75, "flops": 0.5, "realised": 0.5}
    entry["variants"]["dcdit"]["gflop_per_image"] = 11.0
    assert saving(entry)["realised"] is None
    entry["variants"]["dcdit"] = {"status": "failed", "reason": "off"}
    assert saving(entry) is None


def synthetic(date, scale=1.0, machine="some-cpu", **changes):
    entry = {
        "name": "dechunk-S",
        "case": dataclasses.asdict(Case("dechunk", "S", 32, 4)),
        "bytes": 1e6, "flops": 1e9, "tokens": 1024,
        "variants": {
            "plain": {**timed([2.0, 2.0, 2.0]), "peak_bytes": 2**21},
            "native": {**timed([scale, scale, scale]), "peak_bytes": 2**20},
            "triton": {"status": "failed", "reason": "result 0 is off by 1, allowed 0.1"},
        },
    }  # fmt: skip
    rates = {"copy_bytes_per_s": 1e7, "matmul_flops_per_s": {"float32": 1e10}}
    header = {"machine": machine, "device": "cpu", "date": date, "commit": "abc", "command": "python -m bench.run"}
    return {**header, "torch": "2", "threads": 2, "cores": 2, "load": 0.1, "rates": rates, "cases": [entry], **changes}


CASE = Case("forward", "digits", 14, 2, drop_fraction=0.5)
FORWARD = synthetic("2026-01-01")["cases"][0] | {"case": dataclasses.asdict(CASE)}


def write_report(folder, *runs):
    for i, result in enumerate(runs):
        (folder / f"{i}.json").write_text(json.dumps(result))
    report.main(["--results", str(folder), "--output", str(folder / "docs" / "benchmarks.md")])
    return (folder / "docs" / "benchmarks.md").read_text()


def test_report_takes_the_newest(tmp_path):
    text = write_report(tmp_path, synthetic("2026-01-02", 1.0), synthetic("2026-01-01", 3.0))
    assert "| S, 256 px, B 4 | 0.25 | fwd | 2,000 ms | 0.50 (0.50–0.50) | **failed** | 10% | 10.0% |" in text
    assert "Failed (result 0 is off by 1, allowed 0.1): triton of dechunk-S." in text
    assert "[0.json]" in text and "[1.json]" not in text
    assert "No GPU has been measured" in text
    assert (tmp_path / "docs" / "images" / "bench-some-cpu-roofline.png").exists()


@pytest.mark.parametrize("lacks", [{"cut": ["pad-S"]}, {"command": "python -m bench.run --cases passes"}], ids=str)
def test_a_run_that_lacks_cases_replaces_none_that_was_whole(lacks, tmp_path):
    text = write_report(tmp_path, synthetic("2026-01-01"), synthetic("2026-01-02", **lacks))
    assert "[0.json]" in text and "[1.json]" not in text


@pytest.mark.parametrize(("scale", "says"), [(1.05, "agree on all 1 ratios"), (1.2, "too noisy")])
def test_report_says_when_runs_disagree(tmp_path, scale, says):
    assert says in write_report(tmp_path, synthetic("2026-01-01", scale), synthetic("2026-01-02", 1.0))


def test_report_says_what_is_missing(tmp_path):
    stages = [
        {"name": "build", "status": 0, "seconds": 20.4},
        {"name": "racecheck", "status": "timeout", "seconds": 45},
    ]
    crashed = {"name": "plan-S", "crashed": "the process ended with status -9"}
    cases = [*synthetic("2026-01-01")["cases"], crashed]
    changes = {"stages": stages, "current": "train-B", "cut": ["chunk-S", "chunk-B", "pad-S"], "cases": cases}
    text = write_report(tmp_path, synthetic("2026-01-01", **changes))
    assert "build passed in 20 s, racecheck timeout in 45 s" in text
    assert "Failed (the run ended within it): train-B.\n" in text
    assert "Failed (the process ended with status -9): plan-S.\n" in text
    assert "2 of chunk, 1 of pad" in text


def test_report_says_when_the_machine_was_busy(tmp_path):
    assert "kept this machine busy" not in write_report(tmp_path, synthetic("2026-01-01"))
    assert "kept this machine busy** (load 5.3 on 2" in write_report(tmp_path, synthetic("2026-01-02", load=5.3))


def test_model_table(tmp_path):
    """Half the FLOPs in three quarters of the time, and as many cells as columns."""
    variants = {"dcdit": timed([0.75, 1.5], 5.0), "DiT/2": timed([1.0, 2.0], 10.0), "plain": timed([2.0, 4.0], 5.0)}
    text = write_report(tmp_path, synthetic("2026-01-01", cases=[FORWARD | {"variants": variants}]))
    head, rule, row = (line for line in text.splitlines() if line.startswith("|"))
    assert head.count("|") == rule.count("|") == row.count("|")
    assert row.startswith("| digits, B 2 | 0.25 | 0.5 | 2,000 ms | 0.50 | 0.75 (0.75–0.75) | 0.50 | 2.00 (2.00–2.00) |")


def test_graphs_are_compared_with_graphs(tmp_path):
    variants = {"dcdit": timed([3.0] * 2, 5.0), "DiT/2": timed([2.0] * 2, 10.0)}
    variants |= {"dcdit graph": timed([0.6] * 2, 5.0), "DiT/2 graph": timed([1.0] * 2, 10.0)}
    text = write_report(tmp_path, synthetic("2026-01-01", cases=[FORWARD | {"variants": variants}]))
    head, _, row = (line for line in text.splitlines() if line.startswith("|"))
    assert head.endswith("| dcdit graph | DiT/2 graph | realised saving of graphs |") and head.count("|") == row.count(
        "|"
    )
    assert row.endswith("| 0.30 (0.30–0.30) | 0.50 (0.50–0.50) | 0.80 |")


def test_report_compares_no_two_commits(tmp_path):
    text = write_report(tmp_path, synthetic("2026-01-01", 9.0, commit="def"), synthetic("2026-01-02"))
    assert "no second to compare with" in text


def test_published_figures_come_from_the_results(tmp_path):
    report.main(["--output", str(tmp_path / "benchmarks.md")])
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs" / "benchmarks.md").read_text()
