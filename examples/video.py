"""Dynamic chunking on video: a transformer on (F, H, W) cells, trained with a quarter of the tokens.

python examples/video.py
"""

import argparse

import torch
from torch import nn

import dcdit
from dcdit.ops import varlen_attention
from dcdit.training.objectives import ratio_loss

FRAMES, HEIGHT, WIDTH, D, HEADS = 4, 8, 8, 64, 2


class Block(nn.Module):
    """Pre-norm attention and MLP on packed tokens (T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x, plan):
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, HEADS, -1)).unbind(1)
        out = varlen_attention(q, k, v, plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen)
        x = x + self.proj(out.flatten(1))
        return x + self.mlp(self.norm2(x))


class VideoDenoiser(nn.Module):
    """Predicts the noise in (B, F, H, W) videos, a token for each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = (FRAMES, HEIGHT, WIDTH)
        self.embed = nn.Linear(1, D)
        self.pos_embed = nn.Parameter(0.5 * torch.randn(FRAMES * HEIGHT * WIDTH, D))
        self.chunking = dcdit.DynamicChunking([Block() for _ in range(2)], D, self.grid)
        self.head = nn.Linear(D, 1)

    def forward(self, x, drop_fraction=0.0):
        self.chunking.drop_fraction = drop_fraction
        h = self.embed(x.flatten(1)[..., None]) + self.pos_embed
        return self.head(self.chunking(h)).view_as(x)


def squares(count: int) -> torch.Tensor:
    """Videos (count, F, H, W) of a bright square that moves to the right by one cell a frame."""
    video = torch.full((count, FRAMES, HEIGHT, WIDTH), -1.0)
    for i, (y, x) in enumerate(torch.randint(0, HEIGHT - 2, (count, 2)).tolist()):
        for f in range(FRAMES):
            video[i, f, y : y + 3, (x + f) % WIDTH : (x + f) % WIDTH + 3] = 1.0
    return video


def main(steps: int = 200) -> tuple[float, float, float]:
    """Train with ρ = 0.75; returns the first and the last loss, means of 5 steps, and the share of the cells kept."""
    torch.manual_seed(0)
    model = VideoDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        clean = squares(8)
        noise = torch.randn_like(clean)
        diffusion = (model(0.7 * clean + 0.7 * noise, drop_fraction=0.75) - noise).square().mean()
        routing = model.chunking.routing
        loss = diffusion + 0.03 * ratio_loss(routing.boundary_prob, routing.natural_mask, target_ratio=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(diffusion.item())
    kept = routing.boundary_mask.float().mean().item()
    before, after = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"loss {before:.3f} → {after:.3f} with {kept:.1%} of the cells")
    return before, after, kept


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
