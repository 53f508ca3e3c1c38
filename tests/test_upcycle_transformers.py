"""`dcdit upcycle --family`: transformers of diffusers from folders of latents and text embeddings."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")
import yaml
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_training import subprocess_environment
from transformer_families import FAMILIES, make, run

from dcdit.cli import main
from dcdit.errors import CheckpointError, ConfigError, DataError
from dcdit.integrations.attention import add_dynamic_chunking, load_dynamic_chunking
from dcdit.integrations.velocities import VELOCITIES
from dcdit.training.config import load_config
from dcdit.training.state import read_header
from dcdit.training.transformers import TransformerConfig, TransformerUpcycler, train_transformer
from dcdit.training.transformers.student import count_blocks, keep_a_share

SHAPES = {"wan": (4, 2, 8, 12), "ltx": (8, 2, 4, 6), "qwen-image": (4, 8, 6)}
RAGGED = ("z-image", "qwen-image", "ltx")
OPTIONS = {"steps": 6, "distill_steps": 3, "batch_size": 2, "log_every": 1}
OPTIM = {"lr": 1e-3, "ema_decay": [0.5]}


def configuration(tmp_path, family="flux", **options):
    """The arguments of a small run: five samples of two shapes, and a pipeline's folder with a random transformer."""
    torch.manual_seed(0)
    if not (tmp_path / "source").exists():
        make(FAMILIES[family]).save_pretrained(tmp_path / "source" / "transformer")
        (tmp_path / "latents").mkdir()
        for i in range(5):
            *front, height, width = SHAPES.get(family, (2, 8, 6))
            sides = (width, height) if i % 3 == 2 else (height, width)
            text = torch.randn(3 if family in RAGGED and i % 2 else 6, 24)
            sample = {"latents": torch.randn(*front, *sides), "text": text, "pooled": torch.randn(12)}
            save_file(sample, tmp_path / "latents" / f"{i}.safetensors")
    values = OPTIONS | {"latents": str(tmp_path / "latents"), "output": str(tmp_path / "run"), "optim": OPTIM} | options
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return ["upcycle", "--from", str(tmp_path / "source"), "--family", family, str(tmp_path / "config.yaml")]


def trainer(tmp_path, allow=(), **options):
    command = configuration(tmp_path, **options)
    overrides = [f"source={command[2]}", f"family={command[4]}"]
    return TransformerUpcycler(load_config(command[5], overrides, TransformerConfig), allow)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", VELOCITIES)
def test_blocks_are_counted_by_the_config(family, tmp_path):
    model = make(FAMILIES[family])
    model.save_pretrained(tmp_path)
    chunking = add_dynamic_chunking(model)
    assert count_blocks(tmp_path, VELOCITIES[family]()) == chunking.stop


@pytest.mark.parametrize("family", VELOCITIES)
def test_the_command_makes_a_model_that_diffusers_loads(family, tmp_path):
    """Both stages keep the tokens that ρ leaves of 1/N; text and time modules stay as they were, the rest learns."""
    bf16 = {"precision": "bf16", "checkpointing": True} if family == "flux" else {}
    main(configuration(tmp_path, family, **bf16))
    stages = [[key for key in line if key in ("distillation_loss", "velocity_loss")] for line in lines(tmp_path)]
    assert stages == [["distillation_loss"]] * 3 + [["velocity_loss"]] * 3
    for line in lines(tmp_path):
        assert line["kept"] == pytest.approx((1 - line["drop_fraction"]) / 4, abs=0.05)
    model = load_dynamic_chunking(tmp_path / "run/model").eval()
    assert run(model, FAMILIES[family].inputs((4, 4))).isfinite().all()
    plain = type(model).from_pretrained(tmp_path / "run/model")
    before = dict(type(model).from_pretrained(tmp_path / "source/transformer").named_parameters())
    frozen = VELOCITIES[family].text_and_time
    for name, p in plain.named_parameters():
        if name.startswith(tuple(f"{part}." for part in frozen)):
            assert torch.equal(p, before[name])
    assert sum(not torch.equal(p, before[name]) for name, p in plain.named_parameters()) > 20


def interrupted(run, stop, monkeypatch):
    """A run that is interrupted at step `stop` and saves what it has."""
    step = TransformerUpcycler._train_step

    def interrupting(self):
        if self.step == stop:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TransformerUpcycler, "_train_step", interrupting)
        try:
            run.run()
        except KeyboardInterrupt:
            run.save()
            raise
        finally:
            run.held.close()


@pytest.mark.parametrize("stop", [2, 4])
def test_an_interrupted_run_goes_on_to_the_same_bits(stop, tmp_path, monkeypatch):
    """In each of both stages."""
    command = configuration(tmp_path)
    main([*command, f"output={tmp_path / 'whole'}"])
    interrupted(trainer(tmp_path), stop, monkeypatch)
    main(command)
    for file in ("model/diffusion_pytorch_model.safetensors", "last.safetensors"):
        ours, want = load_file(tmp_path / "run" / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == want.keys() and all(torch.equal(ours[key], want[key]) for key in want)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    state, model = (
        load_file(tmp_path / "run/last.safetensors"),
        load_file(tmp_path / "run/model/diffusion_pytorch_model.safetensors"),
    )
    assert all(torch.equal(state[f"ema.{key}"], value) for key, value in model.items())


def test_batches_are_noisy_latents_of_one_shape(tmp_path):
    """Each sample is there in each epoch; x − σ·target is the sample; a batch does not depend on what was before it."""
    run = trainer(tmp_path)
    found = set()
    for step in range(run.data.batches(2)):
        batch = run.batch(step, 0, 2)
        clean = batch["x"] - batch["sigma"].view(2, 1, 1, 1) * batch["target"]
        for latents, pooled in zip(clean, batch["pooled"], strict=True):
            match = [i for i in range(5) if torch.equal(run.data[i]["pooled"], pooled)]
            torch.testing.assert_close(run.data[match[0]]["latents"], latents)
            found |= set(match)
    assert found == set(range(5)) and run.data.batches(2) == 3
    later = run.batch(4, 1, 2)
    assert torch.equal(trainer(tmp_path, output=str(tmp_path / "other")).batch(4, 0, 2)["x"][1:], later["x"])
    run.held.close()


def test_training_lowers_both_losses(tmp_path):
    """On the same batches a run that learns is ahead of one that does not."""
    found = {}
    for rate in (0.0, 2e-4):
        options = {"steps": 60, "distill_steps": 40, "drop_fractions": [0.0], "router_rate": 1.0}
        options["optim"] = {"lr": rate, "ema_decay": [], "cosine": False, "beta2": 0.95}
        main([*configuration(tmp_path, **options), f"output={tmp_path / 'run'}"])
        for name in ("distillation_loss", "velocity_loss"):
            found[name, rate] = sum([line[name] for line in lines(tmp_path) if name in line][-10:])
        shutil.rmtree(tmp_path / "run")
    for name in ("distillation_loss", "velocity_loss"):
        assert found[name, 2e-4] < 0.85 * found[name, 0.0]


def test_two_processes(tmp_path):
    """Each takes half of a batch, and both end with the same weights: one process saves them."""
    command = [*configuration(tmp_path), "batch_size=4"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    done = subprocess.run(
        [*launcher, "--main_process_port=0", "-m", "dcdit.cli", *command],
        env=subprocess_environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert load_dynamic_chunking(tmp_path / "run/model") is not None


def test_a_fresh_router_keeps_its_share():
    model, inputs = make(FAMILIES["flux"]), FAMILIES["flux"].inputs((8, 8))
    chunking = add_dynamic_chunking(model)
    run(model, inputs)
    with torch.no_grad():
        keep_a_share(chunking, 4)
    run(model, inputs)
    assert chunking.routing.natural_mask.float().mean() == pytest.approx(0.25, abs=0.02)


def test_the_shipped_configuration():
    config = load_config("configs/transformers/flux1-n4.yaml", ["from=a", "latents=b"], TransformerConfig)
    assert (config.source, config.steps, config.optim.ema_decay, config.blocks) == ("a", 15_000, (), (1, -1))


def test_a_small_grid_keeps_at_least_the_forced_cells(tmp_path):
    """Of 1 and 2 cells, which a router forces, too, and whatever the budget says."""
    command = configuration(tmp_path)
    for i, sides in enumerate([(2, 2), (2, 4), (6, 4), (2, 2), (2, 4)]):
        rewritten(tmp_path, i, latents=torch.randn(2, *sides))
    main([*command, "target_ratio=100"])
    assert all(0 < line["kept"] <= 1 for line in lines(tmp_path))


def rewritten(tmp_path, number, **tensors):
    file = tmp_path / f"latents/{number}.safetensors"
    save_file(load_file(file) | tensors, file)


NAN = torch.full((2, 8, 6), float("nan"))
SAMPLES = {
    "must have finite latents, got NaN": {"latents": NAN},
    r"latents of floating-point numbers, no side of 0, got I8 \(2, 8, 6\)": {"latents": torch.ones(2, 8, 6).char()},
    r"must have text of floating-point numbers, no side of 0, got F32 \(0, 24\)": {"text": torch.ones(0, 24)},
    r"must have latents of \(2, a multiple of 2, a multiple of 2\), got \(3, 8, 6\)": {"latents": torch.ones(3, 8, 6)},
    r"a multiple of 2\), got \(2, 7, 6\)": {"latents": torch.ones(2, 7, 6)},
    r"a multiple of 2\), got \(2, 1, 8, 6\)": {"latents": torch.ones(2, 1, 8, 6)},
    r"must have text of \(S, 24\), got \(6, 20\)": {"text": torch.ones(6, 20)},
    r"must have pooled of \(12,\), got \(10,\)": {"pooled": torch.ones(10)},
}


@pytest.mark.parametrize("message", SAMPLES)
def test_a_sample_that_does_not_fit(message, tmp_path):
    command = configuration(tmp_path)
    rewritten(tmp_path, 3, **SAMPLES[message])
    config = load_config(command[5], [f"source={command[2]}", "family=flux"], TransformerConfig)
    with pytest.raises(DataError, match=f"3.safetensors {message}" if message.startswith("must") else message):
        train_transformer(config)


def test_what_came_before_a_broken_sample_is_saved(tmp_path, capsys):
    command = configuration(tmp_path)
    run = trainer(tmp_path)
    run.held.close()
    used = [set(run._epoch(0)[step]) for step in range(3)]
    late = next(iter(used[2] - used[0] - used[1]))
    rewritten(tmp_path, late, latents=run.data[late]["latents"] * float("inf"))
    assert main(command) == 2
    assert f"{late}.safetensors must have finite latents" in capsys.readouterr().err
    assert read_header(tmp_path / "run/last.safetensors")["step"] == 2


def test_samples_may_move_and_may_not_change(tmp_path, capsys):
    command = configuration(tmp_path)
    main(command)
    (tmp_path / "latents").rename(tmp_path / "moved")
    moved = [*command, f"latents={tmp_path / 'moved'}"]
    assert main(moved) == 0
    (tmp_path / "moved/0.safetensors").unlink()
    assert main(moved) == 2
    assert "data=items 5, this run asks for items 4" in capsys.readouterr().err
    assert main([*moved, "--allow", "data"]) == 0


def test_the_source_may_be_named_in_another_way(tmp_path, monkeypatch, capsys):
    command = configuration(tmp_path)
    assert main(command) == 0
    monkeypatch.chdir(tmp_path)
    assert main([*command[:2], "source", *command[3:]]) == 0
    (tmp_path / "source").rename(tmp_path / "other")
    assert main([*command[:2], "other", *command[3:]]) == 2
    assert "this run asks for other; give another output, or go on with --allow source" in capsys.readouterr().err


def test_a_full_disk_leaves_what_was_saved(tmp_path, capsys, monkeypatch):
    """The model and the state of an earlier step stay, and the run goes on from them to the same bits."""
    command = configuration(tmp_path)
    main([*command, f"output={tmp_path / 'whole'}"])
    saved, own = [], FluxTransformer2DModel.save_pretrained

    def full(self, folder):
        own(self, folder)
        saved.append(folder)
        if len(saved) == 2:
            raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(FluxTransformer2DModel, "save_pretrained", full)
    assert main([*command, "save_every=2"]) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert read_header(tmp_path / "run/last.safetensors")["step"] == 2 and not (tmp_path / "run/.model").exists()
    assert load_dynamic_chunking(tmp_path / "run/model") is not None
    assert main(command) == 0
    ours, want = (load_file(tmp_path / run / "last.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(ours[key], want[key]) for key in want)
    (tmp_path / "run/model/diffusion_pytorch_model.safetensors").unlink()
    assert main(command) == 0 and load_dynamic_chunking(tmp_path / "run/model") is not None  # written again


def test_nan(tmp_path, capsys):
    """Of the source's weights, and of a training that diverges."""
    command = configuration(tmp_path)
    assert main([*command, "optim.lr=1e30", "log_every=6", "save_every=1000"]) == 2
    assert "training diverged" in capsys.readouterr().err
    file = tmp_path / "source/transformer/diffusion_pytorch_model.safetensors"
    save_file({key: torch.full_like(value, float("nan")) for key, value in load_file(file).items()}, file)
    assert main(command) == 2
    assert "source makes NaN of the first batch" in capsys.readouterr().err


@pytest.mark.parametrize("family", VELOCITIES)
def test_samples_are_held_against_the_models_of_each_family(family, tmp_path):
    velocity, config = VELOCITIES[family](), make(FAMILIES[family]).config
    shapes = (SHAPES.get(family, (2, 8, 6)), (3, 24), *([(12,)] if velocity.pooled else []))
    velocity.check(config, shapes, "file")
    for wrong in (((5, *shapes[0][1:]), *shapes[1:]), (shapes[0][:-1], *shapes[1:]), (shapes[0], (3, 23), *shapes[2:])):
        with pytest.raises(DataError, match="file must have"):
            velocity.check(config, wrong, "file")


CASES = {
    "source=nowhere": (CheckpointError, "nowhere must be a folder of diffusers with config.json"),
    "family=sd3": (CheckpointError, "must have a SD3Transformer2DModel, got FluxTransformer2DModel"),
    "latents=nowhere": (
        DataError,
        "nowhere is not there, expected a folder with safetensors, npz, tar or parquet files",
    ),
    "output=latents/run": (DataError, "cannot write latents/run: it must be a folder outside of the data"),
    "latents=source": (DataError, "must have latents of 3 dimensions, got none"),
    "latents=''": (ConfigError, "latents must be a folder"),
    "batch_size=0": (ConfigError, "batch_size must be at least 1, got 0"),
    "blocks=[9,10]": (ConfigError, "blocks"),
    "blocks=[1,2,3]": (ConfigError, r"blocks must be a list of 2, got \[1, 2, 3\]"),
    "target_ratio=1": (ConfigError, "target_ratio must be greater than 1, got 1.0"),
    "optim.lr=-1": (ConfigError, "optim.lr must not be negative, got -1.0"),
    "optim.beta2=1": (ConfigError, "optim.beta2 must be in"),
    "router_rate=-1": (ConfigError, "router_rate must not be negative, got -1.0"),
    "seed=9223372036854775808": (ConfigError, "seed must be below"),
    "drop_fractions=[1]": (ConfigError, r"values in \[0, 1\), got"),
    "optim.ema_decay=[0.9,0.99]": (ConfigError, "must be one value"),
    "accumulate=2": (ConfigError, "accumulate"),
    "depth=3": (ConfigError, "depth"),
}


@pytest.mark.parametrize("override", CASES)
def test_bad_input(override, tmp_path, monkeypatch):
    error, message = CASES[override]
    command = configuration(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = [f"source={command[2]}", "family=flux", override]
    with pytest.raises(error, match=message):
        TransformerUpcycler(load_config(command[5], given, TransformerConfig))


def test_what_a_run_does_not_go_on_from(tmp_path, capsys):
    """Its own result as a source; another configuration in the same output."""
    command = configuration(tmp_path)
    main(command)
    assert "5 samples of 2 shapes\n1 process on cpu, from step 0 of 6\n" in capsys.readouterr().out
    again = TransformerConfig(source=str(tmp_path / "run/model"), latents=str(tmp_path / "latents"))
    with pytest.raises(CheckpointError, match="has dynamic chunking already"):
        TransformerUpcycler(again)
    capsys.readouterr()
    assert main([*command, "ratio_weight=0.2"]) != 0
    assert "the run at step 6 was trained with ratio_weight=0.1" in capsys.readouterr().err


def test_a_source_whose_name_reads_as_another_type_in_yaml(tmp_path, monkeypatch, capsys):
    command = configuration(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("2024", "a: b", "null"):
        assert main([*command[:1], "--from", name, *command[3:]]) == 2
        assert f"{name} must be a folder of diffusers" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["source=b", "family=flux", "from=b", "upcycle.source=b"])
def test_the_model_to_start_from_is_named_once(override, capsys):
    assert main(["upcycle", "--from", "a", "none.yaml", override]) == 2
    assert f"name the model to start from: leave {override} out" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["", "transformer"])
def test_a_transformer_without_its_family(part, tmp_path, capsys):
    (tmp_path / part).mkdir(exist_ok=True)
    (tmp_path / part / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    assert main(["upcycle", "--from", str(tmp_path), "none.yaml"]) == 2
    assert "has a WanTransformer3DModel: give --family wan" in capsys.readouterr().err
