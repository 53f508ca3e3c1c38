"""A small model, its predictions and its first noise, for the tests of samplers."""

import torch

from dcdit.model.config import DCDiTConfig
from dcdit.model.dcdit import DCDiT
from dcdit.sampling.denoising import image_generator

SIZES = {"input_size": (6, 5), "in_channels": 3, "num_classes": 4, "hidden_size": 32, "depth": 1, "num_heads": 1}


def tiny(learn_sigma=True):
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(**SIZES, encoder_width=32, learn_sigma=learn_sigma))
    for parameter in model.parameters():  # nothing zero, so that class, time and ρ all show
        torch.nn.init.normal_(parameter, std=0.08)
    torch.nn.init.zeros_(model.router.score.bias)
    torch.nn.init.normal_(model.class_embed.weight)
    return model.eval()


def predict(model, x, t, y, rho):
    with torch.no_grad():
        return model(x, torch.full((len(x),), float(t)), y, drop_fraction=rho)


def initial(seed, indices, generators=None):
    generators = generators or [image_generator(seed, i) for i in indices]
    return torch.stack([torch.randn(3, 6, 5, generator=g) for g in generators])
