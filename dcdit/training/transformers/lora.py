"""LoRA (arXiv 2106.09685) by peft on the chunked blocks' linear layers, and the weights that it comes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ...errors import ConfigError

Tensors = dict[str, torch.Tensor]


def add_lora(net: nn.Module, chunking: nn.Module, rank: int, targets: tuple[str, ...] = ()) -> None:
    """Adapters of this rank on the linear layers of the chunked blocks, in place; they and the router alone learn.

    `targets` are ends of the layers' names, such as to_q or ff.net.2; without any all layers have one. Raises
    ConfigError for one that no layer has, and where peft is missing.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("lora needs peft: pip install peft") from error
    chunked = {id(module) for block in chunking.stack for module in block.modules()}
    layers = [n for n, module in net.named_modules() if id(module) in chunked and isinstance(module, nn.Linear)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            ends = sorted({name.split(".", 2)[2] for name in layers})
            raise ConfigError(f"lora_targets must be among {', '.join(ends)}, got {target}")
    chosen = [n for n in layers if not targets or any(f".{n}".endswith(f".{target}") for target in targets)]
    net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen))
    chunking.router.requires_grad_(True)  # peft has frozen it


class Learned:
    """Of a model the parameters that learn, for averages and files: with adapters the others are the source's."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As the model's."""
        return ((name, p) for name, p in self.net.named_parameters() if p.requires_grad)


def save_adapters(weights: Tensors, folder: Path) -> None:
    """The adapters of a model's state, as a pipeline's load_lora_weights and a model's load_lora_adapter read them."""
    found = {f"transformer.{name.replace('.default.', '.')}": w for name, w in weights.items() if ".lora_" in name}
    folder.mkdir()
    save_file(found, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})


def merged(weights: Tensors) -> Tensors:
    """A model's state with its adapters added to its own weights."""
    whole = {name.replace(".base_layer.", "."): w for name, w in weights.items() if ".lora_" not in name}
    for name, up in weights.items():
        if ".lora_B." in name:  # its alpha is the rank: the scale is 1
            layer = name.partition(".lora_B.")[0] + ".weight"
            whole[layer] = whole[layer] + up @ weights[name.replace(".lora_B.", ".lora_A.")]
    return whole
