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
    print_rivals(config)
    print(
        "\n'total' is the paper's count; 'uncounted' is what it leaves out: "
        "stem, embedders, residual projection, output."
    )


def print_rivals(config: DCDiTConfig) -> None:
    """Multiply-adds of SparseDiT, DyDiT and PatchDiT of equal backbone beside the plain DiT's, attention included."""
    from ..model.rival_macs import dydit_macs, dydit_on, patch_dit_macs, patch_on, sparse_dit_macs, sparse_on

    if config.depth < 6 or any(side % 2 for side in config.input_size):
        return
    sparse, dynamic = sparse_on(config), dydit_on(config)
    sizes = [tuple(max(1, round(side * share)) for side in sparse.grid) for share in (0.25, 0.5, 0.75, 1)]
    layout = f"{sparse.pooling} + {sparse.groups}×6 + {sparse.top} blocks"
    print(f"  SparseDiT, {layout:<17}" + "".join(f"{f'{h}×{w}':>12}" for h, w in sizes))
    print(" " * 30 + "".join(f"{2e-9 * sparse_dit_macs(sparse, size):12.4g}" for size in sizes))
    rates = (0.25, 0.5, 0.7, 1.0)
    print("  DyDiT, gates leaving" + " " * 8 + "".join(f"{f'{rate:.0%}':>12}" for rate in rates))
    print(" " * 30 + "".join(f"{2e-9 * dydit_macs(dynamic, rate):12.4g}" for rate in rates))
    scales = tuple(scale for scale in (1, 2, 4) if not any(side % scale for side in dynamic.grid))
    patches = patch_on(config, scales=scales)
    print("  PatchDiT, patches of cells" + " " * 2 + "".join(f"{f'{2 * s}×{2 * s}':>12}" for s in scales))
    print(" " * 30 + "".join(f"{2e-9 * patch_dit_macs(patches, scale):12.4g}" for scale in scales))


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
