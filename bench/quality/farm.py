"""Calls of bench.quality side by side on one GPU, within a limit: python -m bench.quality.farm LIST --limit SECONDS

LIST has the arguments of a call on each line; # begins a comment. Their steps are N, 0.4N and the like, N being as many
as fit: all calls are made for some seconds first, which also fills the compilers' caches, and their rates side by side
say how many. A call that fails in this is taken apart into calls of one variant each. Calls that are in training when
the time is nearly over stop, and are judged as they are, all variants of a call at one step.

What came is packed into OUT/quality.tar.gz: the lines of the results; losses, pictures and a log of each call.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from ..arguments import existing

ROOT = Path(__file__).parents[2]
CALL = (sys.executable, "-m", "bench.quality")
LEAST, MOST = 2000, 40_000  # steps: where there is no rate, and at most
SHARE = 0.95  # of the steps that a rate promises: a run that is cut off ends with a high learning rate
START = 20  # seconds of a call before its first step, its compilers' caches being full


def main() -> None:
    """See the module."""
    begin = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=existing)
    parser.add_argument("--limit", type=float, required=True, help="seconds of the whole")
    parser.add_argument("--probe", type=float, default=60, help="of these, seconds for the rates at most")
    parser.add_argument("--judging", type=float, default=50, help="of these, seconds to draw and judge in at the end")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/quality")))
    args = parser.parse_args()
    lines = [line.split("#")[0] for line in args.list.read_text(encoding="utf-8").splitlines()]
    calls = [shlex.split(line) for line in lines if line.strip()]
    end = begin + args.limit

    tries = [[*with_steps(words, str(MOST)), "--samples", "0"] for words in calls]
    whole = begin + args.probe
    status = side_by_side(tries, args.out / "probe", whole - 10, whole)
    rates = [rate(args.out / "probe" / f"{i}") for i in range(len(calls))]
    print("steps/s", [round(value) for value in rates], f"after {time.time() - begin:.0f} s", flush=True)
    left = SHARE * (end - time.time() - args.judging - START)
    fits = [left * value / share_of(words) for words, value in zip(calls, rates, strict=True) if value]
    most = int(min([MOST, *(fits or [LEAST])])) // 100 * 100 or 100

    final = []
    for i, words in enumerate(calls):
        words = with_steps(words, str(int(share_of(words) * most)))
        count = next(n for n, word in enumerate(words) if word.startswith("--"))
        failed = status[i] not in (0, "killed")
        final += [[name, *words[count:]] for name in words[:count]] if failed else [words]
    print(f"N = {most}: {len(final)} calls", flush=True)
    side_by_side(final, args.out / "runs", end - args.judging, end)
    pack(args.out)


def share_of(words: list[str]) -> float:
    """The steps of a call as its line says them, in N."""
    return float(words[words.index("--steps") + 1].removesuffix("N") or 1)


def with_steps(words: list[str], steps: str) -> list[str]:
    """A call with other steps."""
    place = words.index("--steps") + 1
    return [*words[:place], steps, *words[place + 1 :]]


def rate(runs: Path) -> float:
    """Steps per second of a call's first run in the later half of its steps."""
    file = next(runs.glob("*/*/metrics.jsonl"), None)
    lines = [] if file is None else [json.loads(line) for line in file.read_text().splitlines()]
    found = sorted(line["steps_per_s"] for line in lines[len(lines) // 2 :])
    return found[len(found) // 2] if len(lines) > 1 else 0.0


def side_by_side(calls: list[list[str]], out: Path, until: float, end: float) -> dict[int, int | str]:
    """Make calls at once, which train until `until` and are killed at `end`; the status of each."""
    out.mkdir(parents=True, exist_ok=True)
    running, ended, begin = {}, dict[int, int | str](), time.time()
    for i, words in enumerate(calls):
        runs = out / f"{i}"
        runs.mkdir(exist_ok=True)
        for file in out.parent.glob("*-classifier.pt"):
            (runs / file.name).write_bytes(file.read_bytes())
        common = ["--runs", str(runs), "--results", str(runs / "quality.jsonl"), "--until", f"{until:.0f}"]
        with open(out / f"{i}.log", "w", encoding="utf-8") as log:
            running[i] = subprocess.Popen(
                [*CALL, *words, *common, "--device", "cuda"],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
    while running:
        for i, process in list(running.items()):
            status = process.poll()
            if status is None and time.time() > end:
                os.killpg(process.pid, signal.SIGKILL)
                status = "killed"
            if status is not None:
                ended[i] = status
                print(f"{out.name} {i}: {status} after {time.time() - begin:.0f} s, {shlex.join(calls[i])}", flush=True)
                if status:
                    print((out / f"{i}.log").read_text(errors="replace")[-600:], flush=True)
                del running[i]
        time.sleep(0.1)
    return ended


def pack(out: Path) -> None:
    """Put what is to be kept into one archive."""
    wanted = ("*.log", "*/quality.jsonl", "*/*/*/metrics.jsonl", "*/*/*/pictures.png")
    with tarfile.open(out / "quality.tar.gz", "w:gz") as archive:
        for file in sorted(
            file for folder in ("runs", "probe") for kind in wanted for file in (out / folder).glob(kind)
        ):
            archive.add(file, file.relative_to(out))


if __name__ == "__main__":
    main()
