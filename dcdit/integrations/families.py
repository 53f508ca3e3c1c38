"""The families of diffusers' transformers that `dcdit upcycle` knows by name; nothing is imported for their names."""

from typing import Literal, get_args

Family = Literal["flux", "sd3", "z-image", "qwen-image", "wan", "ltx"]
FAMILIES: tuple[Family, ...] = get_args(Family)
