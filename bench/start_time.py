"""python -m bench.start_time: processor seconds of commands that compute nothing, beside their limits.

Whole processes, and the least of the rounds, for other work on the machine only adds. `import torch` stands beside:
most of `info` is that. Exits with 1 where one is above its limit.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Sequence

from .arguments import positive
from .machine import ROOT

# Name → what Python runs, and seconds.
LIMITS = {
    "dcdit --help": ("-m dcdit --help", 0.5),
    "dcdit sample --help": ("-m dcdit sample --help", 0.5),
    "dcdit info DC-DiT-XL/N4": ("-m dcdit info DC-DiT-XL/N4", 2.0),
    "import torch": ("-m torch.version", float("inf")),
}


def processor_seconds(command: Sequence[str]) -> float:
    """User and system time of one process, its output thrown away. Raises CalledProcessError where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main(argv: list[str] | None = None) -> int:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(prog="python -m bench.start_time", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=5, help="of all commands in turn (5)")
    rounds = range(parser.parse_args(argv).rounds)
    taken = [[processor_seconds([sys.executable, *words.split()]) for words, _ in LIMITS.values()] for _ in rounds]
    late = 0
    for (name, (_, limit)), times in zip(LIMITS.items(), zip(*taken, strict=True), strict=True):
        late += min(times) > limit
        allowed = f"of {limit:g}" if limit < float("inf") else ""
        print(f"{name:<28}{min(times):8.3f} s {allowed}{': too long' if min(times) > limit else ''}".rstrip())
    return int(late > 0)


if __name__ == "__main__":
    sys.exit(main())
