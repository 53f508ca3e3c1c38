"""Upcycling: diffusers' DiT as the reference for weights, distillation against a loop, and whole runs."""

import json

import pytest
import torch
from torch import nn

from dcdit import DCDiT, DCDiTConfig
from dcdit.cli import main
from dcdit.errors import ConfigError
from dcdit.model.plain_dit import PlainDiT
from dcdit.training.config import load_config
from dcdit.training.upcycling import Upcycler, distillation_loss, to_dit, upcycle

CONFIG = DCDiTConfig(
    input_size=8, num_classes=5, hidden_size=64, depth=2, num_heads=2, encoder_width=32, cond_norm=True
)


def randomised(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


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
        torch.testing.assert_close(seen[name], nn.functional.silu(normed))
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
