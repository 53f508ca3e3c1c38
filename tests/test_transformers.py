"""Dynamic chunking of diffusers' text-to-image transformers: small random ones of the real classes."""

import pytest
import torch

pytest.importorskip("diffusers")
import torch.nn.functional as F
from diffusers.models import normalization
from transformer_families import FAMILIES, TEXT, close, every_family, make, picture, run

from bench.transformers import flops, saved
from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking, remove_dynamic_chunking
from dcdit.training import ratio_loss


@pytest.fixture
def exact(monkeypatch):
    """The untouched models compute float64 as float64; their norms and rotations go to float32 whatever comes."""
    cast = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else cast(x))
    in_own_dtype = lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.eps)  # noqa: E731
    monkeypatch.setattr(normalization.RMSNorm, "forward", in_own_dtype)


@every_family
@pytest.mark.parametrize(
    ("dtype", "tolerance", "blocks"),
    [
        *((torch.float64, 1e-12, blocks) for blocks in (slice(None), slice(1, -1), slice(-1, None))),
        (torch.float32, 5e-6, slice(None)),
    ],
    ids=str,
)
def test_all_cells_kept_is_the_untouched_model(family, dtype, tolerance, blocks, request):
    """Also on another grid afterwards; removed it is equal to the last bit, and with half the cells it is not."""
    if dtype == torch.float64:
        request.getfixturevalue("exact")
    model = make(family, dtype)
    given = [family.inputs(grid, dtype=dtype) for grid in ((5, 7), (1, 8))]
    want = [run(model, inputs) for inputs in given]
    names = list(model.state_dict())
    chunking = add_dynamic_chunking(model, blocks=blocks)
    assert [name for name in model.state_dict() if ".router." not in name] == names
    for inputs, wanted in zip(given, want, strict=True):
        close(run(model, inputs), wanted, tolerance)
        assert chunking.routing.plan.capacity == 2 * chunking.routing.plan.cells
    chunking.drop_fraction = 0.5
    assert not torch.allclose(run(model, given[0]), want[0], rtol=1e-3)
    assert chunking.routing.plan.capacity < 0.6 * 70
    remove_dynamic_chunking(model)
    assert torch.equal(run(model, given[0]), want[0])
    assert list(model.state_dict()) == names and "dynamic_chunking" not in model.config


def test_guidance_embedding(exact):
    model = make(FAMILIES["flux"], torch.float64, guidance_embeds=True)
    inputs = {**FAMILIES["flux"].inputs(dtype=torch.float64), "guidance": torch.tensor([1.0, 4.0]).double()}
    want = run(model, inputs)
    add_dynamic_chunking(model)
    close(run(model, inputs), want, 1e-12)


def test_flux_reads_each_tensor_of_ids_once():
    """Canvases take turns, and a tensor that was seen is not read again, which on a GPU would be a wait."""
    model, given = make(FAMILIES["flux"]), [FAMILIES["flux"].inputs(grid) for grid in ((5, 7), (1, 8))]
    chunking = add_dynamic_chunking(model)
    want = [run(model, inputs) for inputs in given]
    for inputs, wanted in zip(given, want, strict=True):
        assert torch.equal(run(model, inputs), wanted)
        inputs["img_ids"].data.zero_()  # past torch's count of changes, which would have it read again
        run(model, inputs)
    assert [grid for *_, grid in chunking.seen] == [(5, 7), (1, 8)]


@pytest.mark.parametrize("blocks", [slice(None), slice(1, -2)], ids=str)
def test_padding_of_text_is_cut(blocks, exact):
    """As the untouched model under a mask, and as a shorter text alone; the padding's content is never read."""
    family = FAMILIES["flux"]
    model = make(family, torch.float64)
    inputs = family.masked(family.inputs(dtype=torch.float64))
    want = run(model, inputs)
    chunking = add_dynamic_chunking(model, blocks=blocks)
    close(run(model, inputs), want, 1e-12)
    chunking.drop_fraction = torch.tensor([0.0, 0.6])
    both = run(model, inputs)
    del inputs["joint_attention_kwargs"]
    alone = {name: value if name.endswith("ids") else value[1:] for name, value in inputs.items()}
    alone["encoder_hidden_states"], alone["txt_ids"] = alone["encoder_hidden_states"][:, :3], inputs["txt_ids"][:3]
    chunking.drop_fraction = 0.6
    close(both[1:], run(model, alone), 1e-12)


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_quarter_of_the_cells_trains(family, checkpointing):
    """Gradients reach the router and every block, equal gradients with checkpointing; the loss falls."""
    model = make(family)
    chunking = add_dynamic_chunking(model)
    chunking.drop_fraction = 0.75
    inputs = family.inputs((4, 6))
    model.train()
    grads = []
    for on in (False, checkpointing):
        (model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing)()
        out = picture(model, inputs)
        assert chunking.routing.plan.capacity == 12
        routing = chunking.routing
        loss = out.square().mean() + ratio_loss(routing.boundary_prob, routing.natural_mask, target_ratio=4.0)
        grads.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for (name, parameter), first, again in zip(model.named_parameters(), *grads, strict=True):
        close(again, first, 1e-5) if first is not None else None
        # The last text of SD3 and of Qwen-Image is not looked at.
        unread = name.startswith("transformer_blocks.3.") and ("add" in name or "txt" in name)
        if name.startswith(family.lists) and not unread:
            assert first is not None and first.isfinite().all() and first.abs().max() > 0, name
        assert parameter.shape == (parameter if first is None else first).shape
    target, optimizer = torch.zeros_like(out), torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = (picture(model, inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_padding_of_text_is_cut_in_sd3(exact):
    """Where all blocks are chunked; each sample as alone, in the untouched model, with its own text."""
    family = FAMILIES["sd3"]
    model = make(family, torch.float64)
    inputs = family.inputs(dtype=torch.float64)
    short = {name: value[1:] for name, value in inputs.items()}
    short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :3]
    want = run(model, short)
    keep = torch.ones(2, 1, 1, TEXT + 35, dtype=torch.bool)
    keep[1, ..., 3:TEXT] = False
    inputs["joint_attention_kwargs"] = {"attention_mask": keep}
    add_dynamic_chunking(model)
    close(run(model, inputs)[1:], want, 1e-12)
    remove_dynamic_chunking(model)
    add_dynamic_chunking(model, blocks=slice(1, None))
    with pytest.raises(ConfigError, match="attention_mask needs all blocks chunked"):
        run(model, inputs)


@every_family
def test_flops_are_those_of_the_untouched_blocks_on_fewer_tokens(family):
    """As bench.transformers counts, to 1 %; the router beside them."""
    model = make(family)
    whole, half = (8, 8), (8, 4)  # Z-Image fills up to multiples of 32
    inputs = {grid: family.inputs(grid, batch=1) for grid in (whole, half)}
    for given in inputs.values():
        given |= {name: None for name in given if name.endswith("_mask")}  # padding costs the untouched model something
    counts = {grid: flops(lambda given=given: run(model, given)) for grid, given in inputs.items()}
    chunking = add_dynamic_chunking(model)
    model.requires_grad_(False)  # the counter asks for gradients of whatever could have one
    chunking.drop_fraction = 0.5
    blocks, joint = chunking.run, family not in (FAMILIES["wan"], FAMILIES["ltx"])
    chunking.run = lambda _, x, plan, text, **rest: (x, text.rows) if joint else x
    around = {grid: flops(lambda given=given: run(model, given)) for grid, given in inputs.items()}
    chunking.run = blocks
    got = flops(lambda: run(model, inputs[whole]))
    alone = counts[half] - (around[half] - 2 * chunking.router.macs(32))  # the untouched blocks, on half the tokens
    want = around[whole] + alone
    assert abs(got - want) < 0.01 * got


@every_family
def test_memory_is_at_most_that_of_the_untouched_model_on_fewer_tokens(family):
    """As bench.transformers counts what a backward needs, and 15 % in these small models for router and way back."""
    model = make(family).requires_grad_(True)
    inputs = [family.inputs(grid, batch=1) for grid in ((8, 8), (8, 4))]
    for given in inputs:
        given |= {name: None for name in given if name.endswith("_mask")}
    whole, half = (saved(model, lambda given=given: model(**given)) for given in inputs)
    add_dynamic_chunking(model).drop_fraction = 0.5
    got = saved(model, lambda: model(**inputs[0]))
    assert 0.7 * half < got < 1.15 * half < whole


def test_memory_of_one_layer():
    """A product keeps its input, once for both; attention its operands, its result and one sum for each row."""
    model = torch.nn.Linear(8, 8)
    x = torch.randn(2, 3, 5, 8)
    attend = F.scaled_dot_product_attention
    assert saved(model, lambda: model(x) + model(x)) == 4 * 240
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    assert saved(model, lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=None)) == 4 * (240 + 240 + 30)
    assert F.scaled_dot_product_attention is attend
