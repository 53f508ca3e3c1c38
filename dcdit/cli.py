"""The `dcdit` command. Each sub-command is a module of dcdit.commands, imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys

from .errors import DCDiTError

COMMANDS = {
    "info": "parameters and FLOPs of a preset or checkpoint",
    "train": "train from a YAML config",
    "upcycle": "train from a pretrained DiT's weights",
    "data": "check a folder of pictures or latents before training, or encode pictures to latents",
    "convert": "turn a checkpoint of the public release into a directory, or back",
    "sample": "sample images from a checkpoint",
    "visualize": "draw chunk maps and the compute spent along a trajectory",
    "demo": "sample the digits that ship with the package and tabulate what dynamic chunking saves",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, like every other complaint."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command. Returns 0, or 1 where `dcdit data check` found bad files; 2 after one line about input that
    cannot be used or a package that is not there; 130 when interrupted."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except ModuleNotFoundError as error:
        print(f"dcdit: {error}; pip install 'dcdit[demo]' brings what all commands need", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    parser = _Parser(prog="dcdit", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    args = parser.parse_args(argv[:1])
    module = importlib.import_module(f"dcdit.commands.{args.command}")
    module.configure(parsers[args.command])
    # By itself: a parser with sub-commands does not take key=value on both sides of an option.
    parsers[args.command].parse_intermixed_args(argv[1:], args)
    from dcdit_kernels import BackendError  # here, lest torch be imported to complain of an option

    try:
        return module.run(args) or 0
    except (DCDiTError, BackendError, OSError) as error:
        print(f"dcdit {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dcdit {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
