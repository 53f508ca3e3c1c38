"""Dynamic chunking in diffusers' own DiT and PixArt, against those models as they come, in float64."""

import copy
import itertools
import runpy
import warnings

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiTTransformer2DModel, LatteTransformer3DModel, PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from safetensors.torch import load_file
from torch import nn

from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking, remove_dynamic_chunking
from dcdit.integrations.basic_blocks import ChunkedBlocks, PackedAttnProcessor
from dcdit.training.objectives import ratio_loss

SIDE = 4  # tokens
SIZES = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "sample_size": 2 * SIDE, "patch_size": 2}


def dit():
    return DiTTransformer2DModel(**SIZES, in_channels=4, out_channels=8, num_embeds_ada_norm=5)


def pixart():
    return PixArtTransformer2DModel(**SIZES, in_channels=4, out_channels=8, cross_attention_dim=64, caption_channels=24)


def build(kind):
    torch.manual_seed(0)
    model = kind().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def batch(kind, size=3):
    torch.manual_seed(1)
    x, timestep = torch.randn(size, 4, 2 * SIDE, 2 * SIDE).double(), torch.tensor([3, 500, 999])
    if kind is dit:
        return x, {"timestep": timestep, "class_labels": torch.tensor([0, 4, 5])}
    mask = (torch.arange(7) < torch.tensor([7, 1, 4])[:, None]).double()
    text = torch.randn(size, 7, 24).double()
    text[mask == 0] = 1e3  # padding that must not be read
    return x, {
        "timestep": timestep,
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {},
    }


class Fixed(nn.Module):
    def __init__(self, boundary_prob):
        super().__init__()
        self.boundary_prob = boundary_prob

    def forward(self, h):
        return self.boundary_prob


class OneSample(nn.Module):
    """Untouched blocks on the retained tokens of one sample at a time, each with its text alone; the loop to match."""

    def __init__(self, blocks, prob, grid=(SIDE, SIDE)):
        super().__init__()
        self.blocks, self.prob = blocks, prob
        places = torch.tensor(list(itertools.product(*map(range, grid))))
        self.distance = (places[:, None] - places).square().sum(2)

    @property
    def norm1(self):
        return self.blocks[0].norm1

    def forward(self, h, encoder_hidden_states=None, encoder_attention_mask=None, timestep=None, **kwargs):
        out = h.clone()
        labels = kwargs.pop("class_labels", None)
        for b in range(len(h)):
            kept = (self.prob[b] > 0.5).nonzero().flatten()
            x = h[b : b + 1, kept]
            text = None
            if encoder_hidden_states is not None:
                text = encoder_hidden_states[b : b + 1, encoder_attention_mask[b, 0] == 0]
            for block in self.blocks:
                x = block(
                    x,
                    encoder_hidden_states=text,
                    timestep=timestep[b : b + 1],
                    class_labels=None if labels is None else labels[b : b + 1],
                )
            change = x[0] - h[b, kept]
            out[b] += change[self.distance[:, kept].argmin(1)]
        return out


@pytest.mark.parametrize("kind", [dit, pixart])
def test_with_all_tokens_the_model_is_the_untouched_one(kind):
    model, (x, condition) = build(kind), batch(kind)
    expected = model(x, **condition).sample
    chunking = add_dynamic_chunking(model)
    torch.testing.assert_close(model(x, **condition).sample, expected, rtol=0, atol=1e-12)
    assert bool(chunking.routing.boundary_mask.all())


def test_a_sample_whose_text_is_padding_alone_attends_to_that():
    model, (x, condition) = build(pixart), batch(pixart)
    condition["encoder_hidden_states"][1].clamp_(max=1)
    condition["encoder_attention_mask"][1] = 0
    expected = model(x, **condition).sample
    add_dynamic_chunking(model)
    torch.testing.assert_close(model(x, **condition).sample, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [dit, pixart])
def test_a_wrapped_model_is_saved_and_loaded(kind, tmp_path):
    model, (x, condition) = build(kind), batch(kind)
    chunking = add_dynamic_chunking(model).double()
    nn.init.normal_(chunking.router.score.bias)
    model.save_pretrained(tmp_path)
    again = type(model).from_config(type(model).load_config(tmp_path)).double().eval()
    add_dynamic_chunking(again).double()
    again.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert torch.equal(again(x, **condition).sample, model(x, **condition).sample)


@pytest.mark.parametrize("kind", [dit, pixart])
def test_weights_keep_their_names_and_wrapping_is_undone(kind, tmp_path):
    model, (x, condition) = build(kind), batch(kind)
    names, expected = list(model.state_dict()), model(x, **condition).sample
    add_dynamic_chunking(model).double().drop_fraction = 0.5
    assert [name for name in model.state_dict() if not name.startswith("transformer_blocks.router.")] == names
    assert not torch.allclose(model(x, **condition).sample, expected)
    model.save_pretrained(tmp_path)
    remove_dynamic_chunking(model)
    assert list(model.state_dict()) == names and not model._forward_pre_hooks
    assert torch.equal(model(x, **condition).sample, expected)
    with pytest.raises(ConfigError, match="add_dynamic_chunking was called on"):
        remove_dynamic_chunking(model)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.float64)  # the blocks, without the router
    assert torch.equal(loaded(x, **condition).sample, expected)


def test_a_picture_of_another_shape():
    """The nearest cell of the call's own grid, though the model was made for a square of as many tokens."""
    model, (_, condition) = build(pixart), batch(pixart)
    prob, x = torch.rand(3, 16).double(), torch.randn(3, 4, 4, 16).double()
    untouched = copy.deepcopy(model)
    untouched.transformer_blocks = nn.ModuleList([OneSample(untouched.transformer_blocks, prob, (2, 8))])
    chunking = add_dynamic_chunking(model, router=Fixed(prob))
    out, want = model(x, **condition).sample, untouched(x, **condition).sample
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    assert chunking.routing.plan.grid == (2, 8)


@pytest.mark.parametrize("kind", [dit, pixart])
def test_offload_and_quantisation_of_a_wrapped_model(kind):
    model, (x, condition) = build(kind).float(), batch(kind)
    x, condition = x.float(), {k: v.float() if torch.is_floating_point(v) else v for k, v in tensors(condition)}
    if kind is pixart:
        condition["encoder_hidden_states"].clamp_(-2, 2)  # int8 has one scale for the text and its padding
    add_dynamic_chunking(model)
    with torch.no_grad():
        want = model(x, **condition, **rest(kind)).sample
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch announces that torchao will take this over
            quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        got = quantised(x, **condition, **rest(kind)).sample
        assert 0 < (got - want).square().mean().sqrt() < 0.1 * want.std()
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert {p.device.type for p in model.parameters()} == {"meta"}
        torch.testing.assert_close(model(x, **condition, **rest(kind)).sample, want)


def tensors(condition):
    return [(key, value) for key, value in condition.items() if isinstance(value, torch.Tensor)]


def rest(kind):
    return {"added_cond_kwargs": {}} if kind is pixart else {}


@pytest.mark.parametrize("kind", [dit, pixart])
def test_with_few_tokens_each_sample_is_the_untouched_blocks_on_its_own_tokens(kind):
    model, (x, condition) = build(kind), batch(kind)
    prob = torch.rand(3, SIDE * SIDE).double()
    untouched = copy.deepcopy(model)
    untouched.transformer_blocks = nn.ModuleList([OneSample(untouched.transformer_blocks, prob)])
    add_dynamic_chunking(model, router=Fixed(prob))
    torch.testing.assert_close(model(x, **condition).sample, untouched(x, **condition).sample, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [dit, pixart])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_quarter_of_the_tokens_has_gradients_everywhere(kind, checkpointing):
    model, (x, condition) = build(kind), batch(kind)
    chunking = add_dynamic_chunking(model).double()
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    chunking.drop_fraction = 0.75
    out = model(x, **condition).sample
    routing = chunking.routing
    (out.square().mean() + ratio_loss(routing.boundary_prob, routing.natural_mask, 4.0)).backward()
    assert routing.plan.lengths.tolist() == [4, 4, 4]
    for name, parameter in chunking.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_budget_for_each_sample_and_a_batch_of_another_size():
    model, (x, condition) = build(dit), batch(dit)
    chunking = add_dynamic_chunking(model).double()
    chunking.drop_fraction = torch.tensor([0.0, 0.5, 0.75])
    model(x, **condition)
    assert chunking.routing.plan.lengths.tolist() == [16, 8, 4]
    chunking.drop_fraction = 0.5
    model(x[:2], **{key: value[:2] for key, value in condition.items()})
    assert chunking.routing.plan.lengths.tolist() == [8, 8]


def test_what_it_refuses():
    model = build(dit)
    model.transformer_blocks = nn.ModuleList([FluxTransformerBlock(64, 2, 32)])
    with pytest.raises(
        ConfigError,
        match=r"got DiTTransformer2DModel, whose blocks are FluxTransformerBlock; docs.* what another family needs",
    ):
        add_dynamic_chunking(model)

    model, (x, condition) = build(pixart), batch(pixart)
    add_dynamic_chunking(model).double()
    with pytest.raises(ConfigError, match="self-attention mask"):
        model(x, **condition, attention_mask=torch.ones(3, 16))

    model, (x, condition) = build(dit), batch(dit)
    for block in model.transformer_blocks:
        block.attn1.set_processor(PackedAttnProcessor())
    with pytest.raises(ValueError, match="cross_attention_kwargs"):
        model(x, **condition)


def chunked_feed_forward():
    block = BasicTransformerBlock(32, 1, 32)
    block.set_chunk_feed_forward(4)
    return block


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: [BasicTransformerBlock(32, 1, 32, positional_embeddings="sinusoidal", num_positional_embeddings=9)],
            "got positional embeddings",
        ),
        (lambda: [BasicTransformerBlock(32, 1, 32, cross_attention_dim=8, attention_type="gated")], "got gated"),
        (lambda: [chunked_feed_forward()], "got chunked feed-forward"),
        (list, "one BasicTransformerBlock or more, got none"),
    ],
    ids=["positions", "gated", "feed_forward", "none"],
)
def test_blocks_that_it_refuses(make, words):
    with pytest.raises(ConfigError, match=words):
        ChunkedBlocks(make(), (3, 3))


def test_models_that_it_refuses():
    sizes = {**SIZES, "in_channels": 4, "out_channels": 8, "caption_channels": 24, "video_length": 2}
    with pytest.raises(ConfigError, match="no blocks outside of transformer_blocks, got temporal_transformer"):
        add_dynamic_chunking(LatteTransformer3DModel(**sizes))
    with pytest.raises(
        ConfigError, match=r"model must be one of .* or have transformer_blocks .* got Linear, which has none"
    ):
        add_dynamic_chunking(nn.Linear(2, 2))
    model = dit()
    model.register_to_config(patch_size=None)
    with pytest.raises(ConfigError, match=r"numbers for sample_size and patch_size .*'NoneType'"):
        add_dynamic_chunking(model)


@pytest.mark.parametrize("kind", [dit, pixart])
def test_other_attention_processors_are_refused(kind):
    model, (x, condition) = build(kind), batch(kind)
    for block in add_dynamic_chunking(model).double().blocks:
        block.attn1.set_processor(AttnProcessor())
    with pytest.raises(ConfigError, match="must stay PackedAttnProcessor, got AttnProcessor"):
        model(x, **condition)


@pytest.mark.parametrize("example", ["dit_diffusers", "pixart"])
def test_examples_train_with_a_quarter_of_the_tokens(example, capsys):
    before, after, kept = runpy.run_path(f"examples/{example}.py")["main"](steps=30)
    distance = float(capsys.readouterr().out.split(": ")[1].split()[0])
    assert distance < 1e-5 and after < 0.75 * before and kept <= 0.25
