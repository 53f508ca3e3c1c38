"""Packages that import a name's module on its first use, so that the command line answers before torch is loaded."""

import importlib
from collections.abc import Callable


def lazy(package: str, modules: dict[str, str]) -> tuple[Callable[[str], object], list[str]]:
    """The __getattr__ and the __all__ of `package`, from its modules and the names that each module exports."""
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def __getattr__(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return __getattr__, sorted(homes)
