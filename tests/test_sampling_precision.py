"""Which precision sampling takes by itself, and that its pictures are float32's."""

import json

import pytest
import torch

from bench.cases import Case
from bench.gate import cast, evaluate, psnr
from bench.measure import build
from dcdit import DCDiT, DCDiTConfig, preset
from dcdit.checkpoints.folder import save_checkpoint
from dcdit.checkpoints.systems_folder import SYSTEMS
from dcdit.cli import main
from dcdit.model import precision
from dcdit.model.dit_config import SparseDiTConfig
from dcdit.model.patch_dit import PatchDiT
from dcdit.model.plain_dit import PlainDiT
from dcdit.training.config import load_config
from dcdit.training.run import train

WIDE = DCDiTConfig(
    input_size=(4, 4), num_classes=2, hidden_size=256, depth=1, num_heads=4, encoder_width=32, learn_sigma=False
)
USE = {"objective": "flow", "codec": {"kind": "pixel_unshuffle", "factor": 2}}


@pytest.fixture
def amx(monkeypatch):
    """Set what the CPU is said to have."""

    def have(known):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": known}, raising=False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    return have


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = DCDiT(WIDE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_checkpoint(tmp_path / "model", model, USE)
    return str(tmp_path / "model")


def test_the_choice(amx, monkeypatch):
    """By AMX, the width and the device alone, so that a picture does not depend on its batch."""
    small, large = preset("digits"), preset("DC-DiT-S/N4")
    for known, chosen in ((True, torch.bfloat16), (False, torch.float32)):
        amx(known)
        assert precision.sampling_dtype(large, "cpu") == chosen
        assert precision.sampling_dtype(small, "cpu") == precision.sampling_dtype(large, "cuda") == torch.float32
    amx(True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision.sampling_dtype(large, "cpu") == torch.float32
    amx(True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # PyTorch 2.10
    assert precision.sampling_dtype(large, "cpu") == torch.float32


def test_the_command_says_what_it_chose_and_is_overridden(checkpoint, tmp_path, amx, capsys):
    def run(name, *more):
        words = ["sample", checkpoint, "--cpu", "--steps", "2", "--format", "png", "--output", str(tmp_path / name)]
        status = main([*words, *more])
        files = {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.png")}
        return status, files, capsys.readouterr()

    amx(True)
    _, half, said = run("a")
    assert said.out.splitlines()[0].startswith("In bfloat16, for which this CPU has AMX; --precision float32")
    assert json.loads((tmp_path / "a" / "sampling.json").read_text())["precision"] == "bfloat16"
    _, full, said = run("b", "--precision", "float32")
    assert "bfloat16" not in said.out and len(full) == len(half) == 2 and full != half
    amx(False)
    assert run("c")[:2] == (0, full)
    _, asked, said = run("d", "--precision", "bfloat16")
    assert asked == half and "AMX" not in said.out
    status, _, said = run("a")
    assert status == 2 and "precision=bfloat16, this call asks for float32" in said.err


@pytest.mark.parametrize("kind", [PlainDiT, *(kind for kind, _ in SYSTEMS.values())])
def test_an_input_of_another_precision_is_named(kind):
    """By the DiTs as by a DC-DiT, PatchDiT's coarse scales included."""
    config = dict(SYSTEMS.values()).get(kind, DCDiTConfig)
    sizes = {"input_size": (8, 8), "hidden_size": 64, "num_heads": 4}
    sizes |= {"sparse_size": (2, 2)} if config is SparseDiTConfig else {"depth": 1}
    sizes |= {"encoder_width": 32} if config is DCDiTConfig else {}
    model = precision.cast_weights(kind(config(**sizes)), torch.bfloat16)
    y = torch.zeros(1, dtype=torch.long)
    for options in ({}, {"scale": 2}) if kind is PatchDiT else ({},):
        with pytest.raises(ValueError, match=r"x must be torch\.bfloat16 as the model is, got torch\.float32"):
            model(torch.zeros(1, 4, 8, 8), torch.zeros(1), y, **options)


def test_training_is_not_touched(tmp_path, amx):
    """AMX changes no bit of a run."""
    text = "model: {preset: digits, hidden_size: 256, num_heads: 4, encoder_width: 32, depth: 1}\n"
    (tmp_path / "run.yaml").write_text(text)
    found = []
    for known in (True, False):
        amx(known)
        folder = tmp_path / str(known)
        train(load_config(tmp_path / "run.yaml", ["steps=2", "batch_size=2", "log_every=1", f"output={folder}"]))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([line["loss"] for line in lines])
    assert found[0] == found[1] and len(found[0]) == 2


def test_pictures_in_bfloat16_are_those_in_float32():
    """A batch of S sampled by four steps from equal noise, with Lite-CFG."""
    problem = build(Case("sample", "S", 32, 1, dtype="bfloat16"), "cpu")
    names = ("dcdit", "dcdit reference")
    half, reference = (evaluate(problem.variants[name], problem.inputs, False)[0] for name in names)
    full = evaluate(problem.variants["dcdit"], cast(problem.inputs, torch.float32), False)[0]
    found = [psnr(half, full), psnr(half, reference)]
    assert min(found) >= 34, found
