"""Edits: known cells are the noised original at every step and untouched at the end; tokens go inside of the mask."""

import numpy as np
import pytest
import torch
from PIL import Image

from dcdit.checkpoints.folder import save_checkpoint
from dcdit.cli import main
from dcdit.errors import ConfigError
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.sampling import Batcher, Edit, sample
from dcdit.sampling.denoising import image_generator

SIZES = {"input_size": (6, 5), "num_classes": 4, "hidden_size": 32, "depth": 1, "num_heads": 1, "encoder_width": 32}


def tiny(**changes):
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(**SIZES, **changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    torch.nn.init.zeros_(model.router.score.bias)
    return model


@pytest.fixture(scope="module")
def flow():
    return tiny(learn_sigma=False)


@pytest.fixture(scope="module")
def edit():
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[1:4, 2:] = True  # nine cells, neither the first nor the last
    return Edit(torch.rand(4, 6, 5, generator=torch.Generator().manual_seed(1)) - 0.5, mask)


@torch.no_grad()
def test_flow_matching_by_hand(flow, edit):
    """x ← x − v/S, and x = (1 − σ)·image + σ·noise outside of the mask before each forward."""
    steps, y = 4, torch.tensor([1])
    x = noise = torch.randn(1, 4, 6, 5, generator=image_generator(2, 0))
    inside = edit.mask.clone()
    inside[0, 0] = inside[-1, -1] = True
    for i in range(steps):
        sigma = 1 - i / steps
        x = torch.where(edit.mask, x, (1 - sigma) * edit.image + sigma * noise)
        t = torch.full((1,), 1000 * sigma)
        cond, uncond = (flow(x, t, label, 0.3, keep=inside.view(1, -1)) for label in (y, torch.tensor([4])))
        x = x - (uncond + 2.0 * (cond - uncond)) / steps
    got = sample(flow, [1], objective="flow", steps=steps, guidance=2.0, drop_fraction=0.3, seed=2, edit=edit).latents
    torch.testing.assert_close(got[0], torch.where(edit.mask, x[0], edit.image), rtol=1e-4, atol=1e-5)
    assert torch.equal(got[0][:, ~edit.mask], edit.image[:, ~edit.mask])


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm-solver++"])
def test_noise_prediction_sees_the_original_at_its_noise(edit, scheduler):
    model, seen = tiny(), []
    options = {"objective": "ddpm", "scheduler": scheduler, "steps": 5, "edit": edit}
    got = sample(model, [0], callback=lambda step: seen.append((step.timestep, step.x[0])), **options).latents[0]
    noise = torch.randn(1, 4, 6, 5, generator=image_generator(0, 0))[0]
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for t, x in seen:
        power = float(alpha_bar[int(t)])
        want = power**0.5 * edit.image + (1 - power) ** 0.5 * noise
        torch.testing.assert_close(x[:, ~edit.mask], want[:, ~edit.mask], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[:, ~edit.mask], edit.image[:, ~edit.mask])
    assert not torch.equal(got[:, edit.mask], edit.image[:, edit.mask])


@pytest.mark.parametrize("keep_grid", [0, 3])
@pytest.mark.parametrize("amount", [{"tokens": 6}, {"tokens": [9, 10, 11, 25]}, {"drop_fraction": 0.9}])
def test_tokens_are_spent_inside_of_the_mask_first(edit, keep_grid, amount):
    model, seen = tiny(learn_sigma=False, keep_grid=keep_grid), []
    options = {"objective": "flow", "steps": 4, "guidance": 2.0, "edit": edit, **amount}
    trace = sample(model, [0, 1], callback=lambda step: seen.append(step.routing), **options).trace
    inside = edit.mask.clone()
    inside[0, 0] = inside[-1, -1] = True
    if keep_grid:
        inside[::3, ::3] = True
    inside = inside.flatten()
    for routing in seen:
        kept = routing.plan.boundary_mask
        outside = (kept & ~inside).sum(1)
        missing = (inside & ~kept).sum(1)
        assert ((outside == 0) | (missing == 0)).all()
        if "drop_fraction" in amount:
            assert not missing.any()
    if "tokens" in amount:
        wanted = [6] * 4 if amount["tokens"] == 6 else amount["tokens"]
        assert trace.tokens.tolist() == [[n, n] for n in wanted] == trace.uncond_tokens.tolist()


def test_a_batcher_serves_edits(flow, edit):
    wide = Edit(torch.zeros(4, 3, 7), torch.ones(3, 7, dtype=torch.bool))
    own = [{"edit": edit, "tokens": 8}, {"edit": wide, "tokens": 20}, {"edit": edit, "drop_fraction": 0.5}, {}]
    batcher = Batcher(flow, objective="flow", steps=3, guidance=1.5)
    requests = [batcher.submit(i, index=i, **options) for i, options in enumerate(own)]
    while batcher.step():
        pass
    for i, (request, options) in enumerate(zip(requests, own, strict=True)):
        want = sample(flow, [i], indices=[i], objective="flow", steps=3, guidance=1.5, **options).latents[0]
        torch.testing.assert_close(request.latent, want, rtol=1e-5, atol=1e-5)


def test_bad_edits_are_named(flow, edit):
    image, mask = edit.image, edit.mask
    for bad, more, message in [
        (
            Edit(image[:3], mask),
            {},
            r"must be a float latent \(4, H, W\), got torch.float32 of shape \(3, 6, 5\)",
        ),
        (Edit(image, mask[:5]), {}, r"mask must be bool of shape \(6, 5\), got torch.bool of shape \(5, 5\)"),
        (Edit(image, mask.float()), {}, r"mask must be bool of shape \(6, 5\), got torch.float32 of shape \(6, 5\)"),
        (Edit(image / 0, mask), {}, "image must be finite, got NaN or infinity"),
        (Edit(image, mask & False), {}, "must have a cell to sample, got none"),
        (edit, {"size": (6, 6)}, r"size must be \(6, 5\), that of the edit's mask, got \(6, 6\)"),
        (edit, {"policy": "reuse=2"}, "an edit is for a DC-DiT without a policy, got a RoutingReuse"),
    ]:
        with pytest.raises(ConfigError, match=message):
            sample(flow, [0], objective="flow", steps=2, edit=bad, **more)


@pytest.fixture(scope="module")
def files(flow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    use = {"objective": "flow", "codec": {"kind": "pixel_unshuffle", "factor": 2}}
    save_checkpoint(folder / "model", flow, use)
    levels = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
    mask = np.zeros_like(levels)
    mask[3, 5] = 255  # a single pixel: its cell is sampled
    Image.fromarray(levels).save(folder / "image.png")
    Image.fromarray(levels).convert("RGBA").save(folder / "colour.png")
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask // 2).save(folder / "grey.png")
    Image.fromarray(mask[:10]).save(folder / "small.png")
    return folder


def words(files, out, *more):
    options = ["--cpu", "--steps", "2", "--classes", "0,2", "--format", "png", "--output", str(out)]
    return ["sample", str(files / "model"), *options, *map(str, more)]


def test_files_on_the_command_line(files, tmp_path, capsys):
    """The pictures are the file's, but for the pixels of the masked cell; another image is another run."""
    both = ["--image", files / "image.png", "--edit-mask", files / "mask.png"]
    assert main(words(files, tmp_path / "out", *both)) == 0
    want = np.asarray(Image.open(files / "image.png"))
    for label in (0, 2):
        got = np.asarray(Image.open(next((tmp_path / "out").glob(f"*_class{label}.png"))))[..., 0]
        outside = np.ones_like(want, dtype=bool)
        outside[2:4, 4:6] = False
        assert np.array_equal(got[outside], want[outside]) and not np.array_equal(got, want)
    assert main(words(files, tmp_path / "out")) == 2
    assert "images of another run, with image=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--image", "image.png"], "--image needs --edit-mask as well"),
        (["--edit-mask", "mask.png"], "--edit-mask needs --image as well"),
        (["--image", "image.png", "--edit-mask", "grey.png"], "levels 0 and 255), got mode L with levels such as 127"),
        (["--image", "image.png", "--edit-mask", "colour.png"], "must be black and white (mode 1 or L, levels 0 and"),
        (
            ["--image", "image.png", "--edit-mask", "small.png"],
            "12×10 pixels as the pictures to make, got 10×10",
        ),
        (["--image", "small.png", "--edit-mask", "mask.png"], "12×10 pixels as the pictures to make, got 10×10"),
        (["--image", "none.png", "--edit-mask", "mask.png"], "none.png is not a readable image"),
        (["--image", "image.png", "--edit-mask", "none.png"], "none.png is not a readable image"),
    ],
)
def test_bad_files_are_named_in_one_line(files, tmp_path, given, message, capsys):
    paths = [str(files / word) if word.endswith(".png") else word for word in given]
    assert main(words(files, tmp_path / "out", *paths)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
