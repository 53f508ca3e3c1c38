"""The C++ and CUDA sources: every kernel compiles without spills, and the CPU build runs clean under sanitizers."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

from bench.gpu import check_plan_command

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
CXX = shutil.which("g++")


@pytest.mark.skipif(NVCC is None, reason="nvcc is neither on PATH nor in /usr/local/cuda")
@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("*.cu")))
def test_kernels_compile_without_spills(source, tmp_path):
    """For sm_80, sm_90, sm_100 and as PTX: nothing in local memory, and registers for a full block of 1024 threads."""
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)]
    code.append("-gencode=arch=compute_100,code=compute_100")
    command = [NVCC, "-O3", "-std=c++17", "-DDCDIT_CUDA", "--threads=2", "-Xptxas=-v", *code, "-c", source]
    run = subprocess.run([*command, "-o", tmp_path / "out.o"], cwd=CSRC, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = run.stdout + run.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", report)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    in_source = len(re.findall(r"__global__", (CSRC / source).read_text()))
    assert {arch for _, arch in kernels} == {"sm_80", "sm_90", "sm_100"} and len(kernels) >= 3 * in_source > 0
    assert len(memory) >= len(kernels) and len(registers) == len(kernels)
    assert set(memory) == {("0", "0", "0")} and max(registers) <= 64, report
    assert "warning" not in report, report


EXERCISE = """
import math
import torch
import dcdit_kernels as K
from dcdit_kernels import extension, reference
assert extension.load_error is None, extension.load_error
assert extension._C.__file__.startswith({folder!r}), extension._C
torch.manual_seed(0)
torch.set_num_threads(2)
extension.CELLS_PER_THREAD = extension.BYTES_PER_THREAD = 1  # threads from the first cell on
for grid in [(7, 9), (1, 13), (5, 1), (2, 3, 4), (3, 4, 5), (17,), (1, 1)]:
    for share in (0.0, 0.3):
        prob = torch.rand(5, math.prod(grid)) * 0.5 + 0.5 * (torch.rand(5, math.prod(grid)) < share)
        third = torch.arange(5 * math.prod(grid)).view(5, -1) % 3
        masks = {{"keep": third == 1, "ban": third == 2}} if share else {{}}
        for kind in (f"{{len(grid)}}d", "previous"):
            for capacity in (None, 0, 7, 500):
                for dtype in (torch.float32, torch.float64):
                    for block in (1, 64):
                        drop = (0.3, 0.5, kind, capacity)
                        plan = extension.plan_chunks(prob.to(dtype), grid, *drop, **masks, block=block)
                want = reference.plan_chunks(prob.double(), grid, 0.3, 0.5, kind, capacity, **masks)
                assert torch.equal(plan.nearest, want.nearest) and torch.equal(plan.member_index, want.member_index)
                for x in (torch.randn(5 * plan.cells, 3), torch.randn(5 * plan.cells, 2, 5)[:, 1]):
                    packed = extension.pack_rows(x, plan.token_index)
                    assert torch.equal(packed, reference.pack_rows(x, plan.token_index))
                    extension.unpack_rows(packed, plan.token_index, 5 * plan.cells)
                x = torch.randn(plan.capacity, 5, requires_grad=True)
                K.dechunk(x, prob, plan, backend="native").sum().backward()
                modulators = torch.randn(5, 15, requires_grad=True).chunk(3, dim=1)
                for out in K.gate_residual_modulate(x, x, *modulators, plan, backend="native"):
                    out.sum().backward(retain_graph=True)
                K.adaln_modulate(x, *modulators[1:], plan, backend="native").sum().backward()
print("clean")
"""


def run_compiler(*arguments):
    run = subprocess.run([CXX, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="needs g++ on Linux")
def test_sanitizers(tmp_path):
    """Every address and every integer of the CPU build, in both block sizes; torch's own buffers have red zones too."""
    package = tmp_path / "dcdit_kernels"
    shutil.copytree(ROOT / "dcdit_kernels", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = []
    for source in sorted(CSRC.glob("*.cpp")):
        # The bindings are pybind11's code, slow to compile: they only have to load.
        how = ["-O0"] if source.name == "bindings.cpp" else ["-O1", "-g1", "-Wall", "-Wextra", "-Werror", *sanitize]
        objects.append(tmp_path / f"{source.stem}.o")
        run_compiler("-std=c++17", "-fPIC", '-DDCDIT_CUDA_ARCHS=""', *how, *includes, "-c", source, "-o", objects[-1])
    target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    run_compiler("-shared", "-pthread", *sanitize, *objects, "-o", target, "-ldl")
    library = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("this g++ has no libasan")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "LD_PRELOAD": library}
    env |= {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "1"}
    script = EXERCISE.format(folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.endswith("clean\n"), run.stdout[-2000:] + run.stderr[-6000:]


@pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="needs g++ on Linux")
def test_plans_of_blocks_agree(tmp_path):
    """The block algorithms in any order of their threads, and on real threads that meet only at the barriers."""
    program, sources = tmp_path / "check_plan", [ROOT / "tests/check_plan.cpp", CSRC / "plan_cpu.cpp"]
    run_compiler(
        "-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=thread", f"-I{CSRC}", *sources, "-o", program, "-ldl"
    )
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    run = subprocess.run([program], capture_output=True, text=True, env=env)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this g++'s ThreadSanitizer cannot place its shadow under this kernel")
    assert run.returncode == 0 and run.stdout.startswith("clean: "), run.stdout + run.stderr[-6000:]


@pytest.mark.skipif(NVCC is None, reason="nvcc is neither on PATH nor in /usr/local/cuda")
def test_plan_check_builds_for_a_gpu(tmp_path):
    """As `python -m bench.gpu` builds it; without a GPU it says so."""
    program = tmp_path / "check_plan"
    build = subprocess.run(
        [*check_plan_command("90", nvcc=NVCC), "-o", program], cwd=ROOT, capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    run = subprocess.run([program], capture_output=True, text=True)
    assert (run.returncode, run.stdout[:6]) in ((0, "clean:"), (2, "CUDA: ")), run.stdout
