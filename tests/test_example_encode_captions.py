"""examples/encode_captions.py with small pipelines: samples that the command reads, latents as pipelines make them."""

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from transformer_families import FAMILIES, make

from dcdit.data.conditioned import Conditioned
from dcdit.errors import DataError
from dcdit.integrations.velocities import VELOCITIES
from examples.encode_captions import encode_folder, main


def folder(path):
    path.mkdir()
    for i, size in enumerate([(40, 24), (24, 40), (200, 100)]):
        Image.effect_noise(size, 80).convert("RGB").save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"picture {i}\n", encoding="utf-8-sig")  # with a mark in front
    return path


def piped(family, captions):
    """A small pipeline whose text encoders are a stand-in that notes the captions."""
    torch.manual_seed(0)
    pipe = FAMILIES[family].pipeline(make(FAMILIES[family]))
    embedded, pooled = torch.randn(1, 6, 24), torch.randn(1, 12)
    answers = {"flux": (embedded, pooled, None), "sd3": (embedded, None, pooled, None), "z-image": ([embedded[0]], [])}
    pipe.encode_prompt = lambda caption, *_, **__: captions.append(caption) or answers[family]
    return pipe


@pytest.mark.parametrize("family", ["flux", "sd3", "z-image"])
def test_samples_fit_the_model(family, tmp_path):
    captions, velocity = [], VELOCITIES[family]()
    pipe = piped(family, captions)
    assert encode_folder(pipe, folder(tmp_path / "pictures"), tmp_path / "samples", side=32, empty=2) == 3
    assert captions == ["picture 0", "", "picture 2"]
    data = Conditioned(str(tmp_path / "samples"), velocity.pooled, velocity.ragged)
    for shapes, file in data.kinds.items():
        velocity.check(pipe.transformer.config, shapes, file)
    scale = pipe.vae_scale_factor
    sides = [tuple(scale * n for n in data[i]["latents"].shape[1:]) for i in range(3)]
    assert all(h * w <= 32 * 32 for h, w in sides)
    assert sides[0][0] < sides[0][1] and sides[1] == sides[0][::-1] and sides[2][1] > 1.5 * sides[2][0]
    assert encode_folder(pipe, tmp_path / "pictures", tmp_path / "samples") == 0  # all there


def test_a_folder_without_a_pipeline_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path), str(tmp_path / "samples")])
    assert "error: Error no file named model_index.json found in directory" in capsys.readouterr().err


def test_latents_are_those_of_a_pipeline(tmp_path, monkeypatch):
    pipe = piped("flux", [])
    pipe.vae.register_to_config(shift_factor=0.3, scaling_factor=1.7)
    encode_folder(pipe, folder(tmp_path / "pictures"), tmp_path / "samples")
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    other = diffusers.FluxImg2ImgPipeline(**pipe.components)
    pixels = pipe.image_processor.preprocess(Image.open(tmp_path / "pictures/0.png"))
    with torch.no_grad():
        want = other._encode_vae_image(pixels, torch.Generator())[0]
    torch.testing.assert_close(Conditioned(str(tmp_path / "samples"), True)[0]["latents"], want)


def test_bad_folders(tmp_path):
    pipe = piped("flux", [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must have pictures with captions beside them"):
        encode_folder(pipe, tmp_path / "empty", tmp_path / "samples")
    (folder(tmp_path / "pictures") / "1.txt").unlink()
    with pytest.raises(DataError, match=r"1\.png must have a caption beside it, 1\.txt"):
        encode_folder(pipe, tmp_path / "pictures", tmp_path / "samples")
    pipe.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(DataError, match="the pipeline must be FLUX's, SD3's or Z-Image's, got a Linear"):
        encode_folder(pipe, tmp_path / "pictures", tmp_path / "samples2")
