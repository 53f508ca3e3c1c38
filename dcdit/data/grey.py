"""Grey pictures that are in memory, with their class ids."""

from __future__ import annotations

import hashlib

import numpy as np


class GreyPictures:
    """`images`, uint8 (N, H, W), and `labels` (N,); a subclass reads them and describes itself."""

    encoded = False
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        """A picture, float32 (1, H, W) in [-1, 1], and its class id."""
        image = self.images[index][None].astype(np.float32) / 127.5 - 1
        return (image[..., ::-1] if flip else image), int(self.labels[index])

    def fingerprint(self) -> str:
        """16 hexadecimal digits that other pictures or labels would change."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()[:16]
