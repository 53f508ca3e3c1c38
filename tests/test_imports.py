"""Modules import each other in one direction, also where an import stands inside a function."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# DCDiT.from_pretrained and save_pretrained are where users of diffusers look for them; checkpoints make models.
BACKWARD = {("dcdit.model.dcdit", "dcdit.checkpoints.folder")}
# What diffusers 0.36 and 0.37 brought, of what this package knows.
NEWER = {
    f"diffusers.{name}"
    for name in ("MagCacheConfig", "TaylorSeerCacheConfig", "ZImageTransformer2DModel", "ZImagePipeline")
}


def modules(*packages: str) -> dict[str, Path]:
    """Module name → file."""
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, files, strict=True))


def imported(name: str, file: Path) -> Iterator[str]:
    """Every name that a module imports when it runs, as an absolute one."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in types for inner in ast.walk(node)}
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped:
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            base = base if node.level else str(node.module)
            yield from (f"{base}.{alias.name}" for alias in node.names)
            yield base


def edges(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module → the modules that it imports."""
    return {name: {other for other in imported(name, file) if other in known} - {name} for name, file in known.items()}


def test_no_cycle():
    """dcdit, dcdit_kernels and bench have an order in which every import looks back, but for `BACKWARD`."""
    graph = edges(modules("dcdit", "dcdit_kernels", "bench"))
    for name, other in BACKWARD:
        assert other in graph[name], f"{name} imports {other} no more: BACKWARD is too long"
        graph[name].remove(other)
    # A package exports its modules: a name that comes through it is an edge to the module itself.
    packages = {name for name in graph if (ROOT / name.replace(".", "/")).is_dir()}
    list(TopologicalSorter({name: others - packages for name, others in graph.items()}).static_order())
    with pytest.raises(CycleError):
        graph["dcdit.errors"].add("dcdit.cli")
        list(TopologicalSorter(graph).static_order())


def test_an_older_diffusers_has_what_is_imported():
    """Chunked transformers and pipelines are imported with diffusers 0.35, which lacks the names of `NEWER`."""
    for name, file in modules("dcdit").items():
        assert not NEWER & set(imported(name, file)), name


def test_info_needs_no_compiler():
    """PyTorch's takes longer to import than all else."""
    code = "import sys, dcdit.cli; dcdit.cli.main(['info', 'DC-DiT-S/N4']); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_kernels_stand_alone():
    """`dcdit_kernels` imports nothing of `dcdit`, and neither imports `bench` or `tests`."""
    everything = modules("dcdit", "dcdit_kernels", "bench", "tests")
    graph = edges(everything)
    for name, others in graph.items():
        forbidden = ("bench", "tests", "dcdit.") if name.startswith("dcdit_kernels") else ("bench", "tests")
        if name.startswith("dcdit"):
            assert not [other for other in others if other.startswith(forbidden) or other == "dcdit"], name
