"""Triton's kernels as its compiler makes them for four GPUs, without one: registers, spills, loads, instructions."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

# kernel → (gate, norm) → elements that it moves for each of a row, at XL with a quarter of the cells kept.
PASSES = {
    "modulate_forward": lambda gate, norm: 1 + 2 * gate + norm,
    "modulate_backward": lambda gate, norm: 3 * gate + 3 * norm + (gate and not norm),
    "chunk_forward": lambda *_: 2,
    "chunk_backward": lambda *_: 1 + 0.25,
    "mean_backward": lambda *_: 1 + 0.25,
    "plug_forward": lambda *_: 1 + 2 + 0.25 * 2,  # residual and rows in float32
}


def bytes_moved(row):
    """By a program that runs once, or one trip of a loop, in bfloat16."""
    gate, norm, rows = (row["constants"].get(name, 0) for name in ("GATE", "NORM", "ROWS"))
    return PASSES[row["kernel"]](gate, norm) * rows * 1152 * 2


AOT = "bfloat16,32,32,1152,.25", "float32,7,9,72,.25"


def lines_of(name, *args):
    """The lines that a script beside this file prints; Triton's compiler and its interpreter exclude each other."""
    if sys.platform != "linux":
        pytest.skip("Triton's compiler runs on Linux only")
    script = Path(__file__).parent / name
    done = subprocess.run(
        [sys.executable, script, *args],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled():
    """The rows of tests/compile_kernels.py for every launch at AOT."""
    return lines_of("compile_kernels.py", *AOT, "--count", ",".join(PASSES))


def test_no_step_after_the_first_meets_a_compiler():
    """Whatever becomes of the batch and its tokens; none is among them."""
    first, *later = lines_of("count_compilations.py")
    assert first > 30 and len(later) == 9 and not any(later)


def test_every_launch_compiles_ahead_of_time(compiled):
    """sm_80, sm_90, sm_100 and gfx942: no spills, 64-bit row offsets, 16-byte loads where rows allow them."""
    assert {row["target"] for row in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    narrow = {"prob_backward", "locate_rows"}  # move one number a cell
    for row in compiled:
        assert row["spills"] == 0, row
        assert row["i64_products"] > 0 or row["kernel"] in narrow, row
        if row["case"] == AOT[0] and row["target"] != "gfx942":
            assert row["loads_16B"] > 0 or row["kernel"] == "locate_rows", row


def test_instructions_counted_ahead_of_time_leave_room(compiled):
    """An H200 issues 132·4 warp instructions a cycle, 0.93·10¹² a second at 1.755 GHz: at the 4.2 TB/s that copies may
    reach, one for every 4.5 bytes. A kernel that moves fewer a instruction cannot keep up with its memory."""
    seen = set()
    for row in compiled:
        if "instructions" in row and bytes_moved(row):
            columns = math.ceil(1152 / 512) if any(part in row["kernel"] for part in ("chunk", "mean", "plug")) else 1
            issued = (
                row["warps"] * columns * (row["loop"] if row["kernel"] == "modulate_backward" else row["instructions"])
            )
            assert bytes_moved(row) / issued > 4.5, row
            seen.add(row["kernel"])
    assert len(seen) == 6
