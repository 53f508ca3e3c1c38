"""FLOPs of diffusers' transformers at their real sizes, untouched and chunked, counted on meta tensors.

`python -m bench.transformers` prints the table of docs/transformers.md. The chunked blocks are counted as the untouched
ones on fewer image tokens; what stands around them, on all tokens; the router and its way back beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from dcdit.model.config import DCDiTConfig
from dcdit.model.routers import PredictabilityRouter

SHARES = (1.0, 0.5, 0.25)


def flops(call: Callable[[], object]) -> int:
    """2 per multiply-add, of products and attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def flux(tokens: int, blocks: bool, text: int = 512) -> int:
    """FLUX.1 on so many image tokens, with its blocks or without."""
    sizes = {} if blocks else {"num_layers": 0, "num_single_layers": 0}
    model = diffusers.FluxTransformer2DModel(guidance_embeds=True, **sizes)
    one, ids = torch.empty(1), torch.empty(tokens, 3)
    inputs = {"hidden_states": torch.empty(1, tokens, 64), "encoder_hidden_states": torch.empty(1, text, 4096)}
    inputs |= {"pooled_projections": torch.empty(1, 768), "img_ids": ids, "txt_ids": torch.empty(text, 3)}
    return flops(lambda: model(**inputs, timestep=one, guidance=one))


def sd3(tokens: int, blocks: bool, text: int = 333, *, layers: int, heads: int, dual: int) -> int:
    """SD3.5 on a grid 64 patches wide."""
    model = diffusers.SD3Transformer2DModel(
        num_layers=layers if blocks else 0, num_attention_heads=heads, caption_projection_dim=64 * heads,
        pos_embed_max_size=192, dual_attention_layers=tuple(range(dual)), qk_norm="rms_norm",
    )  # fmt: skip
    inputs = {"hidden_states": torch.empty(1, 16, tokens // 32, 128), "timestep": torch.empty(1)}
    inputs |= {"encoder_hidden_states": torch.empty(1, text, 4096), "pooled_projections": torch.empty(1, 2048)}
    return flops(lambda: model(**inputs))


def z_image(tokens: int, blocks: bool, text: int = 128) -> int:
    """Z-Image on a grid 64 patches wide; the refiners are outside of the blocks."""
    model = diffusers.ZImageTransformer2DModel(n_layers=30 if blocks else 0)
    return flops(lambda: model([torch.empty(16, 1, tokens // 32, 128)], torch.empty(1), [torch.empty(text, 2560)]))


def qwen_image(tokens: int, blocks: bool, text: int = 512) -> int:
    """Qwen-Image on a grid 64 patches wide."""
    model = diffusers.QwenImageTransformer2DModel(num_layers=60 if blocks else 0)
    model.pos_embed = Turns(64)  # diffusers' makes complex numbers by numpy, which has no meta tensors
    inputs = {"hidden_states": torch.empty(1, tokens, 64), "encoder_hidden_states": torch.empty(1, text, 3584)}
    return flops(lambda: model(**inputs, timestep=torch.empty(1), img_shapes=[[(1, tokens // 64, 64)]]))


class Turns(torch.nn.Module):
    """Rotary numbers of the shapes of Qwen-Image's."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, shapes: list, max_txt_seq_len: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        cells = math.prod(shapes[0][0])
        return tuple(torch.empty(n, self.pairs, dtype=torch.complex64, device=device) for n in (cells, max_txt_seq_len))


def wan(tokens: int, blocks: bool, text: int = 512) -> int:
    """Wan 2.1 14B; its FLOPs depend on the number of tokens alone, which here lie 35 in a row."""
    model = diffusers.WanTransformer3DModel(num_layers=40 if blocks else 0)
    video = torch.empty(1, 16, 1, 2 * (tokens // 35), 70)
    return flops(lambda: model(video, torch.empty(1), torch.empty(1, text, 4096)))


def ltx(tokens: int, blocks: bool, text: int = 128) -> int:
    """LTX-Video 2B, its tokens in one row."""
    model = diffusers.LTXVideoTransformer3DModel(num_layers=28 if blocks else 0)
    inputs = {"hidden_states": torch.empty(1, tokens, 128), "encoder_hidden_states": torch.empty(1, text, 4096)}
    inputs |= {"num_frames": 1, "height": 1, "width": tokens}
    return flops(lambda: model(**inputs, timestep=torch.empty(1), encoder_attention_mask=torch.empty(1, text)))


# How to count, its options, the width, and the tokens: of 1024×1024 pixels, for Wan of 81 frames of 480×832, for LTX of
# 161 frames of 512×704.
MODELS: dict[str, tuple[Callable[..., int], dict[str, int], int, int]] = {
    "FLUX.1": (flux, {}, 3072, 4096),
    "SD3.5 large": (sd3, {"layers": 38, "heads": 38, "dual": 0}, 2432, 4096),
    "SD3.5 medium": (sd3, {"layers": 24, "heads": 24, "dual": 13}, 1536, 4096),
    "Z-Image": (z_image, {}, 3840, 4096),
    "Qwen-Image": (qwen_image, {}, 3072, 4096),
    "Wan 2.1 14B": (wan, {}, 5120, 32760),
    "LTX-Video 2B": (ltx, {}, 2048, 7392),
}


def chunked(count: Callable[..., int], options: dict[str, int], width: int, tokens: int, share: float) -> float:
    """FLOPs of a forward in which all blocks run on this share of the image tokens."""
    kept = round(tokens * share)
    blocks = count(kept, True, **options) - count(kept, False, **options)
    with torch.device("meta"):
        router = PredictabilityRouter(DCDiTConfig(input_size=(1, 1), hidden_size=width, num_heads=1))
    return blocks + count(tokens, False, **options) + 2 * router.macs(tokens)


def main() -> None:
    print("| model | image tokens | untouched, TFLOPs | all kept | half | a quarter |\n|---|---|---|---|---|---|")
    for name, (count, options, width, tokens) in MODELS.items():
        with torch.device("meta"):
            whole = count(tokens, True, **options)
            found = [chunked(count, options, width, tokens, share) for share in SHARES]
        cells = [f"{value / 1e12:.1f} ({value / whole:.2f})" for value in found]
        print(f"| {name} | {tokens} | {whole / 1e12:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
