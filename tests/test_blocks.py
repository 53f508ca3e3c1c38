"""DiT blocks as ordinary modules: the launches of a forward, the view of hooks, and where weights are read."""

import functools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dcdit.model import blocks
from dcdit.model.blocks import MainNetwork, Stream
from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.model.plain_dit import PlainDiT
from dcdit_kernels import plan_chunks, use_backend

SIZES = {"input_size": (6, 5), "num_classes": 5, "hidden_size": 64, "depth": 3, "num_heads": 2, "encoder_width": 32}


def filled(module, std=0.1):
    """Nothing zero, so that every part shows in the output."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def backbone(depth=3, width=32):
    return filled(MainNetwork(width, depth, 2, 4.0))


def packed(width=32):
    plan = plan_chunks(torch.rand(3, 30), (6, 5))
    return torch.randn(plan.capacity, width), torch.randn(3, width), plan


def model_inputs(batch=3):
    return torch.randn(batch, 4, 6, 5), 1000 * torch.rand(batch), torch.arange(batch)


@pytest.mark.parametrize("depth", [1, 3])
def test_what_the_backbone_launches(depth, monkeypatch):
    """One kernel between two halves of blocks, block borders included, and no byte beside its inputs and outputs."""
    calls, moved = Counter(), Counter()

    def spy(name):
        operator = getattr(blocks, name)

        def call(*args, **kwargs):
            out = operator(*args, **kwargs)
            calls[name] += 1
            moved[name] += sum(t.nbytes for t in (*args, *(out if isinstance(out, tuple) else (out,)))
                               if isinstance(t, torch.Tensor) and t.is_floating_point())  # fmt: skip
            return out

        monkeypatch.setattr(blocks, name, call)

    for name in ("adaln_modulate", "gate_residual", "gate_residual_modulate", "varlen_attention"):
        spy(name)
    x, c, plan = packed()
    backbone(depth)(x, c, plan)
    assert calls == {
        "adaln_modulate": 1,
        "gate_residual_modulate": 2 * depth - 1,
        "gate_residual": 1,
        "varlen_attention": depth,
    }
    rows, vectors = x.nbytes, c.nbytes
    assert moved == {
        "adaln_modulate": 2 * rows + 2 * vectors,
        "gate_residual_modulate": (2 * depth - 1) * (4 * rows + 3 * vectors),
        "gate_residual": 3 * rows + vectors,
        "varlen_attention": depth * 4 * rows,
    }


def test_hooks_fire_for_each_block_and_record_has_its_hidden_states():
    """Against the blocks of PlainDiT, which compute their hidden states one by one."""
    net, (_, c, plan) = backbone().double(), packed()
    plan = plan_chunks(torch.ones(3, 30), (6, 5))
    x, c = torch.randn(90, 32).double(), c.double()
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append(out.hidden(args[2])))
    want = net(x, c, plan)
    net.record = []
    torch.testing.assert_close(net(x, c, plan), want, rtol=1e-12, atol=1e-12)
    assert len(seen) == 6 and len(net.record) == 3

    plain = PlainDiT(DCDiTConfig(hidden_size=32, depth=3, num_heads=2, encoder_width=32))
    plain.blocks.load_state_dict(net.blocks.state_dict())
    h = x.view(3, 30, 32)
    for i, block in enumerate(plain.double().blocks):
        h = block(h, c)
        for got in (seen[i], seen[3 + i], net.record[i]):
            torch.testing.assert_close(got.view(3, 30, 32), h, rtol=1e-10, atol=1e-10)


def test_a_stream_of_hidden_states_alone():
    net, (x, c, plan) = backbone(), packed()
    block, active = net.blocks[0], torch.nn.functional.silu(c)
    first = block(Stream(x), active, plan)
    pending = block(first, active, plan).hidden(plan)
    settled = block(Stream(first.hidden(plan)), active, plan).hidden(plan)
    torch.testing.assert_close(pending, settled, rtol=1e-5, atol=1e-5)


def make(kind):
    torch.manual_seed(0)
    if kind == "plain":
        return filled(PlainDiT(DCDiTConfig(**{**SIZES, "input_size": (6, 4)})))
    return filled(DCDiT(DCDiTConfig(**SIZES, router=kind, cond_norm=True)))


@pytest.mark.parametrize("kind", ["predictability", "cosine", "plain"])
def test_every_module_with_parameters_of_its_own_is_called(kind):
    """Offload, storage in float8, adapters and quantised layers act on forwards: weights are read nowhere else."""
    net, called = make(kind), set()
    for name, module in net.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    x, t, y = model_inputs()
    net(x[..., :4] if kind == "plain" else x, t, y)
    own = {name for name, module in net.named_modules() if next(module.parameters(recurse=False), None) is not None}
    assert own <= called


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["predictability", "cosine", "plain"])
def test_a_hook_may_keep_what_it_saw(kind, grad):
    """No later layer writes over an output that a hook holds, and hooks leave the result as it is."""
    net, held = make(kind), []
    x, t, y = model_inputs()
    x = x[..., :4] if kind == "plain" else x
    with torch.set_grad_enabled(grad):
        want = net(x, t, y)
        for module in net.modules():
            module.register_forward_hook(lambda _, args, out: held.append((out, [part.clone() for part in flat(out)])))
            if grad:
                module.register_full_backward_hook(lambda *_: None)
        out = net(x, t, y)
    assert torch.equal(out, want) and len(held) > 30
    for out, copies in held:
        assert all(torch.equal(part, copy) for part, copy in zip(flat(out), copies, strict=True))


def test_full_backward_hooks_see_every_module_with_parameters():
    net, seen, (x, t, y) = make("predictability"), set(), model_inputs()
    for name, module in net.named_modules():
        module.register_full_backward_hook(lambda *_, name=name: seen.add(name))
    net(x, t, y).square().sum().backward()
    own = {name for name, module in net.named_modules() if next(module.parameters(recurse=False), None) is not None}
    assert own - seen <= {"router.norm"}  # it has no input to take a gradient of


def test_selective_checkpointing_may_save_convolutions_and_products():
    """The model overwrites no tensor that such a policy has kept."""
    net, (x, t, y) = make("predictability"), model_inputs()
    kept = [torch.ops.aten.convolution.default, torch.ops.aten.addmm.default]
    policy = functools.partial(create_selective_checkpoint_contexts, kept)
    gradients = []
    for run in (net, functools.partial(checkpoint, net, use_reentrant=False, context_fn=policy)):
        gradients.append(torch.autograd.grad(run(x, t, y).square().sum(), list(net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("router", ["predictability", "cosine"])
def test_forward_mode(router):
    """A given routing's derivative is that by finite differences; the router's straight-through estimate, which no
    difference shows, makes forward mode the transpose of the backward."""
    net, (x, t, y) = make(router).double(), model_inputs()
    x, t = x.double(), t.double()
    dx, dt, weight = torch.randn_like(x), torch.randn_like(t), torch.randn(3, 8, 6, 5).double()
    with use_backend("reference"):
        with torch.no_grad():
            _, routing = net(x, t, y, return_routing=True)
            up, down = (net(x + e * dx, t, y, routing=routing) for e in (1e-6, -1e-6))
        _, tangent = torch.func.jvp(lambda x: net(x, t, y, routing=routing), (x,), (dx,))
        torch.testing.assert_close(tangent, (up - down) / 2e-6, rtol=1e-5, atol=1e-6)

        _, tangent = torch.func.jvp(lambda x, t: net(x, t, y), (x, t), (dx, dt))
        x.requires_grad_(), t.requires_grad_()
        gx, gt = torch.autograd.grad((net(x, t, y) * weight).sum(), [x, t])
        torch.testing.assert_close((tangent * weight).sum(), (gx * dx).sum() + (gt * dt).sum())


def flat(out):
    return [part for part in (out if isinstance(out, tuple) else (out,)) if part is not None]
