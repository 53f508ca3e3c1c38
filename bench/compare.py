"""make bench-compare BASE=<git ref>: the operators of this tree against those of another commit.

Both sides run this tree's bench/, each in a separate process with separate packages; a round asks one, then the other,
so that drift hits both. Prints the time of this tree over that of BASE; the exit status is 1 where one got slower.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from .arguments import add_device, positive, several
from .cases import GROUPS, Case, select
from .gate import check, one_line
from .machine import ROOT
from .measure import build, count
from .run import quiet
from .timing import clock_of, make_call, ratios

SLOWER = 1.05  # a lower quartile above this is a regression
ORDER = ("dcdit", "native", "triton", "reference")  # a user gets the first that runs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="git ref to compare with")
    add_device(parser)
    parser.add_argument("--groups", type=several("group", GROUPS), default=GROUPS)
    parser.add_argument("--rounds", type=positive, default=15)
    args = parser.parse_args(argv)
    slower = 0
    with checkout(args.base) as tree, Side(ROOT, args.device) as ours, Side(tree, args.device) as base:
        for group in args.groups:
            for case in select(args.device, (group,))[:2]:
                verdict, line = compare(case, base, ours, args.rounds)
                slower += verdict == "SLOWER"
                print(f"{case.name}: {line} {verdict}", flush=True)
    return 1 if slower else 0


def compare(case: Case, base: Side, ours: Side, rounds: int) -> tuple[str, str]:
    """(verdict, measurement) of one case. A tree that cannot be measured now counts as slower."""
    before, now = base.ask(case), ours.ask(case)
    if "error" in now:
        return "SLOWER", f"here {now['error']}"
    if "error" in before:
        return "new", f"base {before['error']}"
    pairs = [(base.ask(None)["seconds"], ours.ask(None)["seconds"]) for _ in range(rounds)]
    middle, low, high = ratios([b for _, b in pairs], [a for a, _ in pairs])
    names = " → ".join(dict.fromkeys((before["variant"], now["variant"])))
    verdict = "SLOWER" if low > SLOWER else "faster" if high < 1 / SLOWER else "same"
    return verdict, f"{names}, {1e3 * min(b for _, b in pairs):.3g} ms, × {middle:.2f} ({low:.2f}–{high:.2f})"


@contextlib.contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A worktree of `ref` with this tree's bench/, its extension built where this tree's is; removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="bench-base-"))
    git = ["git", "-C", str(ROOT), "worktree"]
    try:
        subprocess.run([*git, "add", "--detach", str(folder / "tree"), ref], check=True, capture_output=True, text=True)
        tree = folder / "tree"
        shutil.rmtree(tree / "bench", ignore_errors=True)
        shutil.copytree(ROOT / "bench", tree / "bench")
        if list((ROOT / "dcdit_kernels").glob("_C*.so")) and list((tree / "csrc").glob("*.cpp")):
            subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True)
        yield tree
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"bench-compare: {' '.join(error.cmd)} failed: {error.stderr or ''}".strip()) from error
    finally:
        subprocess.run([*git, "remove", "--force", str(folder / "tree")], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


class Side:
    """A process that measures on one tree: give it a case to build, then None for each sample."""

    def __init__(self, tree: Path, device: str) -> None:
        command = [sys.executable, "-c", "from bench.compare import serve; serve()", device]
        self.process = subprocess.Popen(
            command, cwd=tree, env={**quiet(), "PYTHONPATH": str(tree)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()

    def ask(self, case: Case | None) -> dict:
        print(json.dumps(case and asdict(case)), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("reply "):
                return json.loads(line.removeprefix("reply "))
        raise SystemExit(f"bench-compare: the measuring process ended with status {self.process.wait()}")


def serve() -> None:
    """Answer one line of JSON for each line on standard input."""
    clock = None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked is None:
            reply = {"seconds": clock()}
        else:
            try:
                name, clock = prepare(Case(**asked), sys.argv[1])
                reply = {"variant": name}
            except Exception as error:  # the other side has to hear of it
                reply = {"error": one_line(error)}
        print("reply " + json.dumps(reply), flush=True)


def prepare(case: Case, device: str) -> tuple[str, Callable[[], float]]:
    """The variant that a user would get, and its clock. Raises ValueError where it misses the gate."""
    problem = build(case, device)
    name = next(name for name in ORDER if name in problem.variants)
    wrong = check(problem)[name]
    if wrong:
        raise ValueError(wrong)
    syncs = count(make_call(problem.variants[name], problem.inputs, problem.backward), device)["syncs"]
    return name, clock_of(problem, name, device, syncs)[0]


if __name__ == "__main__":
    sys.exit(main())
