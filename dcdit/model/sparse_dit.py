"""SparseDiT, first called FlexDiT (arXiv 2412.06028): most blocks see a coarser grid of tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dcdit_kernels import Packing

from ..errors import check_kind
from .blocks import DiTBlock, Stream
from .dit_config import SparseDiTConfig, fitting_size
from .dit_shell import DiTShell, dense_packing
from .plain_dit import PlainDiT, check_start
from .sparse_blocks import CrossBlock, PoolingBlock


class SparseDiT(DiTShell):
    """Poolingformer blocks, groups of sparse and dense blocks, dense blocks: (B, C, H, W) → (B, C or 2C, H, W).

    The weights do not depend on the sparse grid, so that each forward may have its own.
    """

    def __init__(self, config: SparseDiTConfig) -> None:
        check_kind(config, SparseDiTConfig, "config")
        super().__init__(config, config.patch)
        sizes = config.hidden_size, config.num_heads, config.mlp_ratio
        self.pooling = nn.ModuleList(PoolingBlock(*sizes) for _ in range(config.pooling))
        self.groups = nn.ModuleList(SparseGroup(config) for _ in range(config.groups))
        self.top = nn.ModuleList(DiTBlock(*sizes) for _ in range(config.top))

    @classmethod
    def from_dit(cls, dit: PlainDiT, config: SparseDiTConfig) -> SparseDiT:
        """A SparseDiT with the blocks of a DiT of its depth, in their order.

        q, kv and the pooling blocks' v are slices of qkv. The merge layers begin as 0 and the identity: the dense
        tokens pass, and the sparse ones are heard by attention. Raises ConfigError where sizes differ.
        """
        model = cls(config)
        check_start(model, dit)
        around = {key: value for key, value in dit.state_dict().items() if not key.startswith("blocks.")}
        model.load_state_dict(around, strict=False)
        blocks = [module for module in model.modules() if isinstance(module, DiTBlock)]
        for block, source in zip(blocks, dit.blocks, strict=True):
            block.load_state_dict(block.from_qkv(source.state_dict()))
        for group in model.groups:
            nn.init.zeros_(group.merge_sparse.weight)
            nn.init.eye_(group.merge_dense.weight)
            nn.init.zeros_(group.merge_sparse.bias)
            nn.init.zeros_(group.merge_dense.bias)
        return model

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, sparse_size: Any = None) -> torch.Tensor:
        """x (B, C, H, W), t and y (B,) → (B, C, H, W), or (B, 2C, H, W) with config.learn_sigma.

        `sparse_size` is the sparse grid (h, w), or one number for both sides; None: the configuration's. Raises
        ValueError for inputs of another shape, ConfigError for a sparse grid larger than the tokens'.
        """
        self.check(x, t, y)
        size = self.config.sparse_size if sparse_size is None else fitting_size(sparse_size, self.grid)
        c = self.time_embed(t) + self.class_embed(y)
        active = F.silu(c)
        stream = Stream(self.patches(x).flatten(0, 1))
        packing = dense_packing(len(x), len(self.pos_embed), x.device)
        sparse = dense_packing(len(x), size[0] * size[1], x.device)
        for block in self.pooling:
            stream = block(stream, active, packing)
        for group in self.groups:
            stream = group(stream, active, packing, sparse, self.grid, size)
        for block in self.top:
            stream = block(stream, active, packing)
        return self.finish(stream, active, packing)


class SparseGroup(nn.Module):
    """Sparse tokens are generated from the dense ones, go through their blocks, and are given back (section 3)."""

    def __init__(self, config: SparseDiTConfig) -> None:
        super().__init__()
        sizes = config.hidden_size, config.num_heads, config.mlp_ratio
        self.generate = CrossBlock(*sizes)
        self.sparse = nn.ModuleList(DiTBlock(*sizes) for _ in range(config.sparse))
        self.merge_sparse = nn.Linear(config.hidden_size, config.hidden_size)
        self.merge_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.recover = CrossBlock(*sizes)
        self.dense = nn.ModuleList(DiTBlock(*sizes) for _ in range(config.dense))

    def forward(
        self,
        stream: Stream,
        c: torch.Tensor,
        packing: Packing,
        sparse: Packing,
        grid: tuple[int, int],
        size: tuple[int, int],
    ) -> Stream:
        """Stream of (B·N, D) → Stream; `packing` of the `grid`'s N tokens, `sparse` of the M tokens of `size`."""
        x = stream.hidden(packing)
        inner = self.generate(Stream(pool(x, grid, size)), c, sparse, x, packing)
        for block in self.sparse:
            inner = block(inner, c, sparse)
        s = inner.hidden(sparse)
        # The linear map comes before the upsampling, where the rows are few.
        merged = upsample(self.merge_sparse(s), size, grid) + self.merge_dense(x)
        stream = self.recover(Stream(merged), c, packing, s, sparse)
        for block in self.dense:
            stream = block(stream, c, packing)
        return stream


def pool(x: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Rows (B·N, D) of a grid → (B·M, D) of a coarser one: means over PyTorch's adaptive windows, which may overlap."""
    return _on_grid(x, grid, lambda cells: F.adaptive_avg_pool2d(cells, size))


def upsample(x: torch.Tensor, size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Rows (B·M, D) of a coarse grid → (B·N, D): each takes the row ⌊i·size/grid⌋, PyTorch's mode 'nearest'."""
    return _on_grid(x, size, lambda cells: F.interpolate(cells, grid))


def _on_grid(x: torch.Tensor, grid: tuple[int, int], function) -> torch.Tensor:
    cells = x.unflatten(0, (-1, *grid)).permute(0, 3, 1, 2)  # channels-last, no copy
    return function(cells).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
