"""python -m bench.run: measure the cases of this machine into bench/results/<machine>-<date>.json.

The measuring runs in a process of its own that writes the file after every case. Where it dies (a fault on the GPU
takes the process with it) the case is recorded as crashed and the rest goes on in a fresh one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from .cases import GROUPS, compiled_too, select
from .machine import ROOT, describe, rates

RESULTS = ROOT / "bench" / "results"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    header = describe(args.device)
    output = args.output or unused(header)
    before = json.loads(output.read_text()) if output.exists() else {}
    if before.get("stages"):  # of `bench.gpu`, whose own stages are not the work of others
        header["load"] = before["load"]
    write(output, {**header, "stages": before.get("stages"), "rates": None, "current": None, "cases": []})
    deadline = args.deadline or time.time() + args.budget
    command = [sys.executable, "-m", "bench.run", *(argv if argv is not None else sys.argv[1:])]
    command += ["--worker", "--output", str(output), "--deadline", str(deadline)]
    while True:
        # A case that has begun may finish; one that hangs may not.
        try:
            limit = max(1, deadline + args.grace - time.time())
            status = subprocess.run(command, cwd=ROOT, timeout=limit, env=quiet()).returncode
        except subprocess.TimeoutExpired:
            status = "timeout"
        result = json.loads(output.read_text())
        if result["current"] is None:
            break
        print(f"{result['current']}: crashed, status {status}", flush=True)
        result["cases"].append({"name": result["current"], "crashed": f"the process ended with status {status}"})
        result["current"] = None
        write(output, result)
        if status == "timeout":
            break
    done = {entry["name"] for entry in result["cases"]}
    cut = [case.name for case in select(args.device, args.groups, args.quick) if case.name not in done]
    if cut:
        write(output, {**result, "cut": cut})
    print(output)
    return 0 if status == 0 else 1


def unused(header: dict) -> Path:
    """bench/results/<machine>-<date>.json, numbered where a run of the same day has taken it."""
    path = free = RESULTS / f"{header['machine']}-{header['date'][:10]}.json"
    number = 1
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def quiet() -> dict[str, str]:
    """The environment, less the profiler's log."""
    return {"KINETO_LOG_LEVEL": "5", **os.environ}


def work(args: argparse.Namespace) -> None:
    """Measure what the file does not have yet, until the deadline."""
    from .headline import component_times, outside_products
    from .measure import count_launches, measure
    from .parts import training_parts

    deadline = args.deadline
    if args.device == "cuda":  # the cases take all that they get, and their launches are counted afterwards
        deadline -= 0.1 * (deadline - time.time())
    result = json.loads(args.output.read_text())
    result["rates"] = faster(result["rates"], rates(args.device))
    done = {entry["name"] for entry in result["cases"]}
    for case in select(args.device, args.groups, args.quick):
        if case.name in done:
            continue
        if time.time() > deadline:
            break
        write(args.output, {**result, "current": case.name})
        begin = time.time()
        compiled = args.compile and compiled_too(case, args.device)
        entry = measure(case, args.device, compiled, args.rounds, args.seconds)
        if case.group == "forward":
            entry["components_s"] = component_times(case, args.device)
            if args.device == "cpu":
                entry["outside_products"] = outside_products(case)
        if case.group == "train" and entry["variants"]["dcdit"]["status"] == "ok":
            entry["components_s"] = training_parts(case, args.device, entry["variants"]["dcdit"]["seconds"])
        if args.device == "cuda":
            torch.cuda.synchronize()  # a fault ends the process here at the latest, lest the next case be blamed
        entry["wall_s"] = round(time.time() - begin, 2)
        result["cases"].append(entry)
        write(args.output, result)
        print(summary(entry), flush=True)
    measured = {entry["name"]: entry for entry in result["cases"] if "variants" in entry}
    for case in select("cuda", args.groups, quick=True) if args.device == "cuda" else []:
        if case.name in measured and time.time() < args.deadline:
            count_launches(measured[case.name], args.compile and compiled_too(case, "cuda"))
            write(args.output, result)
    write(args.output, {**result, "rates": faster(result["rates"], rates(args.device))})


def faster(old: dict | None, new: dict) -> dict:
    """The better of two measurements of the machine's rates, which nothing but other work can lower."""
    if old is None:
        return new
    best = {dtype: max(rate, new["matmul_flops_per_s"][dtype]) for dtype, rate in old["matmul_flops_per_s"].items()}
    return {"copy_bytes_per_s": max(old["copy_bytes_per_s"], new["copy_bytes_per_s"]), "matmul_flops_per_s": best}


def summary(entry: dict) -> str:
    """One line: milliseconds, or what went wrong."""
    parts = [
        f"{name} {v['seconds'] * 1e3:.3g} ms" if v["status"] == "ok" else f"{name} {v['status'].upper()}"
        for name, v in entry["variants"].items()
        if v["status"] != "absent"
    ]
    return f"{entry['name']}: {', '.join(parts)}"


def write(path: Path, result: dict) -> None:
    """Replace the file as a whole, so that a kill leaves the last complete one; a copy goes to the folder $OUT."""
    header = json.dumps({key: value for key, value in result.items() if key != "cases"}, indent=1, allow_nan=False)
    cases = ",\n".join(json.dumps(entry, allow_nan=False) for entry in result["cases"])  # a line each
    text = f'{header[:-2]},\n "cases": [\n{cases}\n ]\n}}\n'
    folders = [path.parent, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{path.stem}.tmp"
        temporary.write_text(text)
        os.replace(temporary, folder / path.name)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--groups", type=lambda s: tuple(s.split(",")), default=GROUPS, help="of " + ",".join(GROUPS))
    parser.add_argument("--quick", action="store_true", help="the first case of each group only")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what Inductor compiles")
    parser.add_argument("--budget", type=float, default=540, help="seconds; cases that would begin later are cut")
    parser.add_argument("--grace", type=float, default=60, help="seconds past the budget for a case that has begun")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="of the rounds of one case")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help="the end of the budget as seconds since 1970")
    args = parser.parse_args(argv)
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"unknown group {', '.join(sorted(unknown))}; known: {', '.join(GROUPS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
