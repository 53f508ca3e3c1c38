"""Time of the operators and of the model, beside the straightforward formulation; see docs/bench.md."""

import sys

from dcdit.errors import DCDiTError


def refuse(kind, error, trace) -> None:
    """An excepthook: input that cannot be used is one line; all else is a traceback."""
    if issubclass(kind, (DCDiTError, FileNotFoundError)):
        print(error, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[0] == "-m":  # what Python says there while it looks for the module to run
    sys.excepthook = refuse
