"""Folders of pictures of all shapes: buckets of their own aspect, batches by tokens, and training on them."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dcdit.cli import main
from dcdit.codecs import PixelUnshuffle
from dcdit.data.buckets import bucket_of
from dcdit.data.encode import encode_folder
from dcdit.data.image_folder import ImageFolder
from dcdit.data.sources import Latents
from dcdit.errors import ConfigError, DataError
from dcdit.training.batches import TrainingStream, batches
from dcdit.training.config import load_config
from dcdit.training.objectives import FlowMatching, ratio_loss
from dcdit.training.parts import cuts, weights_of
from dcdit.training.trainer import Trainer

SHAPES = [(16, 16), (8, 32), (30, 9), (64, 64), (12, 20), (5, 3), (21, 12)]  # height, width


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """44 pictures of seven shapes in two classes."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(44):
        height, width = SHAPES[i % len(SHAPES)]
        low = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        file = root / ("cat" if i % 2 else "dog") / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(low).resize((width, height)).save(file)
    return root


@pytest.fixture
def config(pictures, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"""
        output: {tmp_path}/run
        steps: 4
        tokens_per_batch: 1400
        objective: flow
        model: {{input_size: [8, 8], in_channels: 12, num_classes: 2, hidden_size: 32, depth: 1, num_heads: 1,
                 encoder_width: 32, learn_sigma: false}}
        data: {{kind: folder, path: {pictures}, size: 16, buckets: 4, flip: true}}
        codec: {{factor: 2}}
        optim: {{lr: 1e-3, warmup_steps: 0}}
        drop_warmup: 0
        log_every: 1
    """)
    return lambda *overrides: load_config(file, list(overrides))


def stream(pictures, **options):
    source = ImageFolder(pictures, 16, buckets=4)
    options = {"batch_size": 8, "tokens": 600, "unit": 2, "seed": 3, "flip": True, **options}
    return TrainingStream(source, FlowMatching(), (12, 8, 8), 2, **options)


def same(a, b):
    return all(torch.equal(x, y) for key in ("image", "noise", "t", "y") for x, y in zip(a[key], b[key], strict=True))


def test_buckets_keep_aspect_and_area():
    for height, width in itertools.product((7, 64, 100, 333, 2000), repeat=2):
        sides = bucket_of(height, width, 128, 16)
        assert all(side >= 16 and side % 16 == 0 for side in sides)
        scale = min(1, 128 / (height * width) ** 0.5)
        for side, own in zip(sides, (height, width), strict=True):
            assert abs(side - own * scale) <= 8 or (side == 16 and own * scale < 16)
    assert bucket_of(300, 300, 128, 16) == (128, 128)
    assert bucket_of(1000, 250, 128, 16) == (256, 64)
    assert bucket_of(48, 32, 128, 16) == (48, 32)  # not enlarged


def test_pictures_are_read_in_their_buckets(pictures, tmp_path):
    source = ImageFolder(pictures, 16, buckets=4)
    assert "7 buckets" not in ImageFolder(pictures, 16).describe() and "buckets" in source.describe()
    whole = {(16, 16): (16, 16), (8, 32): (8, 32), (64, 64): (16, 16), (5, 3): (4, 4)}
    for index, (file, _) in enumerate(source.files):
        image, size = source.load(index, False)[0], Image.open(file).size[::-1]
        assert image.shape == (3, *source.shapes[index]) == (3, *whole.get(size, source.shapes[index]))
        if size == source.shapes[index]:  # pixel by pixel
            np.testing.assert_allclose(image, np.asarray(Image.open(file)).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (32, 8)).save(tmp_path / "a" / "turned.jpg", exif=exif)
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    turned = ImageFolder(tmp_path, 16, buckets=4)
    assert turned.shapes == [(16, 16), (32, 8)] and turned.load(1, False)[0].shape == (3, 32, 8)


def test_batches_by_tokens(pictures):
    """As many items as fit, every item in its order, over the end of epochs; then equally after a resumption."""
    data = stream(pictures)
    cells, steps = data.cells(), list(data.steps(0, 12))
    flat = [item for items in steps for item in items]
    assert flat == list(range(len(flat))) and len(flat) > 2 * 44

    def cost(item):
        epoch, place = divmod(item, 44)
        return cells[data._permutation(epoch)[place]]

    for items in steps:
        total = sum(map(cost, items))
        assert total <= 600 < total + cost(items[-1] + 1)
    assert list(data.steps(5, 9)) == steps[5:9]
    whole = list(batches(data, 0, 6))
    assert [len(batch["t"]) for batch in whole] == [len(items) for items in steps[:6]]
    for batch in whole:
        assert sum(noise[0].numel() for noise in batch["noise"]) <= 600
        for image, noise in zip(batch["image"], batch["noise"], strict=True):
            assert noise.shape == (12, image.shape[1] // 2, image.shape[2] // 2)
    assert all(map(same, batches(stream(pictures), 3, 6), whole[3:]))
    assert all(map(same, batches(stream(pictures), 0, 3, workers=1), whole))


def test_parts_of_a_batch(pictures):
    """Ranks share a batch by whole sub-batches; the weights of the parts make the mean of the whole."""
    data = stream(pictures, tokens=2400)
    whole = next(batches(data, 0, 1))
    ranks = [next(batches(stream(pictures, tokens=2400), 0, 1, rank, 2)) for rank in range(2)]
    joined = {key: [*ranks[0][key], *ranks[1][key]] for key in ("image", "noise", "t", "y")}
    assert same(joined, whole) and len(ranks[0]["t"]) % 16 == 0
    for count, parts in itertools.product((1, 15, 16, 47, 64, 65), (1, 2, 3)):
        ends = cuts(count, parts)
        sizes = [b - a for a, b in itertools.pairwise(ends)]
        assert sum(sizes) == count and all(end % 16 == 0 or end == count for end in ends)
        weights = [weights_of(size, count, parts).get("weights", (1, 1)) for size in sizes]
        np.testing.assert_allclose(np.mean(weights, axis=0), (1, 1))


def run(config):
    trainer = Trainer(config)
    try:
        trainer.run()
    finally:
        trainer.close()
    return [json.loads(line) for line in (trainer.output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_and_is_the_same_in_parts(config, tmp_path):
    whole = run(config())
    assert len(whole) == 4 and all(np.isfinite(line["loss"]) for line in whole)
    run(config(f"output={tmp_path}/again", "steps=2", "optim.cosine=false"))
    rest = run(config(f"output={tmp_path}/again", "optim.cosine=false"))
    plain = run(config(f"output={tmp_path}/plain", "optim.cosine=false"))
    assert [line["loss"] for line in rest] == [line["loss"] for line in plain]
    parts = run(config(f"output={tmp_path}/parts", "tokens_per_batch=2400", "accumulate=2"))
    one = run(config(f"output={tmp_path}/one", "tokens_per_batch=2400"))
    for a, b in zip(parts, one, strict=True):
        for key in ("loss", "diffusion_loss", "ratio_loss", "kept"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    assert parts[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)  # Adam magnifies roundings later on


def test_the_loss_by_hand(config, tmp_path):
    """Samples alone: mean of their diffusion losses, and the ratio loss over the cells of each sixteen."""
    trainer = Trainer(config(f"output={tmp_path}/hand"))
    trainer.close()
    batch = next(batches(trainer.stream, 0, 1))
    x0 = [torch.nn.functional.pixel_unshuffle(image, 2) for image in batch["image"]]
    values, _ = trainer.losses(x0, batch["noise"], batch["t"], batch["y"], torch.tensor(0.2))
    each, prob, kept = [], [], []
    for x, noise, t, y in zip(x0, batch["noise"], batch["t"], batch["y"], strict=True):
        s = t / 1000
        out, routing = trainer.net(((1 - s) * x + s * noise)[None], t[None], y[None], 0.2, return_routing=True)
        each.append((out[0] - (noise - x)).square().mean())
        prob.append(routing.boundary_prob[0])
        kept.append(routing.plan.capacity / routing.plan.cells)
    torch.testing.assert_close(values["diffusion_loss"], torch.stack(each).mean())
    torch.testing.assert_close(values["kept"].item(), float(np.mean(kept)))
    groups = [torch.cat(prob[i : i + 16])[None] for i in range(0, len(prob), 16)]
    want = torch.stack([ratio_loss(p, p > 0.5, 4.0) for p in groups]).mean()
    torch.testing.assert_close(values["ratio_loss"], want)


def test_validation_and_the_check_know_buckets(config, pictures, tmp_path, capsys):
    options = ["steps=1", "validation.every=1", f"validation.path={pictures}", "validation.items=20"]
    lines = run(config(*options))
    assert 0 < lines[-1]["validation_kept"] < 1 and np.isfinite(lines[-1]["validation_loss"])
    assert main(["data", "check", str(pictures), "--size", "16", "--buckets", "4"]) == 0
    out = capsys.readouterr().out
    assert "buckets, height×width:" in out and "  8×32: 7" in out and "  16×16: 13" in out


def test_latents_of_all_shapes_train_as_their_pictures(config, pictures, tmp_path, capsys):
    use = {"kind": "autoencoder_kl", "pretrained": "x", "scale": None}
    source, target = ImageFolder(pictures, 16, buckets=4), tmp_path / "latents"
    assert encode_folder(source, target, PixelUnshuffle(2), use) == []
    latents = Latents(target, (12, 8, 8), buckets=2)
    assert latents.shapes == [(height // 2, width // 2) for height, width in source.shapes]
    assert "44 latents of 12 channels in " in latents.describe()
    codec = ["codec.kind=autoencoder_kl", "codec.pretrained=x"]
    disk = ["data.kind=latents", f"data.path={target}", "data.buckets=2", f"output={tmp_path}/disk", *codec]
    here, there = (run(config("steps=2", "data.flip=false", *more)) for more in ([], disk))
    assert [line["loss"] for line in here] == [line["loss"] for line in there]
    assert main(["data", "check", str(target), "--buckets", "2"]) == 0
    assert main(["data", "check", str(target), "--buckets", "3"]) == 1
    assert "expected sides that 3 divides, found " in capsys.readouterr().out
    with pytest.raises(DataError, match=r"data\.buckets=1 takes latents of any size"):
        [Latents(target, (12, 8, 8)).load(i, False) for i in range(44)]
    with pytest.raises(DataError, match="holds latents with buckets=4, this call asks for 0"):
        encode_folder(ImageFolder(pictures, 16), target, PixelUnshuffle(2), use)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.buckets=-4"], "data.buckets must not be negative, got -4"),
        (["data.buckets=3"], "data.buckets must be a multiple of 2, the pixels of a cell times the model's"),
        (["data.kind=digits"], "data.buckets is of data.kind=folder or latents, got digits"),
        (["compile=true"], "data.buckets and compile exclude each other"),
        (["cuda_graph=true"], "data.buckets and cuda_graph exclude each other"),
        (["tokens_per_batch=40"], "tokens_per_batch must hold 1 of the largest item's 6[0-9] cells, .* got 40"),
        (
            ["tokens_per_batch=1000000000000"],
            "tokens_per_batch must be at most [0-9]+, 1048576 items, got 1000000000000",
        ),
        (["data.buckets=64"], "data.buckets must be at most data.size, 16 pixels, got 64"),
        (["accumulate=2"], "tokens_per_batch must hold 32 of the largest item's"),
        (["data.buckets=0", "tokens_per_batch=640", "cuda_graph=true"], "cuda_graph and tokens_per_batch exclude"),
        (["model.in_channels=4"], "the data gives latents of shape .*the model takes"),
    ],
)
def test_bad_configurations(config, overrides, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        Trainer(config(*overrides)).close()
