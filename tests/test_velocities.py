"""Velocities of diffusers' transformers, against two steps of their own pipelines."""

import pytest
import torch

pytest.importorskip("diffusers")
from transformer_families import FAMILIES, make

from dcdit.integrations.families import FAMILIES as FAMILY_NAMES
from dcdit.integrations.velocities import VELOCITIES

PACKED = {"flux": (8, 12), "qwen-image": (4, 6)}
GUIDANCE = {"flux": 2.0, "z-image": 0.0}  # Z-Image has no second pass at 0, the others at 1


@pytest.mark.parametrize("name", VELOCITIES)
def test_two_steps_are_those_of_the_pipeline(name):
    family, velocity = FAMILIES[name], VELOCITIES[name]()
    model = make(family, **({"guidance_embeds": True} if name == "flux" else {}))
    assert type(model).__name__ == velocity.name
    for part in velocity.text_and_time:
        model.get_submodule(part)
    pipe, prompts = family.pipeline(model), family.prompts()
    pipe.set_progress_bar_config(disable=True)
    sizes = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}
    prompts = {key: value for key, value in prompts.items() if not key.startswith("negative_")}
    prompts |= {"num_frames": 5} if name == "wan" else {}
    if name == "ltx":
        velocity.scale = (pipe.vae_temporal_compression_ratio / 25, *[pipe.vae_spatial_compression_ratio] * 2)
    noise = {}
    prepare = pipe.prepare_latents

    def note(*args, **kwargs):
        noise["made"] = prepare(*args, **kwargs)
        return noise["made"]

    pipe.prepare_latents = note
    want = pipe(**sizes | prompts, guidance_scale=GUIDANCE.get(name, 1.0), return_dict=False)[0]
    x = noise["made"][0] if isinstance(noise["made"], tuple) else noise["made"]
    if name in PACKED:
        x, want = (torch.nn.functional.pixel_shuffle(part.mT.unflatten(2, PACKED[name]), 2) for part in (x, want))
    elif name == "ltx":
        frames, side = 1 + 2 // pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio
        x, want = (part.mT.unflatten(2, (frames, 32 // side, 64 // side)) for part in (x, want))
    text = prompts["prompt_embeds"]
    more = {"pooled": prompts["pooled_prompt_embeds"], "guidance": 2.0} if velocity.pooled else {}
    with torch.no_grad():
        for sigma, after in zip(pipe.scheduler.sigmas, pipe.scheduler.sigmas[1:], strict=False):
            inputs = velocity.inputs(model, x, sigma[None], [text[0]], **more)
            x = x + (after - sigma) * velocity.velocity(model(**inputs), x)
    torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-5)


def test_every_name_has_a_velocity():
    """The command's choices are the table's keys."""
    assert tuple(VELOCITIES) == FAMILY_NAMES
