"""Samples of different sizes in one batch: encoder and decoder for each size, one backbone on the tokens of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from dcdit_kernels import ChunkPlan, Packing, pack_rows, unpack_rows
from dcdit_kernels._plan_input import check_values
from dcdit_kernels.packing import kept_for_backward

from .clean_latents import velocity_to
from .routing import Routing

if TYPE_CHECKING:
    from .dcdit import DCDiT


# A batch (B, C, H, W), or samples (C, H, W) of different sizes.
Samples = torch.Tensor | list[torch.Tensor]


@dataclass(frozen=True)
class MixedRouting:
    """A router's decision for B samples of several sizes.

    - `parts`: the Routing of each size, in the order of first appearance.
    - `indices`: for each part, the places of its samples in the batch.
    - `packing`: the retained tokens of all samples, in the order of the batch: the backbone's input.
    """

    parts: tuple[Routing, ...]
    indices: tuple[tuple[int, ...], ...]
    packing: Packing

    @property
    def boundary_prob(self) -> torch.Tensor:
        """The probability of each cell (B, L), where L are the cells of the largest sample, and 0 past a sample's."""
        return self._padded([part.boundary_prob for part in self.parts])

    @property
    def natural_mask(self) -> torch.Tensor:
        """The router's boundaries before the tail drop, bool (B, L)."""
        return self.boundary_prob > 0.5

    @property
    def boundary_mask(self) -> torch.Tensor:
        """The retained cells, bool (B, L)."""
        return self._padded([part.boundary_mask for part in self.parts])

    @property
    def valid(self) -> torch.Tensor:
        """Which of the (B, L) cells are a sample's own, bool."""
        return self._padded([torch.ones_like(part.boundary_prob, dtype=torch.bool) for part in self.parts])

    @property
    def kept(self) -> torch.Tensor:
        """The share of each sample's cells that is retained, float32 (B,)."""
        return self._padded([part.kept[:, None] for part in self.parts]).squeeze(1)

    def check(self, sizes: dict[tuple[int, ...], list[int]], budget: dict[str, Any]) -> None:
        """Raise ValueError unless this routing can serve samples of these sizes, by their places in the batch."""
        grids = [part.plan.grid for part in self.parts]
        if grids != list(sizes) or list(map(list, self.indices)) != list(sizes.values()):
            have = dict(zip(grids, map(list, self.indices), strict=True))
            raise ValueError(f"routing must be for samples of {sizes}, got one of {have}")
        for part in self.parts:
            part.check(len(part.boundary_prob), part.plan.grid, budget)

    def _padded(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return pad_sequence(unsorted(parts, self.indices), batch_first=True)


def sizes_of(samples: Sequence[torch.Tensor]) -> dict[tuple[int, ...], list[int]]:
    """The sizes (H, W) of samples (C, H, W) in the order of first appearance, with the places of their samples."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        sizes.setdefault(tuple(sample.shape[-2:]), []).append(i)
    return sizes


def unsorted(parts: Sequence[torch.Tensor], indices: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The entries of each part in the order of the batch."""
    entries = [entry for part in parts for entry in part.unbind()]
    places = [i for index in indices for i in index]
    return [entry for _, entry in sorted(zip(places, entries, strict=True), key=lambda pair: pair[0])]


def by_size(function: Callable[..., torch.Tensor], samples: Any, *others: Any) -> Any:
    """function(samples, *others) on a batch (B, …); on a list of samples (C, H, W), once for each size.

    `others` have an entry for each sample. Returns the function's result, for a list a list of its entries.
    """
    if isinstance(samples, torch.Tensor):
        return function(samples, *others)
    indices = list(sizes_of(samples).values())
    stacked = ([torch.stack([arg[i] for i in index]) for arg in (samples, *others)] for index in indices)
    return unsorted([function(*args) for args in stacked], indices)


def check_inputs(x: Any, t: Any, y: Any, channels: int, classes: int) -> None:
    """Raise ValueError unless a model of so many channels and classes can take these.

    x is a batch (B, C, H, W) or a list of B samples (C, H, W); t and y are (B,), y class ids, or `classes` for none.
    """
    batch = isinstance(x, torch.Tensor)
    if isinstance(x, torch.Tensor):
        size, parts = x.shape[:1], [("x", x)]  # torch.export takes a tensor's len for a constant
    else:
        check_samples(x)
        size, parts = torch.Size([len(x)]), [(f"x[{i}]", part) for i, part in enumerate(x)]
    shape = ("B, " if batch else "") + f"{channels}, H, W"
    for name, part in parts:
        if part.dim() != 3 + batch or part.shape[-3] != channels or 0 in part.shape[-2:]:
            raise ValueError(f"{name} must have shape ({shape}), got {tuple(part.shape)}")
    for name, tensor in (("t", t), ("y", y)):
        if not isinstance(tensor, torch.Tensor) or tensor.shape != size:
            came = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else repr(tensor)
            raise ValueError(f"{name} must have shape ({size[0]},), got {came}")
    if y.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"y must hold integer class ids, got {y.dtype}")
    # On a GPU this look would be a synchronisation; there the embedding's own assert speaks.
    on_cpu = y.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and y.numel() and not 0 <= int(y.min()) <= int(y.max()) <= classes:
        raise ValueError(f"class ids must be in [0, {classes}], got {int(y.min())} to {int(y.max())}")


def check_samples(samples: Any) -> None:
    """Raise ValueError unless `samples` are tensors, at least one, of one dtype on one device."""
    if not isinstance(samples, list | tuple) or not samples or not all(isinstance(x, torch.Tensor) for x in samples):
        kinds = [type(x).__name__ for x in samples] if isinstance(samples, list | tuple) else type(samples).__name__
        raise ValueError(f"x must be a tensor (B, C, H, W) or a list of tensors (C, H, W), got {kinds}")
    first = samples[0]
    for i, x in enumerate(samples):
        if (x.dtype, x.device) != (first.dtype, first.device):
            raise ValueError(f"x[{i}] must be {first.dtype} on {first.device} as x[0] is, got {x.dtype} on {x.device}")


def forward_mixed(
    model: DCDiT,
    samples: Sequence[torch.Tensor],
    t: torch.Tensor,
    c: torch.Tensor,
    outer: torch.Tensor,
    budget: dict[str, Any],
    routing: Any,
    backbone_inputs: dict[str, Any],
) -> tuple[list[torch.Tensor], MixedRouting]:
    """`DCDiT.forward` of a list: the predictions and the routing. t (B,); c and outer (B, D) come from `condition`."""
    sizes = sizes_of(samples)
    indices = tuple(map(tuple, sizes.values()))
    if isinstance(routing, MixedRouting):
        routing.check(sizes, budget)
    elif routing is not None:
        raise ValueError(f"routing must be a MixedRouting for a list of samples, got a {type(routing).__name__}")
    order, counts = _order(indices, c.device), list(map(len, indices))
    outers = outer[order].split(counts)
    xs = [torch.stack([samples[i] for i in index]) for index in indices]
    hs = [model.encode(x, part) for x, part in zip(xs, outers, strict=True)]
    wide = [h.to(torch.promote_types(h.dtype, torch.float32)) for h in hs]
    if routing is None:
        parts = _route(model, wide, c[order].split(counts), list(sizes), _split_budget(budget, samples, indices))
        routing = MixedRouting(parts, indices, _pack(parts, indices))
    tokens = [model.gather(h, part) for part, h in zip(routing.parts, hs, strict=True)]
    rows = _rows(routing)
    packed = model.backbone(pack_rows(torch.cat(tokens), rows), c, routing.packing, **backbone_inputs)
    tokens = unpack_rows(packed, rows, len(rows)).split([part.plan.capacity for part in routing.parts])
    outs = [model.decode(*args) for args in zip(tokens, wide, routing.parts, outers, strict=True)]
    if model.config.predict_clean:
        outs = [velocity_to(*args) for args in zip(xs, outs, t[order].split(counts), strict=True)]
    return unsorted(outs, indices), routing


def _order(indices: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """The samples sorted by size, int64 (B,)."""
    return torch.tensor([i for index in indices for i in index]).to(device, non_blocking=True)


def _split_budget(budget: dict[str, Any], samples: Sequence[torch.Tensor], indices: Any) -> list[dict[str, Any]]:
    """The budget of each size. drop_fraction and budget_per_sample may have a number, and each mask has a tensor (L,),
    for each sample."""
    for name in {"capacity", "budget"} & budget.keys():
        raise ValueError(f"{name} is for samples of one size: leave it out for a list")
    for name in {"drop_fraction", "budget_per_sample"} & budget.keys():
        numbers = budget[name]
        if isinstance(numbers, torch.Tensor) and numbers.dim():
            if len(numbers.shape) > 1 or len(numbers) != len(samples):
                raise ValueError(f"{name} must have shape ({len(samples)}), got {tuple(numbers.shape)}")
            budget = {**budget, name: numbers[_order(indices, numbers.device)].split(list(map(len, indices)))}
    for name in {"keep", "ban"} & budget.keys():
        shapes = [(x.shape[1] * x.shape[2],) for x in samples]
        if (have := [tuple(mask.shape) for mask in budget[name]]) != shapes:
            raise ValueError(f"{name} must be a list of masks of shapes {shapes}, got {have}")
        budget = {**budget, name: [torch.stack([budget[name][i] for i in index]) for index in indices]}
    return [{k: v[g] if isinstance(v, list | tuple) else v for k, v in budget.items()} for g in range(len(indices))]


def _route(
    model: DCDiT,
    hs: Sequence[torch.Tensor],
    cs: Sequence[torch.Tensor],
    grids: Sequence[tuple[int, ...]],
    budgets: Sequence[dict[str, Any]],
) -> tuple[Routing, ...]:
    """The routing of each size. Plans with room for every cell wait for nothing; one copy tells the rows of all."""
    parts, counts = [], []
    for h, c, grid, budget in zip(hs, cs, grids, budgets, strict=True):
        part = model.route(h, c, **model.named(grid), capacity=h.shape[0] * h.shape[1], **budget)
        prob, plan = part.boundary_prob.detach(), part.plan
        good = (prob.amin() >= 0) & (prob.amax() <= 1)  # False for NaN
        counts += [plan.cu_seqlens[-1], plan.lengths.amax(), good]
        parts.append(part)
    numbers = torch.stack([count.to(torch.int32) for count in counts]).view(-1, 3).tolist()
    for part, budget, (_, _, good) in zip(parts, budgets, numbers, strict=True):
        if not good:
            check_values(part.boundary_prob, budget.get("keep"), budget.get("ban"))
    cut = (_with_rows(part.plan, *rows) for part, (*rows, _) in zip(parts, numbers, strict=True))
    return tuple(Routing(part.boundary_prob, plan) for part, plan in zip(parts, cut, strict=True))


def _with_rows(plan: ChunkPlan, rows: int, longest: int) -> ChunkPlan:
    """A plan of fixed capacity without its spare rows."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    for name, length in (("token_index", rows), ("sample_index", rows), ("member_offsets", rows + 1)):
        fields[name] = fields[name][:length]
    return ChunkPlan.unchecked(**{**fields, "capacity": rows, "max_seqlen": longest, "exact": True})


def _pack(parts: Sequence[Routing], indices: Sequence[Sequence[int]]) -> Packing:
    """The packing of all samples in the order of the batch."""
    with kept_for_backward():
        lengths = torch.cat([part.plan.lengths for part in parts])
        ends = lengths[_order(indices, lengths.device).argsort()].cumsum(0)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends])
        longest, total = (max(part.plan.max_seqlen for part in parts), sum(part.plan.capacity for part in parts))
        return Packing.from_cu_seqlens(cu_seqlens, longest, total, exact=True)


def _rows(routing: MixedRouting) -> torch.Tensor:
    """For each packed row of the batch its row among those sorted by size, int64 (capacity,)."""
    packing = routing.packing
    with kept_for_backward():
        lengths = torch.cat([part.plan.lengths for part in routing.parts])
        order = _order(routing.indices, lengths.device)
        first = (lengths.cumsum(0) - lengths)[order.argsort()] - packing.cu_seqlens[:-1]
        return torch.arange(packing.capacity, device=first.device) + first[packing.sample_index]
