"""Builds dcdit_kernels._C from csrc/ (by ninja, if there): always for the CPU, for CUDA as well where nvcc is found.

DCDIT_CUDA_ARCHS   compute capabilities such as "80;90;100"; "none" builds for the CPU alone. Code for newer GPUs comes
                   from the PTX of the last one. Where it is not set, a CUDA part that does not compile is left out.
CXX, CUDA_HOME     the C++ compiler, and the CUDA toolkit where nvcc is not on PATH.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
ARCHS = ("80", "90", "100")
CPU_LOOPS = ("chunk", "cosine", "dechunk", "group_norm", "modulate", "plan")
SOURCES = ["bindings.cpp", *(f"{name}_cpu.cpp" for name in CPU_LOOPS)]
CUDA_SOURCES = ["plan_cuda.cu", "rows_cuda.cu"]
Step = tuple[str, list[Path], Path]  # command with $in and $out, inputs, output


def say(text: str) -> None:
    print(f"dcdit: {text}", flush=True)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)])
    return shutil.which("nvcc", path=places)


def cuda_archs(nvcc: str) -> list[str]:
    """What DCDIT_CUDA_ARCHS asks for, else those of ARCHS that this nvcc knows; empty for none."""
    asked = os.environ.get("DCDIT_CUDA_ARCHS")
    if asked is not None:
        return [arch.replace(".", "") for arch in asked.replace(",", ";").split(";") if arch not in ("", "none")]
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ARCHS if f"compute_{arch}" in known]


def steps(
    folder: Path, target: Path, cxx: str, nvcc: str | None, archs: list[str]
) -> list[tuple[str, list[Path], Path]]:
    """Every step of the build, in order."""
    flags = "-O3 -std=c++17 -fPIC -fvisibility=hidden"
    defines = f'-DDCDIT_CUDA_ARCHS=\\"{",".join(archs)}\\"' + " -DDCDIT_CUDA" * bool(archs)
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs[-1:]]
    undefined = " -undefined dynamic_lookup" if sys.platform == "darwin" else ""
    compilers = {
        ".cpp": f"{cxx} {flags} {defines} {includes} -pthread -MMD -MF $out.d -c $in -o $out",
        ".cu": f"{nvcc} -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden -DDCDIT_CUDA {' '.join(code)} "
        "-MMD -MF $out.d -c $in -o $out",
    }
    link = f"{nvcc} -shared -cudart static" if archs else f"{cxx} -shared{undefined} -pthread"
    sources = [ROOT / "csrc" / name for name in SOURCES + CUDA_SOURCES * bool(archs)]
    compile_steps = [(compilers[path.suffix], [path], folder / f"{path.name}.o") for path in sources]
    return [*compile_steps, (f"{link} $in -ldl -o $out", [out for _, _, out in compile_steps], target)]


def write_ninja(folder: Path, todo: list[Step]) -> Path:
    """The steps as a build file."""
    lines = [f"builddir = {escaped(folder)}"]
    for number, (command, inputs, out) in enumerate(todo):
        lines += [f"rule step{number}", f"  command = {command}"]
        lines += ["  depfile = $out.d"] * ("-MMD" in command)
        lines.append(f"build {escaped(out)}: step{number} {' '.join(map(escaped, inputs))}")
    file = folder / "build.ninja"
    file.write_text("\n".join(lines) + "\n")
    return file


def escaped(path: Path) -> str:
    return str(path.resolve()).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cxx, nvcc = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++"), find_nvcc()
        if cxx is None:
            raise CompileError("no C++ compiler (c++, g++ or $CXX): dcdit_kernels runs without its extension")
        asked = os.environ.get("DCDIT_CUDA_ARCHS")
        archs = cuda_archs(nvcc) if nvcc else []
        if nvcc is None and asked not in (None, "", "none"):
            raise SystemExit(f"dcdit: DCDIT_CUDA_ARCHS={asked} needs nvcc, which is neither on PATH nor in CUDA_HOME")
        cuda = f"CUDA {', '.join(archs)} + PTX with {nvcc}" if archs else "without CUDA"
        why = "" if archs else " (no nvcc on PATH or in CUDA_HOME)" if nvcc is None else f" (DCDIT_CUDA_ARCHS={asked})"
        say(f"building dcdit_kernels._C with {cxx} for the CPU, {cuda}{why}")
        try:
            self.make(ext, cxx, nvcc, archs)
        except subprocess.CalledProcessError:
            if not archs or asked is not None:
                raise SystemExit("dcdit: the extension does not compile; see above") from None
            say("the CUDA part does not compile here (see above): building for the CPU alone")
            self.make(ext, cxx, None, [])
        say(f"built {self.get_ext_fullpath(ext.name)}")

    def make(self, ext: Extension, cxx: str, nvcc: str | None, archs: list[str]) -> None:
        folder, target = Path(self.build_temp), Path(self.get_ext_fullpath(ext.name))
        for path in (folder, target.parent):
            path.mkdir(parents=True, exist_ok=True)
        todo = steps(folder, target, cxx, nvcc, archs)
        if shutil.which("ninja"):
            subprocess.run(["ninja", "-f", str(write_ninja(folder, todo))], check=True)
            return
        say("no ninja: one step after another")  # pip brings it; a machine that builds in place may have none
        for command, inputs, out in todo:
            paths = {"$in": " ".join(shlex.quote(str(path)) for path in inputs), "$out": shlex.quote(str(out))}
            for name, value in paths.items():
                command = command.replace(name, value)
            subprocess.run(command, shell=True, check=True)


# Optional: without a compiler the rest is installed, and says at the first call what is missing.
setup(
    license="Apache-2.0",
    ext_modules=[Extension("dcdit_kernels._C", [f"csrc/{name}" for name in SOURCES], optional=True)],
    cmdclass={"build_ext": Build},
)
