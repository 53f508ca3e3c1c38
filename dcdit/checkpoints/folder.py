"""Checkpoints: a directory of model.safetensors and config.json, or a `.pt` of the public release.

Loading one never runs code.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, check_kind, first_line
from ..files import WEIGHTS, check_file, expanded, naming, read_json, replacing, sync
from ..model.config import DCDiTConfig, preset_of_size
from ..model.dcdit import DCDiT
from .near import folder_of, near_folder, near_name, own_class
from .release_keys import from_release, infer_config, release_content, stored_use
from .release_keys import release_key as release_key
from .safe_pickle import check_pointer, read_state
from .systems_folder import empty_system, system_of
from .weights_fit import check_grid, check_header, compare_shapes, header_shapes, shapes_of, some_of

FILES = ("config.json", WEIGHTS)
KEPT = ("README.md", "LICENSE", "LICENSE.md", ".gitattributes")  # further files of repositories
ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = ("digits",)  # checkpoints in ASSETS


def load_state(model: DCDiT, state: dict[str, torch.Tensor]) -> None:
    """Load a state dict strictly. Raises CheckpointError naming the keys or shapes that differ."""
    compare_shapes(shapes_of(model), {key: tuple(tensor.shape) for key, tensor in state.items()})
    model.load_state_dict(state)


def check_place(directory: Path) -> None:
    """Raise CheckpointError where a directory holds anything but a checkpoint and its description."""
    if directory.exists() and directory.samefile("."):
        raise CheckpointError("a checkpoint replaces its folder, which cannot be the working directory: give another")
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file, expected a folder for {' and '.join(FILES)}")
    entries = [entry.name for entry in directory.iterdir()] if directory.exists() else []
    foreign = [name for name in entries if name not in (*FILES, *KEPT)]
    if foreign:
        raise CheckpointError(
            f"{directory} holds more than a checkpoint ({some_of(foreign)}); give a directory of its own"
        )


def save_checkpoint(directory: str | Path, model: DCDiT, extra: dict[str, Any] | None = None) -> None:
    """Write model.safetensors and config.json; the directory appears whole or not at all.

    `extra` holds JSON values about the model's use, such as {"objective": "flow"}; None: the values of `model.use`, as
    it was loaded. A checkpoint that is there already is replaced, and its README.md and licence stay; raises
    CheckpointError where the directory holds anything else.
    """
    from safetensors.torch import save

    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise CheckpointError(f"a checkpoint is of a model such as a DCDiT, got a {type(model).__name__}")
    extra = getattr(model, "use", {}) if extra is None else extra
    check_kind(extra, dict, "extra", 'such as {"objective": "flow"}')
    directory = expanded(directory)
    check_place(directory)
    directory = directory.resolve() if directory.is_symlink() else directory  # a link stays, its target is replaced
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        own = {"own_parts": model.own_parts} if getattr(model, "own_parts", None) else {}
        config = {**system_of(model), "model": model.config.to_dict(), **own, **extra}
        with naming(directory):
            (temporary / WEIGHTS).write_bytes(save(_tensors(model)))
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in FILES:
                sync(temporary / name)
        for name in KEPT:
            if (directory / name).is_file():
                shutil.copy2(directory / name, temporary / name)
        temporary.chmod(0o755)
        old = temporary.with_name(temporary.name + ".old")
        if directory.exists():
            os.rename(directory, old)
        os.rename(temporary, directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def store_use(directory: Path, values: dict[str, Any]) -> None:
    """Add JSON values to a checkpoint's config.json. Raises CheckpointError where it cannot be written."""
    file = directory / "config.json"
    try:
        config = read_json(file)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps({**config, **values}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error}") from error


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    router: nn.Module | None = None,
    backbone: nn.Module | None = None,
) -> tuple[DCDiT, dict[str, Any]]:
    """The model of a checkpoint directory, in eval mode, and the values that were saved with it, also as `model.use`.

    `router` and `backbone` are the modules of a model that was made with its own; they get the checkpoint's weights.
    The sizes in config.json are compared with the weights' header before anything is allocated. Raises CheckpointError
    for a missing, truncated, foreign or mismatched checkpoint.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = expanded(path)
    if path.is_file():
        raise CheckpointError(f"{path} is a file, expected a folder of {' and '.join(FILES)}{folder_of(path)}")
    config_file, weights = (path / name for name in FILES)
    _check_there(config_file)
    try:
        extra = read_json(config_file)
    except ValueError as error:
        raise CheckpointError(f"{config_file} is not a dcdit config: {error}") from error
    if isinstance(extra, dict) and "_class_name" in extra:
        raise CheckpointError(
            f"{config_file} is that of a {extra['_class_name']} of diffusers, expected a dcdit config{own_class(extra)}"
        )
    _check_there(weights)
    if not isinstance(extra, dict) or not isinstance(extra.get("model"), dict):
        raise CheckpointError(f"{config_file} is not a dcdit config: expected a mapping with the mapping 'model'")
    try:
        if "kind" in extra:
            return _load_system(extra, weights, device)
        config, own_parts = DCDiTConfig.from_dict(extra.pop("model")), dict(extra.pop("own_parts", {}))
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config_file} is not a dcdit config: {error}") from error
    parts = {"router": router, "backbone": backbone}
    for name, kind in own_parts.items():
        if parts.get(name) is None:
            raise CheckpointError(f"{path} has a {name} of its own, {kind}: give the module as {name}=")
    try:
        check_header(weights, config, parts)
        state = load_file(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is truncated or not a safetensors file: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{weights} cannot be read: {error}") from error
    check_grid(state["pos_embed"], config, path)
    model = DCDiT(config, **parts).to(device)
    load_state(model, {key: tensor.to(torch.float32) for key, tensor in state.items()})
    return _with_use(model.eval(), extra), extra


def _check_there(file: Path) -> None:
    """Raise CheckpointError for a file of a checkpoint's folder that is missing, or a pointer in its place."""
    path = file.parent
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {path}: {file.name} is missing{near_folder(path)}")
    try:
        check_pointer(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _load_system(extra: dict[str, Any], weights: Path, device: str | torch.device) -> tuple[Any, dict[str, Any]]:
    """`load_checkpoint` of one of `SYSTEMS`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if "router" in extra.pop("own_parts", {}):
        raise CheckpointError(f"{weights.parent} has a router of its own: build the model, and load its weights")
    try:
        shapes = header_shapes(weights)
        model = empty_system(extra.pop("kind"), extra.pop("model"), shapes, weights.parent)
        compare_shapes(shapes_of(model), shapes)
        state = load_file(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is truncated or not a safetensors file: {error}") from error
    model = model.to_empty(device=device)
    load_state(model, {key: tensor.to(torch.float32) for key, tensor in state.items()})
    return _with_use(model.eval(), extra), extra


def locate(name: str | Path, **hub: Any) -> Path:
    """The folder of a checkpoint: a path, the name of one that ships with the package (digits), or a Hub repository.

    `hub` goes to `huggingface_hub.snapshot_download`. The Hub is asked only for owner/name where no folder `owner` is.
    Raises CheckpointError.
    """
    path = expanded(name)
    if not str(name):
        raise CheckpointError("a checkpoint must be a folder, a Hub repository or digits, got an empty name")
    if hub:
        _check_hub_options(hub)
    if path.exists():
        return path
    if str(name) in SHIPPED:
        return ASSETS / str(name)
    if preset_of_size(str(name)):
        raise CheckpointError(f"{name} names a size, which has no weights; {', '.join(SHIPPED)} ships with dcdit")
    if not re.fullmatch(r"[\w][\w.-]*/[\w.-]+", str(name)) or path.parent.exists():
        near = near_name(path)
        raise CheckpointError(f"no checkpoint at {name}{near or f'; {SHIPPED[0]} ships with dcdit'}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(f"there is no folder {name}; the Hub needs pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(FILES), **hub))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a directory nor a repository that can be read: {first_line(error)}"
        ) from error


def from_pretrained(
    name: str | Path,
    device: str | torch.device = "cpu",
    *,
    router: nn.Module | None = None,
    backbone: nn.Module | None = None,
    **hub: Any,
) -> DCDiT:
    """The model of a checkpoint that `locate` finds, in eval mode and float32; `model.use` says its purpose.

    `router` and `backbone` as in `load_checkpoint`. `hub` goes to `huggingface_hub.snapshot_download`, such as
    revision= or local_files_only=. Raises CheckpointError.
    """
    return load_checkpoint(locate(name, **hub), device, router=router, backbone=backbone)[0]


def _check_hub_options(hub: dict[str, Any]) -> None:
    from huggingface_hub import snapshot_download

    known = inspect.signature(snapshot_download).parameters.keys() - {"repo_id", "allow_patterns", "dry_run"}
    for key in hub.keys() - known:
        cast = "; the model is float32: cast it with .to(dtype)" if "dtype" in key else ""
        raise CheckpointError(f"from_pretrained has no option {key}{cast}")


def weights_hash(directory: Path) -> str:
    """A short hash of a checkpoint's weights: their length, beginning and end."""
    file = directory / WEIGHTS
    with open(file, "rb") as stream:
        digest = hashlib.sha256(str(file.stat().st_size).encode() + stream.read(2**20))
        stream.seek(max(0, file.stat().st_size - 2**20))
        digest.update(stream.read())
    return digest.hexdigest()[:16]


def load_release(
    path: str | Path, *, num_heads: int | None = None, sigma: float | None = None, which: str = "ema"
) -> DCDiT:
    """The model of a checkpoint of the public release (AMD-AGI/DynamicChunkingDiT), in eval mode.

    Args:
        path: the `.pt` file: a dict of model, ema and config, or a bare state dict.
        num_heads, sigma: unknown from the shapes. None: from the stored configuration where it can be read, else
            heads of 72 or 64 channels and σ = 1.
        which: "ema" or "model".

    Sizes come from the tensors. Nothing that the file names is imported or run. Raises CheckpointError naming the key,
    the expected and the found shape where they do not fit, and ConfigError for sizes that make no model.
    """
    return read_release(path, num_heads=num_heads, sigma=sigma, which=which)[0]


def read_release(
    path: str | Path, *, num_heads: int | None = None, sigma: float | None = None, which: str = "ema"
) -> tuple[DCDiT, dict[str, Any]]:
    """`load_release`, and `model.use`: as `save_release` stored it, or the release's own objective and codec."""
    state, config = read_state(path, which)
    state = from_release(state)
    model = DCDiT(infer_config(state, config, num_heads, sigma))
    load_state(model, {key: tensor.to(torch.float32) for key, tensor in state.items()})
    use = stored_use(config)
    return _with_use(model.eval(), use), use


def save_release(path: str | Path, model: DCDiT, extra: dict[str, Any] | None = None) -> None:
    """Write `model` as a `.pt` in the public release's layout; the file appears whole or not at all.

    Of `extra`, as of `save_checkpoint`, it keeps objective, codec, guidance channels and class names; the file says so
    where they are not known. Raises CheckpointError for a model that the layout has no place for, such as one on a grid
    that is not square, and DataError where a file of another kind is there.
    """
    path = expanded(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected the name of a .pt file")
    check_file(path, ".pt", ".pth")
    if not isinstance(model, DCDiT) or system_of(model):
        raise CheckpointError(f"the public release has no place for a {type(model).__name__}, expected a DC-DiT")
    extra = getattr(model, "use", {}) if extra is None else extra
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary:
            torch.save(release_content(_tensors(model), model.config, extra), temporary)
    except RuntimeError as error:  # torch's writer hides the system's reason
        if not os.access(path.parent, os.W_OK):
            raise OSError(f"cannot write {path}: no permission to write in {path.parent}") from error
        raise OSError(f"cannot write {path}, is the disk full? {first_line(error)}") from error


def _with_use(model: DCDiT, use: dict[str, Any]) -> DCDiT:
    """`model` with its use, which `save_checkpoint` and `save_release` write again."""
    model.use = use  # type: ignore[assignment]
    return model


def _tensors(model: DCDiT) -> dict[str, torch.Tensor]:
    return {key: tensor.cpu().contiguous() for key, tensor in model.state_dict().items()}
