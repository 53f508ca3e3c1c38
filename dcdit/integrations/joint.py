"""Dynamic chunking of diffusers' text-to-image transformers: image tokens are chunked, text keeps its own length.

A family is a subclass of `JointBlocks` in a file of its own. It says which lists of blocks the model runs one after
the other, which class stands in for each class of block, where the grid is to be seen, and how a stack runs. The
chunked blocks keep their weights and their names; their class alone is another, with a forward on packed rows.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.hooks import RemovableHandle

from dcdit_kernels import ChunkPlan, Packing, qk_norm_rope, varlen_attention
from dcdit_kernels.packing import JoinedPacking

from ..errors import ConfigError
from ..model.config import check_keys
from ..model.dynamic_chunking import BUDGET, DynamicChunking
from ..model.routing import Routing
from .block_caches import enable_cache_around
from .joint_text import PackedText
from .latents import cells_of
from .norm_weights import NORMS, WeightOf


@dataclass(frozen=True)
class Rows:
    """What the packed rows of a forward are: image rows of `plan`, text rows of `text`, both in `joined`.

    `c` (B, D) is the embedding that modulates. cos and sin (P, head width / 2) and `position` (rows of joined,) are
    those of `qk_norm_rope`, or None in a model without rotary embedding.
    """

    c: torch.Tensor
    plan: ChunkPlan
    text: Packing
    joined: JoinedPacking
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    position: torch.Tensor | None = None


class Unchunked(nn.ModuleList):
    """A list of blocks of which the model's own loop sees those alone that no stack before it has run.

    Length, indices and slices are those of all blocks: LoRA and offloading look for a block by its number.
    """

    def __init__(self, blocks: Iterable[nn.Module], run: int = 0) -> None:
        super().__init__(blocks)
        self.run = run

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[self.run :])


class JointBlocks(DynamicChunking):
    """The chunked blocks of a model, standing in its list of blocks as one of them where the model's loop goes through
    it. Its length and its indices are those of the whole list: LoRA looks for a block by its number.

    Args:
        model: one of the family, which is changed in place.
        blocks: which are chunked, counted over all lists in turn.
        group: so many of them at a time run on the same tokens, which the router then chooses anew, of the features
            that they have by then; None: all of them.
        options: DynamicChunking's router and sigma.

    `uncond` holds what is kept in the unconditional pass instead, as keywords of DynamicChunking's forward
    (`drop_fraction`, `budget` and the like), where a pipeline runs that pass alone and names it by
    `model.cache_context("uncond")`: FluxPipeline with true guidance, QwenImagePipeline, WanPipeline. `passing` is the
    name of the pass that runs; a router with an attribute of this name has it too. A router whose forward names
    `latents` gets those of the model's call as `cells_of` gives them. `routings` holds the Routing of each group of the
    last forward; the last of them is `routing`.
    """

    LISTS: ClassVar[tuple[str, ...]]
    CLASSES: ClassVar[dict[type[nn.Module], type[nn.Module]]]
    WEIGHTS: ClassVar[tuple[str, ...]] = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")  # of RMSNorms, by kernels
    SETTINGS: ClassVar[tuple[str, ...]] = (*DynamicChunking.SETTINGS, "uncond", "passing", "latents")
    GRID: ClassVar[str] = ""  # the arguments that name the grid
    REFUSED: ClassVar[tuple[str, ...]] = ()  # arguments of the model's forward that chunked blocks cannot serve
    OPTIONS: ClassVar[tuple[str, ...]] = ()  # of attention that they can; LoRA's scale is no block's

    def __init__(
        self, model: nn.Module, width: int, blocks: slice = slice(None), group: int | None = None, **options: Any
    ) -> None:
        if getattr(model, "is_cache_enabled", False):
            raise ConfigError("enable_cache must come after add_dynamic_chunking: disable_cache() first")
        lists = [getattr(model, name) for name in self.LISTS]
        every = [block for blocks_of_one in lists for block in blocks_of_one]
        if not isinstance(blocks, slice) or blocks.step not in (None, 1):
            raise ConfigError(f"blocks must be a slice without a step, got {blocks!r}")
        for end in (blocks.start, blocks.stop):
            if end is not None and not (isinstance(end, int) and abs(end) <= len(every)):
                raise ConfigError(f"blocks must begin and end within the model's {len(every)}, got {blocks}")
        self.start, self.stop, _ = blocks.indices(len(every))
        chunked = every[self.start : self.stop]
        if not chunked:
            raise ConfigError(f"blocks must name one block or more of {len(every)}, got {blocks}")
        if group is not None and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
            raise ConfigError(f"group must be a number of blocks, or None for all of them, got {group!r}")
        for block in chunked:
            if type(block) not in self.CLASSES:
                names = ", ".join(kind.__name__ for kind in self.CLASSES)
                raise ConfigError(f"blocks must be {names}, got {type(block).__name__}")
            check_hooks(block, self.norms_of(block), "come after add_dynamic_chunking")
        ends = list(itertools.accumulate(len(own) for own in lists))
        place = next(i for i, end in enumerate(ends) if self.start < end)
        before = ends[place] - len(lists[place])
        super().__init__(lists[place], width, (1,), **options)
        self.place, self.first, self.own = place, self.start - before, min(self.stop - before, len(lists[place]))
        self.stack = (*chunked,)  # in a tuple, or those of another list would be children
        self.group, self.begun = group or len(chunked), 0
        self.routings: tuple[Routing, ...] = ()
        self.batch, self.checkpointing = None, False
        self.uncond: dict[str, Any] | None = None
        self.passing: str | None = None
        self.apart = hasattr(model, "cache_context")
        self.latents: torch.Tensor | None = None
        for block in chunked:
            block.__class__ = self.CLASSES[type(block)]
            for norm in self.norms_of(block):
                norm.__class__ = NORMS.get(type(norm), type(norm))
        if self.apart:
            model.cache_context = functools.partial(self.named_pass, model.cache_context)
            model.enable_cache = functools.partial(enable_cache_around, self, model.enable_cache)
        self.hook: RemovableHandle = model.register_forward_pre_hook(self.see, with_kwargs=True)
        setattr(model, self.LISTS[place], self)
        for i in range(place + 1, len(lists)):
            run = max(0, min(self.stop - ends[i - 1], len(lists[i])))
            setattr(model, self.LISTS[i], Unchunked(lists[i], run))

    def norms_of(self, block: nn.Module) -> list[nn.Module]:
        """The norms whose weights kernels apply."""
        return [module for name, module in block.named_modules() if name.split(".")[-1] in self.WEIGHTS]

    @property
    def blocks(self) -> list[nn.Module]:
        """The chunked ones."""
        return list(self.stack)

    @property
    def running(self) -> list[nn.Module]:
        """Those of the group that a forward has come to."""
        return list(self.stack[self.begun : self.begun + self.group])

    def forward(self, h: torch.Tensor, *, text: PackedText, **kwargs: Any) -> Any:
        """h (B, L, D) → (B, L, D), or with the text's rows where `run` returns them, group by group."""
        routings = []
        for begun in range(0, len(self.stack), self.group):
            self.begun = begun
            result = super().forward(h, text=text, **kwargs)
            routings.append(self.routing)
            h, text.rows = result if isinstance(result, tuple) else (result, text.rows)
        self.routings = tuple(routings)
        return (h, text.rows) if isinstance(result, tuple) else h

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "routings": ()}

    def __iter__(self) -> Iterator[nn.Module]:
        own = super().blocks
        return iter([*own[: self.first], self, *own[self.own :]])

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, index: int) -> nn.Module:
        return super().blocks[index]

    @contextlib.contextmanager
    def named_pass(self, own: Callable[..., contextlib.AbstractContextManager], name: str, **rest: Any) -> Iterator:
        """In place of the model's own `cache_context`: the pass of guidance is noted as well."""
        parts = [part for part in (self, self.router) if hasattr(part, "passing")]
        with own(name, **rest):
            for part in parts:
                part.passing = name
            try:
                yield
            finally:
                for part in parts:
                    part.passing = None

    def options(self, **asked: Any) -> dict[str, Any]:
        """As DynamicChunking's, with the budget of the pass.

        Raises ConfigError for an `uncond` that is no budget, or that no pass of its own would take.
        """
        if self.uncond is None:
            return super().options(**asked)
        if not isinstance(self.uncond, dict):
            raise ConfigError(f"uncond must be a dict such as {{'drop_fraction': 0.9}}, got {self.uncond!r}")
        check_keys(self.uncond, BUDGET, "uncond")
        if self.passing == "cond_uncond" or not self.apart:
            raise ConfigError(
                "uncond is for a pass that runs alone, and here both passes share a batch: set drop_fraction or "
                f"budget_per_sample to a tensor with a value for each sample, got uncond {self.uncond!r}"
            )
        return super().options(**(self.uncond if self.passing == "uncond" else {}), **asked)

    def see(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note what the blocks are not told: the grid of the model's input. A hook on the model."""
        named = list(inspect.signature(type(model).forward).parameters)[1:] if args else []
        inputs = dict(zip(named, args, strict=False)) | kwargs
        if not inputs.keys() & {"hidden_states", "x"}:
            return  # for the forward to complain of
        for name in self.REFUSED:
            if inputs.get(name) is not None:
                raise ConfigError(f"chunked blocks do not support {name}; remove_dynamic_chunking, or leave it out")
        for name in ("attention_kwargs", "joint_attention_kwargs"):
            other = [option for option in inputs.get(name) or () if option not in ("scale", *self.OPTIONS)]
            if other:
                known = " and ".join(("scale", *self.OPTIONS))
                raise ConfigError(f"chunked blocks take no {name} but {known}, got {', '.join(map(str, other))}")
        self.checkpointing = getattr(model, "gradient_checkpointing", False)
        self.grid = self.grid_of(model, inputs)
        if self._taken((), {})[1]:
            self.latents = cells_of(inputs.get("hidden_states", inputs.get("x")), self.grid)
        if self.GRID and inputs["hidden_states"].shape[1] != math.prod(self.grid):
            tokens, sides = inputs["hidden_states"].shape[1], "×".join(map(str, self.grid))
            raise ConfigError(f"{self.GRID} must be one grid of {tokens} tokens, as hidden_states has, got {sides}")

    def _taken(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """As DynamicChunking's, the latents among what a router may name."""
        return super()._taken(args, {**kwargs, "latents": self.latents})

    def grid_of(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[int, ...]:
        """The grid of image tokens of a call of the model, from its arguments by name."""
        raise NotImplementedError

    def call(self, block: nn.Module, *args: Any) -> Any:
        """The block, checkpointed where the model is."""
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def restore(self, model: nn.Module) -> None:
        """The model as it was. Raises ConfigError where a block has a hook, which holds on to the packed forward, and
        where the model has a cache."""
        if getattr(model, "is_cache_enabled", False):
            raise ConfigError("the cache must go before remove_dynamic_chunking: disable_cache() first")
        for block in self.stack:
            check_hooks(block, self.norms_of(block), "go before remove_dynamic_chunking")
        for block in self.stack:
            block.__class__ = type(block).__bases__[0]
            for norm in self.norms_of(block):
                norm.__class__ = type(norm).__bases__[-1] if isinstance(norm, WeightOf) else type(norm)
        self.hook.remove()
        for name in ("cache_context", "enable_cache"):
            vars(model).pop(name, None)
        setattr(model, self.LISTS[self.place], nn.ModuleList(super().blocks))
        for name in self.LISTS[self.place + 1 :]:
            setattr(model, name, nn.ModuleList(getattr(model, name)._modules.values()))


def check_hooks(block: nn.Module, norms: list[nn.Module], when: str) -> None:
    """Raise ConfigError for a forward that a tool has put on a block or its norms, or a hook of accelerate inside."""
    for module in (block, *norms):
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # what a hook leaves that has gone
    hooked = any("forward" in vars(module) for module in (block, *norms))
    if hooked or any(hasattr(module, "_hf_hook") for module in block.modules()):
        raise ConfigError(f"hooks on blocks must {when}, got a block that has one")


def check_processor(attn: nn.Module, processor: type) -> None:
    """Raise ConfigError unless `attn` computes as `processor` does, on projections of its own for q, k and v."""
    if type(attn.processor) is not processor or attn.fused_projections:
        name = "fused projections" if attn.fused_projections else type(attn.processor).__name__
        raise ConfigError(f"chunked blocks need {processor.__name__} with projections apart, got {name}")


def heads(layers: tuple[nn.Module, ...], x: torch.Tensor, attn: nn.Module) -> list[torch.Tensor]:
    """Projections of rows (T, D), each (T, heads, head width)."""
    return [layer(x).unflatten(1, (attn.heads, -1)) for layer in layers]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Each row to all rows of its sample: (T, heads, head width) → (T, D)."""
    cu, longest = packing.cu_seqlens, packing.max_seqlen
    return varlen_attention(q, k, v, cu, cu, longest, longest, packing=packing).flatten(1)


def attend_jointly(
    attn: nn.Module, image: torch.Tensor, text: torch.Tensor, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text rows and image rows of a block whose attention joins both: (T1, D), (T2, D) → (text, image)."""
    q, k, v = heads((attn.to_q, attn.to_k, attn.to_v), image, attn)
    text_q, text_k, text_v = heads((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), text, attn)
    q, k = qk_norm_rope(
        text_q,
        text_k,
        rows.cos,
        rows.sin,
        rows.position,
        attn.norm_added_q(),
        attn.norm_added_k(),
        rows.joined,
        (q, k, attn.norm_q(), attn.norm_k()),
        eps=attn.norm_q.eps,
    )
    return rows.joined.split(attend(q, k, rows.joined.cat(text_v, v), rows.joined))


def project(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The projection behind an attention."""
    return attn.to_out[1](attn.to_out[0](x))


def attend_to_text(attn: nn.Module, x: torch.Tensor, text: PackedText, plan: ChunkPlan) -> torch.Tensor:
    """A cross-attention with norms over all heads together: rows (T, D) to their sample's text, (T, D)."""
    q, k = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(text.rows))
    q, k = (part.unflatten(1, (attn.heads, -1)) for part in (q, k))
    (v,) = heads((attn.to_v,), text.rows, attn)
    ends, longest = text.packing.cu_seqlens, text.packing.max_seqlen
    y = varlen_attention(q, k, v, plan.cu_seqlens, ends, plan.max_seqlen, longest, packing=plan)
    return project(attn, y.flatten(1))


def finite(x: torch.Tensor) -> torch.Tensor:
    """As diffusers' blocks: no infinity in half precision."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
