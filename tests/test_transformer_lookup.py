"""Chunked transformers as others look into them: blocks by number, arguments by place, adapters, offloading."""

import contextlib
import copy
import inspect

import accelerate
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformer_families import FAMILIES, close, every_family, make, run

from dcdit.errors import ConfigError
from dcdit.integrations.attention import (
    add_dynamic_chunking,
    chunking_of,
    load_dynamic_chunking,
    remove_dynamic_chunking,
)

REFUSED = {
    "flux": ("controlnet_block_samples", [torch.zeros(1)]),
    "sd3": ("block_controlnet_hidden_states", [torch.zeros(1)]),
    "z-image": ("controlnet_block_samples", {0: torch.zeros(1)}),
    "qwen-image": ("controlnet_block_samples", [torch.zeros(1)]),
    "wan": ("encoder_hidden_states_image", torch.zeros(1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_its_place_too(name):
    """FLUX and Qwen-Image took ControlNet's residuals without a word where they had no name."""
    family, (argument, value) = FAMILIES[name], REFUSED[name]
    model, inputs = make(family), family.inputs()
    add_dynamic_chunking(model, blocks=slice(1, 3))
    known = {key: p.default for key, p in inspect.signature(type(model).forward).parameters.items() if key != "self"}
    names = list(known)[: list(known).index(argument) + 1]
    in_place = [(known | inputs)[key] for key in names]
    for args, refused in ((in_place[:-1], False), ((*in_place[:-1], value), True)):
        with pytest.raises(ConfigError, match=f"do not support {argument}") if refused else contextlib.nullcontext():
            with torch.no_grad():
                model(*copy.copy(args))


@every_family
def test_blocks_are_found_by_their_numbers(family):
    """Chunked or not, as LoRA's loader of FLUX and offloading by group look for them."""
    model = make(family)
    lists = [getattr(model, name[:-1]) for name in family.lists]
    before = [list(blocks) for blocks in lists]
    add_dynamic_chunking(model, blocks=slice(1, -1))
    for name, own in zip(family.lists, before, strict=True):
        blocks = getattr(model, name[:-1])
        assert len(blocks) == len(own) and [blocks[i] for i in range(-1, len(own))] == [own[-1], *own]
        assert [model.get_submodule(f"{name}{i}") for i in range(len(own))] == own


@every_family
def test_its_pipeline_loads_lora_into_a_chunked_model(family, tmp_path):
    """The bits of the adapters before they were saved, in chunked blocks and in others; fused they act as well."""
    model, inputs = make(family), family.inputs()
    chunking = add_dynamic_chunking(model, blocks=slice(1, -1))
    chunking.drop_fraction = 0.5
    plain = run(model, inputs)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    want = run(model, inputs)
    pipe = family.pipeline(model)
    type(pipe).save_lora_weights(tmp_path, get_peft_model_state_dict(model))
    model.unload_lora()
    assert torch.equal(run(model, inputs), plain) and not torch.equal(plain, want)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(run(model, inputs), want)
    pipe.fuse_lora()
    close(run(model, inputs), want, 1e-4)


def test_a_pipeline_is_saved_and_read_with_its_chunked_model(tmp_path):
    """`load_dynamic_chunking` reads the transformer's folder; diffusers alone makes it the untouched one."""
    model, inputs = make(FAMILIES["flux"]), FAMILIES["flux"].inputs()
    untouched = run(model, inputs)
    add_dynamic_chunking(model, blocks=slice(1, 4))
    pipe = FAMILIES["flux"].pipeline(model)
    torch.nn.init.constant_(chunking_of(model).router.score.bias, 0.0)
    want = run(model, inputs)
    pipe.save_pretrained(tmp_path)
    missing = {name: part for name, part in pipe.components.items() if part is None}
    chunked = load_dynamic_chunking(tmp_path / "transformer")
    again = type(pipe).from_pretrained(tmp_path, transformer=chunked, **missing)
    assert torch.equal(run(again.transformer, inputs), want) and not torch.equal(want, untouched)
    plain = type(pipe).from_pretrained(tmp_path, **missing)
    assert torch.equal(run(plain.transformer, inputs), untouched)


def test_offloading_by_group_goes_through_both_lists_of_flux():
    family = FAMILIES["flux"]
    model, inputs = make(family), family.inputs()
    chunking = add_dynamic_chunking(model, blocks=slice(1, 4))
    chunking.drop_fraction = 0.5
    want = run(model, inputs)
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(run(model, inputs), want)
    assert all(hasattr(block, "_diffusers_hook") for block in model.single_transformer_blocks[:])
    with pytest.raises(ConfigError, match="hooks on blocks must go before remove_dynamic_chunking"):
        remove_dynamic_chunking(model)
    assert torch.equal(run(model, inputs), want)


@every_family
def test_offloading_by_layer_comes_after_the_wrapping(family):
    model = make(family)
    inputs = family.inputs()
    want = run(model, inputs)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ConfigError, match="hooks on blocks must come after add_dynamic_chunking"):
        add_dynamic_chunking(model, blocks=slice(1, 3))
    accelerate.hooks.remove_hook_from_submodules(model)
    add_dynamic_chunking(model, blocks=slice(1, 3))
    remove_dynamic_chunking(model)
    assert run(model, inputs).shape == want.shape


def test_wan_cast_whole_to_half_precision():
    """Its tables of angles too: no further from float32 than the untouched model so cast."""
    family = FAMILIES["wan"]
    model, inputs = make(family), family.inputs()
    half = {name: values.bfloat16() for name, values in inputs.items()}
    want = run(model, {name: values.float() for name, values in half.items()})
    untouched = run(model.to(torch.bfloat16), half)
    add_dynamic_chunking(model)
    errors = [(y.float() - want).square().mean().sqrt() for y in (run(model, half), untouched)]
    assert 0 < errors[0] < 1.2 * errors[1]
