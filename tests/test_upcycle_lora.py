"""`lora` of `dcdit upcycle --family`: adapters on the chunked blocks' linear layers."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from safetensors.torch import load_file
from test_upcycle_transformers import configuration, interrupted, trainer
from transformer_families import FAMILIES, run

from dcdit.cli import main
from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking, chunking_of, load_dynamic_chunking
from dcdit.integrations.reading import read_untouched
from dcdit.integrations.velocities import VELOCITIES
from dcdit.training.config import load_config
from dcdit.training.resume import compare
from dcdit.training.transformers import TransformerConfig


@pytest.mark.parametrize("family", VELOCITIES)
def test_adapters_and_router_alone_learn(family, tmp_path):
    """Every linear layer of the chunked blocks learns, nothing else does but the router; the adapter's file gives the
    merged model, on a source that is wrapped alike and has its router."""
    command = configuration(tmp_path, family, lora=2)
    main(command)
    name = VELOCITIES[family].name
    model = load_dynamic_chunking(tmp_path / "run/model").eval()
    source = read_untouched(tmp_path / "source/transformer", name).eval()
    chunked = {id(m) for block in chunking_of(model).stack for m in block.modules()}
    linears = {f"{n}.weight" for n, m in model.named_modules() if id(m) in chunked and isinstance(m, torch.nn.Linear)}
    before, after = dict(source.named_parameters()), dict(model.named_parameters())
    changed = {n for n, p in after.items() if n in before and not torch.equal(p, before[n])}
    assert changed == linears and len(linears) > 5
    chunking = add_dynamic_chunking(source, blocks=slice(1, -1))
    chunking.router.load_state_dict(chunking_of(model).router.state_dict())
    source.load_lora_adapter(tmp_path / "run/lora", weight_name="pytorch_lora_weights.safetensors")
    for part in (chunking, chunking_of(model)):
        part.drop_fraction = 0.3
    inputs = FAMILIES[family].inputs((4, 4))
    torch.testing.assert_close(run(source, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)


def test_a_pipeline_reads_the_adapter(tmp_path):
    main(configuration(tmp_path, lora=2))
    family, source = FAMILIES["flux"], read_untouched(tmp_path / "source/transformer", "FluxTransformer2DModel")
    pipe = family.pipeline(source)
    pipe.load_lora_weights(tmp_path / "run/lora")
    (config,) = source.peft_config.values()
    assert config.r == config.lora_alpha == 2 and len(config.target_modules) > 5


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    command = configuration(tmp_path, lora=2)
    main([*command, f"output={tmp_path / 'whole'}"])
    interrupted(trainer(tmp_path, lora=2), 4, monkeypatch)
    main(command)
    for file in (
        "model/diffusion_pytorch_model.safetensors",
        "lora/pytorch_lora_weights.safetensors",
        "last.safetensors",
    ):
        ours, want = load_file(tmp_path / "run" / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == want.keys() and all(torch.equal(ours[key], want[key]) for key in want)
    learned = {key.split(".", 1)[1] for key in ours if key.startswith("model.")}
    assert all(".lora_" in name or ".router." in name for name in learned)


def test_another_rank_is_refused_before_the_source_is_read(tmp_path, monkeypatch):
    """Allowed or not. A run of a version without the key had its default, and an average may begin later."""
    command = configuration(tmp_path, lora=2)
    main([*command, "steps=1", "distill_steps=1", "optim.ema_decay=[]"])
    allow = ["steps", "distill_steps", "lora", "blocks", "lora_targets", "optim"]
    trainer(tmp_path, allow, lora=2, steps=2, optim={"ema_decay": 0.9}).held.close()
    monkeypatch.setattr("dcdit.training.transformers.run.read_source", None)
    for options, found in (({"lora": 4}, r"lora=\[2\]"), ({"lora": 2, "blocks": [0, 1]}, r"blocks=\[")):
        with pytest.raises(ConfigError, match=rf"the run at step 1 has weights for {found}.*; give another output"):
            trainer(tmp_path, allow, **options)
    new = load_config(command[5], ["source=a", "latents=b"], TransformerConfig).to_dict()
    old = {key: value for key, value in new.items() if key not in ("lora", "drop_fractions")}
    with pytest.raises(ConfigError, match=r"the run at step 1 has weights for lora=\[\], this run asks for \[2\]"):
        compare(1, old, new, [], kind=TransformerConfig)
    assert compare(1, old | {"lora": [2]}, new | {"drop_fractions": [0.0, 0.3, 0.6]}, [], kind=TransformerConfig) == []


def test_equal_meanings_resume(tmp_path):
    """Five blocks: their ends counted from either side, and layers in any order."""
    command = configuration(tmp_path, lora=2, lora_targets=["to_q", "ff.net.2"])
    main([*command, "steps=1", "distill_steps=1"])
    options = {"lora": 2, "steps": 1, "distill_steps": 1}
    alike = {"lora_targets": ["ff.net.2", "to_q", "to_q"], "blocks": [-4, 4]}
    for one in ({"lora_targets": ["to_q", "ff.net.2"], "blocks": [1, -1]}, alike):
        run = trainer(tmp_path, **options | one)
        run.held.close()
        assert run.step == 1 and not run.changes
    for other in ({"blocks": [1, 5]}, {"lora_targets": ["to_q"]}):
        with pytest.raises(ConfigError, match=f"the run at step 1 has weights for {next(iter(other))}"):
            trainer(tmp_path, **options | alike | other)


def test_targets_choose_layers(tmp_path):
    run = trainer(tmp_path, lora=2, lora_targets=["to_q", "ff.net.2"])
    run.held.close()
    names = {n.partition(".lora_A")[0] for n, _ in run.net.named_parameters() if ".lora_A" in n}
    assert names == {f"single_transformer_blocks.{i}.attn.to_q" for i in range(2)} | {
        f"transformer_blocks.1.{end}" for end in ("attn.to_q", "ff.net.2")
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora": 0}, r"lora must be one rank of at least 1, or \[\] to train all weights, got \(0,\)"),
        ({"lora": [2, 4]}, "lora must be one rank"),
        ({"lora_targets": "to_q"}, r"lora_targets=\['to_q'\] needs lora, a rank"),
        ({"lora": 2, "lora_targets": "to_w"}, "lora_targets must be among attn.add_k_proj, .*attn.to_q, .*, got to_w"),
    ],
)
def test_bad_input(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **options)
