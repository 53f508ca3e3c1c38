"""Samples for `dcdit upcycle --family`, from pictures with captions and a pipeline of FLUX, SD3 or Z-Image.

python examples/encode_captions.py PIPELINE PICTURES SAMPLES [--side 1024] [--empty 10] [--device cuda]

PIPELINE is a folder of diffusers or a repository of the Hub. PICTURES has NAME.png or .jpg with NAME.txt beside it.
Each becomes SAMPLES/NAME.safetensors: latents as the transformer takes them, the caption's embedding, and its vector
where the model has one. Pictures keep their aspect, on an area of SIDE² at most. Every tenth caption is left empty, for
guidance. What is there already is left as it is, so that a second call goes on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from safetensors.torch import save_file

from dcdit.errors import DataError, first_sentence
from dcdit.files import read_text, replacing

KINDS = {".png", ".jpg", ".jpeg", ".webp"}


def encode_text(pipe: Any, caption: str) -> dict[str, torch.Tensor]:
    """`text` (S, D), and `pooled` (P) of FLUX and SD3."""
    kind = type(pipe.transformer).__name__
    if kind == "FluxTransformer2DModel":
        text, pooled, _ = pipe.encode_prompt(caption, None)
    elif kind == "SD3Transformer2DModel":
        text, _, pooled, _ = pipe.encode_prompt(caption, None, None, do_classifier_free_guidance=False)
    elif kind == "ZImageTransformer2DModel":
        return {"text": pipe.encode_prompt(caption, do_classifier_free_guidance=False)[0][0]}
    else:
        raise DataError(f"the pipeline must be FLUX's, SD3's or Z-Image's, got a {kind}")
    return {"text": text[0], "pooled": pooled[0]}


def encode_picture(pipe: Any, picture: Image.Image, side: int) -> torch.Tensor:
    """Latents (C, H, W) of a picture on side² pixels at most, its sides rounded down to whole tokens."""
    shrink, unit = min(1, side / math.sqrt(picture.width * picture.height)), 2 * pipe.vae_scale_factor
    height, width = (max(unit, int(n * shrink) // unit * unit) for n in (picture.height, picture.width))
    vae = pipe.vae
    pixels = pipe.image_processor.preprocess(picture, height=height, width=width).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.mode()[0]
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


@torch.no_grad()
def encode_folder(pipe: Any, pictures: Path, samples: Path, side: int = 1024, empty: int = 10) -> int:
    """Write the samples, every `empty`-th without a caption (0: none), and return how many there are new."""
    files = sorted(file for file in pictures.iterdir() if file.suffix.lower() in KINDS)
    if not files:
        raise DataError(f"{pictures} must have pictures with captions beside them, NAME.png and NAME.txt; it has none")
    samples.mkdir(parents=True, exist_ok=True)
    written = 0
    for number, file in enumerate(files):
        target, text = samples / f"{file.stem}.safetensors", file.with_suffix(".txt")
        if not text.exists():
            raise DataError(f"{file} must have a caption beside it, {text.name}")
        if target.exists():
            continue
        caption = "" if empty and number % empty == empty - 1 else read_text(text).strip()
        with Image.open(file) as picture:
            latents = encode_picture(pipe, ImageOps.exif_transpose(picture).convert("RGB"), side)
        sample = {"latents": latents, **encode_text(pipe, caption)}
        with replacing(target, durable=False) as temporary:
            save_file({name: value.cpu().contiguous() for name, value in sample.items()}, temporary)
        written += 1
    return written


def main(argv: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--empty", type=int, default=10, help="every so many-th caption is empty; 0: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device} needs a GPU, and torch finds none")
    try:
        pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=torch.bfloat16).to(args.device)
        count = encode_folder(pipe, args.pictures, args.samples, args.side, args.empty)
    except (DataError, OSError) as error:
        parser.error(first_sentence(error))
    print(f"{count} samples in {args.samples}")


if __name__ == "__main__":
    main()
