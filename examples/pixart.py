"""Dynamic chunking in diffusers' PixArt: packed self-attention, and cross-attention to texts of different lengths.

python examples/pixart.py
"""

import argparse

import torch
from diffusers import PixArtTransformer2DModel

from dcdit.integrations.attention import add_dynamic_chunking
from dcdit.training.objectives import ratio_loss


def small_pixart() -> PixArtTransformer2DModel:
    """A PixArt of 64 tokens with random weights; `from_pretrained` gives a real one."""
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        cross_attention_dim=64,
        caption_channels=24,
    )


def main(steps: int = 100) -> tuple[float, float, float]:
    """Train with ρ = 0.75; returns the first and the last loss, means of 5 steps, and the share of the tokens kept."""
    torch.manual_seed(0)
    model = small_pixart().eval()
    x, t = torch.randn(8, 4, 16, 16), torch.randint(0, 1000, (8,))
    text, lengths = torch.randn(8, 12, 24), torch.randint(1, 13, (8,))
    condition = {
        "encoder_hidden_states": text,
        "encoder_attention_mask": (torch.arange(12) < lengths[:, None]).float(),
        "timestep": t,
        "added_cond_kwargs": {},
    }
    with torch.no_grad():
        untouched = model(x, **condition).sample
        chunking = add_dynamic_chunking(model)
        print(f"all tokens kept: {(model(x, **condition).sample - untouched).abs().max():.1e} from the untouched model")

    model.train()
    chunking.drop_fraction = 0.75
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        noise = torch.randn_like(x)
        noisy = 0.7 * x + 0.7 * noise
        diffusion = (model(noisy, **condition).sample - noise).square().mean()
        routing = chunking.routing
        loss = diffusion + 0.03 * ratio_loss(routing.boundary_prob, routing.natural_mask, target_ratio=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(diffusion.item())
    kept = routing.boundary_mask.float().mean().item()
    before, after = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"loss {before:.3f} → {after:.3f} with {kept:.1%} of the tokens")
    return before, after, kept


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
