"""FLOPs and memory of diffusers' transformers at their real sizes, untouched and chunked, counted on meta tensors.

`python -m bench.transformers` prints the tables of docs/transformers.md. The chunked blocks are counted as the
untouched ones on fewer image tokens; what stands around them, on all tokens; the router's FLOPs and its way back beside
them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from unittest.mock import patch

import diffusers
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dcdit.model.config import DCDiTConfig
from dcdit.model.routers import PredictabilityRouter

SHARES = (1.0, 0.5, 0.25)
Forward = tuple[nn.Module, Callable[[], object]]  # a model, and one pass of it


def flops(call: Callable[[], object]) -> int:
    """2 per multiply-add, of products and attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


class Flash(torch.autograd.Function):
    """What a flash kernel keeps of (B, heads, L, width) for its backward: no L² scores."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(q)  # the sizes alone count; what stood in memory could be NaN, which routers refuse
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


def saved(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that a forward keeps for its backward, each storage once, parameters left out."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    attention = lambda query, key, value, *_, **__: Flash.apply(query, key, value)  # noqa: E731
    with patch("torch.nn.functional.scaled_dot_product_attention", attention):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = call()
    own = {x.untyped_storage()._cdata for x in model.parameters()}
    del output
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


def flux(tokens: int, blocks: bool, text: int = 512) -> Forward:
    """FLUX.1 on so many image tokens, with its blocks or without."""
    sizes = {} if blocks else {"num_layers": 0, "num_single_layers": 0}
    model = diffusers.FluxTransformer2DModel(guidance_embeds=True, **sizes)
    one, ids = torch.empty(1), torch.empty(tokens, 3)
    inputs = {"hidden_states": torch.empty(1, tokens, 64), "encoder_hidden_states": torch.empty(1, text, 4096)}
    inputs |= {"pooled_projections": torch.empty(1, 768), "img_ids": ids, "txt_ids": torch.empty(text, 3)}
    return model, lambda: model(**inputs, timestep=one, guidance=one)


def sd3(tokens: int, blocks: bool, text: int = 333, *, layers: int, heads: int, dual: int) -> Forward:
    """SD3.5 on a grid 64 patches wide."""
    model = diffusers.SD3Transformer2DModel(
        num_layers=layers if blocks else 0, num_attention_heads=heads, caption_projection_dim=64 * heads,
        pos_embed_max_size=192, dual_attention_layers=tuple(range(dual)), qk_norm="rms_norm",
    )  # fmt: skip
    inputs = {"hidden_states": torch.empty(1, 16, tokens // 32, 128), "timestep": torch.empty(1)}
    inputs |= {"encoder_hidden_states": torch.empty(1, text, 4096), "pooled_projections": torch.empty(1, 2048)}
    return model, lambda: model(**inputs)


def z_image(tokens: int, blocks: bool, text: int = 128) -> Forward:
    """Z-Image on a grid 64 patches wide; the refiners are outside of the blocks."""
    model = diffusers.ZImageTransformer2DModel(n_layers=30 if blocks else 0)
    return model, lambda: model([torch.empty(16, 1, tokens // 32, 128)], torch.empty(1), [torch.empty(text, 2560)])


def qwen_image(tokens: int, blocks: bool, text: int = 512) -> Forward:
    """Qwen-Image on a grid 64 patches wide."""
    model = diffusers.QwenImageTransformer2DModel(num_layers=60 if blocks else 0)
    model.pos_embed = Turns(64)  # diffusers' makes complex numbers by numpy, which has no meta tensors
    inputs = {"hidden_states": torch.empty(1, tokens, 64), "encoder_hidden_states": torch.empty(1, text, 3584)}
    return model, lambda: model(**inputs, timestep=torch.empty(1), img_shapes=[[(1, tokens // 64, 64)]])


class Turns(nn.Module):
    """Rotary numbers of the shapes of Qwen-Image's."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, shapes: list, max_txt_seq_len: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        cells = math.prod(shapes[0][0])
        return tuple(torch.empty(n, self.pairs, dtype=torch.complex64, device=device) for n in (cells, max_txt_seq_len))


def wan(tokens: int, blocks: bool, text: int = 512) -> Forward:
    """Wan 2.1 14B; its FLOPs depend on the number of tokens alone, which here lie 35 in a row."""
    model = diffusers.WanTransformer3DModel(num_layers=40 if blocks else 0)
    video = torch.empty(1, 16, 1, 2 * (tokens // 35), 70)
    return model, lambda: model(video, torch.empty(1), torch.empty(1, text, 4096))


def ltx(tokens: int, blocks: bool, text: int = 128) -> Forward:
    """LTX-Video 2B, its tokens in one row."""
    model = diffusers.LTXVideoTransformer3DModel(num_layers=28 if blocks else 0)
    inputs = {"hidden_states": torch.empty(1, tokens, 128), "encoder_hidden_states": torch.empty(1, text, 4096)}
    inputs |= {"num_frames": 1, "height": 1, "width": tokens}
    return model, lambda: model(**inputs, timestep=torch.empty(1), encoder_attention_mask=torch.empty(1, text))


# How to count, its options, the width, and the tokens: of 1024×1024 pixels, for Wan of 81 frames of 480×832, for LTX of
# 161 frames of 512×704.
MODELS: dict[str, tuple[Callable[..., Forward], dict[str, int], int, int]] = {
    "FLUX.1": (flux, {}, 3072, 4096),
    "SD3.5 large": (sd3, {"layers": 38, "heads": 38, "dual": 0}, 2432, 4096),
    "SD3.5 medium": (sd3, {"layers": 24, "heads": 24, "dual": 13}, 1536, 4096),
    "Z-Image": (z_image, {}, 3840, 4096),
    "Qwen-Image": (qwen_image, {}, 3072, 4096),
    "Wan 2.1 14B": (wan, {}, 5120, 32760),
    "LTX-Video 2B": (ltx, {}, 2048, 7392),
}


Count = Callable[[int, bool], int]  # of a pass on so many image tokens, with the blocks or without


def chunked(count: Count, tokens: int, share: float) -> int:
    """Of a pass in which all blocks run on this share of the image tokens; the router is not in it."""
    kept = round(tokens * share)
    return count(kept, True) - count(kept, False) + count(tokens, False)


def compute(name: str) -> str:
    """A model's row of FLOPs, on the meta device."""
    build, options, width, tokens = MODELS[name]
    count = lambda tokens, blocks: flops(build(tokens, blocks, **options)[1])  # noqa: E731
    router = PredictabilityRouter(DCDiTConfig(input_size=(1, 1), hidden_size=width, num_heads=1))
    whole, extra = count(tokens, True), 2 * router.macs(tokens)
    found = [chunked(count, tokens, share) + extra for share in SHARES]
    cells = " | ".join(f"{value / 1e12:.1f} ({value / whole:.2f})" for value in found)
    return f"| {name} | {tokens} | {whole / 1e12:.1f} | {cells} |"


def memory(name: str) -> str:
    """A model's row of gigabytes in bfloat16, on the meta device."""
    build, options, _, tokens = MODELS[name]
    size = sum(p.numel() for p in build(tokens, True, **options)[0].parameters())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        count = lambda tokens, blocks: saved(*build(tokens, blocks, **options))  # noqa: E731
        found = [chunked(count, tokens, share) for share in SHARES]
    finally:
        torch.set_default_dtype(before)
    first, *rest = (value / 1e9 for value in found)
    cells = " | ".join([f"{first:.1f}", *(f"{value:.1f} ({value / first:.2f})" for value in rest)])
    return f"| {name} | {size / 1e9:.1f} | {2 * size / 1e9:.1f} | {cells} |"


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.transformers", description=__doc__.splitlines()[0]).parse_args()
    heads = (
        (compute, "| model | image tokens | untouched, TFLOPs | all kept | half | a quarter |"),
        (memory, "| model | parameters, 10⁹ | weights, GB | activations, GB | half | a quarter |"),
    )
    for row, head in heads:
        print(f"\n{head}\n|---|---|---|---|---|---|")
        for name in MODELS:
            with torch.device("meta"):
                print(row(name), flush=True)


if __name__ == "__main__":
    main()
