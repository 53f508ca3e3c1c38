"""Picture files of every common kind as upright RGB: 16-bit greys, palettes, transparency, EXIF orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import ConfigError, DataError

# Extensions that are read; animated files give their first frame.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif"),
)


def read_picture(file: Path, background: str = "white"):
    """A file as a PIL image in mode RGB, turned as its EXIF orientation says.

    16-bit grey is scaled to 8 bits; transparent pixels are composited on `background`, a colour name or #rrggbb.
    Raises DataError that names the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = _eight_bits(image)
            elif image.mode == "F":
                raise ValueError("its 32-bit floats have no known range: save it with 8 or 16 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file} is not a readable image: {reason}") from error


def read_square(file: Path, size: int, background: str = "white") -> np.ndarray:
    """The picture's centred square, resized: (3, size, size), float32 in [-1, 1]. Raises DataError."""
    return read_fitted(file, (size, size), background)


def read_fitted(file: Path, shape: tuple[int, int], background: str = "white") -> np.ndarray:
    """The picture resized to cover (H, W), the excess cut off evenly: (3, H, W), float32 in [-1, 1].

    Raises DataError.
    """
    from PIL import Image, ImageOps

    image = ImageOps.fit(read_picture(file, background), shape[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def upright_size(file: Path) -> tuple[int, int] | None:
    """(H, W) of a file as `read_picture` turns it, from its header; None where that cannot be read."""
    from PIL import ExifTags, Image

    try:
        with Image.open(file) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # on its side
            return image.size if turned else image.size[::-1]
    except Exception:  # reported where the file is read whole
        return None


def check_colour(name: str) -> None:
    """Raise ConfigError where Pillow does not know a colour."""
    from PIL import ImageColor

    try:
        ImageColor.getrgb(name)
    except ValueError as error:
        raise ConfigError(f"data.background must be a colour such as white or #808080, got {name!r}") from error


def _eight_bits(image):
    """Grey of 16 bits (mode I;16, or I as older Pillow reads it) as mode L, or LA where one grey is transparent."""
    from PIL import Image

    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("its 32-bit integers have no known range: save it with 8 or 16 bits")
    scaled = Image.fromarray((grey / 257).round().astype(np.uint8))
    hidden = image.info.get("transparency")
    if hidden is not None:
        scaled = scaled.convert("LA")
        scaled.putalpha(Image.fromarray(np.where(grey == hidden, 0, 255).astype(np.uint8)))
    return scaled
