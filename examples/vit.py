"""Dynamic chunking in a vision transformer with timm's names, on pictures of different sizes in one packed batch.

The class token takes part in attention and is never chunked; positions are learned or rotary. The untrained map router
keeps the patches of highest contrast. `classify` takes timm's own VisionTransformer as well.

python examples/vit.py
"""

import argparse

import torch
from torch import nn

from dcdit import DynamicChunking
from dcdit.model import MapRouter
from dcdit.ops import Packing, qk_norm_rope, varlen_attention


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.ls1, self.ls2 = Attention(dim, num_heads), nn.Identity(), nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class VisionTransformer(nn.Module):
    """The parts of timm's, under its names; `pos_embed` is None where positions are rotary."""

    def __init__(self, side=8, patch=4, channels=1, classes=2, dim=64, depth=2, num_heads=2, rotary=False) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.patch_embed.grid_size = side, side
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = None if rotary else nn.Parameter(0.02 * torch.randn(1, 1 + side**2, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)


def rotary_table(grid: tuple[int, int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (cells, width / 2): a quarter of a head's channels turns with the row, a quarter with the column."""
    rate = 100.0 ** -torch.arange(0, 1, 4 / width)
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    angle = torch.cat([rows.flatten()[:, None] * rate, columns.flatten()[:, None] * rate], 1)
    return angle.cos(), angle.sin()


def run_blocks(blocks, cells, plan, classes, rotary):
    """Packed patches (T, D) with a class token a picture, (B, D) → (patches, class tokens)."""
    joined = Packing.from_lengths([1] * plan.batch_size, classes.device).join(plan)
    x = joined.cat(classes, cells)
    position = joined.cat(torch.full_like(plan.cu_seqlens[1:], -1), plan.cell_index)  # the class token is nowhere
    ends, longest = joined.cu_seqlens, joined.max_seqlen
    for block in blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(1, (3, attn.num_heads, -1)).unbind(1)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rotary is not None:
            q, k = qk_norm_rope(q, k, *rotary, position, plan=joined, norm="none")
        out = varlen_attention(q, k, v, ends, ends, longest, longest, packing=joined)
        x = x + block.ls1(attn.proj(out.flatten(1)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    classes, cells = joined.split(x)
    return cells, classes


def add_chunking(model: nn.Module) -> DynamicChunking:
    """Wrap the blocks in place; the weights keep their names."""
    model.blocks = DynamicChunking(
        model.blocks, model.cls_token.shape[2], model.patch_embed.grid_size, run=run_blocks, router=MapRouter()
    )
    return model.blocks


def classify(model: nn.Module, pictures: list[torch.Tensor]) -> torch.Tensor:
    """Pictures (C, H, W) of different sizes, in whole patches → logits (B, classes).

    Each stands in the first corner of a canvas; what lies outside of it is never a token.
    """
    chunking = model.blocks
    embedded = [model.patch_embed.proj(picture[None])[0] for picture in pictures]
    grid = tuple(max(x.shape[axis] for x in embedded) for axis in (1, 2))
    canvas = embedded[0].new_zeros(len(pictures), len(embedded[0]), *grid)
    valid = torch.zeros(len(pictures), *grid, dtype=torch.bool, device=canvas.device)
    contrast = canvas.new_zeros(len(pictures), *grid)
    for i, (picture, x) in enumerate(zip(pictures, embedded, strict=True)):
        height, width = x.shape[1:]
        canvas[i, :, :height, :width], valid[i, :height, :width] = x, True
        patches = picture.unflatten(2, (width, -1)).unflatten(1, (height, -1))
        contrast[i, :height, :width] = patches.std((0, 2, 4)) + 1e-3  # a flat patch comes last, and may come
    h, classes, rotary = canvas.flatten(2).mT, model.cls_token[0].expand(len(pictures), -1), None
    if model.pos_embed is None:
        rotary = rotary_table(grid, h.shape[2] // chunking.blocks[0].attn.num_heads)
    else:  # as in NaViT, a picture takes the rows and columns that it has
        places = model.pos_embed[0, 1:].unflatten(0, model.patch_embed.grid_size)[: grid[0], : grid[1]]
        h, classes = h + places.flatten(0, 1), classes + model.pos_embed[0, :1]
    chunking.router.map = contrast
    _, classes = chunking(h, grid=grid, valid=valid.flatten(1), classes=classes, rotary=rotary)
    return model.head(model.norm(classes))


def crosses(count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pictures of 3 to 6 patches a side with a cross (1) or a square (0) somewhere."""
    pictures, labels = [], torch.randint(0, 2, (count,))
    for label in labels.tolist():
        height, width = torch.randint(3, 7, (2,)).tolist()
        picture = 0.05 * torch.randn(1, 4 * height, 4 * width)
        top, left = (int(torch.randint(0, 4 * n - 7, ())) for n in (height, width))
        shape = torch.eye(7) + torch.eye(7).flip(0)
        if not label:
            shape = torch.ones(7, 7)
            shape[1:-1, 1:-1] = 0
        picture[0, top : top + 7, left : left + 7] += shape
        pictures.append(picture)
    return pictures, labels


def main(steps: int = 60, rotary: bool = False) -> tuple[float, float, float]:
    """Train with ρ = 0.75; returns the first and the last loss, means of 5 steps, and the share of the patches kept."""
    torch.manual_seed(0)
    model = VisionTransformer(rotary=rotary)
    chunking = add_chunking(model)
    chunking.drop_fraction = 0.75
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(steps):
        pictures, labels = crosses(32)
        loss = nn.functional.cross_entropy(classify(model, pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    kept = float(chunking.routing.plan.lengths.sum()) * 16 / sum(picture.numel() for picture in pictures)
    before, after = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    positions = "rotary" if rotary else "learned"
    print(f"{positions} positions: loss {before:.3f} → {after:.3f} with {kept:.1%} of the patches")
    return before, after, kept


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
    main(rotary=True)
