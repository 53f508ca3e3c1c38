"""diffusers' pipelines from prompts on: small random tokenisers and text encoders, made here, and a chunked model."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_families import FAMILIES, close, make

from dcdit.integrations.attention import add_dynamic_chunking

MADE_OF = sorted(pre_tokenizers.ByteLevel.alphabet())
END, PAD = len(MADE_OF), len(MADE_OF) + 1


def tokenizer(length):
    """Bytes, an end and padding, as Hugging Face's fast tokenisers have them."""
    vocabulary = {token: i for i, token in enumerate([*MADE_OF, "<end>", "<pad>"])}
    bytes_alone = Tokenizer(models.BPE(vocabulary, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, eos_token="<end>", pad_token="<pad>", model_max_length=length
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def clip(kind=transformers.CLIPTextModel, width=12):
    config = transformers.CLIPTextConfig(
        vocab_size=PAD + 1, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=6, max_position_embeddings=16, bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    return kind(config).eval()


def t5(kind=transformers.T5EncoderModel, config=transformers.T5Config):
    return kind(config(vocab_size=PAD + 1, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def qwen():
    config = transformers.Qwen3Config(
        vocab_size=PAD + 1, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12,
    )  # fmt: skip
    return transformers.Qwen3Model(config).eval()


def parts(name):
    """The components that a pipeline encodes its prompts with."""
    if name == "flux":
        return {"text_encoder": clip(), "text_encoder_2": t5(), "tokenizer": tokenizer(16), "tokenizer_2": tokenizer(9)}
    if name == "sd3":
        two = [clip(transformers.CLIPTextModelWithProjection, 8) for _ in range(2)]
        encoders = {"text_encoder": two[0], "text_encoder_2": two[1], "text_encoder_3": t5()}
        return encoders | {key.replace("text_encoder", "tokenizer"): tokenizer(16) for key in encoders}
    if name == "z-image":
        return {"text_encoder": qwen(), "tokenizer": tokenizer(32)}
    return {"text_encoder": t5(transformers.UMT5EncoderModel, transformers.UMT5Config), "tokenizer": tokenizer(32)}


# Which samples of the batch are the unconditional pass; None: it runs alone.
UNCOND = {"flux": None, "sd3": 0, "z-image": 1, "wan": None}


@pytest.mark.parametrize("name", UNCOND)
def test_a_prompt_becomes_a_picture(name):
    """All kept: the untouched pipeline's; with ρ on the transformer, another one for the unconditional pass."""
    torch.manual_seed(0)
    family, model = FAMILIES[name], make(FAMILIES[name])
    pipe, lengths = family.pipeline(model), []
    pipe.register_modules(**parts(name))
    pipe.tokenizer_max_length = 16
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": "a seven next to a two", "negative_prompt": "", "max_sequence_length": 24}
    options |= {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}
    options |= {"flux": {"true_cfg_scale": 2.0}, "wan": {"num_frames": 5}}.get(name, {})

    def sample():
        return pipe(**options, generator=torch.Generator().manual_seed(0))[0]

    want = sample()
    assert want.isfinite().all()
    chunking = add_dynamic_chunking(model)
    close(sample(), want, 1e-4)
    other = {**options, "prompt": "an eight above a three"}
    assert not torch.allclose(pipe(**other, generator=torch.Generator().manual_seed(0))[0], want, rtol=1e-3)
    if UNCOND[name] is None:
        chunking.drop_fraction, chunking.uncond = 0.25, {"drop_fraction": 0.75}
    else:
        chunking.drop_fraction = torch.tensor([0.75, 0.25] if UNCOND[name] == 0 else [0.25, 0.75])
    model.register_forward_hook(lambda *_: lengths.append(chunking.routing.plan.lengths.tolist()))
    assert sample().isfinite().all()
    kept = [chunking.routing.plan.cells * share // 4 for share in (3, 1)]
    one_step = {None: [kept[:1], kept[1:]], 0: [kept[::-1]], 1: [kept]}[UNCOND[name]]
    assert lengths == 2 * one_step
