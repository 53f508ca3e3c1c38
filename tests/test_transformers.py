"""Dynamic chunking of diffusers' text-to-image transformers: small random ones of the real classes."""

import copy
import math

import accelerate
import pytest
import torch

pytest.importorskip("diffusers")
import diffusers
import torch.nn.functional as F
from diffusers.models import normalization
from diffusers.models.transformers import transformer_flux

from bench.transformers import flops
from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking, load_dynamic_chunking, remove_dynamic_chunking
from dcdit.training import ratio_loss

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


FAMILIES = {"flux": Flux(), "sd3": SD3(), "z-image": ZImage(), "qwen-image": QwenImage(), "wan": Wan()}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture
def exact(monkeypatch):
    """The untouched models compute float64 as float64; their norms and rotations go to float32 whatever comes."""
    cast = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else cast(x))
    in_own_dtype = lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.eps)  # noqa: E731
    monkeypatch.setattr(normalization.RMSNorm, "forward", in_own_dtype)


def make(family, dtype=torch.float32, **options):
    """Weights that leave no gate closed and no bias zero."""
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


@every_family
@pytest.mark.parametrize(
    ("dtype", "tolerance", "blocks"),
    [
        *((torch.float64, 1e-12, blocks) for blocks in (slice(None), slice(1, -1), slice(-1, None))),
        (torch.float32, 5e-6, slice(None)),
    ],
    ids=str,
)
def test_all_cells_kept_is_the_untouched_model(family, dtype, tolerance, blocks, request):
    """Also on another grid afterwards; removed it is the same to the last bit, and with half the cells it is not."""
    if dtype == torch.float64:
        request.getfixturevalue("exact")
    model = make(family, dtype)
    given = [family.inputs(grid, dtype=dtype) for grid in ((5, 7), (1, 8))]
    want = [run(model, inputs) for inputs in given]
    names = list(model.state_dict())
    chunking = add_dynamic_chunking(model, blocks=blocks)
    assert [name for name in model.state_dict() if ".router." not in name] == names
    for inputs, wanted in zip(given, want, strict=True):
        close(run(model, inputs), wanted, tolerance)
        assert chunking.routing.plan.capacity == 2 * chunking.routing.plan.cells
    chunking.drop_fraction = 0.5
    assert not torch.allclose(run(model, given[0]), want[0], rtol=1e-3)
    assert chunking.routing.plan.capacity < 0.6 * 70
    remove_dynamic_chunking(model)
    assert torch.equal(run(model, given[0]), want[0])
    assert list(model.state_dict()) == names and "dynamic_chunking" not in model.config


def test_guidance_embedding(exact):
    model = make(FAMILIES["flux"], torch.float64, guidance_embeds=True)
    inputs = {**FAMILIES["flux"].inputs(dtype=torch.float64), "guidance": torch.tensor([1.0, 4.0]).double()}
    want = run(model, inputs)
    add_dynamic_chunking(model)
    close(run(model, inputs), want, 1e-12)


@pytest.mark.parametrize("blocks", [slice(None), slice(1, -2)], ids=str)
def test_padding_of_text_is_cut(blocks, exact):
    """As the untouched model under a mask, and as a shorter text alone; what the padding holds is never read."""
    family = FAMILIES["flux"]
    model = make(family, torch.float64)
    inputs = family.masked(family.inputs(dtype=torch.float64))
    want = run(model, inputs)
    chunking = add_dynamic_chunking(model, blocks=blocks)
    close(run(model, inputs), want, 1e-12)
    chunking.drop_fraction = torch.tensor([0.0, 0.6])
    both = run(model, inputs)
    del inputs["joint_attention_kwargs"]
    alone = {name: value if name.endswith("ids") else value[1:] for name, value in inputs.items()}
    alone["encoder_hidden_states"], alone["txt_ids"] = alone["encoder_hidden_states"][:, :3], inputs["txt_ids"][:3]
    chunking.drop_fraction = 0.6
    close(both[1:], run(model, alone), 1e-12)


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_quarter_of_the_cells_trains(family, checkpointing):
    """Gradients reach the router and every block, the same ones with checkpointing; the loss falls."""
    model = make(family)
    chunking = add_dynamic_chunking(model)
    chunking.drop_fraction = 0.75
    inputs = family.inputs((4, 6))
    model.train()
    grads = []
    for on in (False, checkpointing):
        (model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing)()
        out = picture(model, inputs)
        assert chunking.routing.plan.capacity == 12
        routing = chunking.routing
        loss = out.square().mean() + ratio_loss(routing.boundary_prob, routing.natural_mask, target_ratio=4.0)
        grads.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for (name, parameter), first, again in zip(model.named_parameters(), *grads, strict=True):
        close(again, first, 1e-5) if first is not None else None
        # The last text of SD3 and of Qwen-Image is not looked at.
        unread = name.startswith("transformer_blocks.3.") and ("add" in name or "txt" in name)
        if name.startswith(family.lists) and not unread:
            assert first is not None and first.isfinite().all() and first.abs().max() > 0, name
        assert parameter.shape == (parameter if first is None else first).shape
    target, optimizer = torch.zeros_like(out), torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = (picture(model, inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@every_family
def test_saved_and_loaded_without_a_recipe(family, tmp_path):
    """Blocks, sigma and router come back; diffusers alone reads the untouched model."""
    model = make(family)
    inputs = family.inputs()
    untouched = run(model, inputs)
    chunking = add_dynamic_chunking(model, blocks=slice(1, 3), sigma=0.7)
    torch.nn.init.normal_(chunking.router.score.weight)
    torch.nn.init.zeros_(chunking.router.score.bias)
    want = run(model, inputs)
    assert chunking.routing.plan.capacity < 70
    for folder in ("once", "twice"):  # a loaded model is saved like the first
        model.save_pretrained(tmp_path / folder)
        model = load_dynamic_chunking(tmp_path / folder)
        assert torch.equal(run(model, inputs), want)
    plain = type(model).from_pretrained(tmp_path / "once")
    assert torch.equal(run(plain, inputs), untouched)
    with pytest.raises(ConfigError, match="router must be a None, got Linear"):
        load_dynamic_chunking(tmp_path / "once", router=torch.nn.Linear(1, 1))
    plain.save_pretrained(tmp_path / "plain")
    remove_dynamic_chunking(model)
    model.save_pretrained(tmp_path / "removed")
    with pytest.raises(ConfigError, match="must have dynamic_chunking"):
        load_dynamic_chunking(tmp_path / "removed")


@every_family
def test_the_pipeline_runs_unchanged(family):
    """All kept: the pictures of the untouched model; with a budget each step keeps its share."""
    model = make(family)
    pipe, prompts = family.pipeline(model), family.prompts()
    pipe.set_progress_bar_config(disable=True)

    def sample():
        options = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}
        out = pipe(**prompts, **options, generator=torch.Generator().manual_seed(0))
        return out[0]

    want = sample()
    chunking = add_dynamic_chunking(model)
    close(sample(), want, 1e-4)
    chunking.drop_fraction = 0.5
    assert sample().shape == want.shape
    assert float(chunking.routing.plan.lengths.max()) == chunking.routing.plan.cells / 2


def test_another_budget_for_the_unconditional_pass():
    """SD3's pipeline runs both in one batch, the unconditional one first."""
    family = FAMILIES["sd3"]
    model = make(family)
    pipe = family.pipeline(model)
    chunking = add_dynamic_chunking(model)
    chunking.drop_fraction = torch.tensor([0.75, 0.25])
    pipe(**family.prompts(), height=16, width=24, num_inference_steps=1, output_type="latent")
    assert chunking.routing.plan.lengths.tolist() == [6, 18]


def test_padding_of_text_is_cut_in_sd3(exact):
    """Where all blocks are chunked; each sample as alone, in the untouched model, with its own text."""
    family = FAMILIES["sd3"]
    model = make(family, torch.float64)
    inputs = family.inputs(dtype=torch.float64)
    short = {name: value[1:] for name, value in inputs.items()}
    short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :3]
    want = run(model, short)
    keep = torch.ones(2, 1, 1, TEXT + 35, dtype=torch.bool)
    keep[1, ..., 3:TEXT] = False
    inputs["joint_attention_kwargs"] = {"attention_mask": keep}
    add_dynamic_chunking(model)
    close(run(model, inputs)[1:], want, 1e-12)
    remove_dynamic_chunking(model)
    add_dynamic_chunking(model, blocks=slice(1, None))
    with pytest.raises(ConfigError, match="attention_mask needs all blocks chunked"):
        run(model, inputs)


def test_frames_that_stand_still_are_kept_once():
    """Wan refills cells from other frames: with a router that keeps the first frame, later ones are as the first."""

    class First(torch.nn.Module):
        def forward(self, h, *, grid):
            prob = torch.zeros(h.shape[:2]).unflatten(1, grid)
            prob[:, 0] = 1
            return prob.flatten(1)

    family = FAMILIES["wan"]
    model, inputs = make(family), family.inputs((6, 4))
    inputs["hidden_states"][:, :, 1:] = inputs["hidden_states"][:, :, :1]
    chunking = add_dynamic_chunking(model, router=First())
    out = run(model, inputs)
    assert chunking.routing.plan.grid == (3, 2, 4) and chunking.routing.plan.lengths.tolist() == [8, 8]
    close(out[:, :, 1:], out[:, :, :1].expand_as(out[:, :, 1:]), 1e-6)


def test_bad_input_of_qwen_image_and_wan():
    family = FAMILIES["qwen-image"]
    model, inputs = make(family), family.inputs()
    add_dynamic_chunking(model)
    for shapes, words in (
        ([[(1, 5, 7)], [(1, 7, 5)]], "need one picture a sample, of one shape"),
        ([[(1, 5, 7), (1, 2, 2)]] * 2, "need one picture a sample, of one shape"),
        ([[(1, 5, 8)]] * 2, "img_shapes must be one grid of 35 tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(model, {**inputs, "img_shapes": shapes})
    with pytest.raises(ConfigError, match="without zero_cond_t"):
        add_dynamic_chunking(make(family, zero_cond_t=True))
    model, inputs = make(FAMILIES["wan"]), FAMILIES["wan"].inputs()
    add_dynamic_chunking(model)
    with pytest.raises(ConfigError, match="one timestep a sample, got one for each token"):
        run(model, {**inputs, "timestep": torch.rand(2, 35)})


@every_family
def test_flops_are_those_of_the_untouched_blocks_on_fewer_tokens(family):
    """As bench.transformers counts, to 1 %; the router beside them."""
    model = make(family)
    whole, half = (8, 8), (8, 4)  # Z-Image fills up to multiples of 32
    inputs = {grid: family.inputs(grid, batch=1) for grid in (whole, half)}
    for given in inputs.values():
        given.pop("encoder_hidden_states_mask", None)  # padding would cost the untouched model something
    counts = {grid: flops(lambda given=given: run(model, given)) for grid, given in inputs.items()}
    chunking = add_dynamic_chunking(model)
    model.requires_grad_(False)  # the counter asks for gradients of whatever could have one
    chunking.drop_fraction = 0.5
    blocks, joint = chunking.run, family is not FAMILIES["wan"]
    chunking.run = lambda _, x, plan, text, **rest: (x, text.rows) if joint else x
    around = {grid: flops(lambda given=given: run(model, given)) for grid, given in inputs.items()}
    chunking.run = blocks
    got = flops(lambda: run(model, inputs[whole]))
    alone = counts[half] - (around[half] - 2 * chunking.router.macs(32))  # the untouched blocks, on half the tokens
    want = around[whole] + alone
    assert abs(got - want) < 0.01 * got


def test_z_image_wants_one_size_in_a_batch():
    family = FAMILIES["z-image"]
    model, inputs = make(family), family.inputs()
    add_dynamic_chunking(model)
    inputs["x"][1] = inputs["x"][1][..., :-2]
    with pytest.raises(ConfigError, match=r"need latents of one size in a batch, got \[\(1, 10, 12\), \(1, 10, 14\)\]"):
        run(model, inputs)


def half_kept(family):
    """A wrapped model at ρ = 0.5, its inputs, its chunking and its output."""
    model, inputs = make(family), family.inputs()
    chunking = add_dynamic_chunking(model)
    chunking.drop_fraction = 0.5
    return model, inputs, chunking, run(model, inputs)


@every_family
def test_copies_and_tools_of_diffusers(family):
    """A deep copy is independent; LoRA on the blocks' linears acts; the repeated blocks compile by their names."""
    model, inputs, chunking, want = half_kept(family)
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(chunking.router.score.weight)
    assert torch.equal(run(other, inputs), want)
    peft = pytest.importorskip("peft")
    other.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert not torch.allclose(run(other, inputs), want)
    names = {type(block).__name__ for block in chunking.blocks}
    assert names <= set(type(model)._no_split_modules)


@every_family
def test_weights_that_come_and_go(family):
    """accelerate's offload by module, diffusers' by block, and blocks compiled by their names."""
    model, inputs, _, want = half_kept(family)
    cpu = torch.device("cpu")
    moved = accelerate.cpu_offload(copy.deepcopy(model), execution_device=cpu)
    assert next(moved.parameters()).device.type == "meta"
    assert torch.equal(run(moved, inputs), want)
    grouped = copy.deepcopy(model)
    grouped.enable_group_offload(cpu, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(run(grouped, inputs), want)
    if family is FAMILIES["wan"]:  # of those that have _repeated_blocks the one that compiles soonest
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend="aot_eager")
        close(run(model, inputs), want, 1e-5)


@every_family
def test_bad_input(family):
    """One line that says what was expected and what came."""
    model = make(family)
    for blocks, words in (
        (slice(9, None), "blocks must name one block or more"),
        (slice(None, None, 2), "blocks must be a slice without a step"),
        ([1], "blocks must be a slice"),
    ):
        with pytest.raises(ConfigError, match=words):
            add_dynamic_chunking(model, blocks=blocks)
    with pytest.raises(ConfigError, match="must be one that add_dynamic_chunking was called on"):
        remove_dynamic_chunking(model)
    add_dynamic_chunking(model)
    with pytest.raises(ConfigError, match="has dynamic chunking already"):
        add_dynamic_chunking(model)
    remove_dynamic_chunking(model)
    with pytest.raises(ConfigError, match=r"model must be one of FluxTransformer2DModel.* or have transformer_blocks"):
        add_dynamic_chunking(torch.nn.Linear(2, 2))


def test_bad_input_of_flux():
    family = FAMILIES["flux"]
    model, inputs = make(family), family.inputs()
    add_dynamic_chunking(model)
    ids = inputs["img_ids"]
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    for change, words in (
        ({"controlnet_block_samples": [torch.zeros(1)]}, "do not support controlnet_block_samples"),
        ({"img_ids": ids[:-1], "hidden_states": inputs["hidden_states"][:, :-1]}, "img_ids must be one grid of tokens"),
        ({"joint_attention_kwargs": {"attention_mask": mask}}, r"attention_mask must be bool \(2, 1, 1, 41\)"),
        ({"joint_attention_kwargs": {"ip_hidden_states": mask}}, "take no joint_attention_kwargs but attention_mask"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(model, {**inputs, **change})
    model.set_attn_processor(transformer_flux.FluxIPAdapterAttnProcessor(64, 64))
    with pytest.raises(ConfigError, match=r"need FluxAttnProcessor .* got FluxIPAdapterAttnProcessor"):
        run(model, inputs)
