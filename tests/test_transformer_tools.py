"""Chunked transformers of diffusers in its pipelines and tools: saved, copied, adapted, offloaded; bad input."""

import copy
import inspect
import json
import logging

import accelerate
import pytest
import torch

pytest.importorskip("diffusers")
from diffusers.models.transformers import transformer_flux
from safetensors.torch import load_file, save_file
from transformer_families import FAMILIES, close, every_family, make, run

from dcdit.errors import CheckpointError, ConfigError
from dcdit.integrations.attention import add_dynamic_chunking, load_dynamic_chunking, remove_dynamic_chunking
from dcdit.integrations.reading import _Wrapped


@every_family
def test_saved_and_loaded_without_a_recipe(family, tmp_path):
    """Blocks, sigma and router come back; diffusers alone reads the untouched model."""
    model = make(family)
    inputs = family.inputs()
    untouched = run(model, inputs)
    chunking = add_dynamic_chunking(model, blocks=slice(1, 3), sigma=0.7)
    torch.nn.init.normal_(chunking.router.score.weight)
    run(model, inputs)
    prob = chunking.routing.boundary_prob
    chunking.router.score.bias.data -= prob[prob < 1].logit().median()  # so that some cells are kept
    want = run(model, inputs)
    assert chunking.routing.plan.capacity < 70
    for folder in ("once", "twice"):  # a loaded model is saved like the first
        model.save_pretrained(tmp_path / folder)
        model = load_dynamic_chunking(tmp_path / folder)
        assert torch.equal(run(model, inputs), want)
    plain = type(model).from_pretrained(tmp_path / "once")
    assert torch.equal(run(plain, inputs), untouched)
    with pytest.raises(ConfigError, match=r"router must be None, .* got Linear"):
        load_dynamic_chunking(tmp_path / "once", router=torch.nn.Linear(1, 1))
    plain.save_pretrained(tmp_path / "plain")
    remove_dynamic_chunking(model)
    model.save_pretrained(tmp_path / "removed")
    with pytest.raises(ConfigError, match="must have dynamic_chunking"):
        load_dynamic_chunking(tmp_path / "removed")


def damaged(**values):
    """Changes config.json."""

    def damage(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def without_router(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "router" not in k}, file, {"format": "pt"})


DAMAGED = {
    "must be a folder of diffusers with config.json": lambda folder: (folder / "config.json").unlink(),
    "config.json is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "must name a model of diffusers .*, got None": lambda folder: (folder / "config.json").write_text("[]"),
    "_class_name, got Nonsense": damaged(_class_name="Nonsense"),
    "_class_name, got FluxPipeline": damaged(_class_name="FluxPipeline"),
    "lacks .* weights that its config asks for, such as transformer_blocks.2": damaged(num_layers=3),
    "cannot be read as a FluxTransformer2DModel: .*expected shape": damaged(joint_attention_dim=3),
    "cannot be read as a FluxTransformer2DModel": lambda folder: (
        folder / "diffusion_pytorch_model.safetensors"
    ).write_bytes(b"half"),
    "must have the router's weights in safetensors": without_router,
}


def test_a_mark_in_front_of_the_config(tmp_path):
    """As some editors leave it; diffusers itself refuses such a file."""
    model = make(FAMILIES["flux"])
    add_dynamic_chunking(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    load_dynamic_chunking(tmp_path)
    assert "dynamic_chunking" in _Wrapped._dict_from_json_file(file, dduf_entries=None)  # as diffusers 0.35 calls it


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_folder(message, tmp_path):
    model = make(FAMILIES["flux"])
    add_dynamic_chunking(model)
    model.save_pretrained(tmp_path)
    DAMAGED[message](tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_dynamic_chunking(tmp_path)


def test_loading_warns_of_a_real_weight_alone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    model = make(FAMILIES["flux"])
    add_dynamic_chunking(model)
    model.save_pretrained(tmp_path)
    caplog.clear()
    assert type(load_dynamic_chunking(tmp_path)) is type(model) and not caplog.messages
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"x_embedder.other": torch.zeros(1)}, file, {"format": "pt"})
    load_dynamic_chunking(tmp_path)
    (message,) = set(caplog.messages)
    assert "x_embedder.other" in message and "router" not in message


@every_family
def test_the_pipeline_runs_unchanged(family):
    """All kept: the pictures of the untouched model; with a budget each step keeps its share."""
    model = make(family)
    pipe, prompts = family.pipeline(model), family.prompts()
    pipe.set_progress_bar_config(disable=True)

    def sample():
        options = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}
        out = pipe(**options | prompts, generator=torch.Generator().manual_seed(0))
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
    older = make(family)
    older.forward = lambda hidden_states, txt_seq_lens=None: hidden_states
    with pytest.raises(ConfigError, match=r"Qwen-Image needs diffusers 0\.39 or newer, got "):
        add_dynamic_chunking(older)
    model, inputs = make(FAMILIES["wan"]), FAMILIES["wan"].inputs()
    add_dynamic_chunking(model)
    with pytest.raises(ConfigError, match="one timestep a sample, got one for each token"):
        run(model, {**inputs, "timestep": torch.rand(2, 35)})


def test_bad_input_of_ltx():
    family = FAMILIES["ltx"]
    model, inputs = make(family), family.inputs()
    add_dynamic_chunking(model)
    with pytest.raises(ConfigError, match=r"need num_frames, height and width, positive integers; got \[5, None, 7\]"):
        run(model, {**inputs, "height": None})
    with pytest.raises(ConfigError, match="one timestep a sample, got one for each token"):
        run(model, {**inputs, "timestep": torch.rand(2, 35)})
    with pytest.raises(ConfigError, match=r"num_frames, height and width must be one grid of 35 tokens, .* got 5×1×6"):
        run(model, {**inputs, "width": 6})
    for shape in ((2, 5), (1, 6)):
        with pytest.raises(
            ConfigError, match=rf"encoder_attention_mask must be \(2, 6\), .* got \({shape[0]}, {shape[1]}\)"
        ):
            run(model, {**inputs, "encoder_attention_mask": torch.ones(shape)})
    model.transformer_blocks[1].attn2.set_processor(object())
    with pytest.raises(ConfigError, match="need LTXVideoAttnProcessor with projections apart, got object"):
        run(model, inputs)


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
    assert names <= set(type(model)._no_split_modules or type(model)._repeated_blocks)


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
    whole = copy.deepcopy(model)
    _, hook = accelerate.cpu_offload_with_hook(whole, cpu)  # what a pipeline's enable_model_cpu_offload does
    assert torch.equal(run(whole, inputs), want)
    hook.offload()
    assert torch.equal(run(whole, inputs), want)
    if model._repeated_blocks:  # SD3 has none in diffusers; the quickest one is compiled with AOTAutograd
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend="aot_eager" if family is FAMILIES["wan"] else "eager")
        close(run(model, inputs), want, 1e-5)


@every_family
def test_bad_input(family):
    """One line that names the expected and the actual value."""
    model = make(family)
    for blocks, words in (
        (slice(2, 1), "blocks must name one block or more"),
        (slice(9, None), "blocks must begin and end within the model's"),
        (slice(0, -9), "blocks must begin and end within the model's"),
        (slice("a", None), "blocks must begin and end within the model's"),
        (slice(None, None, 2), "blocks must be a slice without a step"),
        ([1], "blocks must be a slice"),
    ):
        with pytest.raises(ConfigError, match=words):
            add_dynamic_chunking(model, blocks=blocks)
    with pytest.raises(ConfigError, match="must be one that add_dynamic_chunking was called on"):
        remove_dynamic_chunking(model)
    chunking = add_dynamic_chunking(model)
    with pytest.raises(ConfigError, match="has dynamic chunking already"):
        add_dynamic_chunking(model)
    attn = next(m for m in chunking.blocks[0].modules() if hasattr(m, "set_processor"))
    attn.set_processor(object())
    with pytest.raises(ConfigError, match=r"chunked blocks need \w+Processor.*, got object"):
        run(model, family.inputs())
    remove_dynamic_chunking(model)
    with pytest.raises(ConfigError, match=r"model must be one of FluxTransformer2DModel.* or have transformer_blocks"):
        add_dynamic_chunking(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"model must be its transformer, got a .*Pipeline"):
        add_dynamic_chunking(family.pipeline(model))


def test_bad_input_of_flux():
    family = FAMILIES["flux"]
    model, inputs = make(family), family.inputs()
    add_dynamic_chunking(model)
    ids = inputs["img_ids"]
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    for change, words in (
        ({"controlnet_block_samples": [torch.zeros(1)]}, "do not support controlnet_block_samples"),
        ({"img_ids": ids[:-1], "hidden_states": inputs["hidden_states"][:, :-1]}, "img_ids must be one grid of tokens"),
        ({"img_ids": ids.roll(1, 0)}, "img_ids must be one grid of tokens, row by row, got 5×7 in another order"),
        ({"img_ids": family.inputs((6, 7))["img_ids"]}, "img_ids must be one grid of 35 tokens, .* got 6×7"),
        ({"joint_attention_kwargs": {"attention_mask": mask}}, r"attention_mask must be bool \(2, 1, 1, 41\)"),
        (
            {"joint_attention_kwargs": {"ip_hidden_states": mask}},
            "no joint_attention_kwargs but scale and attention_mask, got ip_h",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            run(model, {**inputs, **change})
    model.set_attn_processor(transformer_flux.FluxIPAdapterAttnProcessor(64, 64))
    with pytest.raises(ConfigError, match=r"need FluxAttnProcessor .* got FluxIPAdapterAttnProcessor"):
        run(model, inputs)


@every_family
def test_options_of_attention_without_effect(family):
    """LoRA's scale is one that the model reads; what it hands to blocks, or drops, is refused, by place as by name."""
    model, inputs = make(family), family.inputs()
    add_dynamic_chunking(model, blocks=slice(1, None))
    name = next(name for name in inspect.signature(type(model).forward).parameters if name.endswith("attention_kwargs"))
    close(run(model, {**inputs, name: {"scale": 1.0}}), run(model, inputs), 0)
    for options in ({"ip_adapter_image_embeds": [torch.zeros(2, 1, 8)]}, {"scale": 1.0, "ip_hidden_states": None}):
        with pytest.raises(ConfigError, match=rf"chunked blocks take no {name} but scale.*, got ip_"):
            run(model, {**inputs, name: options})


def test_the_grid_of_ltx_is_that_of_its_coordinates():
    """A grid of as many cells with sides exchanged is one for the model too, where coordinates do not say otherwise."""
    family = FAMILIES["ltx"]
    model, inputs = make(family), family.inputs((4, 7))
    want = run(model, inputs)
    add_dynamic_chunking(model)
    sides = {name: inputs[name] for name in ("num_frames", "height", "width")}
    assert tuple(sides.values()) == (2, 2, 7)
    places = torch.cartesian_prod(*(torch.arange(float(n)) for n in sides.values())).T.expand(2, -1, -1)
    inputs["video_coords"] = places * torch.tensor(inputs.pop("rope_interpolation_scale"))[:, None]
    close(run(model, inputs), want, 1e-5)
    for changed in ({"height": 7, "width": 2}, {"num_frames": 7, "width": 2}, {"num_frames": 1, "height": 4}):
        wrong = {**inputs, **changed, "video_coords": inputs["video_coords"].clone()}
        with pytest.raises(
            ConfigError, match="num_frames, height and width must be the grid of video_coords, row by row"
        ):
            run(model, wrong)
    with pytest.raises(ConfigError, match="must be the grid of video_coords"):  # known by other sides
        run(model, {**inputs, "height": 7, "width": 2})
