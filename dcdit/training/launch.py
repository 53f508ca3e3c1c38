"""accelerate's Accelerator for a training configuration: the launcher's settings are obeyed or refused."""

from __future__ import annotations

import os
import warnings

from ..errors import ConfigError
from ..files import expanded
from .config import TrainConfig
from .ranks import cpu_ranks, joining

# Ways of splitting a model that need its blocks wrapped: the trainer holds the whole model on every process.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def make_accelerator(config: TrainConfig):
    """The Accelerator of a run. Raises ConfigError where `accelerate launch` and the configuration disagree.

    `--mixed_precision no` is also the launcher's default, so the configuration may ask for more.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    _check_fsdp(config)
    for name, words in REFUSED.items():
        if _asked(name):
            raise ConfigError(
                f"accelerate launch asks for {words}, which dcdit train does not support: use --multi_gpu"
            )
    for flag, name, key, ours, free in (
        ("mixed_precision", "ACCELERATE_MIXED_PRECISION", "precision", config.precision, "no"),
        ("gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "accumulate", config.accumulate, "1"),
        ("dynamo_backend", "ACCELERATE_DYNAMO_BACKEND", "compile", config.compile, "no"),
    ):
        theirs = os.environ.get(name, free).lower()
        fits = str(ours) if key != "compile" else ("inductor" if ours else "no")
        if theirs not in (free, fits):
            raise ConfigError(
                f"accelerate launch asks for {flag}={theirs}, the configuration has {key}={ours}: set {key} there"
            )
    _check_trackers(config.log_with)
    output = expanded(config.output)
    project = ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "tensorboard"))
    # Accumulation and compilation are the trainer's own: accelerate would divide each loss once more.
    # PyTorch's remark on gradients of convolutions in channels_last: true, and nothing to be done about it.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    hidden = {name: os.environ.pop(name, None) for name in _OWN}
    try:
        with joining():
            return Accelerator(
                mixed_precision=config.precision,
                cpu=cpu_ranks(),
                log_with=list(config.log_with) or None,
                project_config=project,
            )
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


# What accelerate must not do as well.
_OWN = ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_FSDP")


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _check_fsdp(config: TrainConfig) -> None:
    """Raise ConfigError where the launcher asks for FSDP and the configuration does not, or cannot."""
    if not _asked("ACCELERATE_USE_FSDP"):
        return
    ours = getattr(config, "fsdp", None)
    if ours is None:
        raise ConfigError("accelerate launch asks for FSDP, which dcdit train does not support: use --multi_gpu")
    if not ours:
        raise ConfigError("accelerate launch asks for FSDP, the configuration has fsdp=False: set fsdp there")
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate launch asks for FSDP 1: use --fsdp_version 2")


def _check_trackers(names: tuple[str, ...]) -> None:
    """Raise ConfigError for trackers that accelerate does not know, or would leave out with a warning."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType if kind.value != "all"]
    available = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(f"log_with must be among {', '.join(known)}, got {name!r}")
        if name not in available:
            raise ConfigError(f"log_with={name} needs a package that is not installed: pip install {name}")
