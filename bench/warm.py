"""python -m bench.warm --cases decisive: fill the compilers' caches, a process for each case, one on each core.

Each process runs a case once, as the gate does and as the timing does; later launches find it compiled. Triton's
kernels do not depend on the batch above 1, and a backward pass has a forward in front: of cases that differ in nothing
else one is run. A case that fails costs itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from .arguments import add_device, several
from .cases import Case
from .lists import LISTS, Wanted, at_hand
from .machine import ROOT

OURS = ("triton", "dcdit")


def todo(lists: list[str], device: str) -> list[Wanted]:
    """The cases to run, with their compiling variants."""
    found: dict[object, Wanted] = {}
    for name in lists:
        for case, names in at_hand(LISTS[name](), device):
            compiled = any("compiled" in name for name in names)
            ours = tuple(n for n in names if ("compiled" in n if compiled else n in OURS or case.ablation))
            few = min(case.batch, 2)  # a batch of one has another layout
            alike = dataclasses.replace(case, batch=few, drop_fraction=0.0, backward=False, clustered=False)
            kind = case if compiled else alike
            earlier = found[kind][0] if kind in found else None
            if ours and (earlier is None or (earlier.backward, earlier.batch) < (case.backward, case.batch)):
                found[kind] = case, ours
    return list(found.values())


def warm(case: Case, names: tuple[str, ...], device: str) -> None:
    """Run each variant once as the gate does and once as it is timed."""
    from .gate import evaluate, full_float32, one_line
    from .measure import build
    from .timing import make_call

    problem = build(case, device, any("compiled" in name for name in names))
    for name in names:
        if name not in problem.variants:
            continue
        try:
            variant = problem.variants[name]
            with full_float32():
                evaluate(variant, problem.inputs, problem.backward)
            make_call(variant, problem.inputs, problem.backward)()
        except Exception as error:  # the benches run it again, and record this
            print(f"{case.name}, {name}: {one_line(error)}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.warm", description=__doc__.splitlines()[0])
    add_device(parser, "cuda")
    parser.add_argument("--cases", type=several("list", LISTS), required=True, help="of " + ",".join(LISTS))
    parser.add_argument("--only", type=int, help="the case of this number, in this process")
    args = parser.parse_args(argv)
    wanted = todo(args.cases, args.device)
    if args.only is not None:
        warm(*wanted[args.only], args.device)
        return 0
    command = [sys.executable, "-m", "bench.warm", "--device", args.device, "--cases", ",".join(args.cases)]
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1", **os.environ}

    def run(number: int) -> int:
        status = subprocess.run([*command, "--only", str(number)], cwd=ROOT, env=env).returncode
        print(f"{wanted[number][0].name}: {'warm' if status == 0 else f'status {status}'}", flush=True)
        return status

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return int(any(pool.map(run, range(len(wanted)))))


if __name__ == "__main__":
    sys.exit(main())
