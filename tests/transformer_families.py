"""Small random transformers of diffusers' text-to-image families, their inputs and their pipelines."""

import copy
import math

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers

TEXT = 6


def tiny_vae():
    return diffusers.AutoencoderKL(
        latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4, shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


class Flux:
    lists = "transformer_blocks.", "single_transformer_blocks."

    def model(self, **options):
        return diffusers.FluxTransformer2DModel(
            in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6), **options,
        )  # fmt: skip

    def inputs(self, grid=(5, 7), batch=2, dtype=torch.float32):
        height, width = grid
        ids = torch.zeros(height, width, 3)
        ids[..., 1] += torch.arange(height)[:, None]
        ids[..., 2] += torch.arange(width)
        draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
        return {
            "hidden_states": draw(batch, height * width, 8),
            "encoder_hidden_states": draw(batch, TEXT, 24),
            "pooled_projections": draw(batch, 12),
            "timestep": torch.rand(batch, dtype=dtype),
            "img_ids": ids.flatten(0, 1),
            "txt_ids": torch.zeros(TEXT, 3),
        }

    def masked(self, inputs):
        """The last tokens of the second sample's text are padding."""
        keep = torch.ones(2, 1, 1, TEXT + inputs["hidden_states"].shape[1], dtype=torch.bool)
        keep[1, ..., 3:TEXT] = False
        return {**inputs, "joint_attention_kwargs": {"attention_mask": keep}}

    def pipeline(self, transformer):
        parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return diffusers.FluxPipeline(scheduler=scheduler, vae=tiny_vae(), transformer=transformer, **parts)

    def prompts(self):
        return {"prompt_embeds": torch.randn(1, TEXT, 24), "pooled_prompt_embeds": torch.randn(1, 12)}


class SD3:
    lists = ("transformer_blocks.",)

    def model(self, **options):
        sizes = {"sample_size": 16, "pos_embed_max_size": 12, "patch_size": 2, "in_channels": 2, "out_channels": 2}
        return diffusers.SD3Transformer2DModel(
            **sizes, num_layers=4, attention_head_dim=16, num_attention_heads=4, caption_projection_dim=64,
            joint_attention_dim=24, pooled_projection_dim=12, dual_attention_layers=(0, 2), qk_norm="rms_norm",
            **options,
        )  # fmt: skip

    def inputs(self, grid=(5, 7), batch=2, dtype=torch.float32):
        draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
        return {
            "hidden_states": draw(batch, 2, 2 * grid[0], 2 * grid[1]),
            "encoder_hidden_states": draw(batch, TEXT, 24),
            "pooled_projections": draw(batch, 12),
            "timestep": 1000 * torch.rand(batch),
        }

    def pipeline(self, transformer):
        names = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        parts = dict.fromkeys(names)
        return diffusers.StableDiffusion3Pipeline(transformer, scheduler, tiny_vae(), **parts)

    def prompts(self):
        texts = {f"{sign}prompt_embeds": torch.randn(1, TEXT, 24) for sign in ("", "negative_")}
        return texts | {f"{sign}pooled_prompt_embeds": torch.randn(1, 12) for sign in ("", "negative_")}


class ZImage:
    since = "0.36"
    lists = ("layers.",)

    def model(self, **options):
        return diffusers.ZImageTransformer2DModel(
            in_channels=2, dim=64, n_layers=4, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=24,
            axes_dims=[4, 6, 6], axes_lens=[128, 32, 32], **options,
        )  # fmt: skip

    def inputs(self, grid=(5, 7), batch=2, dtype=torch.float32):
        """Captions of several lengths, in and beyond one multiple of 32."""
        draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
        return {
            "x": [draw(2, 1, 2 * grid[0], 2 * grid[1]) for _ in range(batch)],
            "t": torch.rand(batch, dtype=dtype),
            "cap_feats": [draw(5 + 30 * i, 24) for i in range(batch)],
        }

    def pipeline(self, transformer):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        return diffusers.ZImagePipeline(scheduler, tiny_vae(), None, None, transformer)

    def prompts(self):
        return {"prompt_embeds": [torch.randn(5, 24)], "negative_prompt_embeds": [torch.randn(3, 24)]}


class QwenImage:
    since = "0.39"
    lists = ("transformer_blocks.",)

    def model(self, **options):
        return diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=24, axes_dims_rope=(4, 6, 6), **options,
        )  # fmt: skip

    def inputs(self, grid=(5, 7), batch=2, dtype=torch.float32):
        """Texts of several lengths."""
        mask = torch.ones(batch, TEXT, dtype=torch.bool)
        mask[-1, 2:] = False
        return {
            "hidden_states": torch.randn(batch, math.prod(grid), 16, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, TEXT, 24, dtype=dtype),
            "encoder_hidden_states_mask": mask,
            "timestep": torch.rand(batch, dtype=dtype),
            "img_shapes": [[(1, *grid)]] * batch,
        }

    def pipeline(self, transformer):
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )  # fmt: skip
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return diffusers.QwenImagePipeline(scheduler, vae, None, None, transformer)

    def prompts(self):
        texts = {f"{sign}prompt_embeds": torch.randn(1, TEXT, 24) for sign in ("", "negative_")}
        return texts | {f"{name}_mask": torch.ones(1, TEXT).bool() for name in texts}


class Wan:
    lists = ("blocks.",)

    def model(self, **options):
        return diffusers.WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24, freq_dim=32,
            ffn_dim=96, num_layers=4, rope_max_seq_len=32, **options,
        )  # fmt: skip

    def inputs(self, grid=(5, 7), batch=2, dtype=torch.float32):
        """As many cells as `grid` has, its first side for frames and rows of one cell, or frames of two rows."""
        frames, rows = (grid[0] // 2, 2) if grid[0] % 2 == 0 else (grid[0], 1)
        return {
            "hidden_states": torch.randn(batch, 4, frames, 2 * rows, 2 * grid[1], dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, TEXT, 24, dtype=dtype),
            "timestep": 1000 * torch.rand(batch),
        }

    def pipeline(self, transformer):
        vae = diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=4, scale_factor_temporal=2,
        )  # fmt: skip
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return diffusers.WanPipeline(None, None, vae, scheduler, transformer)

    def prompts(self):
        return {f"{sign}prompt_embeds": torch.randn(1, TEXT, 24) for sign in ("", "negative_")} | {"num_frames": 5}


class LTX:
    lists = ("transformer_blocks.",)

    def model(self, **options):
        """Heads that the angles of three axes do not fill: the first of them turn nothing."""
        return diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64,
            num_layers=4, caption_channels=24, norm_elementwise_affine=True, **options,
        )  # fmt: skip

    def inputs(self, grid=(5, 7), batch=2, dtype=torch.float32):
        """Frames as in `Wan.inputs`; texts of several lengths."""
        frames, rows = (grid[0] // 2, 2) if grid[0] % 2 == 0 else (grid[0], 1)
        mask = torch.ones(batch, TEXT, dtype=torch.int64)
        mask[1:, 2:] = 0
        return {
            "hidden_states": torch.randn(batch, math.prod(grid), 8, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, TEXT, 24, dtype=dtype),
            "encoder_attention_mask": mask,
            "timestep": 1000 * torch.rand(batch),
            "num_frames": frames,
            "height": rows,
            "width": grid[1],
            "rope_interpolation_scale": (0.3, 32, 32),
        }

    def pipeline(self, transformer):
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, False),
            decoder_spatio_temporal_scaling=(True, False), decoder_inject_noise=(False,) * 3, patch_size=4,
            down_block_types=("LTXVideoDownBlock3D",) * 2, downsample_type=("conv",) * 2, upsample_factor=(1, 1),
            upsample_residual=(False, False),
        )  # fmt: skip
        return diffusers.LTXPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)

    def prompts(self):
        texts = {f"{sign}prompt_embeds": torch.randn(1, TEXT, 24) for sign in ("", "negative_")}
        masks = {f"{sign}prompt_attention_mask": torch.ones(1, TEXT) for sign in ("", "negative_")}
        return texts | masks | {"num_frames": 3, "width": 64}


FAMILIES = {
    "flux": Flux(),
    "sd3": SD3(),
    "z-image": ZImage(),
    "qwen-image": QwenImage(),
    "wan": Wan(),
    "ltx": LTX(),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def make(family, dtype=torch.float32, **options):
    """Weights that leave no gate closed and no bias zero."""
    if since := getattr(family, "since", None):  # the diffusers that has the class, or what its chunking needs
        pytest.importorskip("diffusers", minversion=since)
    model = family.model(**options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def close(got, want, tolerance):
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


@torch.no_grad()
def run(model, inputs):
    return picture(model, inputs)


def picture(model, inputs):
    out = model(**copy.copy(inputs)).sample
    return torch.stack(out) if isinstance(out, list) else out


def cache(name, **options):
    """The configuration of a cache of diffusers, whose older versions have fewer."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)(**options)
