"""Picture files of every kind, the folder's classes and order, and the `dcdit data` command."""

import json
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from dcdit.cli import main
from dcdit.data.encode import encode_folder
from dcdit.data.image_folder import ImageFolder
from dcdit.data.picture_files import read_picture, read_square
from dcdit.data.sources import Latents, make_source
from dcdit.errors import ConfigError, DataError
from dcdit.training.batches import TrainingStream, batches
from dcdit.training.objectives import FlowMatching

GREY = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040  # 16 bits, nearly to the top


def save(file, array, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        Image.fromarray(array).save(file, **options)
    except OSError as error:
        pytest.skip(f"Pillow {PIL.__version__} {error}")  # such as 10.1, for 16 bits
    return file


def flat(value, size=8):
    return np.full((size, size, 3), value, dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_grey_is_scaled(suffix, tmp_path):
    got = np.asarray(read_picture(save(tmp_path / f"a{suffix}", GREY)))
    np.testing.assert_array_equal(got, np.repeat(np.round(GREY / 257)[..., None], 3, axis=2))


def test_sixteen_bit_grey_with_one_transparent_level(tmp_path):
    file = tmp_path / "a.png"
    save(file, GREY, transparency=1040)
    got = np.asarray(read_picture(file))
    assert (got[0, 1] == 255).all() and (got[0, 2] == 8).all()


@pytest.mark.parametrize("array", [np.full((4, 4), 70_000, np.int32), np.zeros((4, 4), np.float32)])
def test_values_of_no_known_range_are_refused(array, tmp_path):
    with pytest.raises(DataError, match=r"a\.tif is not a readable image: its 32-bit .* no known range"):
        read_picture(save(tmp_path / "a.tif", array))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(orientation, tmp_path):
    upright = np.zeros((8, 16, 3), dtype=np.uint8)
    upright[:4, :4, 0] = 255
    upright[4:, 12:, 2] = 255
    # How a camera stores an upright picture by EXIF's orientation (columns: EXIF 2.32, table 6).
    stored = [
        *(upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1]),
        *(upright.transpose(1, 0, 2), np.rot90(upright), np.rot90(upright.transpose(1, 0, 2), 2), np.rot90(upright, 3)),
    ][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.png")), upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("background", "colour"), [("white", 255), ("#202020", 32)])
def test_hidden_pixels_show_the_background(mode, background, colour, tmp_path):
    picture = np.full((8, 8, 4), (0, 200, 0, 0), dtype=np.uint8)
    picture[:, 4:] = (0, 0, 0, 255)
    image = Image.fromarray(picture)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    file = tmp_path / "a.png"
    image.save(file)
    got = np.asarray(read_picture(file, background))
    assert abs(got[:, :4].astype(int) - colour).max() <= 1 and got[:, 4:].max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "RGBX"])
def test_other_modes_are_read(mode, tmp_path):
    Image.fromarray(flat(255)).convert(mode).save(tmp_path / "a.tif")
    try:
        Image.open(tmp_path / "a.tif").load()
    except OSError as error:
        pytest.skip(f"Pillow {PIL.__version__} does not read what it writes: {error}")  # 10.1, YCbCr
    assert (np.asarray(read_picture(tmp_path / "a.tif")) >= 254).all()


def test_classes_are_numbered_in_natural_order(tmp_path):
    for name in range(12):
        save(tmp_path / str(name) / "a.png", flat(name))
    folder = ImageFolder(tmp_path, 8)
    assert folder.class_names == [str(name) for name in range(12)]
    for index in range(12):
        image, label = folder.load(index, flip=False)
        assert label == index and np.allclose((image + 1) * 127.5, index)


def test_every_suffix_is_read_and_what_is_left_out_is_said(tmp_path):
    names = ["a.png", "b.JPG", "c.jfif", "d.tif", "e.gif", "f.webp", "g.ppm", "h.jp2", "i.tga"]
    for name in names:
        Image.fromarray(flat(90)).save(tmp_path / "x.png")
        kind = {".jfif": "jpeg", ".jp2": "jpeg2000", ".ppm": "ppm"}.get(name[name.index(".") :])
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.fromarray(flat(90)).save(tmp_path / "cat" / name, kind)
    (tmp_path / "x.png").rename(tmp_path / "beside.png")
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / "lost.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "dog").symlink_to(tmp_path / "outside", target_is_directory=True)
    save(tmp_path / "outside" / "far.png", flat(1))
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat", target_is_directory=True)
    folder = ImageFolder(tmp_path, 8)
    assert [file.name for file, label in folder.files if label == 0] == names
    assert folder.class_names == ["cat", "dog", "outside"]
    for index in range(len(folder)):
        folder.load(index, flip=False)
    text = folder.describe()
    assert text.startswith(f"11 pictures in {tmp_path}, 3 classes (cat, dog, outside); 8×8, 10 RGB, 1 P; left out")
    for part in ("1 × picture beside the class folders", "1 × .txt file", "1 × link to nothing", "1 × folder without"):
        assert part in text


def test_links_to_folders_above_are_no_classes(tmp_path):
    """Nor do they bring the pictures of other classes; of two classes that are one folder the header tells."""
    root = tmp_path / "set"
    for name in ("cat/1.png", "dog/far/2.png"):
        save(root / name, flat(0))
    before = ImageFolder(root, 8)
    (tmp_path / "way").symlink_to(root)
    for link, target in (("all", root), ("cat/up", root), ("cat/two", tmp_path), ("dog/far/back", tmp_path / "way")):
        (root / link).symlink_to(target, target_is_directory=True)
    folder = ImageFolder(tmp_path / "way", 8)
    assert [file.name for file, _ in folder.files] == ["1.png", "2.png"] and folder.class_names == ["cat", "dog"]
    assert folder.fingerprint() == before.fingerprint()
    assert "4 × link to a folder above" in folder.describe()
    (root / "hound").symlink_to(root / "dog", target_is_directory=True)
    folder = ImageFolder(root, 8)
    assert len(folder) == 3 and f"; {root}/hound is in the class dog too; {root}/hound/far is in" in folder.describe()


def test_a_root_of_splits_is_refused(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "cat" / "a.png", flat(0))
    with pytest.raises(DataError, match=r"holds splits, not classes: train, val; give one of them, such as .*/train"):
        ImageFolder(tmp_path, 8)
    save(tmp_path / "boat" / "a.png", flat(0))  # then train is a class of vehicles
    assert ImageFolder(tmp_path, 8).class_names == ["boat", "train", "val"]


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    save(tmp_path / "a" / "cat" / "1.png", flat(0))
    save(tmp_path / "a" / "dog" / "1.png", flat(0))
    before = ImageFolder(tmp_path / "a", 8).fingerprint()
    (tmp_path / "a").rename(tmp_path / "b")
    assert ImageFolder(tmp_path / "b", 8).fingerprint() == before
    (tmp_path / "b" / "dog").rename(tmp_path / "b" / "bat")
    assert ImageFolder(tmp_path / "b", 8).fingerprint() != before


def broken_folder(tmp_path):
    """Six pictures: 1 is half a file, 3 no picture and 4 empty."""
    for index in range(6):
        save(
            tmp_path / "data" / ("cat" if index < 4 else "dog") / f"{index}.png",
            np.random.default_rng(index).integers(0, 255, (8, 8, 3), np.uint8),
        )
    half = tmp_path / "data" / "cat" / "1.png"
    half.write_bytes(half.read_bytes()[:100])
    (tmp_path / "data" / "cat" / "3.png").write_bytes(b"not a picture")
    (tmp_path / "data" / "dog" / "4.png").write_bytes(b"")
    return tmp_path / "data"


def test_broken_pictures_leave_the_order_of_all_others(tmp_path, capsys):
    source = ImageFolder(broken_folder(tmp_path), 8)
    options = {"seed": 1, "batch_size": 4}

    class Whole:
        """The folder with all files readable; picture i is i."""

        def __len__(self):
            return 6

        def load(self, index, flip):
            return np.full((3, 8, 8), index, np.float32), 0

    with pytest.raises(DataError, match=r"\.png is not a readable image"):
        list(batches(TrainingStream(source, FlowMatching(), (3, 8, 8), 2, **options), 0, 3))
    stream = TrainingStream(source, FlowMatching(), (3, 8, 8), 2, **options, skip_broken=True)
    wanted = torch.cat(
        [
            b["image"][:, 0, 0, 0]
            for b in batches(TrainingStream(Whole(), FlowMatching(), (3, 8, 8), 2, **options), 0, 6)
        ]
    )
    got = list(batches(stream, 0, 6))
    images, noise = torch.cat([batch["image"] for batch in got]), torch.cat([batch["noise"] for batch in got])
    pictures = {i: torch.from_numpy(source.load(i, False)[0].copy()) for i in (0, 2, 5)}
    for index, image in zip(wanted.int().tolist(), images, strict=True):
        if index in pictures:
            assert torch.equal(image, pictures[index])
        else:
            assert any(torch.equal(image, picture) for picture in pictures.values())
    resumed = torch.cat([batch["noise"] for batch in batches(stream, 3, 6)])
    assert torch.equal(noise[12:], resumed)
    assert capsys.readouterr().err.count("skipped: ") == 3


def test_a_bomb_is_a_bad_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match=r"a\.png is not a readable image: Image size \(64 pixels\) exceeds"):
        read_square(save(tmp_path / "a.png", flat(0)), 8)


def test_a_background_that_is_no_colour(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.background must be a colour such as white or #808080, got 'whit'"):
        ImageFolder(tmp_path, 8, "whit")


def test_check_reads_every_file_and_lists_the_bad(tmp_path, capsys):
    root = broken_folder(tmp_path)
    assert main(["data", "check", str(root)]) == 1
    out = capsys.readouterr().out
    assert out.count("bad: ") == 3 and "3 of 6 can be read; data.skip_broken=true" in out
    assert "  cat: 2\n  dog: 1\n" in out
    for name in ("cat/1.png", "cat/3.png", "dog/4.png"):
        (root / name).unlink()
    assert main(["data", "check", str(root)]) == 0
    assert "3 of 3 can be read\n" in capsys.readouterr().out


def test_check_of_labels_without_latents(tmp_path, capsys):
    (tmp_path / "pets_labels").mkdir()
    np.save(tmp_path / "pets_labels" / "0.npy", np.array([0]))
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "must hold one folder *_features, such as imagenet256_features; it has 0" in capsys.readouterr().err


def test_encode_goes_on_and_trains(tmp_path, capsys, monkeypatch):
    """Latents are the autoencoder's of each picture; a second call writes the missing files; the codec is compared."""
    from diffusers import AutoencoderKL

    from dcdit.codecs import make_codec
    from dcdit.model.config import DCDiTConfig
    from dcdit.training.config import DataConfig

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(32,), latent_channels=4, sample_size=8, shift_factor=0.1).save_pretrained(
        tmp_path / "vae"
    )
    root, out = broken_folder(tmp_path), tmp_path / "latents"
    words = [
        "data",
        "encode",
        str(root),
        str(out),
        "--codec",
        str(tmp_path / "vae"),
        "--size",
        "8",
        "--batch-size",
        "2",
    ]
    assert main([*words, "--cpu"]) == 2  # picture 1 cannot be read
    assert "cat/1.png is not a readable image" in capsys.readouterr().err
    with pytest.raises(DataError, match="unfinished: run the same dcdit data encode again"):
        Latents(out, (4, 8, 8))
    assert main([*words, "--cpu", "--skip-broken"]) == 0
    text = capsys.readouterr().out
    assert text.count("left out: ") == 3 and "3 latents in" in text
    latents, source = Latents(out, (4, 8, 8)), ImageFolder(root, 8)
    assert latents.names == ["0.npy", "2.npy", "5.npy"] and latents.class_names == ["cat", "dog"]
    codec = make_codec(**latents.codec)
    for item, index in enumerate((0, 2, 5)):
        latent, label = latents.load(item, flip=False)
        image, wanted = source.load(index, flip=False)
        torch.testing.assert_close(torch.from_numpy(latent), codec.encode(torch.from_numpy(image)[None])[0])
        assert label == wanted
    (out / "latents_features" / "2.npy").unlink()  # its label is still there
    assert main([*words, "--cpu", "--skip-broken"]) == 0 and "3 latents in" in capsys.readouterr().out
    assert Latents(out, (4, 8, 8)).names == ["0.npy", "2.npy", "5.npy"]
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *args: pytest.fail("encoded again"))
    assert main([*words, "--cpu", "--skip-broken"]) == 0
    assert main([*words[:-4], "--size", "16", "--cpu"]) == 2
    assert "holds latents with size=8, this call asks for 16; give another folder" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(root / "cat" / "new.png")
    assert main([*words, "--cpu"]) == 2
    assert "holds latents of other pictures: pictures 6, this call asks for 7; give another" in capsys.readouterr().err
    (root / "cat" / "new.png").unlink()
    assert main(["data", "check", str(out)]) == 0
    assert "class ids from 0 to 1, 2 different" in capsys.readouterr().out
    model = DCDiTConfig(input_size=8, num_classes=1)
    with pytest.raises(DataError, match=r"2 classes, the model model\.num_classes=1"):
        make_source(DataConfig(kind="latents", path=str(out)), model)
    (out / "dataset.json").write_text(json.dumps({"codec": 3}))
    with pytest.raises(DataError, match="is not what dcdit data encode writes"):
        Latents(out, (4, 8, 8))


def test_encode_says_what_it_needs(tmp_path, capsys):
    assert main(["data", "encode", str(tmp_path)]) == 2
    assert "needs a folder to write and --codec" in capsys.readouterr().err
    assert main(["data", "encode", str(tmp_path), "out", "--codec", "a", "--scale", "nan"]) == 2
    assert "a scale of at least 0, got 256, 8 and nan" in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "cat", "cat/new"])
def test_encode_writes_outside_of_the_pictures(out, tmp_path, capsys):
    root = tmp_path / "pictures"
    save(root / "cat" / "1.png", flat(1))
    before = sorted(root.rglob("*"))
    assert main(["data", "encode", str(root), str(root / out), "--codec", "vae", "--cpu"]) == 2
    assert "it must be a folder outside of the data, " in capsys.readouterr().err
    assert sorted(root.rglob("*")) == before


def test_encode_writes_finite_latents_alone(tmp_path):
    save(tmp_path / "pictures" / "cat" / "1.png", flat(1))
    codec = SimpleNamespace(encode=lambda images: images / 0)
    with pytest.raises(DataError, match=r"must give finite latents, got NaN or infinity of .*1\.png"):
        encode_folder(ImageFolder(tmp_path / "pictures", 8), tmp_path / "out", codec, {})
    assert not any((tmp_path / "out").rglob("*.npy"))
