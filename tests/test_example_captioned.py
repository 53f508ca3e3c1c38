"""examples/captioned: captioned digits, their detector's labels, and every stage at a tiny size."""

import json
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.36")  # which has Z-Image
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
pytest.importorskip("yaml")
import yaml

from dcdit.interrupts import raised
from examples.captioned import __main__ as captioned
from examples.captioned.compositions import NONE, SIZES, Captions, Compositions, caption, caption_id
from examples.captioned.judging import ask, recognised
from examples.captioned.training import train
from examples.captioned.unfinished import Unfinished

CPU = torch.device("cpu")
TINY = {
    "flux": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1},
    "z_image": {"dim": 32, "n_layers": 3, "n_heads": 1, "n_kv_heads": 1},
}


def test_captions_say_what_is_shown():
    assert caption(7, 2, False) == "a seven next to a two" and caption(8, 3, True) == "an eight above a three"
    assert caption(0, NONE, True) == "a zero"
    every = Captions.every(CPU)
    assert (
        every.text.shape == (221, 32, 64) and len(every.text.flatten(1).unique(dim=0)) == 211
    )  # ten of one digit are there twice
    one = int(caption_id(torch.tensor(4), torch.tensor(NONE), True))
    assert torch.equal(every.pooled[one], every.pooled[one - 110])
    which, first, second = ask(110, SIZES[3], CPU)
    assert len(which.unique()) == 110 and torch.equal(which, 110 + 11 * first + second)


def test_one_digit_a_picture():
    which, first, second = ask(20, SIZES[0], CPU, most=1)
    assert first.tolist() == 2 * list(range(10)) and (second == NONE).all()
    assert torch.equal(which, caption_id(first, second, torch.tensor(False)))
    assert (Compositions(None, True, CPU, most=1).draw(30, SIZES[0], torch.Generator())[2] == NONE).all()


@pytest.mark.parametrize("size", SIZES)
def test_pictures_have_their_digits_in_the_caption_s_order(size):
    """Digits that are filled squares as bright as their number are read off the halves of the canvas."""
    data = Compositions(None, True, CPU)
    data.digits = (20 * (data.labels + 1)).to(torch.uint8)[:, None, None].expand(-1, 28, 28).clone()
    data.digits[:, :, :9] = data.digits[:, :, 19:] = 0
    data.digits[:, :9] = data.digits[:, 19:] = 0
    pictures, first, second = data.draw(60, size, torch.Generator().manual_seed(0))
    assert pictures.shape == (60, 1, *size) and 10 < int((second == NONE).sum()) < 30
    shown = ((pictures + 1) * 127.5 / 20 - 1).round().long()
    ends = [part.flatten(1).amax(1) for part in shown.chunk(2, dim=2 if size[0] > size[1] else 3)]
    assert torch.equal(ends[0], first) and torch.equal(ends[1], torch.where(second == NONE, first, second))


def test_recognised_is_every_digit_in_order():
    first, second = torch.tensor([7, 7, 7, 7]), torch.tensor([2, 2, 2, NONE])
    read = torch.tensor([7, 2, 7, 7]), torch.tensor([2, 7, NONE, NONE])
    logits = [torch.nn.functional.one_hot(digits, n).float() for digits, n in zip(read, (10, 11), strict=True)]
    assert recognised(lambda pictures: logits, torch.zeros(4), first, second).tolist() == [True, False, False, True]


MILLIONS = {"flux": 5.1, "z_image": 5.1, "flux_core": 5.1, "z_image_core": 5.1, "flux_small": 0.8, "z_image_small": 1.2}
MILLIONS |= {f"{name}_longer": millions for name, millions in MILLIONS.items() if name.endswith(("_core", "_small"))}


@pytest.mark.parametrize("name, millions", MILLIONS.items())
def test_configurations_have_the_same_keys_and_the_documented_sizes(name, millions):
    config, pattern = (captioned.read_config(Path(f"examples/captioned/{n}.yaml")) for n in (name, "flux"))
    for part in ("dense", "upcycle", "judge"):
        assert config[part].keys() == pattern[part].keys()
    with torch.device("meta"):
        model = captioned.FAMILIES[config["family"]](config["model"]).model()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("family", TINY)
def test_all_stages(family, tmp_path, capsys):
    config = yaml.safe_load(Path(f"examples/captioned/{family}.yaml").read_text())
    config["model"] |= TINY[family]
    config["batch"], config["upcycle"]["blocks"] = 4, [1, None]
    config["judge"] |= {"pictures": 4, "batch": 4, "steps": 2, "detector_seconds": 0.1, "drop_fractions": [0.0, 0.5]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    captioned.main([str(tmp_path), "--config", str(tmp_path / "tiny.yaml"), "--seconds", "0.1", "0.1", "0.1"])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert capsys.readouterr().out.count("\n") == len(lines)
    kept = {line["name"]: line["kept"] for line in lines if "kept" in line}
    assert kept["dense"] == 1 and kept["a share 1/N, untrained"] == pytest.approx(0.25, abs=0.01)
    assert kept["ρ = 0.5"] < 0.7 * kept["ρ = 0"] < 0.3
    assert [line["stage"] for line in lines if "stage" in line] == ["dense", "upcycle"]
    assert (tmp_path / "pictures.png").stat().st_size > 10000
    frozen = config["upcycle"]["frozen"][0]
    dense, upcycled = (captioned.Run(tmp_path, config, None, CPU).read(stage) for stage in ("dense", "upcycle"))
    same = [torch.equal(*pair) for pair in zip(dense.parameters(), upcycled.parameters(), strict=False)]
    own = [p.equal(q) for p, q in zip(*(m.get_submodule(frozen).parameters() for m in (dense, upcycled)), strict=True)]
    assert all(own) and not all(same)


def test_bfloat16_is_another_arithmetic_of_the_same_loss(monkeypatch):
    """Under autocast and with attention made of products; the compiler is not asked."""
    config = yaml.safe_load(Path("examples/captioned/flux_core.yaml").read_text())
    family, captions = captioned.FAMILIES["flux"]({**config["model"], **TINY["flux"]}), Captions.every(CPU)
    model, losses, compiled = family.model(), [], []
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    monkeypatch.setattr(model, "compile_repeated_blocks", lambda **options: compiled.append(options))
    for bfloat16 in (False, True):
        task = captioned.Task(family, Compositions(None, False, CPU), captions, 4, bfloat16)
        task.prepared(model)
        with task.autocast():
            losses.append(float(task.loss(model, *task.draw())))
    assert compiled == [{"dynamic": True}]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)


def test_a_training_that_a_signal_ended_goes_on(tmp_path):
    """To the bits of one that was not: weights, moments, random numbers, steps and curve."""
    states = {}
    for ends in ([60], [40, 60]):
        generator, weight = torch.Generator().manual_seed(0), torch.nn.Parameter(torch.zeros(3))
        for end in ends:
            unfinished, calls = Unfinished(tmp_path / f"{len(ends)}.pt", (generator,)), []
            first = 40 if end == 60 and len(ends) == 2 else 0

            def loss_of(share, last=end - first + 2, generator=generator, weight=weight, calls=calls):
                calls.append(share)
                if len(calls) == last:  # behind two passes that train nothing
                    signal.raise_signal(signal.SIGTERM)
                return (weight - torch.randn(3, generator=generator)).square().sum()

            with pytest.raises(KeyboardInterrupt), raised():
                train([{"params": [weight], "lr": 0.1}], 1e12, loss_of, unfinished)
            weight = torch.nn.Parameter(torch.ones(3))
        states[len(ends)] = torch.load(tmp_path / f"{len(ends)}.pt")
    whole, parts = states[1], states[2]
    step, _, curve = parts["place"]
    assert step == whole["place"][0] == 61 and [line["step"] for line in curve] == [25, 50]
    assert torch.equal(parts["weights"][0], whole["weights"][0])
    assert torch.equal(parts["generators"][0], whole["generators"][0])
    moments = [state["optimizer"]["state"][0]["exp_avg_sq"] for state in (parts, whole)]
    assert torch.equal(*moments)
