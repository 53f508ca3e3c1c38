"""Differences between a run and its resumption: free, allowed or refused."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DCDiTError
from ..files import expanded
from .config import TrainConfig
from .state import read_header

# Keys of a configuration, or groups of keys, that change no number of the steps that were made.
FREE_KEYS = (
    *("output", "log_every", "save_every", "snapshot_every", "max_minutes", "log_with", "validation"),
    *("data.path", "latents", "data.workers", "data.skip_broken"),  # the data's fingerprint is compared
    *("accumulate", "checkpointing", "cuda_graph", "fsdp"),  # equal numbers, up to the order of sums
)
# Keys by which weights have their shapes or their meaning: those of a run fit no others, whatever is allowed.
SHAPING = (
    *("kind", "family", "lora", "lora_targets", "spend.patch", "spend.scales"),
    *("model.in_channels", "model.num_classes", "model.hidden_size", "model.depth", "model.num_heads"),
    *("model.encoder_width", "model.encoder_stride", "model.mlp_ratio", "model.router"),
    *("model.learn_sigma", "model.cond_norm"),
)
PLACES = ("source", "upcycle.source", "init", "codec.pretrained")  # folders of weights, which have several names
Change = dict[str, Any]  # {"step", "key", "from", "to"}


def saved_run(
    file: Path, config: Any, allow: Sequence[str], data: dict[str, Any], depth: int = 0
) -> tuple[dict[str, Any], list[Change]] | None:
    """The header of the run that a checkpoint holds, and all its changes; None where there is no file.

    `data` describes this run's, `depth` is the number of blocks that the key `blocks` counts. Raises ConfigError where
    its configuration is another, CheckpointError.
    """
    if not file.exists():
        return None
    header = read_header(file)
    old, old_data = header["config"], header.get("data")
    new = compare(header["step"], old, config.to_dict(), allow, old_data, data, type(config), depth)
    return header, [*header.get("changes", []), *new]


def compare(
    step: int,
    old: dict[str, Any],
    new: dict[str, Any],
    allow: Sequence[str],
    old_data: dict[str, Any] | None = None,
    new_data: dict[str, Any] | None = None,
    kind: type = TrainConfig,
    depth: int = 0,
) -> list[Change]:
    """The differences that `allow` lets pass, each with the step from which it holds.

    `old` and `new` are configurations as the `to_dict` of `kind` gives them, the data descriptions as
    `describe_data` does, `depth` as in `saved_run`. Raises ConfigError that names every other difference.
    """
    differences = [(key, a, b) for key, a, b in _differences(old, new, kind, depth) if not _free(key, new)]
    for key, a, b in differences:
        if key in SHAPING or (key == "blocks" and new["lora"]):
            raise ConfigError(
                f"the run at step {step} has weights for {key}={a}, this run asks for {b}; give another output"
            )
    if old_data and new_data and old_data["fingerprint"] != new_data["fingerprint"]:
        key = next(key for key in ("class_names", "items", "fingerprint") if old_data[key] != new_data[key])
        differences.append(("data", f"{key} {old_data[key]}", f"{key} {new_data[key]}"))
    refused = [(key, a, b) for key, a, b in differences if not any(key == k or key.startswith(f"{k}.") for k in allow)]
    if refused:
        changes = ", ".join(f"{key}={shown(a)}, this run asks for {shown(b)}" for key, a, b in refused)
        keys = ",".join(key for key, *_ in refused)
        begun = " (init is read where a run begins, and not again)" if "init" in keys.split(",") else ""
        raise ConfigError(
            f"the run at step {step} was trained with {changes}; give another output, or go on with --allow {keys}"
            + begun
        )
    return [{"step": step, "key": key, "from": a, "to": b} for key, a, b in differences]


def shown(value: Any) -> Any:
    """A value of a configuration in a message, where an empty text would be nothing at all."""
    return value if value != "" else "''"


def diverged(how: str, step: int, saved: int) -> DCDiTError:
    """That training has diverged at a step, and how to go on from the one that is saved; 0: none is."""
    again = f"step {saved} is saved: resume with a smaller optim.lr and --allow optim.lr"
    return DCDiTError(f"training diverged: {how} at step {step}; {again if saved else 'try a smaller optim.lr'}")


def check_allowed(allow: Sequence[str], config: dict[str, Any]) -> None:
    """Raise ConfigError for a name that is neither "data" nor a key or group of keys of a configuration."""
    if isinstance(allow, str):
        raise ConfigError(f"allow must be a list of keys, got {allow!r}")
    known = {"data", *_paths(config)}
    for key in allow:
        if key not in known:
            near = [name for name in known if name.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "expected keys of the configuration, such as optim.lr"
            raise ConfigError(f"--allow {key}: there is no such key; {hint}")


def describe_data(source) -> dict[str, Any]:
    """The fingerprint of the data, its number of items and the names of its classes."""
    return {"fingerprint": source.fingerprint(), "items": len(source), "class_names": source.class_names}


def _free(key: str, new: dict[str, Any]) -> bool:
    # At a constant rate the steps made do not depend on how many are to come.
    constant = not new["optim"]["cosine"] and not new["upcycle"]["output_share"] if "upcycle" in new else False
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS) or (key == "steps" and constant)


def _differences(old: dict[str, Any], new: dict[str, Any], kind: type, depth: int) -> Iterator[tuple[str, Any, Any]]:
    """Differing values by dotted key. A run of a version without a key had its default; keys that went are skipped."""
    before, after = dict(_values(old)), dict(_values(new))
    defaults = dict(_values(_defaults(kind)))
    for key, b in sorted(after.items()):
        a = before.get(key, defaults.get(key, b))
        if b not in (a, [a]) and not _alike(key, a, b, depth):  # several values where there was one
            yield key, a, b


def _alike(key: str, a: Any, b: Any, depth: int) -> bool:
    """Whether two values of a key mean the same: names of a folder, ends of a slice, names in any order."""
    if key in PLACES:
        return bool(a and b) and expanded(a).resolve() == expanded(b).resolve()
    if key == "blocks" and depth:
        return slice(*a).indices(depth) == slice(*b).indices(depth)
    return key == "lora_targets" and set(a) == set(b)


def _values(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def _paths(values: dict[str, Any]) -> Iterator[str]:
    for key, _ in _values(values):
        parts = key.split(".")
        yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _defaults(cls: type) -> dict[str, Any]:
    """The defaults of a configuration class. No instance is made: its own checks might refuse it."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.name == "model":
            values[field.name] = field.default_factory().to_dict()
        elif isinstance(field.default_factory, type):
            values[field.name] = _defaults(field.default_factory)
        else:
            values[field.name] = field.default
    return values
