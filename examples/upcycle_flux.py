"""Upcycling a FLUX-like model on digits: distillation by block, then flow matching, with a quarter of its image tokens.

python examples/upcycle_flux.py

A dense FluxTransformer2DModel is trained first, as the pretrained model that one would have; its text is one token, the
digit. Time and text modules are frozen while upcycling. The losses are of velocities, on digits that no training sees.
"""

import argparse
import copy

import torch
from diffusers import FluxTransformer2DModel

from dcdit.codecs import make_codec
from dcdit.data.sources import load_digits
from dcdit.integrations.attention import add_dynamic_chunking
from dcdit.integrations.distillation import distillation_loss

SIDE, BATCH = 7, 32  # tokens are 4×4 pixels
FROZEN = ("time_text_embed", "context_embedder")


def dense() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


class Pictures:
    """Tokens (N, 49, 16) of digits and their labels (N,); `texts` stand for a text encoder's output."""

    def __init__(self, digits: tuple, held_out: bool) -> None:
        images, labels, outside = digits
        chosen = outside == held_out
        pixels = torch.from_numpy(images[chosen]).float()[:, None] / 127.5 - 1
        self.tokens = make_codec("pixel_unshuffle", factor=4).encode(pixels).flatten(2).mT
        self.labels = torch.from_numpy(labels[chosen])
        self.texts = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
        self.ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(SIDE)), torch.arange(float(SIDE)))

    def batch(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[dict, torch.Tensor]:
        """Inputs of the model at random times, and the velocity it should predict."""
        clean, text = self.tokens[rows], self.texts[self.labels[rows]]
        noise, t = torch.randn(clean.shape, generator=generator), torch.rand(len(rows), generator=generator)
        inputs = {"hidden_states": clean + t[:, None, None] * (noise - clean), "timestep": t}
        inputs |= {"encoder_hidden_states": text[:, None], "pooled_projections": text}
        return inputs | {"img_ids": self.ids, "txt_ids": torch.zeros(1, 3)}, noise - clean


def train(model, pictures: Pictures, steps: int, loss_of, lr: float) -> list[float]:
    """AdamW at a falling rate; the losses."""
    model.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.95), weight_decay=0), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(pictures.labels), (BATCH,), generator=generator)
        loss = loss_of(*pictures.batch(rows, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def held_out_loss(model, pictures: Pictures) -> float:
    """Of velocities, on all held-out digits with fixed noise and times."""
    inputs, velocity = pictures.batch(torch.arange(len(pictures.labels)), torch.Generator().manual_seed(2))
    return float((model.eval()(**inputs).sample - velocity).square().mean())


def main(steps: int = 200, teacher_steps: int = 300) -> dict[str, float]:
    """Held-out losses by stage: the dense model, wrapped, distilled, trained; the last two stages take `steps` each."""
    torch.manual_seed(0)
    digits = load_digits()
    pictures, others = Pictures(digits, held_out=False), Pictures(digits, held_out=True)
    model = dense()

    def flow(inputs: dict, velocity: torch.Tensor) -> torch.Tensor:
        return (model(**inputs).sample - velocity).square().mean()

    train(model, pictures, teacher_steps, flow, 3e-3)
    found = {"dense": held_out_loss(model, others)}
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    chunking = add_dynamic_chunking(model)
    for name in FROZEN:
        model.get_submodule(name).requires_grad_(False)
    chunking.budget_per_sample = SIDE**2 // 4
    found["a quarter, untrained"] = held_out_loss(model, others)
    train(model, pictures, steps, lambda inputs, _: distillation_loss(model, teacher, **inputs), 1e-3)
    found["distilled"] = held_out_loss(model, others)
    losses = train(model, pictures, steps, flow, 2e-3)
    found["trained"] = held_out_loss(model, others)
    found |= {"first": sum(losses[:5]) / 5, "last": sum(losses[-5:]) / 5}
    for name, loss in found.items():
        print(f"{name}: {loss:.3f}")
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
