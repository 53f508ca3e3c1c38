"""DC-DiT as a diffusers model: what `diffusers.DiTPipeline` takes for its transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin

from ..config import DCDiTConfig
from ..drop_fraction import DropFraction
from ..errors import ConfigError
from ..graphs import Graphed
from ..model import DCDiT
from ..schedulers import TRAIN_STEPS

# DiTPipeline's id of 'no label', whatever the number of classes.
DIT_NULL = 1000


class DCDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """A DCDiT with the configuration and forward of diffusers' DiTTransformer2DModel.

    `sample_size` is the latent grid, one number or (H, W); `out_channels` is in_channels, or twice that where the
    variance is learned; the rest is DCDiTConfig's. The model itself is `.model`. Raises ConfigError.
    """

    graph: Graphed | None = None
    _keep_in_fp32_modules = ["router", "residual_proj"]  # noqa: RUF012, diffusers reads a list

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        out_channels: int = 8,
        num_classes: int = 1000,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        encoder_width: int = 96,
        mlp_ratio: float = 4.0,
        target_ratio: float = 4.0,
        router: str = "predictability",
        sigma: float = 1.0,
        cond_norm: bool = False,
    ) -> None:
        super().__init__()
        if out_channels not in (in_channels, 2 * in_channels):
            raise ConfigError(f"out_channels must be {in_channels} or {2 * in_channels}, got {out_channels}")
        config = dict(self.config)
        size, learn_sigma = config.pop("sample_size"), config.pop("out_channels") == 2 * in_channels
        fields = {key: value for key, value in config.items() if not key.startswith("_")}
        self.model = DCDiT(DCDiTConfig(input_size=size, learn_sigma=learn_sigma, **fields))
        self.set_drop_fraction(0.0)

    @classmethod
    def from_dcdit(cls, model: DCDiT) -> DCDiTTransformer2DModel:
        """The same model, sharing its parameters, in the same mode."""
        config = model.config.to_dict()
        size, learned = config.pop("input_size"), config.pop("learn_sigma")
        with torch.device("meta"):
            transformer = cls(
                sample_size=size[0] if size[0] == size[1] else tuple(size),
                out_channels=config["in_channels"] * (2 if learned else 1),
                **config,
            )
        transformer.model = model
        return transformer.train(model.training)

    def set_drop_fraction(self, drop_fraction: DropFraction, uncond_drop_fraction: DropFraction | None = None) -> None:
        """ρ for pipelines that do not know of it; `uncond_drop_fraction` for the rows without label (None: the same).

        Each a number in [0, 1); a tensor, one for each row of the half that it is for; a list, each number for an equal
        share of the time from 1000 (noise) to 0 (data); or a function of the timestep.
        """
        self.budgets = (drop_fraction, drop_fraction if uncond_drop_fraction is None else uncond_drop_fraction)

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
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise (and variance) or velocity.

        Args:
            hidden_states: (B, C, H, W). timestep: (B,), 0 to 1000. class_labels: (B,) ids; `num_classes` is no label,
                and so is 1000 where there are fewer classes, which is what DiTPipeline sends.
            drop_fraction: ρ in [0, 1), a number or (B,); None: what `set_drop_fraction` says.

        Returns `.sample` (B, out_channels, H, W), or a tuple of it without `return_dict`.
        """
        null = self.model.config.num_classes
        if null < DIT_NULL:
            class_labels = torch.where(class_labels == DIT_NULL, null, class_labels)
        if drop_fraction is None:
            drop_fraction = self._rho(timestep, class_labels == null)
        out = (self.graph or self.model)(hidden_states, timestep, class_labels, drop_fraction)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

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
