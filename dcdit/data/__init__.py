"""Data to train on: digits, latents, folders of pictures."""

from .._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "image_folder": "ImageFolder",
        "sources": "Digits Latents load_digits",
    },
)
