"""Weights of trained DiTs and SiTs in other projects' layouts: equal predictions here."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from test_upcycle import CONFIG, randomised
from torch import nn

from dcdit import DCDiTConfig
from dcdit.checkpoints.dit import from_dit, from_sit
from dcdit.errors import CheckpointError, ConfigError
from dcdit.model.plain_dit import PlainDiT
from dcdit.training.upcycling import load_dit, to_dit, upcycle


@pytest.fixture
def theirs():
    """A DiT as diffusers has it after conversion: one embedder, in every block."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    model = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=5, norm_eps=1e-6)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.transformer_blocks[1].norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def original_layout(state, depth=2):
    """Keys of DiT-XL-2-256x256.pt for the weights of a diffusers DiT, as diffusers' conversion script pairs them."""
    emb = "transformer_blocks.0.norm1.emb."
    pairs = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": emb + "timestep_embedder.linear_1",
        "t_embedder.mlp.2": emb + "timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(depth):
        for a, b in (("attn.proj", "attn1.to_out.0"), ("mlp.fc1", "ff.net.0.proj"), ("mlp.fc2", "ff.net.2")):
            pairs[f"blocks.{i}.{a}"] = f"transformer_blocks.{i}.{b}"
        pairs[f"blocks.{i}.adaLN_modulation.1"] = f"transformer_blocks.{i}.norm1.linear"
    out = {f"{a}.{part}": state[f"{b}.{part}"] for a, b in pairs.items() for part in ("weight", "bias")}
    for i in range(depth):
        for part in ("weight", "bias"):
            qkv = [state[f"transformer_blocks.{i}.attn1.to_{x}.{part}"] for x in "qkv"]
            out[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(qkv)
    out["y_embedder.embedding_table.weight"] = state[emb + "class_embedder.embedding_table.weight"]
    return out


@pytest.mark.parametrize("layout", ["model", "pipeline", "original", "original_ema"])
def test_every_layout_computes_what_diffusers_computes(theirs, layout, tmp_path):
    source = tmp_path / "dit"
    if layout == "model":
        theirs.save_pretrained(source)
    elif layout == "pipeline":
        DiTPipeline(theirs, AutoencoderKL(), DDIMScheduler()).save_pretrained(source)
    else:
        state = original_layout(theirs.state_dict())
        state["pos_embed"] = theirs.pos_embed.pos_embed
        torch.save({"ema": state, "model": {}} if layout == "original_ema" else state, source)
    # Frequencies of the published DiT; diffusers' own differ by a last digit: 127 where DiT has 128.
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        ours = load_dit(source, CONFIG)(x, t, y)
        torch.testing.assert_close(ours, theirs(x, t, y).sample, rtol=0, atol=1e-5)


def test_to_dit_is_the_inverse(theirs):
    model = randomised(PlainDiT(CONFIG))
    state = to_dit(model)
    expected = original_layout(theirs.state_dict())
    assert state.keys() == expected.keys() | {"pos_embed"}
    assert all(state[key].shape == expected[key].shape for key in expected)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in from_dit(state).items())


def sit_layout(model):
    """A SiT `.pt` that computes −model(x, 1000·(1 − s)), by its own sinusoid of s: a reference that is no map."""
    state = to_dit(model)
    half = state["final_layer.linear.weight"]
    cells, channels = 4, half.shape[0] // 4
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value = state[key].unflatten(0, (cells, channels))
        state[key] = torch.cat([-value, torch.randn_like(value)], dim=1).flatten(0, 1)  # and channels that are not used
    return state


def test_a_sit_is_turned_into_our_convention():
    """The converted teacher at t gives −SiT(s = 1 − t/1000), SiT's embedding computed in float64."""
    torch.manual_seed(0)
    config = DCDiTConfig(**{**CONFIG.to_dict(), "learn_sigma": False})
    model = randomised(PlainDiT(config)).double()
    state = from_sit({key: value.float() for key, value in sit_layout(model).items()})
    ours = PlainDiT(config)
    ours.load_state_dict(state)
    x, t, y = (
        torch.randn(5, 4, 8, 8).double(),
        torch.tensor([0.0, 1.5, 400.0, 731.0, 1000.0]),
        torch.tensor([0, 4, 5, 1, 2]),
    )
    frequency = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = (1 - t.double() / 1000)[:, None] * frequency
    embedding = model.time_embed.mlp(torch.cat([angle.cos(), angle.sin()], 1))
    model.time_embed.forward = lambda t, dtype=None: embedding
    with torch.no_grad():
        # SiT's data − noise, with the sign turned, is ours; sit_layout turned the weights of `model` around.
        torch.testing.assert_close(ours(x.float(), t, y), model(x, t, y).float(), rtol=0, atol=2e-4)


def test_what_does_not_fit_is_named(theirs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs.save_pretrained(tmp_path / "dit")
    state = original_layout(theirs.state_dict())
    state["pos_embed"] = theirs.pos_embed.pos_embed

    def saved(**changes):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        torch.save({key: value for key, value in {**state, **changes}.items() if value is not None}, file)
        return file

    def config(**changes):
        return DCDiTConfig(**{**CONFIG.to_dict(), **changes})

    for source, sizes, text in (
        (saved(), config(depth=3), "has 2 blocks, expected the configuration's depth 3"),
        (saved(**{"blocks.1.mlp.fc1.bias": None}), CONFIG, r"missing keys in checkpoint: blocks\.1\.fc1\.bias"),
        (
            saved(**{"blocks.0.mlp.fc2.bias": torch.zeros(3)}),
            CONFIG,
            r"fc2\.bias: expected shape \(64,\), found \(3,\)",
        ),
        (saved(), config(input_size=9), r"patches of 2×2 cells, which do not fill \(9, 9\)"),
        (saved(**{"final_layer.linear.weight": None}), CONFIG, "this is no DiT"),
        (saved(**{"blocks.0.attn_rate.router.weight": torch.ones(1)}), CONFIG, "these weights look like DyDiT"),
        (saved(**{"hnet.residual_proj.weight": torch.ones(1)}), CONFIG, "look like DC-DiT's public release"),
        (
            saved(**dict.fromkeys(state), words=torch.ones(1)),
            CONFIG,
            r"look like no DiT known here \(keys such as words",
        ),
        (saved(**{"final_layer.linear.bias": None}), CONFIG, r"missing keys in checkpoint: head\.bias"),
        (saved(**{"x_embedder.proj.weight": torch.tensor(1.0)}), CONFIG, r"stem\.weight: expected 4 axes, found"),
        (saved(**{"final_layer.linear.weight": torch.tensor(1.0)}), CONFIG, r"head\.weight: expected 2 axes, found"),
        (
            saved(**{"final_layer.linear.bias": torch.ones(31)}),
            CONFIG,
            r"head\.bias: expected rows for each of the patch's 4 cells, found shape \(31,\)",
        ),
        (saved(pos_embed=torch.ones(2, 16, 64)), CONFIG, r"pos_embed: expected shape \(16, 64\), found \(2, 16, 64\)"),
        (tmp_path / "dit", config(num_heads=4), "num_heads: expected 4 as in the configuration, found 2"),
        (tmp_path / "absent", CONFIG, "there is no DiT at"),
        ("digits", CONFIG, r"at digits, which names a DC-DiT: expected a \.pt, or a folder or repository of diffusers"),
        ("someone/absent", CONFIG, "neither a .pt nor a DiT"),
    ):
        with pytest.raises(CheckpointError, match=text):
            load_dit(source, sizes)
    with pytest.raises(ConfigError, match="cond_norm=True"):
        upcycle(PlainDiT(CONFIG), config(cond_norm=False))
    for name, value in (("hidden_size", 32), ("depth", 3), ("num_heads", 4), ("mlp_ratio", 2.0)):
        text = f"the DCDiT has {name} {value}, the DiT to start from has {getattr(CONFIG, name)}"
        with pytest.raises(ConfigError, match=text):
            upcycle(PlainDiT(CONFIG), config(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activation_fn", "gelu", "activation_fn: expected gelu-approximate, found gelu"),
        ("attention_bias", False, "attention_bias: expected True, found False"),
        ("norm_elementwise_affine", True, "norm_elementwise_affine: expected False, found True"),
        ("norm_eps", 1e-3, "norm_eps: expected 1e-06 or 1e-05, found 0.001"),
    ],
)
def test_another_arithmetic_of_diffusers_is_refused(theirs, tmp_path, name, value, message):
    DiTTransformer2DModel(**{**theirs.config, name: value}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_dit(tmp_path, CONFIG)


def test_the_epsilon_of_published_conversions_is_read(theirs, tmp_path):
    DiTTransformer2DModel(**{**theirs.config, "norm_eps": 1e-5}).save_pretrained(tmp_path)
    assert load_dit(tmp_path, CONFIG).blocks[0].norm.eps == 1e-6


def test_a_folder_of_another_class_is_named(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(CheckpointError, match="must have a DiTTransformer2DModel, got FluxTransformer2DModel"):
        load_dit(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps({**values, "_class_name": "Transformer2DModel"}))
    load_dit(tmp_path, CONFIG)


def test_missing_weights_of_diffusers_are_not_made_up(theirs, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["transformer_blocks.1.ff.net.2.bias"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys in checkpoint: transformer_blocks\.1\.ff\.net\.2\.bias"):
        load_dit(tmp_path, CONFIG)
