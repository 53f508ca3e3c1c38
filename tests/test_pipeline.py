"""DC-DiT inside diffusers' DiTPipeline and in its own pipeline, with real diffusers and tiny random weights."""

import inspect
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback

from dcdit import DCDiT, DCDiTConfig
from dcdit.errors import ConfigError
from dcdit.integrations.pipeline import DCDiTPipeline
from dcdit.integrations.transformer import DCDiTTransformer2DModel
from dcdit.sampling.sampler import sample

CELLS = 36


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=12)


def transformer(learn_sigma=True, size=6):
    torch.manual_seed(0)
    sizes = {"num_classes": 10, "hidden_size": 32, "depth": 1, "num_heads": 1, "encoder_width": 32}
    model = DCDiT(DCDiTConfig(input_size=size, **sizes, learn_sigma=learn_sigma))
    for parameter in model.parameters():  # nothing zero, so that class, time and ρ all show
        torch.nn.init.normal_(parameter, std=0.08)
    torch.nn.init.constant_(model.router.score.bias, 3.0)  # all cells are boundaries: tokens tell ρ
    return DCDiTTransformer2DModel.from_dcdit(model.eval())


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def record_tokens(model):
    """Tokens of each row at each step, as the transformer's blocks see them."""
    rows = []
    model.model.main.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[2].lengths.tolist()))
    return rows


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_dit_pipeline_runs_unchanged_and_keeps_it_all(vae, learn_sigma, tmp_path):
    pipe = quiet(DiTPipeline(transformer=transformer(learn_sigma), vae=vae, scheduler=DDIMScheduler()))
    options = {"num_inference_steps": 3, "output_type": "np"}
    images = pipe([1, 7], generator=torch.manual_seed(1), **options).images
    assert images.shape == (2, 12, 12, 3) and np.isfinite(images).all() and images.std() > 0
    pipe.save_pretrained(tmp_path)
    again = quiet(DiTPipeline.from_pretrained(tmp_path))
    assert type(again.transformer) is DCDiTTransformer2DModel
    np.testing.assert_array_equal(again([1, 7], generator=torch.manual_seed(1), **options).images, images)
    ours = quiet(DCDiTPipeline.from_pretrained(tmp_path))  # an equal folder, equal images
    np.testing.assert_allclose(ours([1, 7], generator=torch.manual_seed(1), **options).images, images, atol=1e-5)


def test_older_diffusers_read_the_types_of_the_parts():
    """diffusers 0.35 opens a pipeline whose parts have a class or typing's Union, neither strings nor X | None."""
    for part in list(inspect.signature(DCDiTPipeline.__init__).parameters.values())[1:]:
        assert inspect.isclass(part.annotation) or typing.get_origin(part.annotation) is typing.Union


def test_the_pipeline_loads_in_a_new_process(vae, tmp_path):
    """After the import that the documents name: diffusers imports no module that a folder names."""
    DiTPipeline(transformer=transformer(), vae=vae, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    code = "import sys, dcdit.integrations.transformer; from diffusers import DiTPipeline; "
    code += "print(type(DiTPipeline.from_pretrained(sys.argv[1]).transformer).__name__)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["DCDiTTransformer2DModel"], done.stderr[-500:]


def test_a_scheduler_of_another_objective_is_refused(tmp_path):
    model = transformer(learn_sigma=False).model
    model.use = {"objective": "flow"}
    flow = DCDiTTransformer2DModel.from_dcdit(model)
    flow.save_pretrained(tmp_path)
    for known in (flow, DCDiTTransformer2DModel.from_pretrained(tmp_path)):
        with pytest.raises(ConfigError, match="DDIMScheduler does not integrate this model, which was trained by flow"):
            quiet(DCDiTPipeline(known, DDIMScheduler()))([1], output_type="latent")
        assert len(quiet(DCDiTPipeline(known, FlowMatchEulerDiscreteScheduler()))([1], output_type="latent").images)
    model.use = {"objective": "ddpm"}
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler does not integrate this model"):
        noise = DCDiTTransformer2DModel.from_dcdit(model)
        quiet(DCDiTPipeline(noise, FlowMatchEulerDiscreteScheduler()))([1], output_type="latent")
    for predicted in ("v_prediction", "sample"):  # would be taken for noise
        with pytest.raises(ConfigError, match=f"prediction_type epsilon of DDIMScheduler, got {predicted}"):
            quiet(DCDiTPipeline(noise, DDIMScheduler(prediction_type=predicted)))([1], output_type="latent")


def test_the_shift_of_a_vae_is_used(vae):
    pipe = quiet(DCDiTPipeline(transformer(), DDIMScheduler(), vae))
    options = {"guidance_scale": 1.0, "num_inference_steps": 2}
    z = pipe([3], generator=torch.manual_seed(0), output_type="latent", **options).images
    vae.register_to_config(shift_factor=0.3)
    try:
        images = pipe([3], generator=torch.manual_seed(0), output_type="pt", **options).images
    finally:
        vae.register_to_config(shift_factor=None)
    with torch.no_grad():
        expected = vae.decode(z / vae.config.scaling_factor + 0.3).sample
    torch.testing.assert_close(torch.as_tensor(images), (expected / 2 + 0.5).clamp(0, 1))


def test_no_label_is_1000_to_dit_pipeline_and_the_last_class_to_the_model():
    model = transformer()
    x, t = torch.randn(2, 4, 6, 6), torch.tensor([500, 20])
    theirs = model(x, t, torch.tensor([1000, 3])).sample
    assert torch.equal(theirs, model.model(x, t, torch.tensor([10, 3])))
    assert torch.equal(theirs, model(x, t, torch.tensor([10, 3]), return_dict=False)[0])


def test_our_pipeline_is_our_sampler():
    """Flow matching with guidance, a schedule, and Lite-CFG, from equal noise."""
    model = transformer(learn_sigma=False)
    start, seen = [], []
    options = {"drop_fraction": lambda t: t / 2000, "uncond_drop_fraction": [0.9, 0.5]}
    result = sample(
        model.model,
        [3, 0, 9],
        objective="flow",
        steps=4,
        guidance=2.0,
        callback=lambda step: start.append(step.x),
        **options,
    )
    pipe = quiet(DCDiTPipeline(model, FlowMatchEulerDiscreteScheduler()))

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["drop_fraction"].tolist())
        return {}

    images = pipe(
        [3, 0, 9],
        guidance_scale=2.0,
        num_inference_steps=4,
        latents=start[0],
        output_type="latent",
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["drop_fraction"],
        **options,
    ).images
    torch.testing.assert_close(images, result.latents, rtol=0, atol=1e-5)
    expected = [[0.5] * 3 + [0.9] * 3, [0.375] * 3 + [0.9] * 3, [0.25] * 3 + [0.5] * 3, [0.125] * 3 + [0.5] * 3]
    np.testing.assert_allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize(
    "drop, uncond, expected",
    [
        (0.5, None, [[18] * 4] * 2),
        (0.0, 0.75, [[36, 36, 9, 9]] * 2),
        (torch.tensor([0.25, 0.5]), 0.75, [[27, 18, 9, 9]] * 2),
        ([0.5, 0.0], None, [[18] * 4, [36] * 4]),
        (lambda t: t / 2000, 0.75, None),
    ],
    ids=["number", "lite_cfg", "each", "list", "function"],
)
def test_budgets_in_both_pipelines(vae, drop, uncond, expected):
    model = transformer()
    rows = record_tokens(model)
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    options = {"class_labels": [1, 2], "num_inference_steps": 2}
    quiet(DCDiTPipeline(model, scheduler))(
        **options, drop_fraction=drop, uncond_drop_fraction=uncond, output_type="latent"
    )
    if expected is None:
        cut = [36 - int(36 * t / 2000) for t in scheduler.timesteps.tolist()]
        expected = [[n, n, 9, 9] for n in cut]
    assert rows == expected
    rows.clear()
    model.set_drop_fraction(drop, uncond)
    quiet(DiTPipeline(transformer=model, vae=vae, scheduler=scheduler))(**options, output_type="np")
    assert rows == expected


@pytest.mark.parametrize("budget", [[0.0, 0.75], lambda t: 0.0 if t > 500 else 0.75], ids=["list", "function"])
def test_a_schedule_takes_the_timestep_of_each_row(budget):
    model = transformer()
    rows = record_tokens(model)
    model.set_drop_fraction(budget, 0.5)
    model(torch.randn(3, 4, 6, 6), torch.tensor([900, 900, 100]), torch.tensor([1, 1000, 2]))
    assert rows == [[36, 18, 9]]


def test_height_and_width(vae):
    pipe = quiet(DCDiTPipeline(transformer(), DDIMScheduler(), vae))
    options = {"num_inference_steps": 2, "output_type": "np"}
    assert pipe([1, 2], height=16, **options).images.shape == (2, 16, 12, 3)
    cells = quiet(DCDiTPipeline(transformer(), DDIMScheduler()))
    latents = cells([1], height=7, width=9, num_inference_steps=2, output_type="latent").images
    assert latents.shape == (1, 4, 7, 9)
    with pytest.raises(ConfigError, match="height must be a positive multiple of 2, got 15"):
        pipe([1], height=15, **options)


def test_each_image_has_its_generator():
    pipe = quiet(DCDiTPipeline(transformer(), DDPMScheduler(variance_type="learned_range")))
    options = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 1.5}
    generators = [torch.Generator().manual_seed(i) for i in (5, 6)]
    both = pipe([1, 2], generator=generators, **options).images
    alone = pipe([2], generator=[torch.Generator().manual_seed(6)], **options).images
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    again = pipe([1, 2], generator=torch.Generator().manual_seed(5), **options).images
    assert not torch.allclose(again[1:], alone, atol=1e-2)


def test_guidance_of_1_runs_one_half():
    model = transformer()
    rows = record_tokens(model)
    quiet(DCDiTPipeline(model, DDIMScheduler()))([1], 1.0, num_inference_steps=1, output_type="latent")
    assert rows == [[36]]


def test_callbacks_bar_and_output_types(vae, capfd):
    pipe = DCDiTPipeline(transformer(), DDIMScheduler(), vae)
    steps = []

    class Zero(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            steps.append((step_index, pipeline.num_timesteps, float(timestep)))
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    options = {"class_labels": [1], "num_inference_steps": 2}
    latents = pipe(**options, callback_on_step_end=Zero(), output_type="latent").images
    assert not latents.any() and [step[:2] for step in steps] == [(0, 2), (1, 2)] and steps[0][2] > steps[1][2]
    assert "2/2" in capfd.readouterr().err
    quiet(pipe)
    start = torch.randn(1, 4, 6, 6)
    kinds = {kind: pipe(**options, latents=start, output_type=kind).images for kind in ("pil", "np", "pt")}
    assert kinds["pil"][0].size == (12, 12) and kinds["pt"].shape == (1, 3, 12, 12)
    np.testing.assert_allclose(np.asarray(kinds["pil"][0]) / 255, kinds["np"][0], atol=0.003)
    assert "2/2" not in capfd.readouterr().err
    assert isinstance(pipe(**options, output_type="np", return_dict=False), tuple)


def test_parts_keep_their_precision_and_oblong_sizes(tmp_path):
    model = transformer(size=(6, 4))
    assert model.config.sample_size == (6, 4)
    model.save_pretrained(tmp_path)
    again = DCDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and again.model.config == model.model.config
    assert {p.dtype for p in again.model.router.parameters()} == {torch.float32}
    x, t, y = torch.randn(1, 4, 6, 4), torch.tensor([500]), torch.tensor([3])
    out = again(x.bfloat16(), t, y).sample
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x, t, y).sample, rtol=0, atol=0.1)


@pytest.mark.parametrize(("dtype", "products"), [(torch.float32, "highest"), (torch.bfloat16, "high")])
def test_products_in_float32_may_be_tf32_beside_half_precision(dtype, products):
    model, seen = transformer().to(dtype), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    quiet(DCDiTPipeline(model, DDIMScheduler()))([3], num_inference_steps=2, output_type="latent")
    assert seen == [products] * 2 and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"class_labels": [10]}, r"ids in \[0, 9\], got \[10\]"),
        ({"class_labels": []}, "list of ids"),
        ({"class_labels": 3}, "list of ids in .*, got 3"),
        ({"class_labels": "cat"}, "list of ids in .*, got 'cat'"),
        ({"num_inference_steps": "2"}, "num_inference_steps must be an integer of at least 1, got '2'"),
        ({"guidance_scale": None}, "guidance_scale must be a finite number, got None"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_scale": torch.ones(2)}, "guidance_scale must be a finite number, got tensor"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be called as a function, got 3"),
        ({"generator": 3}, "generator must be a Generator, got a int; torch.Generator"),
        ({"latents": [1]}, "latents must be a Tensor or NoneType, got a list"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ({"drop_fraction": None}, "drop_fraction must be a number, a tensor, a list or a function, got None"),
        (
            {"guidance_scale": 1, "uncond_drop_fraction": 0.9},
            "uncond_drop_fraction needs a guidance_scale above 1, got 1",
        ),
        ({"guidance_scale": 0.5, "policy": "guidance=200:800"}, "a policy's guidance needs a guidance_scale above 1"),
        ({"drop_fraction": 1.0}, r"\[0, 1\), got 1"),
        ({"drop_fraction": torch.zeros(2)}, "needs 1 values, got 2"),
        ({"generator": [torch.Generator()] * 2}, "one generator or 1, got 2"),
        ({"latents": torch.zeros(1, 4, 6, 5)}, r"shape \(1, 4, 6, 6\), got \(1, 4, 6, 5\)"),
        ({"output_type": "jpeg"}, "pil, np, pt or latent, got 'jpeg'"),
        ({"output_type": "pil"}, "without a vae"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "latents, noise_pred, drop_fraction, got 'x'"),
    ],
)
def test_bad_input_is_named(arguments, words):
    pipe = quiet(DCDiTPipeline(transformer(), DDIMScheduler()))
    with pytest.raises(ConfigError, match=words):
        pipe(**{"class_labels": [1], "num_inference_steps": 1, "output_type": "latent", **arguments})


def test_a_transformer_names_what_it_cannot_be():
    with pytest.raises(ConfigError, match="out_channels must be 4 or 8, got 5"):
        DCDiTTransformer2DModel(out_channels=5)
    model = transformer()
    with pytest.raises(ConfigError, match="drop_fraction must be a number, a tensor, a list or a function, got None"):
        model.set_drop_fraction(None)
    with pytest.raises(ConfigError, match="class_labels must be a Tensor, got a list"):
        model(torch.zeros(2, 4, 6, 6), torch.zeros(2), [0, 1])
    model.set_drop_fraction(torch.zeros(3))
    with pytest.raises(ConfigError, match="needs 2 values, got 3"):
        model(torch.zeros(2, 4, 6, 6), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    model.set_drop_fraction(lambda t: 1.5)
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        model(torch.zeros(2, 4, 6, 6), torch.zeros(2), torch.zeros(2, dtype=torch.long))


def test_what_is_no_transformer_of_diffusers_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"transformer must be a DCDiTTransformer2DModel, .*, got a DCDiT$"):
        DCDiTPipeline(transformer().model, DDIMScheduler())
    transformer().model.save_pretrained(tmp_path / "a")
    for kind in (DCDiTPipeline, DCDiTTransformer2DModel):
        for name in ("digits", tmp_path / "a"):
            with pytest.raises(ConfigError, match="what save_pretrained of diffusers wrote, got a checkpoint of dcdit"):
                kind.from_pretrained(name)
