"""Upcycling of diffusers' transformers: distillation by block, then flow matching, on the tokens a router keeps."""

from .config import TransformerConfig as TransformerConfig
from .run import TransformerUpcycler as TransformerUpcycler
from .run import train_transformer as train_transformer
