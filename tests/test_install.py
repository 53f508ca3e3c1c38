"""The sources install anywhere: from an sdist, without torch, without a compiler, where CUDA does not compile."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BUILD = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "-v"]


def run(*command, check=True, **options):
    options = {"env": environment(), **options}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def environment(**extra):
    """Ours, less the variables that show the sources or the settings of this run."""
    hidden = ("PYTHONPATH", "DCDIT_CUDA_ARCHS", "DCDIT_BACKEND", "TRITON_INTERPRET")
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, **extra}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked sdist: files outside of it cannot help the build."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    ignore = shutil.ignore_patterns(
        ".*", "build", "*.egg-info", "*.so", "__pycache__", "tests", "docs", "bench", "demo"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('..')", cwd=tree)
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder / "out")
    return next((folder / "out").iterdir())


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """Makes an empty environment: no torch, no setuptools, no pip."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        return folder / "bin" / "python"

    return make


def show_torch(python):
    """The folder of packages that has torch, after the environment's own: ours may be installed there as well."""
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(own, "torch.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")


def wheel(sdist, out, **env):
    """(the wheel, the build's output), with this environment's setuptools, pybind11 and ninja."""
    shutil.copytree(sdist, out / "sources")  # leftovers of an earlier build must not be taken
    done = run(*BUILD, "--no-build-isolation", "-w", out, out / "sources", env=environment(**env))
    return next(out.glob("*.whl")), done.stdout + done.stderr


def extensions(path):
    return [name for name in zipfile.ZipFile(path).namelist() if name.startswith("dcdit_kernels/_C")]


def test_sdist_without_torch(sdist, venv, compiler, tmp_path):
    """Into an empty environment; torch is missed by name, and with torch in sight the extension runs."""
    path, said = wheel(sdist, tmp_path, DCDIT_CUDA_ARCHS="none", CXX=compiler)
    assert "for the CPU, without CUDA (DCDIT_CUDA_ARCHS=none)" in said and len(extensions(path)) == 1
    python = venv("empty")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", path)
    missed = run(python, "-c", "import dcdit_kernels", check=False, cwd=tmp_path)
    assert missed.returncode == 1 and "No module named 'torch'" in missed.stderr
    show_torch(python)
    told = run(python, "-m", "dcdit_kernels", cwd=tmp_path).stdout
    assert f"extension: {python.parent.parent}" in told and "CPU only" in told
    assert "plan_chunks: native" in told and "flash-attn 2" in told


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """A C++ compiler that does not optimise and keeps its outputs: both builds for the CPU have the same steps."""
    kept = tmp_path_factory.mktemp("kept")
    cxx = shutil.which("c++") or "g++"
    find = f'for last; do :; done; made={kept}/$(basename "$last")'
    return script(
        kept / "c++", f'{find}; [ -e "$made" ] && cp "$made" "$last" || {{ {cxx} "$@" -O0 && cp "$last" "$made"; }}'
    )


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler_and_cuda_that_does_not_compile(sdist, tmp_path):
    """Without a compiler the rest is installed; a CUDA part that does not compile is left out, unless asked for.

    The compilers are stand-ins: the build's reaction to their answers is tried.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("ninja", "sh", "touch"):
        (tools / tool).symlink_to(shutil.which(tool))
    path, said = wheel(sdist, tmp_path / "a", PATH=str(tools), CXX="")
    assert "no C++ compiler" in said and extensions(path) == []

    obeys = script(tmp_path / "c++", 'for last; do :; done; touch "$last"')  # its last argument is the output
    refuses = '[ "$1" = --list-gpu-arch ] && echo compute_90 && exit 0; echo unsupported GNU version; exit 1'
    script(tmp_path / "cuda/bin/nvcc", refuses)
    broken = {"PATH": str(tools), "CXX": obeys, "CUDA_HOME": str(tmp_path / "cuda")}
    path, said = wheel(sdist, tmp_path / "b", **broken)
    assert "unsupported GNU version" in said and "the CUDA part does not compile here" in said
    assert len(extensions(path)) == 1
    (tools / "ninja").unlink()
    path, said = wheel(sdist, tmp_path / "c", **broken, DCDIT_CUDA_ARCHS="none")
    assert "no ninja: one step after another" in said and len(extensions(path)) == 1
    asked = environment(**broken, DCDIT_CUDA_ARCHS="90")
    failed = run(*BUILD, "--no-build-isolation", "-w", tmp_path, sdist, env=asked, check=False)
    assert failed.returncode != 0 and "the extension does not compile" in failed.stdout + failed.stderr


def test_isolated_and_editable(sdist, venv, compiler):
    """`pip install -e .` as anyone would type it: pip fetches the build's requirements, which torch is not among."""
    python = venv("editable")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-e", sdist]
    done = run(*install, check=False, env=environment(DCDIT_CUDA_ARCHS="none", CXX=compiler))
    if done.returncode and "Could not find a version that satisfies the requirement setuptools" in done.stderr:
        pytest.skip("pip reaches no package index here")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    code = "import dcdit_kernels; print(dcdit_kernels.extension._C.__file__)"
    show_torch(python)
    assert run(python, "-c", code, cwd=python.parent).stdout.startswith(str(sdist))
