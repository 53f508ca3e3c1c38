"""Edits: cells of a given picture stay, the others are sampled, and tokens are spent on those first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.picture_files import read_picture
from ..errors import ConfigError, DataError
from ..model.config import DCDiTConfig
from ..model.routing import regular_cells


@dataclass(frozen=True)
class Edit:
    """A picture to change.

    - `image` (C, H, W): its latent, float.
    - `mask` (H, W): bool, the cells to sample. The others are the picture's, noised for each forward by the image's
      first noise (as diffusers' inpainting does, after arXiv 2201.09865 without its resampling), and untouched at the
      end.
    """

    image: torch.Tensor
    mask: torch.Tensor

    def check(self, config: DCDiTConfig) -> None:
        """Raise ConfigError unless a model of this configuration can take the edit."""
        image, mask = self.image, self.mask
        for name, part in (("image", image), ("mask", mask)):
            if not isinstance(part, torch.Tensor):
                raise ConfigError(f"an edit's {name} must be a tensor, got a {type(part).__name__}")
        if image.dim() != 3 or len(image) != config.in_channels or not image.is_floating_point():
            have = f"{image.dtype} of shape {tuple(image.shape)}"
            raise ConfigError(f"an edit's image must be a float latent ({config.in_channels}, H, W), got {have}")
        if not image.isfinite().all():
            raise ConfigError("an edit's image must be finite, got NaN or infinity")
        if mask.dtype != torch.bool or mask.shape != image.shape[1:]:
            have = f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise ConfigError(f"an edit's mask must be bool of shape {tuple(image.shape[1:])}, got {have}")
        if not mask.any():
            raise ConfigError("an edit's mask must have a cell to sample, got none")

    def blend(self, x: torch.Tensor, noise: torch.Tensor, signal: float, sigma: float) -> torch.Tensor:
        """x (B, C, H, W) with signal·image + sigma·noise outside of the mask."""
        return torch.where(self.mask.to(x.device), x, signal * self.image.to(x) + sigma * noise)

    def limits(self, amount: torch.Tensor, keep_grid: int, device: torch.device) -> dict[str, torch.Tensor]:
        """`keep` and `ban`, bool (R, L), for ρ or tokens (R,).

        By ρ, and where there are tokens enough, all cells of the mask are kept, and the router chooses among the
        others; with fewer tokens it chooses within the mask. Cells that every budget keeps are never banned.
        """
        inside = self.mask.flatten().to(device, copy=True)
        if keep_grid:
            inside = inside | regular_cells(tuple(self.mask.shape), keep_grid, device)
        inside[0] = inside[-1] = True
        if amount.is_floating_point():
            return {"keep": inside.expand(len(amount), -1)}
        enough = (amount >= int(inside.sum())).to(device)[:, None]
        return {"keep": inside & enough, "ban": ~(inside | enough)}


def read_edit(
    image: str | Path, mask: str | Path, codec: Any, config: DCDiTConfig, pixels: tuple[int, int], device: Any
) -> Edit:
    """The edit of two files of `pixels` (H, W): a picture, and black and white of the same size, white to be sampled.

    A cell is sampled where one of its pixels is. Raises DataError for another size, or a mask with colours, greys or
    transparency.
    """
    from PIL import Image

    if not isinstance(pixels, tuple) or len(pixels) != 2:
        raise ConfigError(f"pixels must be (height, width) of the pictures to make, got {pixels!r}")
    picture = read_picture(Path(image))
    try:
        with Image.open(mask) as opened:
            mode, levels = opened.mode, np.asarray(opened.convert("L"))
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise DataError(f"{mask} is not a readable image: {str(error).splitlines()[0]}") from error
    if mode not in ("1", "L") or not np.isin(levels, (0, 255)).all():
        greys = "" if mode not in ("1", "L") else f" with levels such as {levels[(levels > 0) & (levels < 255)][0]}"
        raise DataError(f"{mask} must be black and white (mode 1 or L, levels 0 and 255), got mode {mode}{greys}")
    for file, size in ((image, picture.size[::-1]), (mask, levels.shape)):
        if tuple(size) != pixels:
            wanted, have = ("×".join(map(str, sides)) for sides in (pixels, size))
            raise DataError(f"{file} must have {wanted} pixels as the pictures to make, got {have}; see --size")
    cells = torch.zeros(1, config.in_channels, *config.input_size, device=device)
    colours = np.asarray(picture if codec.decode(cells).shape[1] == 3 else picture.convert("L")).astype(np.float32)
    levels_of = torch.from_numpy(np.atleast_3d(colours).transpose(2, 0, 1) / 127.5 - 1)[None].to(device)
    try:
        latent = codec.encode(levels_of)[0]
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{image} does not fit the model's codec: {str(error).splitlines()[0]}") from error
    unit = pixels[0] // latent.shape[-2]
    return Edit(latent.float(), F.max_pool2d(torch.from_numpy(levels / 255.0)[None], unit)[0] > 0)
