"""The `dcdit` command. Each sub-command is a module of dcdit.commands, imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import textwrap

from .errors import DCDiTError, one_line
from .interrupts import raised

COMMANDS = {
    "info": "parameters and FLOPs of a preset or checkpoint",
    "train": "train from a YAML config",
    "upcycle": "train from a pretrained DiT's weights",
    "data": "check a folder of pictures or latents before training, or encode pictures to latents",
    "convert": "turn a checkpoint of the public release into a directory, or back",
    "sample": "sample images from a checkpoint",
    "evaluate": "measure how far samples are from real pictures",
    "calibrate": "measure the time of a step on this machine, and the router's own tokens over t",
    "calibrate-patches": "find the threshold by which a model of several patch sizes has a wished speed",
    "visualize": "draw chunk maps and the compute spent along a trajectory",
    "demo": "sample the digits that ship with the package and tabulate what dynamic chunking saves",
}
# How PyTorch's allocators say that there is no memory; on a CPU it is a plain RuntimeError.
NO_MEMORY = ("OutOfMemoryError", "MemoryError", "can't allocate memory", "not enough memory", "out of memory")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, like every other complaint."""
        self.exit(2, f"{self.prog}: {message}{_meant(message, self)}; see {self.prog} --help\n")


def _meant(message: str, parser: argparse.ArgumentParser) -> str:
    """What was meant by words that no option takes, where that is plain."""
    prog, places = parser.prog, [action.dest for action in parser._actions if not action.option_strings]
    words = message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrecognized") else []
    if words and words[0] in ("--resume", "--continue"):
        return ": the same command again goes on where it ended"
    if words and words[0].startswith("--") and words[0][2:].partition("=")[0] in places:
        return f": give its value alone, without {words[0].partition('=')[0]}"
    if words and words[0].startswith("--") and prog in ("dcdit train", "dcdit upcycle"):
        return ": a configuration is a file and keys, such as my.yaml steps=1000"
    return ": lists are written as 1,3,5" if words and all(word.replace(".", "").isdecimal() for word in words) else ""


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import torch

        from dcdit_kernels import __version__

        print(f"dcdit {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
        parser.exit()


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command. Returns 0, or 1 where `dcdit data check` found bad files; 2 after one line about input that
    cannot be used, a package that is not there, or memory that is not; 128 + the signal's number when interrupted."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ρ gets a question mark
    words = sys.argv[1:] if argv is None else argv
    name = " ".join(["dcdit", *words[:1]])
    try:
        os.getcwd()
    except FileNotFoundError:  # torch's libraries end the process there
        print(f"{name}: the working directory is deleted: change to one that is there", file=sys.stderr)
        return 2
    try:
        with raised():
            return _run(words)
    except ModuleNotFoundError as error:
        complaint = f"{error}; pip install '.[demo]' in dcdit's sources brings what all commands need"
    except KeyboardInterrupt as error:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    except (MemoryError, RuntimeError) as error:
        if not any(words in f"{type(error).__name__}: {error}" for words in NO_MEMORY):
            raise
        complaint = (
            f"out of memory ({textwrap.shorten(_message(error), 160, placeholder=' …')}): "
            "take a smaller batch size or smaller pictures; "
            "in training also a larger accumulate, or checkpointing=true"
        )
    print(f"{name}: {complaint}", file=sys.stderr)
    return 2


def _run(argv: list[str]) -> int:
    parser = _Parser(prog="dcdit", description="Run and train Dynamic Chunking Diffusion Transformers.")
    parser.add_argument("--version", action=_Version, nargs=0, help="versions of dcdit, torch and Python")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    args = parser.parse_args(argv[:1])
    module = importlib.import_module(f"dcdit.commands.{args.command.replace('-', '_')}")
    module.configure(parsers[args.command])
    # By itself: a parser with sub-commands does not take key=value on both sides of an option.
    parsers[args.command].parse_intermixed_args(argv[1:], args)
    from dcdit_kernels import BackendError  # here, so that an option's error imports no torch

    try:
        status = module.run(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as of `dcdit info … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (DCDiTError, BackendError, OSError) as error:
        print(f"dcdit {args.command}: {_message(error)}", file=sys.stderr)
        return 2


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return one_line(error)


if __name__ == "__main__":
    sys.exit(main())
