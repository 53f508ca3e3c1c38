"""Training that starts from the weights of a DC-DiT."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoints.folder import load_checkpoint, locate, read_release
from ..errors import ConfigError
from ..files import expanded
from ..model.dcdit import DCDiT


def start_from(net: DCDiT, source: str, class_names: list[str] | None, use: dict[str, Any]) -> str:
    """Copy fitting weights of `source` into `net`; return a line that lists the taken and the fresh tensors.

    `source` is a checkpoint as `locate` finds it, or a `.pt` of the public release. Class embeddings go by name where
    both sides have names, else by id where both have the same number of classes. The embedding without a class always
    fits. `use` holds the run's objective and codec; the line names differences. Raises CheckpointError, and ConfigError
    for another system and where less than a tenth of the weights fits.
    """
    path = expanded(source)
    model, theirs = read_release(path) if path.is_file() else load_checkpoint(locate(source))
    if not isinstance(model, DCDiT):
        raise ConfigError(f"init: {source} is a {type(model).__name__}, expected a DC-DiT")
    state = dict(model.named_parameters())
    taken, numbers, fresh = 0, 0, []
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name == "class_embed.weight":
                continue
            if name in state and state[name].shape == parameter.shape:
                parameter.copy_(state[name])
                taken, numbers = taken + 1, numbers + parameter.numel()
            else:
                found = tuple(state[name].shape) if name in state else "nothing"
                fresh.append(f"{name} {tuple(parameter.shape)}, found {found}")
        if 10 * numbers < sum(parameter.numel() for parameter in net.parameters()):
            raise ConfigError(
                f"init: {source} does not fit this model, {len(fresh)} tensors differ, such as {fresh[0]}"
            )
        classes = _copy_classes(
            net.class_embed.weight, state["class_embed.weight"], class_names, theirs.get("class_names")
        )
    line = f"{taken} tensors of {source}, {classes}"
    if fresh:
        line += f"; fresh: {'; '.join(fresh[:4])}" + (f"; and {len(fresh) - 4} more" if len(fresh) > 4 else "")
    for key, value in use.items():
        if key in theirs and theirs[key] != value:
            line += f"; it was trained with {key} {theirs[key]}, not {value}"
    return line


def _copy_classes(
    ours: torch.Tensor, theirs: torch.Tensor, our_names: list[str] | None, their_names: list[str] | None
) -> str:
    if ours.shape[1] != theirs.shape[1]:
        return "no class"
    ours[-1] = theirs[-1]  # without a class
    if our_names and their_names:
        shared = [name for name in our_names if name in their_names]
        for name in shared:
            ours[our_names.index(name)] = theirs[their_names.index(name)]
        return f"{len(shared)} of {len(ours) - 1} classes by name"
    if ours.shape == theirs.shape:
        ours.copy_(theirs)
        return "all classes by id"
    return f"none of {len(ours) - 1} classes, as {len(theirs) - 1} have no names"
