"""Two processes train a small model, sharded by `fully_shard` or copied by DDP; see test_sharded_training.py.

Usage: sharded_training.py FILE PORT. FILE gets, of each case, the losses and the gradients of two steps.
"""

import importlib.util
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT

RANKS, BATCH = 2, 4
CASES = [("fsdp", "predictability"), ("fsdp", "cosine"), ("fsdp bf16", "predictability"), ("ddp", "predictability")]
if importlib.util.find_spec("diffusers"):
    CASES.append(("fsdp", "FLUX"))


class Flux(nn.Module):
    """A small FLUX with chunked blocks and activation checkpointing, called as a DCDiT."""

    def __init__(self):
        super().__init__()
        from diffusers import FluxTransformer2DModel

        from dcdit.integrations.attention import add_dynamic_chunking

        sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4}
        sizes |= {"in_channels": 4, "joint_attention_dim": 24, "pooled_projection_dim": 12, "axes_dims_rope": (4, 6, 6)}
        self.main = FluxTransformer2DModel(**sizes)
        self.chunking = (add_dynamic_chunking(self.main, blocks=slice(0, 3)),)  # in a tuple: no second child
        self.main.enable_gradient_checkpointing()
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(5.0))
        self.inputs = {"img_ids": ids, "txt_ids": torch.zeros(3, 3)}
        self.text, self.pooled = torch.randn(5, 3, 24), torch.randn(5, 12)

    @property
    def blocks(self):
        return [*self.chunking[0].blocks, *self.main.single_transformer_blocks]

    def forward(self, x, t, y, drop_fraction, return_routing):
        (chunking,) = self.chunking
        chunking.drop_fraction = drop_fraction
        inputs = {"encoder_hidden_states": self.text[y], "pooled_projections": self.pooled[y], "timestep": t / 1000}
        return self.main(x.flatten(2).mT, **inputs, **self.inputs).sample, chunking.routing


def make_model(router):
    torch.manual_seed(0)
    if router == "FLUX":
        model = Flux().train()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        return model
    sizes = {"hidden_size": 64, "depth": 2, "num_heads": 2, "encoder_width": 32, "num_classes": 5}
    model = DCDiT(DCDiTConfig(input_size=(6, 5), router=router, **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def shard(model, kind):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if "bf16" in kind else None)
    for block in model.blocks if isinstance(model, Flux) else model.main.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def two_steps(net, rank=0, ranks=1):
    """Losses of two steps on a share of the batch, and the gradients of the second by name."""
    torch.manual_seed(1)
    batch = torch.randn(BATCH, 4, 6, 5), 1000 * torch.rand(BATCH), torch.arange(BATCH)
    x, t, y = (tensor.chunk(ranks)[rank] for tensor in batch)
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=1e-3), []
    for _ in range(2):
        optimizer.zero_grad()
        out, routing = net(x, t, y, drop_fraction=0.3, return_routing=True)
        loss = out.square().mean() + routing.boundary_prob.mean()
        loss.backward()
        gradients = {name.removeprefix("module."): parameter.grad for name, parameter in net.named_parameters()}
        losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses), gradients


def train(rank, file):
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    results = {}
    for kind, router in CASES:
        model = make_model(router)
        losses, gradients = two_steps(
            shard(model, kind) if "fsdp" in kind else DistributedDataParallel(model), rank, RANKS
        )
        dist.all_reduce(losses)
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
        results[kind, router] = losses / RANKS, whole
    if rank == 0:
        torch.save(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
    mp.spawn(train, sys.argv[1:2], RANKS)
