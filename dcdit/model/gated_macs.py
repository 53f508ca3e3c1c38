"""What gates leave of the products of DC-DiT's main network, on packed tokens (arXiv 2410.03456 section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dcdit_kernels import Packing

from .config import DCDiTConfig
from .flops import dcdit_flops
from .gates import Gates
from .rival_macs import block_macs, gate_macs


def main_rates(decided: Sequence[Gates], packing: Packing, config: DCDiTConfig) -> torch.Tensor:
    """The share of the main network's multiply-adds that open gates leave, float32 (B,); gradients go through them.

    `decided` has the Gates of each block: heads and groups (B, H) or, alike for all, (H,), tokens (T, 1) or (T,) packed
    as `packing` says.
    """
    lengths, live = packing.lengths, packing.live
    attention, mlp = block_macs(lengths.float(), config.hidden_size, config.mlp_ratio)
    samples = packing.sample_index[live].long()
    spent = torch.zeros_like(attention)
    for gates in decided:
        tokens = torch.zeros_like(attention).index_add(0, samples, gates.tokens.flatten()[live].float())
        share = gates.groups.float().mean(-1) * tokens / lengths
        spent = spent + gates.heads.float().mean(-1) * attention + share * mlp
    return spent / len(decided) / (attention + mlp)


def gated_flops(config: DCDiTConfig, tokens: float, rate: float = 1.0) -> dict[str, float]:
    """GFLOP of one image through a DyDCDiT by component, as `dcdit_flops` has them, and of the `gates`' own routers.

    The gates leave `rate` of the main network's products; `total` holds both.
    """
    gates = 2e-9 * gate_macs(config, tokens)
    saved = (1 - rate) * 2e-9 * config.depth * sum(block_macs(tokens, config.hidden_size, config.mlp_ratio))
    flops = dcdit_flops(config, tokens)
    return {"gates": gates, **flops, "main": flops["main"] - saved, "total": flops["total"] + gates - saved}


def gated_tokens(config: DCDiTConfig, tokens: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Tokens (B,), of whose products gates leave `rates` (B,) → the tokens that cost as much ungated, float64 (B,).

    `dcdit_flops` of them is the cost with gates, those of the gates' own routers included.
    """
    d, depth, tokens = config.hidden_size, config.depth, tokens.double()
    products = depth * sum(block_macs(tokens, d, config.mlp_ratio))
    square, linear = (2 * depth + 1) * d, depth * (4 + 2 * config.mlp_ratio) * d**2  # dechunk has a square as well
    wanted = square * tokens**2 + linear * tokens - (1 - rates.double()) * products + gate_macs(config, tokens)
    return ((linear**2 + 4 * square * wanted).sqrt() - linear) / (2 * square)
