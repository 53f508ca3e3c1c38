"""`dcdit info`: parameters, and FLOPs by component and by token count, next to the plain DiT."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..model.config import PRESETS, DCDiTConfig, preset


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit info`."""
    parser.add_argument("preset", help=f"a preset ({', '.join(PRESETS)}) or a checkpoint: a folder or Hub repository")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    from ..model.flops import dcdit_flops, dit_flops

    config = _config(args.preset)
    trainable, table = count_parameters(config)
    (height, width), cells = config.input_size, config.cells
    print(f"{args.preset}: grid {height}×{width} = {cells} cells, width {config.hidden_size}")
    print(
        f"  depth {config.depth}, {config.num_heads} heads, encoder width {config.encoder_width}, "
        f"stride {config.encoder_stride}, N {config.target_ratio:g}"
    )
    print(f"  trainable parameters          {trainable:>15,}")
    print(f"  with the position table       {trainable + table:>15,}")
    counts = sorted({cells // 16, cells // 8, cells // 4, cells // 2, cells})
    print(f"\nGFLOP per image{'':15}" + "".join(f"{f'M = {m}':>12}" for m in counts))
    columns = [dcdit_flops(config, m) for m in counts]
    for name in columns[0]:
        print(f"  {name:<28}" + "".join(f"{column[name]:12.4g}" for column in columns))
    patches = cells // 4
    plain = dit_flops(config, patches)
    print(f"\nplain DiT of the same backbone (2×2 patches, {patches} tokens): {plain:.4g} GFLOP per image")
    print("  DC-DiT / DiT" + " " * 16 + "".join(f"{column['total'] / plain:12.2f}" for column in columns))
    print(
        "\n'total' is the paper's count; 'uncounted' is what it leaves out: "
        "stem, embedders, residual projection, output."
    )


def count_parameters(config: DCDiTConfig) -> tuple[int, int]:
    """(trainable parameters, numbers in the position table), without allocating the model."""
    import torch

    from ..model.dcdit import DCDiT

    with torch.device("meta"):
        model = DCDiT(config)
    return sum(p.numel() for p in model.parameters()), model.pos_embed.numel()


def _config(name: str) -> DCDiTConfig:
    if name in PRESETS and not Path(name).exists():
        return preset(name)
    if Path(name).expanduser().exists() or (name.count("/") == 1 and not name.startswith("DC-DiT")):
        from ..checkpoints.folder import load_checkpoint, locate

        return load_checkpoint(locate(name))[0].config
    return preset(name)
