"""The three plots of a machine: roofline, realised saving over batch size, time by component."""

from __future__ import annotations

from pathlib import Path

from .cases import MODELS
from .headline import COMPONENTS, fastest, saving


def draw(run: dict, folder: Path) -> list[tuple[str, str]]:
    """(title, file name) of the plots that the run has data for, written to `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in run["cases"] if "variants" in entry]
    drawn = []
    for title, kind, paint in (
        ("Roofline of the operators", "roofline", roofline),
        ("Realised saving over batch size", "saving", savings),
        ("Time of a forward pass by component", "components", components),
    ):
        height = 2 + 0.25 * sum(e["case"]["group"] == "forward" for e in entries) if kind == "components" else 4.2
        figure, axes = pyplot.subplots(figsize=(7, height), layout="constrained")
        if paint(axes, entries, run):
            name = f"bench-{run['machine']}-{kind}.png"
            axes.set_title(f"{title}, {run['machine']}", fontsize=10)
            # Without the version that matplotlib writes, the same data give the same file.
            figure.savefig(folder / name, dpi=110, metadata={"Software": None})
            drawn.append((title, name))
        pyplot.close(figure)
    return drawn


def roofline(axes, entries: list[dict], run: dict) -> bool:
    """Achieved over possible: the fastest of ours and the straightforward formulation of each operator case."""
    groups = sorted({e["case"]["group"] for e in entries if e["flops"]})
    colours = {group: f"C{i}" for i, group in enumerate(groups) if group not in MODELS}
    entries = [e for e in entries if e["case"]["group"] in colours]
    for entry in entries:
        colour, intensity = colours[entry["case"]["group"]], entry["flops"] / entry["bytes"]
        for variant, marker in ((fastest(entry), "o"), (entry["variants"]["plain"], "x")):
            if variant and variant["status"] == "ok":
                rate = entry["flops"] / variant["seconds"] / 1e9
                axes.plot(intensity, rate, marker, color=colour, markersize=5)
    if not any(map(fastest, entries)) or not run["rates"]:
        return False
    rates = run["rates"]
    x = [10 ** (i / 20) for i in range(-30, 70)]
    for dtype, peak in rates["matmul_flops_per_s"].items():
        axes.plot(x, [min(peak, rates["copy_bytes_per_s"] * v) / 1e9 for v in x], color="0.6", linewidth=1)
        axes.annotate(f"matmul, {dtype}", (x[-1], peak / 1e9), fontsize=7, ha="right", va="bottom")
    for group, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=group)
    axes.plot([], [], "ko", label="ours"), axes.plot([], [], "kx", label="straightforward")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="GFLOP/s")
    axes.legend(fontsize=7, ncols=2)
    return True


def savings(axes, entries: list[dict], run: dict) -> bool:
    """Time saved over FLOPs saved, one line for each size and ρ; dashed of CUDA graphs, as small batches are served."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in entries:
        case = entry["case"]
        for end in ("", " graph") if case["group"] == "forward" else ():
            won = saving(entry, f"dcdit{end}", f"DiT/2{end}")
            if won and won["realised"] is not None:
                label = f"{case['size']}, {case['side']}×{case['side']}, ρ = {case['drop_fraction']:g}"
                lines.setdefault(label, {}).setdefault(end, []).append((case["batch"], won["realised"]))
    for number, (label, kinds) in enumerate(lines.items()):
        for end, points in kinds.items():
            style = "o--" if end else "o-"
            axes.plot(*zip(*sorted(points), strict=True), style, color=f"C{number}", label=label + end, markersize=4)
    axes.axhline(1, color="0.6", linewidth=1)
    axes.axhline(0, color="0.6", linewidth=1, linestyle=":")
    axes.set(
        xscale="log",
        xlabel="batch size",
        ylabel="time saved / FLOPs saved\n(below 0: slower than DiT/2)",
        xlim=(0.8, 80),
    )
    axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axes.minorticks_off()
    if lines:
        axes.figure.legend(fontsize=7, ncols=3, loc="outside lower center", handlelength=4)
    return bool(lines)


def components(axes, entries: list[dict], run: dict) -> bool:
    """Share of each part."""
    rows = [entry for entry in entries if entry["case"]["group"] == "forward" and entry.get("components_s")]
    sizes = ("digits", "S", "B", "L", "XL")
    rows.sort(key=lambda e: (sizes.index(e["case"]["size"]), e["case"]["side"], e["case"]["batch"]))
    cases = [entry["case"] for entry in rows]
    labels = [f"{c['size']} {c['side']}², B {c['batch']}, ρ {c['drop_fraction']:g}" for c in cases]
    left = [0.0] * len(rows)
    for i, name in enumerate((*COMPONENTS, "rest")):
        shares = [100 * e["components_s"].get(name, 0.0) / sum(e["components_s"].values()) for e in rows]
        axes.barh(labels, shares, left=left, label=name, color=f"C{i}")
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set(xlabel="% of the forward pass", xlim=(0, 100))
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.figure.legend(fontsize=7, ncols=5, loc="outside lower center")
    return bool(rows)
