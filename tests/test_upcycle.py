"""Upcycling: diffusers' DiT as the reference of what is read, distillation against a loop, and whole runs."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from dcdit import DCDiT, DCDiTConfig
from dcdit.checkpoints.dit import from_dit, from_sit
from dcdit.cli import main
from dcdit.errors import CheckpointError, ConfigError
from dcdit.model.plain_dit import PlainDiT
from dcdit.training.config import load_config
from dcdit.training.upcycling import Upcycler, distillation_loss, load_dit, to_dit, upcycle

CONFIG = DCDiTConfig(
    input_size=8, num_classes=5, hidden_size=64, depth=2, num_heads=2, encoder_width=32, cond_norm=True
)


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


def randomised(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


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


def test_what_a_student_takes_over():
    teacher = randomised(PlainDiT(CONFIG))
    student = upcycle(teacher, CONFIG)
    pairs = (("main.blocks", "blocks"), ("time_embed", "time_embed"), ("class_embed", "class_embed"))
    for mine, theirs in pairs:
        ours = student.get_submodule(mine).state_dict()
        assert all(torch.equal(ours[k], v) for k, v in teacher.get_submodule(theirs).state_dict().items())
    frozen = {name.split(".")[0] for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {"time_embed", "class_embed"}
    # Cells of a 2×2 patch lie a quarter of a patch around the teacher's token: sin of the first frequency, 1.
    grid = student.pos_embed.view(8, 8, 64)
    columns = torch.tensor([-0.25, 0.25, 0.75, 1.25])
    torch.testing.assert_close(grid[3, :4, 0], columns.sin())
    torch.testing.assert_close(grid[:4, 3, 32], columns.sin())


def test_the_scaffold_sees_normalised_conditioning():
    student = upcycle(randomised(PlainDiT(CONFIG)), CONFIG)
    seen = {}
    for name in ("encoder", "decoder", "final", "main"):
        hook = lambda _, inputs, name=name: seen.__setitem__(name, inputs[1])  # noqa: E731
        student.get_submodule(name).register_forward_pre_hook(hook)
    t, y = torch.tensor([0.0, 999.0]), torch.tensor([0, 5])
    student(torch.randn(2, 4, 8, 8), t, y)
    c = student.time_embed(t) + student.class_embed(y)
    normed = (c - c.mean(1, keepdim=True)) / (c.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(seen["main"], c)
    for name in ("encoder", "decoder", "final"):
        torch.testing.assert_close(seen[name], normed)
    assert student.cond_norm.weight.requires_grad


def test_distillation_loss_is_the_loop():
    torch.manual_seed(0)
    student = upcycle(randomised(PlainDiT(CONFIG)), CONFIG)
    nn.init.constant_(student.router.score.bias, 0.0)
    _, routing = student(torch.randn(3, 4, 8, 8), torch.zeros(3), torch.zeros(3, dtype=torch.long), 0.5, True)
    plan = routing.plan
    outputs = [torch.randn(plan.capacity, 64).double() for _ in range(2)]
    targets = [torch.randn(3, 16, 64).double() * 10**i for i in range(2)]
    losses = []
    for output, target in zip(outputs, targets, strict=True):
        errors, known = [], []
        for b in range(3):
            rows = range(int(plan.cu_seqlens[b]), int(plan.cu_seqlens[b + 1]))
            for patch in range(16):
                top, left = 2 * (patch // 4), 2 * (patch % 4)
                inside = [(top + dy) * 8 + left + dx + 64 * b for dy in (0, 1) for dx in (0, 1)]
                mine = [output[r] for r in rows if int(plan.token_index[r]) in inside]
                if mine:
                    errors.append(torch.stack(mine).mean(0) - target[b, patch])
                    known.append(target[b, patch])
        assert 10 < len(errors) < 48  # patches without a row are among them
        losses.append(torch.stack(errors).square().mean() / torch.stack(known).square().mean())
    expected = torch.stack(losses).mean().float()  # as the loss accumulates
    torch.testing.assert_close(distillation_loss(outputs, targets, routing, 2), expected, rtol=1e-5, atol=0)


def words(teacher, output, *more):
    sizes = ["model.hidden_size=32", "model.depth=1", "model.num_heads=1", "batch_size=16", "steps=4", "log_every=1"]
    sizes += ["upcycle.check_teacher=false"]  # its weights are random
    return ["upcycle", "--from", str(teacher), "configs/digits.yaml", f"output={output}", *sizes, *more]


@pytest.fixture
def digits_teacher(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "depth": 1, "num_heads": 1, "encoder_width": 32, "learn_sigma": False}
    teacher = randomised(PlainDiT(DCDiTConfig(input_size=14, num_classes=10, **sizes)))
    torch.save(to_dit(teacher), tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


def test_a_run_distills_then_trains_and_resumes(digits_teacher, tmp_path, capfd):
    whole = words(digits_teacher, tmp_path / "whole", "upcycle.distill_steps=2")
    assert main(whole) == 0
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert ["distillation_loss" in line for line in lines] == [True, True, False, False]
    first = lines[0]
    total = first["diffusion_loss"] + 0.1 * first["ratio_loss"] + first["distillation_loss"]
    assert first["loss"] == pytest.approx(total, rel=1e-6)

    model, teacher = DCDiT.from_pretrained(tmp_path / "whole/model"), torch.load(digits_teacher)
    assert model.config.cond_norm
    assert torch.equal(model.time_embed.mlp[0].weight, teacher["t_embedder.mlp.0.weight"])
    assert torch.equal(model.class_embed.weight, teacher["y_embedder.embedding_table.weight"])
    assert not torch.equal(model.main.blocks[0].qkv.weight, teacher["blocks.0.attn.qkv.weight"])
    assert not torch.equal(model.cond_norm.weight, torch.ones(32))

    parts = words(digits_teacher, tmp_path / "parts", "upcycle.distill_steps=2")
    assert main([*parts, "max_minutes=1e-9"]) == 0  # one step, then stop
    assert main(parts) == 0
    resumed = [json.loads(line)["loss"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert resumed == [line["loss"] for line in lines]
    assert main([*parts, "upcycle.distill_steps=3"]) == 2
    assert "upcycle.distill_steps=2" in capfd.readouterr().err


def test_distillation_teaches_the_blocks(digits_teacher, tmp_path):
    overrides = words(digits_teacher, tmp_path / "run", "optim.warmup_steps=0", f"upcycle.source={digits_teacher}")[4:]
    trainer = Upcycler(load_config("configs/digits.yaml", overrides))
    batch = torch.utils.data.default_collate([trainer.stream[i] for i in range(16)])
    losses = []
    for _ in range(15):
        losses.append(float(trainer.train_step(batch)["distillation_loss"]))
    trainer.close()
    assert losses[-1] < 0.7 * losses[0]


def sit_layout(model):
    """A SiT `.pt` that computes −model(x, 1000·(1 − s)), by a sinusoid of s of its own: a reference that is no map."""
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


def test_a_teacher_that_predicts_worse_than_zero_is_refused(digits_teacher, tmp_path, capsys):
    assert main(words(digits_teacher, tmp_path / "a", "upcycle.check_teacher=true")) == 2
    captured = capsys.readouterr()
    assert "is no teacher for objective flow: its loss is" in captured.err and "predicting zero has" in captured.out
    assert not (tmp_path / "a").exists()
    assert main(words(tmp_path / "none.pt", tmp_path / "a", "data.kind=folder", "data.path=nowhere")) == 2
    assert "there is no DiT at" in capsys.readouterr().err  # before the data is looked for


def test_a_student_may_have_other_classes(digits_teacher, tmp_path):
    overrides = words(digits_teacher, tmp_path / "run", "model.num_classes=12", f"upcycle.source={digits_teacher}")[4:]
    trainer = Upcycler(load_config("configs/digits.yaml", overrides))
    table, teacher = trainer.net.class_embed.weight, trainer.teacher.class_embed.weight
    assert table.shape == (13, 32) and table.requires_grad and torch.equal(table[-1], teacher[-1])
    seen = []
    trainer.teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    batch = torch.utils.data.default_collate([trainer.stream[i] for i in range(16)])
    assert torch.isfinite(trainer.train_step(batch)["loss"])
    trainer.close()
    assert torch.equal(seen[0], torch.full((16,), 10))  # the teacher's own "no class"


def test_predictions_are_distilled(digits_teacher, tmp_path):
    """Where nothing else counts, the student's prediction becomes the teacher's, blocks or no blocks."""
    options = ["upcycle.distill_steps=2", "upcycle.output_share=1", "optim.lr=1e-2", "optim.warmup_steps=0"]
    options += ["steps=1000", "ratio_weight=0", f"upcycle.source={digits_teacher}"]
    trainer = Upcycler(load_config("configs/digits.yaml", words(digits_teacher, tmp_path / "run", *options)[4:]))
    batch = torch.utils.data.default_collate([trainer.stream[i] for i in range(16)])
    values = []
    for _ in range(40):
        values.append(trainer.train_step(batch))
        trainer.step += 1
    trainer.close()
    assert ["distillation_loss" in v for v in values[:3]] == [True, True, False]
    assert values[-1]["output_loss"] < 0.3 * values[0]["output_loss"]


def test_the_share_of_the_teacher_falls_to_nothing(digits_teacher, tmp_path):
    options = ["upcycle.distill_steps=0", "upcycle.output_share=0.8", "steps=8", f"upcycle.source={digits_teacher}"]
    config = load_config("configs/digits.yaml", words(digits_teacher, tmp_path / "run", *options)[4:])
    trainer = Upcycler(config)
    batch = torch.utils.data.default_collate([trainer.stream[i] for i in range(4)])
    for trainer.step, share in ((0, 0.8), (4, 0.4), (6, 0.2)):
        v = trainer.train_step(batch)
        want = (1 - share) * v["diffusion_loss"] + share * v["output_loss"] + config.ratio_weight * v["ratio_loss"]
        torch.testing.assert_close(v["loss"], want)
    trainer.close()
    with pytest.raises(ConfigError, match=r"output_share must be in \[0, 1\], got 2"):
        load_config("configs/digits.yaml", ["upcycle.output_share=2"])


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
        (saved(), config(depth=3), r"missing keys in checkpoint: blocks\.2\."),
        (saved(**{"blocks.1.mlp.fc1.bias": None}), CONFIG, r"missing keys in checkpoint: blocks\.1\.fc1\.bias"),
        (
            saved(**{"blocks.0.mlp.fc2.bias": torch.zeros(3)}),
            CONFIG,
            r"fc2\.bias: expected shape \(64,\), found \(3,\)",
        ),
        (saved(), config(input_size=9), r"patches of 2×2 cells, which do not fill \(9, 9\)"),
        (saved(**{"final_layer.linear.weight": None}), CONFIG, "this is no DiT"),
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
        ("someone/absent", CONFIG, "neither a .pt nor a DiT"),
    ):
        with pytest.raises(CheckpointError, match=text):
            load_dit(source, sizes)
    with pytest.raises(ConfigError, match="cond_norm=True"):
        upcycle(PlainDiT(CONFIG), config(cond_norm=False))


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


def test_missing_weights_of_diffusers_are_not_made_up(theirs, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["transformer_blocks.1.ff.net.2.bias"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys in checkpoint: transformer_blocks\.1\.ff\.net\.2\.bias"):
        load_dit(tmp_path, CONFIG)
