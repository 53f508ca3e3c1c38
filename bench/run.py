"""python -m bench.run: measure the cases of this machine into bench/results/<machine>-<date>.json.

The measuring runs in a separate process that writes the file after every case. Where it dies (a fault on the GPU
takes the process with it) the case is recorded as crashed and the rest goes on in a fresh one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .arguments import positive, several
from .cases import GROUPS, Case, compiled_too, select
from .lists import LISTS, at_hand
from .machine import ROOT, describe, rates

RESULTS = ROOT / "bench" / "results"


Task = tuple[Case, tuple[str, ...] | None, bool]  # a case, the variants to time (None: all), and whether to compile


def tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks in order. Compiled variants come last, as a second pass over their cases."""
    if args.cases:
        wanted = [item for name in args.cases for item in at_hand(LISTS[name](), args.device)]
        found = [(case, names, any("compiled" in name for name in names)) for case, names in wanted]
    else:
        cases = select(args.device, args.groups, args.quick)
        found = [(case, None, False) for case in cases]
        found += [(case, None, True) for case in cases if compiled_too(case, args.device)]
    return [task for task in found if args.compile or not task[2]]


def key(case: Case, compiled: bool) -> str:
    """The name of a task while it runs."""
    return case.name + " compiled" * compiled


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.run: this Python's torch sees no GPU", file=sys.stderr)
        return 2
    header = describe(args.device)
    output = args.output or unused(header)
    before = json.loads(output.read_text()) if output.exists() else {}
    if before.get("stages"):  # stages of `bench.gpu` are not the work of others
        header["load"] = before["load"]
    kept = {"stages": before.get("stages"), "rates": before.get("rates"), "cases": before.get("cases", [])}
    write(output, {**header, **kept, "current": None})
    deadline = args.deadline or min(time.time() + args.budget, (args.end or math.inf) - args.grace)
    command = [sys.executable, "-m", "bench.run", *(argv if argv is not None else sys.argv[1:])]
    command += ["--worker", "--output", str(output), "--deadline", str(deadline)]
    while True:
        # A case that has begun may finish; one that hangs may not.
        begin = time.time()
        try:
            limit = max(1, deadline + args.grace - begin)
            status = subprocess.run(command, cwd=ROOT, timeout=limit, env=quiet()).returncode
        except subprocess.TimeoutExpired:
            status = "timeout"
        result = json.loads(output.read_text())
        if result["current"] is None:
            break
        name, since = result["current"], result.pop("since", begin)
        reason = f"the process ended with status {status} after {time.time() - since:.0f} s"
        reason = "; ".join([reason, *result.pop("failed", [])[:1]])
        print(f"{name}: crashed, {reason}", flush=True)
        result["cases"].append({"name": name, "crashed": reason})
        result["current"] = None
        write(output, result)
        if status == "timeout":
            break
    done = finished(result)
    cut = [key(case, compiled) for case, _, compiled in tasks(args) if key(case, compiled) not in done]
    write(output, {**result, "cut": cut} if cut else result)
    print(output)
    return 0 if status == 0 else 1


def finished(result: dict) -> set[str]:
    """The tasks that the file has a result of, crashes among them."""
    names = {entry["name"] for entry in result["cases"]}
    return names | {f"{entry['name']} compiled" for entry in result["cases"] if entry.get("compiled")}


def unused(header: dict) -> Path:
    """bench/results/<machine>-<date>.json, numbered where an earlier run of the day has the name."""
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
    """Measure the tasks that the file lacks, until the deadline."""
    from .headline import component_times, outside_products
    from .measure import count_launches, measure
    from .parts import training_parts

    deadline = args.deadline
    if args.device == "cuda":  # the cases take all that they get, and their launches are counted afterwards
        deadline -= min(0.1 * (deadline - time.time()), 12)
    result = json.loads(args.output.read_text())
    result["rates"] = faster(result["rates"], rates(args.device))
    done, todo = finished(result), tasks(args)
    for case, names, compiled in todo:
        if key(case, compiled) in done:
            continue
        if time.time() > deadline:
            break
        write(args.output, {**result, "current": key(case, compiled), "since": time.time()})
        with limited(args.limit):
            begin = time.time()
            entry = measure(case, args.device, compiled, args.rounds, args.seconds, names)
            if case.group == "forward" and not compiled:
                entry["components_s"] = component_times(case, args.device)
                if args.device == "cpu":
                    entry["outside_products"] = outside_products(case)
            if case.group == "train" and entry["variants"]["dcdit"]["status"] == "ok":
                entry["components_s"] = training_parts(case, args.device, entry["variants"]["dcdit"]["seconds"])
            if args.device == "cuda":
                failed = [f"{name}: {v['reason']}" for name, v in entry["variants"].items() if v["status"] == "failed"]
                write(args.output, {**json.loads(args.output.read_text()), "failed": failed})
                torch.cuda.synchronize()  # a fault ends the process here, before the next case
                gc.collect()
                torch.cuda.empty_cache()
        entry["wall_s"] = round(time.time() - begin, 2)
        merge(result["cases"], entry | {"compiled": compiled})
        write(args.output, result)
        print(summary(entry), flush=True)
    measured = {entry["name"]: entry for entry in result["cases"] if "variants" in entry}
    counted: set[str] = set()
    for case, names, compiled in todo if args.device == "cuda" else []:
        if case.name in measured and case.group not in counted and time.time() < args.deadline:
            counted.add(case.group)
            count_launches(measured[case.name], compiled, names)
            write(args.output, result)
    write(args.output, {**result, "rates": faster(result["rates"], rates(args.device))})


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """A block that hangs says where, and ends the process."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def merge(entries: list[dict], entry: dict) -> None:
    """Add an entry, in the place of an earlier one of the case, keeping its further findings."""
    for number, earlier in enumerate(entries):
        if earlier["name"] == entry["name"]:
            entries[number] = {**earlier, **entry}
            return
    entries.append(entry)


def faster(old: dict | None, new: dict) -> dict:
    """The better of two measurements of the machine's rates, which nothing but other work can lower."""
    if old is None:
        return new
    best = {dtype: max(rate, new["matmul_flops_per_s"][dtype]) for dtype, rate in old["matmul_flops_per_s"].items()}
    return {"copy_bytes_per_s": max(old["copy_bytes_per_s"], new["copy_bytes_per_s"]), "matmul_flops_per_s": best}


def summary(entry: dict) -> str:
    """One line: milliseconds, or the fault."""
    parts = [
        f"{name} {v['seconds'] * 1e3:.3g} ms" if v["status"] == "ok" else f"{name} FAILED ({v['reason'][:90]})"
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
    parser.add_argument("--groups", type=several("group", GROUPS), default=GROUPS, help="of " + ",".join(GROUPS))
    parser.add_argument(
        "--cases", type=several("list", LISTS), help="named lists in place of groups: " + ",".join(LISTS)
    )
    parser.add_argument("--quick", action="store_true", help="the first case of each group only")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what Inductor compiles")
    parser.add_argument("--budget", type=float, default=540, help="seconds; cases that would begin later are cut")
    parser.add_argument("--grace", type=float, default=60, help="seconds past the budget for a case that has begun")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one case; a fresh process goes on")
    parser.add_argument("--rounds", type=positive, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="of the rounds of one case")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--end", type=float, help="seconds since 1970 at which all is over, whatever the budget")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
