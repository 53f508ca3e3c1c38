"""Sources, codecs and the stateless stream: each step's data depend on (seed, step, position) only."""

import numpy as np
import pytest
import torch
from PIL import Image

from dcdit.checkpoints.folder import ASSETS
from dcdit.codecs import make_codec
from dcdit.data.image_folder import ImageFolder
from dcdit.data.sources import Digits, Latents, load_digits, make_source
from dcdit.errors import ConfigError, DataError
from dcdit.model.config import DCDiTConfig
from dcdit.training.batches import TrainingStream, batches, draw_drop_fraction
from dcdit.training.config import DataConfig
from dcdit.training.objectives import DDPM, FlowMatching

SHAPE = (4, 6, 6)


class Counting:
    """Item i is the image of i's everywhere but in its first column, which is 1000; its class is i % 3."""

    encoded, classes = False, 3

    def __init__(self, items=10):
        self.items = items

    def __len__(self):
        return self.items

    def load(self, index, flip):
        image = np.full((1, 12, 12), index, dtype=np.float32)
        image[..., -1 if flip else 0] = 1000
        return image, index % 3


class Unknown(Counting):
    """A class 3, which there is not."""

    def load(self, index, flip):
        return super().load(index, flip)[0], 3


def stream(**options):
    defaults = {"seed": 3, "batch_size": 8, "label_drop": 0.1, "flip": True}
    objective = options.pop("objective", FlowMatching())
    source = options.pop("source", Counting())
    return TrainingStream(source, objective, SHAPE, 3, **(defaults | options))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_digits_hold_out_the_last_fifty_of_each_class():
    images, labels, held_out = load_digits()
    assert images.shape == (5000, 28, 28) and held_out.sum() == 500
    for digit in range(10):
        of_class = held_out[labels == digit]
        assert of_class[-50:].all() and not of_class[:-50].any()
    digits = Digits()
    assert len(digits) == 4500 and (np.bincount(digits.labels) == 450).all()
    image, label = digits.load(0, flip=False)
    np.testing.assert_allclose((image[0] + 1) * 127.5, images[~held_out][0], atol=1e-4)
    assert image.dtype == np.float32 and label == labels[~held_out][0]
    np.testing.assert_array_equal(digits.load(0, flip=True)[0], image[..., ::-1])


def test_image_folder_crops_the_centre_and_numbers_the_folders(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, 4:12] = 255  # the centred square
    wide[:4, 4:12, 0] = 0
    Image.fromarray(wide).save(tmp_path / "cat" / "a.png")
    Image.fromarray(wide[..., 0]).save(tmp_path / "dog" / "grey.PNG")
    for hidden in (".ipynb_checkpoints/a.png", "cat/.ipynb_checkpoints/a-checkpoint.png", "cat/._a.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        Image.fromarray(wide).save(tmp_path / hidden)
    folder = ImageFolder(str(tmp_path), 8)
    assert len(folder) == 2 and folder.classes == 2
    image, label = folder.load(0, flip=False)
    expected = np.ones((3, 8, 8), dtype=np.float32)
    expected[0, :4] = -1
    np.testing.assert_array_equal(image, expected)
    assert label == 0 and folder.load(1, flip=False)[1] == 1 and folder.load(1, flip=False)[0].shape == (3, 8, 8)


def test_latents_read_the_release_layout(tmp_path):
    write_latents(tmp_path, {"0": np.full((1, *SHAPE), 2.5), "10": np.ones(SHAPE), "9": np.zeros(SHAPE)})
    latents = Latents(str(tmp_path), SHAPE)
    assert latents.encoded and latents.names == ["0.npy", "9.npy", "10.npy"]
    latent, label = latents.load(0, flip=False)
    assert latent.shape == SHAPE and latent.dtype == np.float32 and (latent == 2.5).all() and label == 7


def write_latents(root, latents, labels=None):
    (root / "imagenet256_features").mkdir()
    (root / "imagenet256_labels").mkdir()
    for name, latent in latents.items():
        np.save(root / "imagenet256_features" / f"{name}.npy", latent)
    for name in latents if labels is None else labels:
        np.save(root / "imagenet256_labels" / f"{name}.npy", np.array([7]))


def test_bad_sources_say_what_is_wrong(tmp_path):
    def says(pattern, load):
        with pytest.raises(DataError, match=pattern) as error:
            load()
        assert "\n" not in str(error.value)

    says(
        "nowhere is not there, expected a folder with a sub-folder of pict",
        lambda: ImageFolder(str(tmp_path / "nowhere"), 8),
    )
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    says("has no images", lambda: ImageFolder(str(tmp_path / "empty"), 8))
    (tmp_path / "empty" / "cat" / "a.png").write_bytes(b"not a picture")
    says("not a readable image", lambda: ImageFolder(str(tmp_path / "empty"), 8).load(0, False))
    for name in ("none", "unpaired", "shape", "pickled", "empty_latents"):
        (tmp_path / name).mkdir()
    says("must hold one folder", lambda: Latents(str(tmp_path / "none"), SHAPE))
    write_latents(tmp_path / "empty_latents", {})
    says("has no .npy files", lambda: Latents(str(tmp_path / "empty_latents"), SHAPE))
    write_latents(tmp_path / "unpaired", {"0": np.zeros(SHAPE), "1": np.zeros(SHAPE)}, labels=["0"])
    says(r"imagenet256_labels/1.npy is missing", lambda: Latents(str(tmp_path / "unpaired"), SHAPE))
    write_latents(tmp_path / "shape", {"0": np.zeros((4, 5, 6))})
    says(
        r"expected shape \(4, 6, 6\), found \(4, 5, 6\)", lambda: Latents(str(tmp_path / "shape"), SHAPE).load(0, False)
    )
    write_latents(tmp_path / "pickled", {"0": np.array([object()], dtype=object)})
    says(r"not a readable \.npy", lambda: Latents(str(tmp_path / "pickled"), SHAPE).load(0, False))
    says("model.num_classes=5", lambda: make_source(DataConfig(), DCDiTConfig(num_classes=5)))
    with pytest.raises(ConfigError, match=r"data\.flip"):
        make_source(DataConfig(kind="latents", path=str(tmp_path), flip=True), DCDiTConfig())


@pytest.mark.parametrize(
    ("value", "label", "message"),
    [
        (np.nan, 7, r"features/0\.npy: expected finite float32, found NaN or infinity"),
        (1e39, 7, r"features/0\.npy: expected finite float32"),
        ("a", 7, r"features/0\.npy: expected numbers, found <U1"),
        (0.0, 0.9, r"labels/0\.npy: expected a whole class id, found 0\.9"),
        (0.0, np.nan, r"labels/0\.npy: expected a whole class id, found nan"),
        (0.0, "a", r"labels/0\.npy: expected numbers, found <U1"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_latents_and_labels_must_be_numbers(value, label, message, tmp_path):
    write_latents(tmp_path, {"0": np.full(SHAPE, value)})
    np.save(tmp_path / "imagenet256_labels" / "0.npy", np.array([label]))
    with pytest.raises(DataError, match=message):
        Latents(str(tmp_path), SHAPE).load(0, False)


def test_pixel_unshuffle_is_lossless():
    images = torch.randn(2, 3, 12, 8)
    codec = make_codec("pixel_unshuffle", factor=4)
    latents = codec.encode(images)
    assert latents.shape == (2, 48, 3, 2) and torch.equal(codec.decode(latents), images)
    assert torch.equal(latents[0, :16, 0, 0], images[0, 0, :4, :4].flatten())
    with pytest.raises(DataError, match="14×12 pixels do not divide into 4×4"):
        codec.encode(torch.randn(1, 1, 14, 12))


def test_video_autoencoders_encode_one_frame_with_their_mean_and_deviation(tmp_path):
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    vae = AutoencoderKLQwenImage(**sizes, latents_mean=mean, latents_std=std).eval()
    vae.save_pretrained(tmp_path)
    codec, images = make_codec("autoencoder_kl", pretrained=str(tmp_path)), torch.rand(2, 3, 16, 16) * 2 - 1
    latents = codec.encode(images)
    with torch.no_grad():
        z = vae.encode(images[:, :, None]).latent_dist.mode()
        torch.testing.assert_close(
            latents * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1), z[:, :, 0]
        )
        torch.testing.assert_close(codec.decode(latents), vae.decode(z).sample[:, :, 0])


def test_autoencoders_without_a_posterior(tmp_path):
    from diffusers import AutoencoderTiny, UNet2DModel

    torch.manual_seed(0)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    vae = AutoencoderTiny(**sizes, num_decoder_blocks=(1, 1), scaling_factor=3.0).eval()
    vae.save_pretrained(tmp_path / "vae")
    codec, images = make_codec("autoencoder_kl", pretrained=str(tmp_path)), torch.rand(2, 3, 8, 8)  # as of a pipeline
    with torch.no_grad():
        torch.testing.assert_close(codec.encode(images), 3 * vae.encode(images).latents)
    UNet2DModel(
        8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).save_pretrained(tmp_path / "unet")
    with pytest.raises(ConfigError, match="UNet2DModel is no autoencoder"):
        make_codec("autoencoder_kl", pretrained=str(tmp_path / "unet"))


def test_autoencoder_kl_scales_the_posterior_mean(tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, sample_size=8, shift_factor=0.4).eval()
    vae.save_pretrained(tmp_path)
    codec, images = make_codec("autoencoder_kl", pretrained=str(tmp_path)), torch.rand(2, 3, 8, 8) * 2 - 1
    latents = codec.encode(images)
    mean = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)[0]
    torch.testing.assert_close(latents, (mean.detach() - 0.4) * vae.config.scaling_factor)
    torch.testing.assert_close(codec.decode(latents), vae.decoder(vae.post_quant_conv(mean)).detach())
    doubled = make_codec("autoencoder_kl", pretrained=str(tmp_path), scale=2 * vae.config.scaling_factor)
    torch.testing.assert_close(doubled.encode(images), 2 * latents)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        make_codec("autoencoder_kl", pretrained=str(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: (_ for _ in ()).throw(ConnectionError()))
    with pytest.raises(ConfigError, match="the Hub cannot be reached, and in its cache someone/vae "):
        make_codec("autoencoder_kl", pretrained="someone/vae")
    with pytest.raises(ConfigError, match=r"the autoencoder '.*digits' of the codec .*loaded: .* holds a DC-DiT$"):
        make_codec("autoencoder_kl", pretrained=str(ASSETS / "digits"))


def test_unknown_codecs_and_options():
    with pytest.raises(ConfigError, match="did you mean 'pixel_unshuffle'"):
        make_codec("pixel_shuffle")
    with pytest.raises(ConfigError, match="facto"):
        make_codec("pixel_unshuffle", facto=2)
    with pytest.raises(ConfigError, match="positive integer"):
        make_codec("pixel_unshuffle", factor=0)


def test_batches_do_not_depend_on_start_or_split_or_workers():
    whole = list(batches(stream(), 0, 5))
    assert len(whole) == 5 and whole[0]["image"].shape == (8, 1, 12, 12) and whole[0]["noise"].shape == (8, *SHAPE)
    for resumed, batch in zip(batches(stream(), 3, 5), whole[3:], strict=True):
        assert same(resumed, batch)
    ranks = [list(batches(stream(), 0, 5, rank, 2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert same({key: torch.cat([r[step][key] for r in ranks]) for key in batch}, batch)
    for parallel, batch in zip(batches(stream(), 0, 5, workers=2), whole, strict=True):
        assert same(parallel, batch)


def test_each_epoch_is_a_permutation():
    items = torch.cat([batch["image"][:, 0, 5, 5] for batch in batches(stream(), 0, 5)]).view(4, 10)
    assert torch.equal(items.sort(1).values, torch.arange(10.0).expand(4, 10))
    assert len({tuple(row.tolist()) for row in items}) == 4


def test_draws_follow_their_distributions():
    """About 2 000 draws; bounds of four standard errors."""
    many = list(batches(stream(batch_size=100), 0, 20))
    images, noise, t, y = (torch.cat([batch[key] for batch in many]) for key in ("image", "noise", "t", "y"))
    n = len(y)
    labels = images[:, 0, 5, 5].long() % 3
    dropped = y == 3
    assert torch.equal(y[~dropped], labels[~dropped])
    assert abs(dropped.float().mean() - 0.1) < 4 * (0.1 * 0.9 / n) ** 0.5
    mirrored = images[:, 0, 0, -1] == 1000
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / n**0.5
    logit = torch.logit(t / 1000)
    assert abs(logit.mean()) < 4 / n**0.5 and abs(logit.std() - 1) < 4 / (2 * n) ** 0.5
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    flat = noise.flatten(1)
    correlation = (flat[:-1] * flat[1:]).mean()  # between neighbours in the batch and over steps
    assert abs(correlation) < 4 / flat[1:].numel() ** 0.5
    assert not same(next(batches(stream(seed=3), 0, 1)), next(batches(stream(seed=4), 0, 1)))
    steps = torch.cat([batch["t"] for batch in batches(stream(batch_size=100, objective=DDPM(False)), 0, 20)])
    assert torch.equal(steps, steps.round()) and steps.min() >= 0 and steps.max() <= 999
    assert abs(steps.mean() - 499.5) < 4 * 1000 / 12**0.5 / n**0.5


def test_drop_fraction_is_zero_in_the_warm_up_then_one_of_the_choices():
    choices = (0.0, 0.3, 0.6)
    assert [draw_drop_fraction(0, step, choices, 50) for step in range(50)] == [0.0] * 50
    drawn = [draw_drop_fraction(0, step, choices, 50) for step in range(50, 950)]
    counts = np.array([drawn.count(choice) for choice in choices])
    assert counts.sum() == 900 and (abs(counts - 300) < 4 * (900 * 2 / 9) ** 0.5).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_class_id_out_of_range_is_one_line(workers):
    with pytest.raises(DataError, match=r"^class id 3 of item \d+ is outside \[0, 3\)$"):
        next(batches(stream(source=Unknown()), 0, 1, workers=workers))


def test_a_class_id_out_of_range_names_its_file(tmp_path):
    for folder, values in (("features", np.zeros(SHAPE, np.float32)), ("labels", np.array(3))):
        (tmp_path / f"a_{folder}").mkdir()
        np.save(tmp_path / f"a_{folder}" / "cat.npy", values)
    with pytest.raises(DataError, match=r"^class id 3 of item cat\.npy is outside \[0, 3\)$"):
        next(batches(stream(source=Latents(tmp_path, SHAPE)), 0, 1))
