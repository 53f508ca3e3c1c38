"""The configuration of upcycling a transformer of diffusers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import ConfigError
from ...integrations.families import Family
from ..config import RUN_LIMITS, check_limits, check_types
from ..config_groups import OptimConfig

LIMITS = (
    *RUN_LIMITS,
    ("target_ratio", lambda value: value > 1, "be greater than 1"),
    ("distill_steps router_rate guidance group", lambda value: value >= 0, "not be negative"),
)


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that `dcdit upcycle --family` reads.

    `source` is a folder of diffusers, of a transformer or of a pipeline that has one, and `latents` that of
    `dcdit.data.conditioned`. The blocks from the first of `blocks` to before the second are chunked, all counted in
    turn and negative ones from the end. The router chooses anew after every `group` of them; 0: it chooses once. The
    first `distill_steps` of `steps` are distillation by block, the others flow matching. Each batch keeps (1 − ρ)/N of
    its image tokens, N `target_ratio`, and ρ one of `drop_fractions`. The router learns at `router_rate` times
    optim.lr. `guidance` is for models that have an embedding of it, `time_shift` that of `dcdit.training.objectives`.
    An empty optim.ema_decay makes no average; one decay may be given. With `lora`, a rank, adapters of the chunked
    blocks' linear layers and the router learn and all else is frozen; `lora_targets` are ends of the names of the
    layers that have one, [] for all. `fsdp` splits weights, gradients, moments, averages and the teacher over the
    processes of `accelerate launch`, by block.
    """

    accumulate, compile = 1, False  # no fields: neither is supported, and the launcher's settings are held against them

    family: Family = "flux"
    source: str = ""
    latents: str = ""
    output: str = "runs/upcycle"
    seed: int = 0
    steps: int = 15_000
    distill_steps: int = 5_000
    batch_size: int = 16
    blocks: tuple[int, int] = (1, -1)
    group: int = 0
    target_ratio: float = 4.0
    ratio_weight: float = 0.1
    drop_fractions: tuple[float, ...] = (0.0, 0.3, 0.6)
    router_rate: float = 4.0
    guidance: float = 3.5
    time_shift: float = 1.0
    lora: tuple[int, ...] = ()
    lora_targets: tuple[str, ...] = ()
    checkpointing: bool = False
    fsdp: bool = False
    precision: Literal["no", "bf16"] = "no"
    optim: OptimConfig = field(default_factory=OptimConfig)
    log_every: int = 10
    save_every: int = 1000
    log_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("source", "latents", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must be a folder, got an empty name")
        check_types(self)
        check_limits(self, LIMITS)
        if not self.drop_fractions or not all(0 <= rho < 1 for rho in self.drop_fractions):
            raise ConfigError(f"drop_fractions must be values in [0, 1), got {self.drop_fractions}")
        decay = self.optim.ema_decay
        if len(decay) > 1 or not all(0 <= value <= 1 for value in decay):
            raise ConfigError(f"optim.ema_decay must be one value in [0, 1], or [] for no average, got {decay}")

        if len(self.lora) > 1 or min(self.lora, default=1) < 1:
            raise ConfigError(f"lora must be one rank of at least 1, or [] to train all weights, got {self.lora}")
        if self.lora_targets and not self.lora:
            raise ConfigError(f"lora_targets={list(self.lora_targets)} needs lora, a rank")

    def to_dict(self) -> dict[str, Any]:
        """All values in JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))
