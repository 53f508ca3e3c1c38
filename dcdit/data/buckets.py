"""Buckets: the sizes to which pictures of all shapes are brought, each near its own aspect."""

from __future__ import annotations

import math


def bucket_of(height: int, width: int, size: int, step: int) -> tuple[int, int]:
    """(H, W) of the bucket of a picture, in pixels: multiples of `step`, near the picture's aspect, size² in area.

    A picture of a smaller area keeps its own size, to the nearest multiple of `step` that is not 0.
    """
    scale = min(1.0, size / math.sqrt(height * width))
    sides = [max(1, round(side * scale / step)) * step for side in (height, width)]
    return sides[0], sides[1]
