"""Packing: rows of samples of different lengths, one sample after the other in one tensor; and two packings joined."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ._check import no_plan, offsets, require, shaped, traced
from ._rules import Rule, check_rules, check_tensors, has_values

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, kw_only=True)  # tensors have no truth value to compare by
class Packing:
    """Which rows of packed features (capacity, D) belong to which sample.

    - `batch_size`: B, the samples. A segment of one (its text, a frame) may stand for a sample.
    - `capacity`: rows of every packed tensor. The live rows are `[0, cu_seqlens[-1])`; operators write zeros past them.
    - `max_seqlen`: an upper bound of the rows of any sample.
    - `cu_seqlens` int32 (B + 1,): the rows of sample b are `cu_seqlens[b]:cu_seqlens[b + 1]`.
    - `sample_index` int32 (capacity,): the sample of each row; -1 past the last live row.
    - `exact`: every row of the capacity is live.

    `from_lengths` and `from_cu_seqlens` make one. The constructor and `dataclasses.replace` check every value, on a GPU
    at the price of one wait for the device: ValueError or TypeError where a value does not fit.
    """

    batch_size: int
    capacity: int
    max_seqlen: int
    cu_seqlens: torch.Tensor
    sample_index: torch.Tensor
    exact: bool = False

    INT64: ClassVar[tuple[str, ...]] = ()  # tensors that are not int32

    @staticmethod
    def from_lengths(lengths: Sequence[int] | torch.Tensor, device: torch.device | str | None = None) -> Packing:
        """Samples of these lengths, integers (B,) of 0 or more, without spare rows.

        The tensors are on `device`, by default the lengths' own. Lengths on a GPU are copied to the host once.
        """
        if isinstance(lengths, torch.Tensor):
            shaped("Packing", "lengths", lengths, None)
            device = lengths.device if device is None else device
            lengths = lengths.tolist()
        try:
            fits = all(isinstance(length, int) and length >= 0 for length in lengths)
        except TypeError:  # a number
            fits = False
        require(fits, "Packing: lengths must be integers of 0 or more, got {}", lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return Packing.from_cu_seqlens(cu_seqlens, max(lengths, default=0), sum(lengths), exact=True)

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens: torch.Tensor, max_seqlen: int | None = None, capacity: int | None = None, exact: bool = False
    ) -> Packing:
        """Samples whose rows are `cu_seqlens[b]:cu_seqlens[b + 1]`, integers (B + 1,) as FlashAttention takes them.

        Args:
            max_seqlen: an upper bound of the lengths; None: the longest.
            capacity: rows of the packed tensors; None: `cu_seqlens[-1]`.
            exact: promises that `cu_seqlens[-1]` is the given capacity.

        The host waits for a GPU once where max_seqlen or capacity is None. Where both are given, the values of
        cu_seqlens are looked at on a CPU alone.
        """
        offsets("Packing", "cu_seqlens", cu_seqlens, 2**31 - 1 if capacity is None else capacity)
        if capacity is None or max_seqlen is None:
            ends = cu_seqlens.tolist()
            longest = max((end - start for start, end in itertools.pairwise(ends)), default=0)
            max_seqlen = longest if max_seqlen is None else max_seqlen
            capacity, exact = (ends[-1], True) if capacity is None else (capacity, exact)
        with kept_for_backward():
            cu_seqlens = cu_seqlens.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
            sample_index = sample_of_rows(cu_seqlens, capacity)
        return Packing.unchecked(
            batch_size=cu_seqlens.shape[0] - 1,
            capacity=capacity,
            max_seqlen=max_seqlen,
            cu_seqlens=cu_seqlens,
            sample_index=sample_index,
            exact=exact,
        )

    @classmethod
    def unchecked(cls, **fields: Any) -> Self:
        """The constructor without its checks."""
        packing = object.__new__(cls)
        for name, value in fields.items():
            object.__setattr__(packing, name, value)  # as torch.compile can follow
        return packing

    @property
    def lengths(self) -> torch.Tensor:
        """Rows of each sample, int32 (batch_size,)."""
        return self.cu_seqlens.diff()

    @property
    def live(self) -> torch.Tensor:
        """The rows before `cu_seqlens[-1]`, bool (capacity,): made when first asked for, then kept."""
        if traced(self.sample_index):
            return self.sample_index >= 0
        # functools.cached_property takes a lock before Python 3.12, which torch.compile does not trace.
        if "_live" not in self.__dict__:
            with kept_for_backward():
                self.__dict__["_live"] = self.sample_index >= 0
        return self.__dict__["_live"]

    def join(self, other: Packing) -> JoinedPacking:
        """Both streams as one: of each sample the rows of self, then those of other. Waits for no device.

        Raises ValueError where the two have not one number of samples, TypeError where `other` is no packing.
        """
        if not isinstance(other, Packing):
            raise no_plan("join", other)
        sizes = self.batch_size, other.batch_size
        require(sizes[0] == sizes[1], "join: both packings must have one number of samples, got {} and {}", *sizes)
        with kept_for_backward():
            ends = torch.stack([self.lengths, other.lengths], 1).flatten().cumsum(0)
            segments = Packing.from_cu_seqlens(
                torch.cat([ends.new_zeros(1), ends]),
                max(self.max_seqlen, other.max_seqlen),
                self.capacity + other.capacity,
                self.exact and other.exact,
            )
            return JoinedPacking.unchecked(
                batch_size=self.batch_size,
                capacity=segments.capacity,
                max_seqlen=self.max_seqlen + other.max_seqlen,
                cu_seqlens=segments.cu_seqlens[::2].contiguous(),
                sample_index=segments.sample_index // 2,
                exact=segments.exact,
                segments=segments,
                first_row=_moved_rows(self.sample_index, other.cu_seqlens),
                second_row=_moved_rows(other.sample_index, self.cu_seqlens[1:]),
            )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy with its tensors on `device`."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def clone(self) -> Self:
        """A copy with separate tensors."""
        return self._each_tensor(torch.Tensor.clone)

    def pin_memory(self) -> Self:
        """A copy in page-locked memory, for `.to(device, non_blocking=True)`."""
        return self._each_tensor(torch.Tensor.pin_memory)

    def _each_tensor(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in fields.items():
            if isinstance(value, Packing):
                fields[name] = value._each_tensor(function)
            elif isinstance(value, torch.Tensor):
                with kept_for_backward():
                    fields[name] = function(value)
        return self.unchecked(**fields)

    def __post_init__(self) -> None:
        check_tensors(self, self._shapes())
        if has_values(self.cu_seqlens):
            check_rules(self, self._rules())

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"cu_seqlens": (self.batch_size + 1,), "sample_index": (self.capacity,)}

    def _rules(self) -> list[Rule]:
        cu, capacity = self.cu_seqlens, self.capacity
        start = torch.cat([cu.new_zeros(1), cu[:-1]])
        sample = torch.arange(len(cu), device=cu.device)
        rises = (cu >= start) & (cu <= capacity) & ((sample > 0) | (cu == 0))
        short = cu - start <= self.max_seqlen
        full = (sample < self.batch_size) | (cu == capacity) | (not self.exact)
        right = self.sample_index == sample_of_rows(cu, capacity)
        return [
            Rule("cu_seqlens", rises, f"between the one before and the capacity, {capacity}, and the first be 0"),
            Rule("cu_seqlens", short, f"at most max_seqlen, {self.max_seqlen}, above the one before"),
            Rule("cu_seqlens", full, f"the capacity, {capacity}, of an exact packing"),
            Rule("sample_index", right, "the sample whose cu_seqlens hold the row, or -1"),
        ]


@dataclass(frozen=True, eq=False, kw_only=True)
class JoinedPacking(Packing):
    """Two packed streams as one, as `first.join(second)` makes it: text or class tokens beside a sample's cells, say.

    - `segments`: the same rows as a packing of 2·B segments: of each sample its first rows, then its second. Modulators
      (B, 2, D), flattened to (2·B, D), are then one for each stream of each sample.
    - `first_row` int64 (T1,), `second_row` int64 (T2,): the joined row of each row of the two streams; -1 past their
      last live rows. The capacity is T1 + T2.
    """

    segments: Packing
    first_row: torch.Tensor
    second_row: torch.Tensor

    INT64: ClassVar[tuple[str, ...]] = ("first_row", "second_row")

    @property
    def source(self) -> torch.Tensor:
        """For each joined row its row in torch.cat([first, second]), int32 (T1 + T2,), rows past the last live one
        included: a permutation. Made when first asked for, then kept."""
        if traced(self.first_row):
            return self._source()
        if "_kept_source" not in self.__dict__:
            with kept_for_backward():
                self.__dict__["_kept_source"] = self._source()
        return self.__dict__["_kept_source"]

    def _source(self) -> torch.Tensor:
        place = torch.cat([self.first_row, self.second_row])
        spare = place < 0
        place = torch.where(spare, self.cu_seqlens[-1] + spare.cumsum(0) - 1, place)
        row = torch.arange(len(place), dtype=torch.int32, device=place.device)
        return torch.empty_like(row).index_copy_(0, place, row)

    def cat(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Rows of the two streams, (T1, …) and (T2, …), as joined rows (T1 + T2, …), zero past the last live one.

        Raises ValueError where rows are too many or too few, or differ in shape or dtype.
        """
        for name, rows, place in (("first", first, self.first_row), ("second", second, self.second_row)):
            fits = rows.dim() >= 1 and rows.shape[0] == place.shape[0]
            require(fits, "cat: {} must have {} rows, got {}", name, place.shape[0], tuple(rows.shape))
        kinds = [(tuple(rows.shape[1:]), rows.dtype) for rows in (first, second)]
        require(kinds[0] == kinds[1], "cat: rows of both must have one shape and dtype, got {} and {}", *kinds)
        return _Cat.apply(first, second, self.first_row, self.second_row, self.exact)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Joined rows (T1 + T2, …) as those of the two streams, zero past their last live ones.

        Raises ValueError where rows are too many or too few.
        """
        fits = rows.dim() >= 1 and rows.shape[0] == self.capacity
        require(fits, "split: rows must be {} in number, got {}", self.capacity, tuple(rows.shape))
        return _Split.apply(rows, self.first_row, self.second_row, self.exact)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        first = self.first_row.shape[0]
        return {**super()._shapes(), "first_row": (first,), "second_row": (self.capacity - first,)}

    def _rules(self) -> list[Rule]:
        sizes = self.segments.batch_size, self.segments.capacity
        wanted = 2 * self.batch_size, self.capacity
        require(sizes == wanted, "JoinedPacking: segments must be {} of {} rows, got {} of {}", *wanted, *sizes)
        rules = super()._rules()
        rules.append(
            Rule("cu_seqlens", self.cu_seqlens == self.segments.cu_seqlens[::2], "where a pair of segments begins")
        )
        for name, stream in (("first_row", 0), ("second_row", 1)):
            have = getattr(self, name)
            row = torch.arange(self.capacity, device=have.device)
            own = (self.segments.sample_index % 2 == stream) & (self.segments.sample_index >= 0)
            want = torch.cat([row[own], have.new_full((len(have),), -1)])
            rules.append(Rule("cu_seqlens", (own.sum() <= len(have)).expand(self.batch_size + 1), f"room for {name}"))
            rules.append(Rule(name, have == want[: len(have)], "the next joined row of its stream, or -1"))
        return rules


class _Cat(torch.autograd.Function):
    """Rows of two streams to their joined rows; the backward is `_Split`, a gather."""

    @staticmethod
    def forward(ctx, first, second, first_row, second_row, exact):
        ctx.save_for_backward(first_row, second_row)
        ctx.exact = exact
        rows = first.shape[0] + second.shape[0]
        if exact:
            out = first.new_empty(rows, *first.shape[1:])
            return out.index_copy_(0, first_row, first).index_copy_(0, second_row, second)
        out = first.new_zeros(rows + 1, *first.shape[1:])  # the last row takes what lies past the live ones
        for part, place in ((first, first_row), (second, second_row)):
            out.index_copy_(0, torch.where(place < 0, rows, place), part)
        return out[:rows]

    @staticmethod
    def backward(ctx, grad):
        return *_Split.apply(grad, *ctx.saved_tensors, ctx.exact), None, None, None


class _Split(torch.autograd.Function):
    """Joined rows to the rows of their two streams, a gather; the backward is `_Cat`."""

    @staticmethod
    def forward(ctx, rows, first_row, second_row, exact):
        ctx.save_for_backward(first_row, second_row)
        ctx.exact = exact
        return tuple(rows[place] if exact else take_rows(rows, place) for place in (first_row, second_row))

    @staticmethod
    def backward(ctx, grad_first, grad_second):
        return _Cat.apply(grad_first, grad_second, *ctx.saved_tensors, ctx.exact), None, None, None


def take_rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[index] of any dtype and shape (N, …), zero where the index is -1."""
    if table.shape[0] == 0:
        return table.new_zeros(len(index), *table.shape[1:])
    rows = table[index.clamp(min=0)]
    return rows.masked_fill((index < 0).view(-1, *[1] * (table.dim() - 1)), 0)


def sample_of_rows(cu_seqlens: torch.Tensor, capacity: int) -> torch.Tensor:
    """The sample of each row, int32 (capacity,); -1 past the last live row."""
    row = torch.arange(capacity, dtype=torch.int32, device=cu_seqlens.device)
    sample = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True, out_int32=True)
    return torch.where(row < cu_seqlens[-1], sample, -1)


def _moved_rows(sample_index: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Each row's joined row, int64: as many further on as `before` (B,) says; -1 past the last live row."""
    row = torch.arange(len(sample_index), device=sample_index.device)
    return torch.where(sample_index < 0, -1, row + take_rows(before, sample_index))


def kept_for_backward() -> Any:
    """Context for tensors that a backward may save, also inside `torch.inference_mode`."""
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inference else contextlib.nullcontext()
