"""The tables of docs/quality.md from bench/results: python -m bench.quality.tables [--least-steps N]"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

import numpy as np

from ..machine import read_lines
from .sets import SCALE
from .study import DRAWN, RESULTS, VARIANTS

PAGE = Path(__file__).parents[2] / "docs" / "quality.md"
BEGIN, END = "<!-- tables: python -m bench.quality.tables -->", "<!-- end of tables -->"
BEGIN_DRAWN, END_DRAWN = "<!-- drawn again -->", "<!-- end of drawn again -->"
# Heading → the key of a result, how it is written, and a factor.
COLUMNS = {
    "held-out loss": ("validation_loss", ".4f", 1),
    "kept": ("validation_kept", ".1%", 1),
    "Fréchet distance": ("frechet", ".2f", 1),
    "at guidance 1.25": ("frechet_at_1.25", ".2f", 1),
    "at guidance 1": ("frechet_at_1", ".2f", 1),
    "in 4×4 patches": ("frechet_patches", ".4f", 1),
    "density": ("density", ".2f", 1),
    "coverage": ("coverage", ".1%", 1),
    "recognised": ("recognised", ".1%", 1),
    "MFLOP": ("gflop", ".0f", 1000),
    "parameters": ("parameters", ",.0f", 1),
    "CPU s": ("train_cpu_seconds", ".0f", 1),
}
DRAWN_COLUMNS = {"ρ": ("drop_fraction", "g", 1), "guidance": ("guidance", "g", 1)} | {
    title: COLUMNS[title]
    for title in ("MFLOP", "Fréchet distance", "in 4×4 patches", "density", "coverage", "recognised")
}


def tables(results: list[dict]) -> str:
    """A table for each set, N, size of cells, width, number of steps and of pictures, and device; long runs first.

    It has means and ranges over the seeds. Of the distances at other guidances it has those that all of its runs have.
    """
    order = list(VARIANTS)
    by_run = lambda r: (r["set"], r["ratio"], r["cell"], r["width"], -r["steps"], r["samples"], r["device"])  # noqa: E731
    parts = []
    results = [{**SCALE, **run} for run in results]
    for (name, ratio, cell, width, less, samples, device), runs in groupby(sorted(results, key=by_run), by_run):
        runs = sorted(runs, key=lambda r: order.index(r["variant"]))
        shown = {key: (all if "_at_" in key else any)(key in run for run in runs) for key, *_ in COLUMNS.values()}
        used = [(title, *column) for title, column in COLUMNS.items() if shown[column[0]]]
        lines = [
            f"### {name}, N {ratio}, cells of {cell}×{cell} pixels, D {width}, {-less} steps, "
            f"{samples} pictures drawn, {device.upper().replace('CUDA', 'GPU')}",
            "| | " + " | ".join(title for title, *_ in used) + " | seeds |",
        ]
        lines.append("|---" * (len(used) + 2) + "|")
        for variant, same in groupby(runs, lambda r: r["variant"]):
            same = list(same)
            cells = [_cell([run[key] * factor for run in same if key in run], how) for _, key, how, factor in used]
            seeds = ", ".join(str(run["seed"]) for run in same)
            lines.append(f"| {variant} | " + " | ".join(cells) + f" | {seeds} |")
        facts = (sorted({run[key] or f"no {key}" for run in runs}) for key in ("machine", "torch", "commit"))
        parts.append("\n".join(lines) + "\n\n" + "; ".join(", ".join(fact) for fact in facts) + ".")
    return "\n\n".join(parts)


def joined(results: list[dict], drawn: list[dict]) -> list[dict]:
    """The results with the Fréchet distances of their models drawn again without tail drop, by guidance."""
    names = ("set", "variant", "ratio", "cell", "width", "steps", "seed", "samples")
    run_of = lambda r: tuple({**SCALE, **r}[key] for key in names)  # noqa: E731
    again: dict[tuple, dict] = {}
    for line in drawn:
        if not line["drop_fraction"]:
            again.setdefault(run_of(line), {})[f"frechet_at_{line['guidance']:g}"] = line["frechet"]
    return [{**run, **again.get(run_of(run), {})} for run in results]


def _cell(values: list[float], how: str) -> str:
    if not values:
        return "–"
    text, low, high = (format(float(value), how) for value in (np.mean(values), min(values), max(values)))
    return text if low == high else f"{text} ({low} to {high})"


def drawn_table(results: list[dict]) -> str:
    """A row for each run, drop fraction and guidance."""
    keys = {"set": "set", "N": "ratio", "cell's side": "cell", "steps": "steps", "seed": "seed"}
    keys |= {"variant": "variant", "pictures": "samples"}
    rows = ["| " + " | ".join([*keys, *DRAWN_COLUMNS]) + " |", "|---" * (len(keys) + len(DRAWN_COLUMNS)) + "|"]
    order = list(VARIANTS)

    def by_run(r: dict) -> tuple:
        run = r["set"], r["ratio"], r["cell"], -r["steps"], r["seed"], order.index(r["variant"])
        return *run, r["guidance"], r["drop_fraction"]

    for run in sorted(({**SCALE, **run} for run in results), key=by_run):
        cells = [str(run[key]) for key in keys.values()]
        cells += [_cell([run[key] * factor], how) for key, how, factor in DRAWN_COLUMNS.values()]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Write the tables into the page, between their marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--least-steps", type=int, default=500, help="shorter runs have no table")
    least = parser.parse_args().least_steps
    text = PAGE.read_text(encoding="utf-8")
    results = [run for run in read_lines(RESULTS) if run["steps"] >= least]
    drawn = read_lines(RESULTS.with_name(DRAWN))
    parts = [(BEGIN, tables(joined(results, drawn)), END), (BEGIN_DRAWN, drawn_table(drawn), END_DRAWN)]
    for begin, table, end in parts:
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{table}\n{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
