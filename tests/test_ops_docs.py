"""The snippets of docs/ops.md and docs/integration.md run; every public operator is in them; importing stays cheap."""

import pathlib
import re
import subprocess
import sys

import pytest

import dcdit.ops

OPS = pathlib.Path("docs/ops.md").read_text()


def snippets(text):
    """(heading, code) of each Python block."""
    heading = ""
    for part in re.split(r"^(?=#+ |```)", text, flags=re.M):
        if part.startswith("#"):
            heading = part.splitlines()[0].lstrip("# ").strip("`")
        elif part.startswith("```python"):
            yield heading, part.split("\n", 1)[1]


def test_every_public_name_has_a_section_with_a_snippet():
    assert sorted(name for name, _ in snippets(OPS) if name in dcdit.ops.__all__) == sorted(dcdit.ops.__all__)


@pytest.mark.parametrize("name, code", list(snippets(OPS)), ids=[name for name, _ in snippets(OPS)])
def test_ops_snippets_run_alone(name, code, capsys):
    exec(compile(code, f"docs/ops.md: {name}", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", ["integration", "upcycling", "transformers"])
def test_the_snippets_of_a_page_run_in_turn(page, tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(pathlib.Path("tests").resolve())
    text, names = pathlib.Path(f"docs/{page}.md").read_text(), {"__name__": "snippet"}
    monkeypatch.chdir(tmp_path)
    for heading, code in snippets(text):
        exec(compile(code, f"docs/{page}.md: {heading}", "exec"), names)


def test_importing_the_operators_imports_no_library_but_torch():
    code = "import sys, dcdit.ops, dcdit; dcdit.ops.plan_chunks; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"diffusers", "accelerate", "transformers", "triton", "safetensors", "yaml", "matplotlib", "sklearn"}
    heavy.add("torch._dynamo")  # as slow as torch itself; it would import Triton as well
    assert "torch" in modules and not heavy.intersection(modules)
