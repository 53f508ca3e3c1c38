"""Wan on videos of digits: one moves, one stands still. A quarter of the tokens, and the frames that they lie in.

python examples/moving_digits.py

A small dense WanTransformer3DModel is trained first, as the pretrained model that one would have. Wrapped, it keeps a
quarter of its cells, untrained and trained; a cell may take its change from another frame. The losses are of
velocities, on digits that no training sees. At last `router="motion"` looks at clean videos: what stands still is kept
in the first frame alone.
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from dcdit.data.sources import load_digits
from dcdit.integrations.attention import add_dynamic_chunking, remove_dynamic_chunking

FRAMES, SIDE, DIGIT, PATCH, BATCH = 4, 24, 14, 4, 8
CELLS = FRAMES * (SIDE // PATCH) ** 2


def wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH), num_attention_heads=4, attention_head_dim=16, in_channels=1, out_channels=1,
        text_dim=16, freq_dim=32, ffn_dim=128, num_layers=4, rope_max_seq_len=32,
    )  # fmt: skip


class Videos:
    """Digits of 14×14 pixels and their labels; `texts` stand for a text encoder's output."""

    def __init__(self, held_out: bool) -> None:
        images, labels, outside = load_digits()
        chosen = outside == held_out
        self.digits = F.avg_pool2d(torch.from_numpy(images[chosen]).float() / 127.5 - 1, 28 // DIGIT)
        self.labels = torch.from_numpy(labels[chosen])
        self.texts = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))

    def clean(self, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Videos (B, 1, F, H, W), and their text (B, 2, 16): the digit that moves, the one that does not."""
        rows = torch.randint(len(self.labels), (BATCH, 2), generator=draw)
        start = torch.randint(SIDE - DIGIT + 1, (BATCH, 2, 2), generator=draw)
        speed = torch.randint(1, 4, (BATCH, 2), generator=draw) * (1 - 2 * (start[:, 0] > (SIDE - DIGIT) // 2).long())
        video = torch.full((BATCH, 1, FRAMES, SIDE, SIDE), -1.0)
        for i, f, which in torch.cartesian_prod(torch.arange(BATCH), torch.arange(FRAMES), torch.arange(2)).tolist():
            y, x = (start[i, which] + (f * speed[i] if which == 0 else 0)).clamp(0, SIDE - DIGIT).tolist()
            place = video[i, 0, f, y : y + DIGIT, x : x + DIGIT]
            place.copy_(torch.maximum(place, self.digits[rows[i, which]]))
        return video, self.texts[self.labels[rows]]

    def batch(self, draw: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs of the model at random times, and the velocity it should predict."""
        clean, text = self.clean(draw)
        noise, t = torch.randn(clean.shape, generator=draw), torch.rand(BATCH, generator=draw)
        x = clean + t.view(-1, 1, 1, 1, 1) * (noise - clean)
        return {"hidden_states": x, "timestep": 1000 * t, "encoder_hidden_states": text}, noise - clean


def loss_of(model: WanTransformer3DModel, videos: Videos, draw: torch.Generator) -> torch.Tensor:
    inputs, target = videos.batch(draw)
    return (model(**inputs).sample - target).square().mean()


def train(model: WanTransformer3DModel, videos: Videos, steps: int) -> None:
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0), torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = loss_of(model, videos, draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def judge(model: WanTransformer3DModel, videos: Videos) -> float:
    draw = torch.Generator().manual_seed(2)
    return sum(float(loss_of(model, videos, draw)) for _ in range(8)) / 8


def main(steps: int = 100) -> dict[str, float]:
    """Train and print; returns the losses, and the cells that "motion" keeps in the first frame and in a later one."""
    torch.manual_seed(0)
    seen, unseen, model = Videos(held_out=False), Videos(held_out=True), wan()
    train(model, seen, steps)
    found = {"dense": judge(model, unseen)}
    add_dynamic_chunking(model).budget_per_sample = CELLS // 4
    found["a quarter, untrained"] = judge(model, unseen)
    train(model, seen, steps)
    found["a quarter, trained"] = judge(model, unseen)
    remove_dynamic_chunking(model)
    chunking = add_dynamic_chunking(model, router="motion")
    clean, text = unseen.clean(torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(clean, torch.zeros(BATCH), text)
    kept = chunking.routing.boundary_mask.unflatten(1, chunking.grid).flatten(2).sum(2).float().mean(0)
    found |= {"cells of the first frame": float(kept[0]), "of a later one": float(kept[1:].mean())}
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
