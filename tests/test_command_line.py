"""The command itself: its words before torch is there, in any locale, without docstrings, and out of memory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import start_time
from dcdit.cli import main

ROOT = Path(__file__).parent.parent
# Runs the command, then says on stderr whether torch came in.
PROBE = """
import sys
sys.path.insert(0, {root!r})
from dcdit.cli import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def run(*words, flags=(), **environment):
    code = PROBE.format(root=str(ROOT))
    return subprocess.run(
        [sys.executable, *flags, "-c", code, *words],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=100,
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["sample", "--help"],
        *([name, "--help"] for name in ("train", "upcycle", "info", "data", "convert", "visualize")),
        ["sample", "x", "--steps", "many"],
        ["demo", "--nonsense"],
    ],
)
def test_options_need_no_torch(words):
    done = run(*words)
    assert done.stderr.splitlines()[-1] == b"False", done.stderr.decode()


def test_a_terminal_without_greek():
    done = run("info", "digits", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert b"14?14 = 196 cells" in done.stdout, done.stderr.decode()


def test_python_without_docstrings():
    done = run("info", "--help", flags=["-OO"])
    assert b"a preset (DC-DiT" in done.stdout, done.stderr.decode()


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("dcdit 0.1.0, torch ")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\\nmore"
        ),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 20.00 MiB."),
    ],
)
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    import dcdit.commands.info as info

    def fail(args):
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert main(["info", "digits"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("dcdit info: out of memory") and text.count("\n") == 1
    assert "batch size" in text and "accumulate" in text and "checkpointing" in text
    monkeypatch.setattr(info, "run", lambda args: (_ for _ in ()).throw(RuntimeError("else")))
    with pytest.raises(RuntimeError, match="else"):
        main(["info", "digits"])


def test_ctrl_c_while_modules_load_is_one_line(monkeypatch, capsys):
    import importlib

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert main(["info", "digits"]) == 130
    assert capsys.readouterr().err == "dcdit info: interrupted\n"


def test_a_reader_that_leaves_is_no_error():
    """As of `dcdit info … | head`; what Python has not written yet is no complaint at exit."""
    command = [sys.executable, "-m", "dcdit.cli", "info", "digits"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": ""}, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=100) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("words", [["info", "digits"], ["sample", "digits", "--cpu"], ["--version"]])
def test_a_deleted_working_directory_is_one_line(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(words) == 2
    assert (
        capsys.readouterr().err == f"dcdit {words[0]}: the working directory is deleted: change to one that is there\n"
    )


def test_the_operators_in_a_deleted_directory_say_so(tmp_path):
    place = tmp_path / "gone"
    place.mkdir()
    command = f"rmdir '{place}'; exec '{sys.executable}' -m dcdit_kernels"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], cwd=place, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 1
    assert b"the working directory is deleted: change to one that is there" in done.stderr.splitlines()[-1]


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "dcdit", "--help"], cwd=ROOT, capture_output=True, timeout=100)
    assert done.returncode == 0 and done.stdout.startswith(b"usage: dcdit ")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("words, status", [(["info", "digits"], 0), (["info", "nothing"], 2)])
def test_a_closed_stream_is_no_error(stream, words, status, monkeypatch):
    monkeypatch.setattr(sys, stream, None)
    assert main(words) == status


def test_the_memory_asked_for_is_told_whole(monkeypatch, capsys):
    where = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    reason = f"{where}: you tried to allocate 40000000000 bytes. Error code 12 (Cannot allocate memory)"

    def fail(*_):
        raise RuntimeError(reason)

    monkeypatch.setattr("dcdit.cli._run", fail)
    assert main(["sample"]) == 2
    assert "allocate 40000000000 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["train"], ["upcycle", "--from", "a"]])
def test_overrides_are_not_asked_for(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    error = capsys.readouterr().err
    assert "are required: config" in error and "key=value" not in error


def test_the_start_is_measured_in_processor_time(monkeypatch, capsys):
    """The least of the rounds counts, sleep does not, and a command above its limit is an exit status."""
    busy = "import time\nwhile time.process_time() < {}: pass\ntime.sleep(0.3)"
    spent = start_time.processor_seconds([sys.executable, "-S", "-c", busy.format(0.2)])
    assert 0.2 <= spent < 0.5
    times = iter([0.6, 0.1, 2.5, 9.0, 0.4, 0.2, 2.1, 9.0])
    monkeypatch.setattr(start_time, "processor_seconds", lambda command: next(times))
    assert start_time.main(["--rounds", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-5:] for line in lines[:1]] == [["--help", "0.400", "s", "of", "0.5"]]
    assert [line.endswith("too long") for line in lines] == [False, False, True, False]
    monkeypatch.setattr(start_time, "processor_seconds", lambda command: 0.4)
    assert start_time.main(["--rounds", "1"]) == 0
