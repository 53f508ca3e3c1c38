"""The tables, the curves and the pictures of `bench.digits.tables`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from dcdit.pictures.images import grid

from .parts import load_pictures

ROOT = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- tables: python -m bench.digits.tables show FOLDER -->", "<!-- end of tables -->"
TITLES = {
    "plain": "plain DiT",
    "plain-longer": "plain DiT, trained on",
    "dcdit": "DC-DiT",
    "dcdit-longer": "DC-DiT, trained on",
    "sparse": "SparseDiT",
    "dydit": "DyDiT, λ = 0.5",
    "dydcdit": "DC-DiT + DyDiT, λ = 0.5",
    "patches": "PatchDiT on 1×1 patches",
}
# What is drawn as one curve, each ordered by its cost: part, the knob's text in the policy, whether steps are the knob.
CURVES = {
    "plain DiT, fewer steps": ("plain", "", True),
    "plain DiT + TeaCache": ("plain", "teacache", False),
    "DC-DiT, fewer steps": ("dcdit", "", True),
    "DC-DiT, ρ": ("dcdit", "rho", False),
    "DC-DiT + TeaCache": ("dcdit", "teacache", False),
    "DC-DiT + DyDiT, ρ": ("dydcdit", "rho", False),
    "DC-DiT + DyDiT + TeaCache": ("dydcdit", "teacache", False),
    "DyDiT + TeaCache": ("dydit", "teacache", False),
    "SparseDiT": ("sparse", "density", False),
    "PatchDiT, τ": ("patches", "patches", False),
}


def curve(lines: list[dict], part: str, knob: str, steps: bool) -> list[dict]:
    """The runs of a part that differ by one knob alone, the cheapest first; the part's own policy is on each."""
    own = [line for line in lines if line["part"] == part and "&" not in line["policy"]]
    if steps:
        found = [line for line in own if line["policy"] == ""]
    else:
        found = [line for line in own if line["policy"].startswith(knob) or line["policy"] == ""]
        found = [line for line in found if line["steps"] == max(line["steps"] for line in own)]
    return sorted(found, key=lambda line: line["gflop"])


def main_table(lines: list[dict]) -> str:
    """All runs, part by part: with guidance, and as `free` has it without."""
    heads = ["", "policy", "steps", "GFLOP", "recognised", "GFLOP", "CPU s", "recognised", "Fréchet distance"]
    rows = ["| | | | guidance 2 | | no guidance | | | |", "|---" * len(heads) + "|", f"| {' | '.join(heads)} |"]
    for part, title in TITLES.items():
        for line in (line for line in lines if line["part"] == part):
            cells = [title, f"`{line['policy']}`" if line["policy"] else "–", str(line["steps"])]
            cells += [f"{line['gflop']:.2f}", f"{line['recognised']:.1%}"]
            free = line.get("free")
            cells += [
                format(free[key], how) if free and key in free else "–"
                for key, how in (("gflop", ".2f"), ("cpu_seconds", ".3f"), ("recognised", ".1%"), ("frechet", ".1f"))
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def equal_table(lines: list[dict]) -> str:
    """Each run of two ways together beside either alone, on the straight line between its runs of next FLOPs."""
    alone = ("DC-DiT, ρ", "DC-DiT + TeaCache", "DC-DiT, fewer steps", "DyDiT + TeaCache", "plain DiT, fewer steps")
    alone += ("plain DiT + TeaCache",)
    rows = ["| | GFLOP | itself | " + " | ".join(alone) + " |", "|---" * (len(alone) + 3) + "|"]
    for line in lines:
        if line["part"] == "dydcdit" or (line["part"] == "dcdit" and "&" in line["policy"]):
            cells = [at_equal(line["gflop"], curve(lines, *CURVES[name])) for name in alone]
            policy = f", `{line['policy']}`" if line["policy"] else ""
            own = f"{line['recognised']:.1%}, {line['frechet']:.1f}"
            rows.append(f"| {TITLES[line['part']]}{policy} | {line['gflop']:.2f} | {own} | {' | '.join(cells)} |")
    return "\n".join(rows)


def at_equal(gflop: float, runs: list[dict]) -> str:
    """Recognised share and Fréchet distance of a curve at so many GFLOP; – beyond its ends."""
    costs = [line["gflop"] for line in runs]
    if not runs or not costs[0] <= gflop <= costs[-1]:
        return "–"
    recognised, frechet = (np.interp(gflop, costs, [line[key] for line in runs]) for key in ("recognised", "frechet"))
    return f"{recognised:.1%}, {frechet:.1f}"


def draw_curves(lines: list[dict], file: Path) -> None:
    """Recognised share and Fréchet distance over FLOPs, and over seconds."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    for number, (name, knob) in enumerate(CURVES.items()):
        runs = curve(lines, *knob)
        style = {"color": f"C{number % 10}", "marker": "os^v"[number % 4], "markersize": 4, "linewidth": 1}
        for column, key in enumerate(("gflop", "cpu_seconds")):
            known = [line for line in runs if key in line]
            for row, (what, factor) in enumerate((("recognised", 100), ("frechet", 1))):
                values = [factor * line[what] for line in known]
                axes[row][column].plot([line[key] for line in known], values, label=name, **style)
    axes[0][0].set(ylabel="recognised, %", xscale="log")
    axes[1][0].set(ylabel="Fréchet distance", xlabel="GFLOP of an image", xscale="log", yscale="log")
    axes[1][1].set(xlabel="processor seconds of an image", xscale="log")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_minor_formatter(NullFormatter())
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    figure.savefig(file, dpi=110, metadata={"Software": None})


def draw_pictures(lines: list[dict], folder: Path, file: Path) -> None:
    """Two digits of each class by the first run of each part, and by the strongest policies."""
    chosen = [next((line for line in lines if line["part"] == part), None) for part in TITLES]
    chosen += [line for line in lines if line.get("speed") == 2.0 or line["policy"] == "rho=0.3 & teacache=0.1"]
    chosen = [line for line in chosen if line is not None]
    figure = Figure(figsize=(9, 0.62 * len(chosen)), layout="constrained")
    for axis, line in zip(figure.subplots(len(chosen), 1, squeeze=False)[:, 0], chosen, strict=True):
        pictures = load_pictures(folder / line["pictures"])
        each = len(pictures) // 10
        some = pictures[np.arange(10).repeat(2) * each + np.tile([0, min(1, each - 1)], 10)]
        axis.imshow(grid(some[..., None].repeat(3, 3), 20))
        title = f"{TITLES[line['part']]}\n{line['policy']}\n{line['gflop']:.1f} GFLOP"
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=7)
        axis.set(xticks=[], yticks=[])
    figure.savefig(file, dpi=110, metadata={"Software": None})


def show(lines: list[dict], folder: Path) -> None:
    """Write the tables between the page's marks, and the pictures beside it. Curves are those without guidance."""
    free = [line | line["free"] for line in lines if "free" in line]
    draw_curves(free, ROOT / "images" / "trained_rivals_curves.png")
    draw_pictures(lines, folder, ROOT / "images" / "trained_rivals.png")
    page = ROOT / "rivals.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = f"{main_table(lines)}\n\n{equal_table(free)}"
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
