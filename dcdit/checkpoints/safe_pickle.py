"""State dicts of `.pt` files: read without running code that the files name, and their keys renamed."""

from __future__ import annotations

import pickle
import re
import threading
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, first_sentence

# Pairs of their name and ours.
Names = tuple[tuple[str, str], ...]


class _InertType(type):
    """Classes that an unpickler may make instances of, but never call."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise CheckpointError(f"the file asks to call {cls.__name__}; refused, nothing of it was run")


class Record(metaclass=_InertType):
    """Stands in for an instance of a class that a checkpoint names: its fields, and nothing that runs."""

    def __new__(cls, *args: Any) -> Record:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise CheckpointError(f"the state of {type(self).__name__} is {type(state).__name__}, expected fields")
        self.__dict__.update(state)


# torch's unpickler has one list of safe classes for the process, not for one reader.
_READING = threading.Lock()
_POINTER = b"version https://git-lfs"
# How a file of torch before 1.6 begins.
_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


def check_pointer(file: Path) -> None:
    """Raise CheckpointError for the text that a clone without Git LFS has in place of weights."""
    with open(file, "rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(f"{file} is a pointer of Git LFS in place of the weights: git lfs pull fetches them")


def read_pickle(path: str | Path) -> Any:
    """The content of a `.pt` file: tensors, containers and numbers; instances of unknown classes become `Record`s.

    torch's weights-only unpickler reads it, so nothing that the file names is imported or run. Raises CheckpointError
    where it asks for that, or is truncated or no checkpoint, and OSError where it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected a .pt file")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {path}")
    check_pointer(path)
    with open(path, "rb") as file:
        start = file.read(max(len(_LEGACY), 9))
        if path.suffix == ".safetensors" or start[8:9] == b"{":  # after the length of its header
            raise CheckpointError(
                f"{path} is a safetensors file, expected a .pt; a folder with config.json needs no converting"
            )
        if start.startswith(_LEGACY):
            raise CheckpointError(f"{path} is in the format of torch before 1.6; load it and save it again with torch")
    try:
        with _READING:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            # One class for each name, so that an error can say which was asked for.
            records: list[Any] = [(_InertType(name, (Record,), {}), name) for name in unknown]
            with torch.serialization.safe_globals(records):
                return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a broken pickle can raise anything
        # torch puts the advice to load without its protection in place of why it refused, raised "from None".
        hidden = isinstance(error, pickle.UnpicklingError) and error.__suppress_context__
        reason = first_sentence(error.__context__ if hidden and error.__context__ else error)
        raise CheckpointError(f"{path} is truncated, tampered with or not a checkpoint: {reason}") from error


def read_state(path: str | Path, which: str = "ema") -> tuple[dict[str, torch.Tensor], Any]:
    """(state dict, stored configuration or None) of a training checkpoint, or of a bare state dict.

    `which` is "ema" or "model"; prefixes of DistributedDataParallel and torch.compile are stripped. Every entry is a
    dense floating-point tensor with separate memory for all its elements. Raises CheckpointError for anything else.
    """
    content = read_pickle(path)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected a dict of tensors or of model and ema")
    config = None
    if not all(isinstance(value, torch.Tensor) for value in content.values()):
        if which not in content:
            raise CheckpointError(f"{path} has no {which!r}; it holds {', '.join(map(str, content))}")
        content, config = content[which], content.get("config")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {which!r} is {type(content).__name__}, expected a dict of tensors")
    state: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: the key {key!r} is {type(key).__name__}, expected a name")
        _check_tensor(f"{path}: {key!r}", value)
        name = re.sub(r"^((module|_orig_mod)\.)+", "", key)
        if name in state:
            raise CheckpointError(f"{path}: {name!r} is there twice, with and without a prefix")
        state[name] = value
    return state, config


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{name} is {type(value).__name__}, expected a tensor")
    if value.layout != torch.strided or value.is_nested or value.is_meta or not value.is_floating_point():
        kind = f"{value.dtype}, {value.layout}, on {value.device}"
        raise CheckpointError(f"{name} is {kind}: expected a dense floating-point tensor with values")
    # An expanded tensor is small in the file, and as large as its shape says once it is copied.
    found, needed = value.untyped_storage().nbytes(), max(value.numel(), 1) * value.element_size()
    if found < needed:
        raise CheckpointError(f"{name}: expected {needed} bytes or more for {tuple(value.shape)}, found {found}")


def shape_of(state: dict[str, torch.Tensor], key: str, dims: int) -> tuple[int, ...]:
    """Shape of a tensor of a state dict. Raises CheckpointError where it is missing or has not `dims` axes."""
    if key not in state:
        raise CheckpointError(f"missing keys in checkpoint: {key}")
    if state[key].dim() != dims:
        raise CheckpointError(f"{key}: expected {dims} axes, found shape {tuple(state[key].shape)}")
    return tuple(state[key].shape)


def swap_prefix(key: str, prefixes: Names) -> str | None:
    """`key` with the first of `prefixes` that it has replaced; None where it has none."""
    return next((new + key.removeprefix(old) for old, new in prefixes if key.startswith(old)), None)


def swap_parts(key: str, parts: Names) -> str:
    """`key` with each of `parts` that stands between dots replaced."""
    for old, new in parts:
        key = re.sub(rf"(?<=\.){re.escape(old)}(?=\.)", new, key)
    return key


def inverse(names: Names) -> Names:
    """Pairs of our name and theirs."""
    return tuple((ours, theirs) for theirs, ours in names)
