"""DC-DiT as a diffusers model: the transformer of `diffusers.DiTPipeline`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from dcdit_kernels import ChunkPlan, chunk

from ..errors import ConfigError, check_kind
from ..model.blocks import Stream
from ..model.config import DCDiTConfig
from ..model.dcdit import DCDiT
from ..model.graphs import Graphed
from ..model.guess_router import takes_guess
from ..model.meta import on_meta
from ..sampling.drop_fraction import DropFraction
from ..sampling.policy import Policy
from ..sampling.policy_run import PolicyRun
from ..sampling.schedulers import TRAIN_STEPS
from .caching import GridChange, GridStage, on_grid
from .reading import check_foreign

# DiTPipeline's id of 'no label', whatever the number of classes.
DIT_NULL = 1000

# By name: an older diffusers lacks some.
CACHES = ("FirstBlockCacheConfig", "MagCacheConfig", "TaylorSeerCacheConfig")


def _with_fields_of_the_configuration(init: Callable) -> Callable:
    """`init` with the fields of DCDiTConfig in its signature, by which diffusers saves and loads a model."""
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
    fields = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
        for field in dataclasses.fields(DCDiTConfig)
        if field.name not in ("input_size", "learn_sigma")
    ]
    init.__signature__ = inspect.Signature([*own, *fields])
    return init


class DCDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """A DCDiT with the configuration and forward of diffusers' DiTTransformer2DModel.

    `sample_size` is the latent grid, one number or (H, W); `out_channels` is in_channels, or twice that where the
    variance is learned; `objective` is the training objective and `policy` that of sampling, where known; the rest is
    DCDiTConfig's. The model itself is `.model`. Raises ConfigError.
    """

    graph: Graphed | None = None
    policy_run: PolicyRun | None = None
    # diffusers reads lists.
    _keep_in_fp32_modules = ["router", "residual_proj"]  # noqa: RUF012
    _repeated_blocks = ["DiTBlock"]  # noqa: RUF012
    _no_split_modules = ["DiTBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["norm"]  # noqa: RUF012
    _supports_gradient_checkpointing = True

    @register_to_config
    @_with_fields_of_the_configuration
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        out_channels: int = 8,
        objective: str | None = None,
        policy: str | None = None,
        **sizes: Any,
    ) -> None:
        super().__init__()
        channels = sizes["in_channels"] = self.config.in_channels
        if out_channels not in (channels, 2 * channels):
            raise ConfigError(f"out_channels must be {channels} or {2 * channels}, got {out_channels}")
        learn_sigma = out_channels == 2 * channels
        self.model = DCDiT(DCDiTConfig(input_size=sample_size, learn_sigma=learn_sigma, **sizes))
        # Without parameters: the backbone as caches see it.
        self.blocks = nn.ModuleList([GridStage(slice(1)), GridStage(slice(1, None))])
        self.change = GridChange()
        self.context_given = False
        self.set_drop_fraction(0.0)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any
    ) -> DCDiTTransformer2DModel:
        """diffusers' own. Raises ConfigError for a folder of another class, and for a checkpoint of this project, of
        which it says how it becomes a model."""
        check_foreign(pretrained_model_name_or_path, cls, options.get("subfolder"))
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_dcdit(cls, model: DCDiT) -> DCDiTTransformer2DModel:
        """A model that shares this one's parameters and mode. Raises ConfigError for another kind of object."""
        check_kind(model, DCDiT, "model", "DCDiT.from_pretrained reads a checkpoint")
        config = model.config.to_dict()
        size, learned = config.pop("input_size"), config.pop("learn_sigma")
        with on_meta():
            transformer = cls(
                sample_size=size[0] if size[0] == size[1] else tuple(size),
                out_channels=config["in_channels"] * (2 if learned else 1),
                **{name: getattr(model, "use", {}).get(name) for name in ("objective", "policy")},
                **config,
            )
        transformer.model = model
        return transformer.train(model.training)

    def set_drop_fraction(self, drop_fraction: DropFraction, uncond_drop_fraction: DropFraction | None = None) -> None:
        """ρ for pipelines that do not know of it; `uncond_drop_fraction` for the rows without label (None: equal).

        Each a number in [0, 1); a tensor, one for each row of the half that it is for; a list, each number for an equal
        share of the time from 1000 (noise) to 0 (data); or a function of the timestep.
        """
        if drop_fraction is None:
            raise ConfigError("drop_fraction must be a number, a tensor, a list or a function, got None")
        self.budgets = (drop_fraction, drop_fraction if uncond_drop_fraction is None else uncond_drop_fraction)

    def set_policy(
        self, policy: Policy | str | None, timesteps: torch.Tensor | Sequence[float] | None = None
    ) -> PolicyRun | None:
        """A policy for pipelines that do not know of it; None: no longer. `policy_run.table()` says what it decided.

        `timesteps` are those of the runs to come, such as `pipe.scheduler.timesteps` after `set_timesteps`. Raises
        ConfigError.
        """
        self.policy_run = None
        if policy is not None:
            if timesteps is None:
                raise ConfigError("set_policy needs the timesteps of a run, such as pipe.scheduler.timesteps")
            self.policy_run = PolicyRun(self.graph or self.model, policy, timesteps)
        return self.policy_run

    def enable_cuda_graph(self, enabled: bool = True) -> None:
        """Replay the model as CUDA graphs where shapes repeat, see `dcdit.graphs.Graphed`; `.graph` counts."""
        if not enabled:
            self.graph = None
        elif self.graph is None or self.graph.model is not self.model:
            self.graph = Graphed(self.model)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        drop_fraction: float | torch.Tensor | None = None,
        return_dict: bool = True,
        guess: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise (and variance) or velocity.

        Args:
            hidden_states: (B, C, H, W). timestep: (B,), 0 to 1000. class_labels: (B,) ids; `num_classes` is no label,
                and so is 1000, which DiTPipeline sends, where there are fewer classes.
            drop_fraction: ρ in [0, 1), a number or (B,); None: the value of `set_drop_fraction`.
            guess: (B, C, H, W), see `DCDiT.forward`.

        Returns `.sample` (B, out_channels, H, W), or a tuple of it without `return_dict`.
        """
        check_kind(class_labels, torch.Tensor, "class_labels")
        null = self.model.config.num_classes
        if null < DIT_NULL:
            class_labels = torch.where(class_labels == DIT_NULL, null, class_labels)
        if drop_fraction is None:
            drop_fraction = self._rho(timestep, class_labels == null)
        told = {} if guess is None else {"guess": guess}
        if self.policy_run is not None:
            if self.is_cache_enabled:
                raise ConfigError("a policy and a cache of diffusers exclude each other: leave one of them out")
            out = self.policy_run(hidden_states, timestep, class_labels, drop_fraction, **told)
        elif not self.is_cache_enabled:
            out = (self.graph or self.model)(hidden_states, timestep, class_labels, drop_fraction, **told)
        else:
            with contextlib.nullcontext() if self.context_given else self.cache_context("batch"):
                out = self.model(hidden_states, timestep, class_labels, drop_fraction, run=self._run_on_grid)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def enable_cache(self, config: Any) -> None:
        """Skip blocks where diffusers' cache says so: FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig.

        A cache keeps grids, whatever tokens the next step retains. Raises ConfigError for the kinds
        that keep the outputs of attention layers, for a model of one block, and for one that routes by a guess.
        """
        kind = type(config).__name__
        if kind not in CACHES:
            raise ConfigError(
                f"config must be one of {', '.join(CACHES)}: other caches keep tokens, which change from step to step; "
                f"got {kind}"
            )
        if takes_guess(self.model):
            raise ConfigError(f"router guess runs without a cache of diffusers, got {kind}")
        if len(self.model.main.blocks) < 2:
            raise ConfigError(f"a cache needs two blocks or more, got {len(self.model.main.blocks)}")
        if kind == "TaylorSeerCacheConfig":
            config = dataclasses.replace(config, use_lite_mode=False, cache_identifiers=["change"])
        super().enable_cache(config)

    @contextlib.contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """As in diffusers. A call outside of any context makes one."""
        self.context_given = True
        try:
            with super().cache_context(name, **kwargs):
                yield
        finally:
            self.context_given = False

    def _run_on_grid(self, stream: Stream, c: torch.Tensor, packing: ChunkPlan) -> Stream:
        """In place of `MainNetwork.run`: the blocks' change comes from the grid, where caches have their say."""
        change = self.change(on_grid(stream.x, packing), self.blocks, self.model.main, c, packing)
        return Stream(stream.x + chunk(change, packing))

    def _rho(self, timestep: torch.Tensor, unlabelled: torch.Tensor) -> float | torch.Tensor:
        if all(isinstance(budget, float | int) for budget in self.budgets) and len(set(self.budgets)) == 1:
            return self.budgets[0]
        rho = torch.zeros(len(unlabelled), device=unlabelled.device)
        for budget, rows in zip(self.budgets, (~unlabelled, unlabelled), strict=True):
            if count := int(rows.sum()):
                values = torch.as_tensor(_at(budget, timestep[rows]), dtype=torch.float32, device=rho.device)
                if values.dim() and len(values) != count:
                    raise ConfigError(f"a drop fraction for each row needs {count} values, got {len(values)}")
                rho[rows] = values
        if not bool(((rho >= 0) & (rho < 1)).all()):
            raise ConfigError(f"drop fractions must be in [0, 1), got {rho.tolist()}")
        return rho


def _at(budget: DropFraction, timesteps: torch.Tensor) -> float | torch.Tensor | list[float]:
    """A budget at each of `timesteps`, 1000 to 0; one that does not depend on time as it is."""
    if callable(budget):
        return [budget(t) for t in timesteps.tolist()]
    if isinstance(budget, Sequence):
        last = len(budget) - 1
        return [budget[min(int((TRAIN_STEPS - t) / TRAIN_STEPS * len(budget)), last)] for t in timesteps.tolist()]
    return budget
