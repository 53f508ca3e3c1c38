"""DCDiTPipeline: class-conditional images from a DC-DiT, with the arguments that users of diffusers know."""

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, Optional

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..codecs import latent_scaling
from ..errors import ConfigError, check_kind
from ..model.clean_latents import clean_guess
from ..model.dcdit import DCDiT
from ..model.guess_router import takes_guess
from ..model.precision import float32_products
from ..sampling.denoising import guide
from ..sampling.drop_fraction import DropFraction, drop_table
from ..sampling.policy import Policy
from ..sampling.policy_run import PolicyRun
from ..sampling.sampler import class_ids
from ..sampling.schedulers import set_timesteps
from .reading import check_foreign
from .transformer import DCDiTTransformer2DModel


class DCDiTPipeline(DiffusionPipeline):
    """Images of given classes.

    Args:
        transformer: the model.
        scheduler: one of diffusers', for the model's objective: noise prediction, or flow matching.
        vae: decodes latents; None for models of pixels, with output_type "latent".
    """

    policy_run: PolicyRun | None = None
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012, diffusers reads a list
    _callback_tensor_inputs = ["latents", "noise_pred", "drop_fraction"]  # noqa: RUF012

    def __init__(
        self,
        transformer: DCDiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: Optional[AutoencoderKL] = None,  # noqa: UP045, diffusers 0.35 reads neither X | None nor strings
    ) -> None:
        super().__init__()
        if not isinstance(getattr(transformer, "model", None), DCDiT):
            raise ConfigError(
                "transformer must be a DCDiTTransformer2DModel, as its from_dcdit makes one, "
                f"got a {type(transformer).__name__}"
            )
        if not hasattr(scheduler, "set_timesteps"):
            raise ConfigError(f"scheduler must be one of diffusers, got a {type(scheduler).__name__}")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **more: Any) -> "DCDiTPipeline":
        """diffusers' own. Raises ConfigError for a checkpoint of this project, and says how it becomes a model."""
        check_foreign(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, **more)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | torch.Tensor,
        guidance_scale: float = 4.0,
        drop_fraction: DropFraction = 0.0,
        uncond_drop_fraction: DropFraction | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
        cuda_graph: bool = False,
        height: int | None = None,
        width: int | None = None,
        policy: Policy | str | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image for each of `class_labels`.

        Args:
            guidance_scale: uncond + guidance_scale·(cond − uncond); 1 or less runs no unconditional half.
            drop_fraction: ρ in [0, 1): a number; a tensor (N,), one for each image; a list over the steps; or a
                function of the timestep; see `dcdit.drop_fraction.drop_table`.
            uncond_drop_fraction: ρ of the unconditional half (Lite-CFG, arXiv 2603.06351); None: drop_fraction.
            generator: one, or one for each image. latents: (N, C, H, W), the noise to start from.
            height, width: of the images in pixels, without a vae in cells; None: the model's own.
            output_type: "pil", "np", "pt", or "latent" for (N, C, H, W) before the vae.
            callback_on_step_end: called as f(pipeline, step, timestep, tensors); returns a dict whose "latents"
                replaces them. `tensors` holds the names in callback_on_step_end_tensor_inputs.
            policy: what each step may spend, see `dcdit.sampling.Policy`; None: the transformer's own.
                `policy_run.table()` says what it decided when.
            cuda_graph: replay the model as CUDA graphs (`transformer.enable_cuda_graph()`), which later calls keep.

        Returns ImagePipelineOutput, or a tuple of its images without `return_dict`. Raises ConfigError.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check(callback_on_step_end_tensor_inputs, output_type, num_inference_steps, drop_fraction)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ConfigError(f"callback_on_step_end must be called as a function, got {callback_on_step_end!r}")
        number = isinstance(guidance_scale, Real) or getattr(guidance_scale, "shape", None) == ()
        if not (number and math.isfinite(guidance_scale)):
            raise ConfigError(f"guidance_scale must be a finite number, got {guidance_scale!r}")
        model, device = self.transformer.model, self._execution_device
        self._guidance_scale = guidance_scale
        if not self.do_classifier_free_guidance and (uncond_drop_fraction is not None or Policy.of(policy).guidance):
            idle = "a policy's guidance" if uncond_drop_fraction is None else "uncond_drop_fraction"
            raise ConfigError(f"{idle} needs a guidance_scale above 1, got {guidance_scale}")
        if cuda_graph and device.type != "cuda":
            raise ConfigError(f"cuda_graph needs a GPU, the pipeline is on {device}")
        if cuda_graph:
            self.transformer.enable_cuda_graph()

        y = self._labels(class_labels, device)
        channels, count = model.config.in_channels, len(y)
        set_timesteps(self.scheduler, num_inference_steps, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        policy = self.transformer.config.get("policy") if policy is None else policy
        table = drop_table(drop_fraction, timesteps.float(), count)
        if self.do_classifier_free_guidance:
            y = torch.cat([y, torch.full_like(y, model.config.num_classes)])
            uncond = drop_fraction if uncond_drop_fraction is None else uncond_drop_fraction
            table = torch.cat([table, drop_table(uncond, timesteps.float(), count)], dim=1)
        table = table.to(device)
        latents = self._noise(count, self._size(height, width), generator, latents, device)
        options = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        whole = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        told: dict[str, torch.Tensor] = {}

        products = float32_products("high" if self.transformer.dtype.itemsize < 4 else None)
        with products, self._spending(policy, timesteps), self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                x = torch.cat([latents, latents]) if self.do_classifier_free_guidance else latents
                x = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
                noise_pred = self.transformer(x, t.expand(len(x)), y, table[i], return_dict=False, **told)[0]
                if takes_guess(model):  # by which the next step routes
                    told["guess"] = clean_guess(x.float(), noise_pred.float(), t.expand(len(x))).to(x.dtype)
                if self.do_classifier_free_guidance:
                    noise_pred = guide(noise_pred, guidance_scale, channels)
                if not whole:
                    noise_pred = noise_pred[:, :channels]
                latents = self.scheduler.step(noise_pred, t, latents, **options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "noise_pred": noise_pred, "drop_fraction": table[i]}
                    tensors = {key: tensors[key] for key in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, i, t, tensors).pop("latents", latents)
                bar.update()

        images = latents
        if output_type != "latent":
            z = latents.to(self.vae.dtype)
            offset, factor = (part.to(z) for part in latent_scaling(self.vae.config))
            images = self.vae.decode(z / factor + offset).sample
            images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @contextlib.contextmanager
    def _spending(self, policy: Policy | str | None, timesteps: torch.Tensor) -> Iterator[None]:
        """The transformer under a policy, where one is given; it keeps its own otherwise."""
        if policy is None:
            yield
            return
        before = self.transformer.policy_run
        self.policy_run = self.transformer.set_policy(policy, timesteps)
        try:
            yield
        finally:
            self.transformer.policy_run = before

    def _check(self, tensor_inputs: list[str], output_type: str, steps: int, drop_fraction: DropFraction) -> None:
        objective = self.transformer.config.get("objective")
        kind = type(self.scheduler).__name__
        predicted = self.scheduler.config.get("prediction_type", "epsilon")
        flow = kind.startswith("FlowMatch") or predicted == "flow_prediction"
        if objective is not None and flow != (objective == "flow"):
            raise ConfigError(f"{kind} does not integrate this model, which was trained by {objective}")
        if objective == "ddpm" and predicted != "epsilon":
            raise ConfigError(f"the model predicts the noise, prediction_type epsilon of {kind}, got {predicted}")
        for name in tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise ConfigError(f"callbacks can see {', '.join(self._callback_tensor_inputs)}, got {name!r}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ConfigError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        if output_type != "latent" and self.vae is None:
            raise ConfigError(f"without a vae the output_type must be latent, got {output_type!r}")
        if not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"num_inference_steps must be an integer of at least 1, got {steps!r}")
        if drop_fraction is None:
            raise ConfigError("drop_fraction must be a number, a tensor, a list or a function, got None")

    def _labels(self, class_labels: list[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
        count = self.transformer.model.config.num_classes
        try:
            return class_ids(class_labels, count).to(device)
        except ConfigError:
            raise ConfigError(f"class_labels must be a list of ids in [0, {count - 1}], got {class_labels!r}") from None

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The latents' (H, W) in cells."""
        config, unit = self.transformer.model.config, 1
        if self.vae is not None:
            unit = getattr(self.vae, "spatial_compression_ratio", 2 ** (len(self.vae.config.block_out_channels) - 1))
        step, sides = unit * config.encoder_stride, []
        for name, given, own in zip(("height", "width"), (height, width), config.input_size, strict=True):
            if given is not None and (not isinstance(given, int) or given < 1 or given % step):
                raise ConfigError(f"{name} must be a positive multiple of {step}, got {given!r}")
            sides.append(own if given is None else given // unit)
        return sides[0], sides[1]

    def _noise(
        self, count: int, size: tuple[int, int], generator, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        shape, dtype = (count, self.transformer.model.config.in_channels, *size), self.transformer.dtype
        for one in generator if isinstance(generator, list) else [] if generator is None else [generator]:
            check_kind(one, torch.Generator, "generator", "torch.Generator().manual_seed(…) makes one")
        if isinstance(generator, list) and len(generator) != count:
            raise ConfigError(f"{count} images need one generator or {count}, got {len(generator)}")
        check_kind(latents, (torch.Tensor, type(None)), "latents")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ConfigError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
