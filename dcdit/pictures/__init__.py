"""Pictures of samples and of the router's choices; the classifier that judges digits."""

from .._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "classifier": "DigitClassifier",
        "images": "save_png to_uint8",
    },
)
