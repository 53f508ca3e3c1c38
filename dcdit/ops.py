"""The operators that other DiT codebases import: plan, chunk, run your blocks on packed tokens, dechunk.

Importing this module imports torch alone. Each name is documented in `dcdit_kernels` and, with a runnable snippet,
in docs/ops.md.
"""

from dcdit_kernels import *  # noqa: F403
from dcdit_kernels import __all__ as __all__
from dcdit_kernels import __version__ as __version__
