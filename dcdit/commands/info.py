"""`dcdit info`: parameters, and FLOPs by component and by token count, next to the plain DiT."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError
from ..files import expanded
from ..model.config import PRESETS, DCDiTConfig, preset, preset_of_size
from ..model.dit_config import DiTConfig, DyDiTConfig, PatchDiTConfig, SparseDiTConfig


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `dcdit info`."""
    parser.add_argument("preset", help=f"a preset ({', '.join(PRESETS)}) or a checkpoint: a folder or Hub repository")
    parser.add_argument("--budget", type=int, metavar="N", help="tokens of each image: adds peak memory and time")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="images at a time, of --budget (1)")
    parser.add_argument("--training", action="store_true", help="of --budget: forward and backward")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    from ..model.flops import dcdit_flops, dit_flops
    from ..model.gated_macs import gated_flops

    config, gated = _config(args.preset)
    if args.budget is None and (args.training or args.batch_size != 1):
        raise ConfigError("--batch-size and --training are of --budget, the tokens of each image: give it as well")
    if isinstance(config, DiTConfig):
        if args.budget is not None:
            raise ConfigError(f"--budget is of a DC-DiT, {args.preset} has a {type(config).__name__}")
        print_system(args.preset, config)
        return
    if args.budget is not None and gated:
        raise ConfigError(f"--budget is of a DC-DiT, {args.preset} is a DyDCDiT")
    if args.budget is not None:
        print_budget(args.preset, config, args.budget, args.batch_size, args.training)
        return
    trainable, table = count_parameters(config, gated)
    (height, width), cells = config.input_size, config.cells
    kind = "DyDCDiT, " if gated else ""
    print(f"{args.preset}: {kind}grid {height}×{width} = {cells} cells, width {config.hidden_size}")
    print(
        f"  depth {config.depth}, {config.num_heads} heads, encoder width {config.encoder_width}, "
        f"stride {config.encoder_stride}, N {config.target_ratio:g}"
    )
    print(f"  trainable parameters          {trainable:>15,}")
    print(f"  with the position table       {trainable + table:>15,}")
    counts = sorted({cells // 16, cells // 8, cells // 4, cells // 2, cells})
    print(f"\nGFLOP per image{'':15}" + "".join(f"{f'M = {m}':>12}" for m in counts))
    columns = [gated_flops(config, m) if gated else dcdit_flops(config, m) for m in counts]
    for name in columns[0]:
        print(f"  {name:<28}" + "".join(f"{column[name]:12.4g}" for column in columns))
    for rate in (0.75, 0.5, 0.25) if gated else ():
        totals = [gated_flops(config, m, rate)["total"] for m in counts]
        print(f"  {f'total, gates leaving {rate:.0%}':<28}" + "".join(f"{total:12.4g}" for total in totals))
    patches = cells // 4
    plain = dit_flops(config, patches)
    print(f"\nplain DiT of the same backbone (2×2 patches, {patches} tokens): {plain:.4g} GFLOP per image")
    print("  DC-DiT / DiT" + " " * 16 + "".join(f"{column['total'] / plain:12.2f}" for column in columns))
    print_rivals(config)
    print(
        "\n'total' is the paper's count; 'uncounted' is what it leaves out: "
        "stem, embedders, residual projection, output."
    )


def print_budget(name: str, config: DCDiTConfig, tokens: int, batch: int, training: bool) -> None:
    """Peak memory on a CPU, and the time of a step where this machine was calibrated. Raises ConfigError."""
    import torch

    from ..errors import DataError
    from ..model.memory import peak_bytes
    from ..model.precision import sampling_dtype
    from ..model.routing import least_tokens
    from ..sampling.step_times import load_times

    least = least_tokens(config.input_size, config.keep_grid)
    if not least <= tokens <= config.cells:
        raise ConfigError(f"--budget must be from {least} to all {config.cells} cells of an image, got {tokens}")
    if batch < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch}")
    weights = 4 * sum(count_parameters(config))
    kind = "training" if training else "forward"
    print(f"{name}: {batch} × {tokens} tokens of {config.cells} cells, {kind}, float32")
    print(f"  weights                       {weights / 1e6:>12,.1f} MB")
    what = "activations and gradients" if training else "activations"
    print(f"  peak of {what:<22}{peak_bytes(config, batch, tokens, training) / 1e6:>12,.1f} MB, on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        dtype = torch.float32 if training else sampling_dtype(config, device)
        seconds = float(load_times(config, device, dtype, training=training).at(batch, tokens))
    except DataError as error:
        print(f"  time of a step: {error}")
    else:
        said = "as dcdit calibrate measured on this machine" + " in bfloat16" * (dtype == torch.bfloat16)
        print(f"  time of a step                {1e3 * seconds:>12,.1f} ms, {said}")


def print_rivals(config: DCDiTConfig) -> None:
    """Multiply-adds of SparseDiT, DyDiT and PatchDiT of equal backbone beside the plain DiT's, attention included."""
    from ..model.rival_macs import dydit_on, patch_on, sparse_on

    if config.depth < 6 or any(side % 2 for side in config.input_size):
        return
    scales = tuple(scale for scale in (1, 2, 4) if not any(side % (2 * scale) for side in config.input_size))
    for system in (sparse_on(config), dydit_on(config), patch_on(config, scales=scales)):
        _print_costs(system)


def print_system(name: str, config: DiTConfig) -> None:
    """Parameters of a SparseDiT, DyDiT or PatchDiT, and its multiply-adds beside the plain DiT's."""
    from ..checkpoints.systems_folder import SYSTEMS
    from ..model.meta import on_meta
    from ..model.rival_macs import dydit_macs, dydit_on

    kind = next(kind for kind, sizes in SYSTEMS.values() if sizes is type(config))
    with on_meta():
        count = sum(parameter.numel() for parameter in kind(config).parameters())
    (height, width), depth = config.grid, config.depth  # type: ignore[attr-defined]
    print(f"{name}: {kind.__name__}, {height}×{width} patches, width {config.hidden_size}, depth {depth}")
    print(f"  parameters                    {count:>15,}")
    plain = 2e-9 * dydit_macs(dydit_on(config, config.patch), routers=False)
    print(f"\nplain DiT of the same size: {plain:.4g} GFLOP per image")
    _print_costs(config)


def _print_costs(config: DiTConfig) -> None:
    """GFLOP of one image at several of the costs that a system may have."""
    from ..model.rival_macs import dydit_macs, patch_dit_macs, sparse_dit_macs

    if isinstance(config, SparseDiTConfig):
        sides = [tuple(max(1, round(side * share)) for side in config.grid) for share in (0.25, 0.5, 0.75, 1)]
        title = (
            f"SparseDiT, {config.pooling} + {config.groups}×{2 + config.sparse + config.dense} + {config.top} blocks"
        )
        costs = {f"{h}×{w}": sparse_dit_macs(config, (h, w)) for h, w in sides}
    elif isinstance(config, PatchDiTConfig):
        title, p = "PatchDiT, patches of cells", config.patch
        costs = {f"{p * scale}×{p * scale}": patch_dit_macs(config, scale) for scale in config.scales}
    else:
        assert isinstance(config, DyDiTConfig)
        title, costs = (
            "DyDiT, gates leaving",
            {f"{rate:.0%}": dydit_macs(config, rate) for rate in (0.25, 0.5, 0.7, 1.0)},
        )
    print(f"  {title:<28}" + "".join(f"{name:>12}" for name in costs))
    print(" " * 30 + "".join(f"{2e-9 * macs:12.4g}" for macs in costs.values()))


def count_parameters(config: DCDiTConfig, gated: bool = False) -> tuple[int, int]:
    """(trainable parameters, numbers in the position table) of a DC-DiT or a DyDCDiT, without allocating the model."""
    from ..model.dcdit import DCDiT
    from ..model.dydit_main import DyDCDiT
    from ..model.meta import on_meta

    with on_meta():
        model = (DyDCDiT if gated else DCDiT)(config)
    return sum(p.numel() for p in model.parameters()), model.pos_embed.numel()


def _config(name: str) -> tuple[DCDiTConfig, bool]:
    """The sizes of a preset or a checkpoint, and whether it is a DyDCDiT."""
    if name in PRESETS and not Path(name).exists():
        return preset(name), False
    ours = name.lower().startswith("dc-dit")
    if not expanded(name).exists() and (known := preset_of_size(name)) and not ours:
        raise ConfigError(f"{name} is no preset; dcdit info {known} has a plain DiT of that backbone beside the DC-DiT")
    if expanded(name).exists() or ("/" in name and not ours):
        from ..checkpoints.folder import load_checkpoint, locate
        from ..model.dydit_main import DyDCDiT

        model = load_checkpoint(locate(name))[0]
        return model.config, isinstance(model, DyDCDiT)
    return preset(name), False
