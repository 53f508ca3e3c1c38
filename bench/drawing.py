"""Pictures for `bench.quality`, drawn as `dcdit.sampling.sample` draws them by "flow-euler", without diffusers."""

from __future__ import annotations

import itertools

import torch

from dcdit.sampling.trajectory import guide, image_generator


@torch.no_grad()
def draw(
    model: torch.nn.Module, classes: torch.Tensor, steps: int, guidance: float, seed: int, batch_size: int
) -> tuple[torch.Tensor, list[float]]:
    """Latents (N, C, H, W), float32 on the CPU, of class ids (N,), by Euler's steps on the model's device; and at each
    step, noise first, the share of the cells that the guided half kept."""
    device, config = next(model.parameters()).device, model.config
    shape, times = (1, config.in_channels, *config.input_size), torch.linspace(1, 0, steps + 1).tolist()
    done, kept = [], torch.zeros(steps, dtype=torch.float64)
    for first in range(0, len(classes), batch_size):
        y = classes[first : first + batch_size]
        x = torch.cat([torch.randn(shape, generator=image_generator(seed, first + i)) for i in range(len(y))]).to(
            device
        )
        both = torch.cat([y, torch.full_like(y, config.num_classes)]).to(device)
        for i, (now, then) in enumerate(itertools.pairwise(times)):
            t = torch.full((len(both),), 1000 * now, device=device)
            out, routing = model(torch.cat([x, x]), t, both, return_routing=True)
            x = x + (then - now) * guide(out, guidance, config.in_channels)
            kept[i] += routing.kept[: len(y)].double().sum().cpu()
        done.append(x.cpu())
    return torch.cat(done), (kept / len(classes)).tolist()
