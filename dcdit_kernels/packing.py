"""Packing: rows of samples of different lengths, one sample after the other in one tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ._check import offsets, require, shaped, traced

if TYPE_CHECKING:
    from typing_extensions import Self


class Rule(NamedTuple):
    """A rule of one tensor of a packing: whether each element `holds` it, and the `expected` value in words."""

    tensor: str
    holds: torch.Tensor
    expected: str


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

    @staticmethod
    def from_lengths(lengths: Sequence[int] | torch.Tensor, device: torch.device | str | None = None) -> Packing:
        """Samples of these lengths, integers (B,) of 0 or more, without spare rows.

        The tensors are on `device`, by default the lengths' own. Lengths on a GPU are copied to the host once.
        """
        if isinstance(lengths, torch.Tensor):
            shaped("Packing", "lengths", lengths, None)
            device = lengths.device if device is None else device
            lengths = lengths.tolist()
        fits = all(isinstance(length, int) and length >= 0 for length in lengths)
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
        packing.__dict__.update(fields)
        return packing

    @property
    def lengths(self) -> torch.Tensor:
        """Rows of each sample, int32 (batch_size,)."""
        return self.cu_seqlens.diff()

    @functools.cached_property
    def live(self) -> torch.Tensor:
        """The rows before `cu_seqlens[-1]`, bool (capacity,): made when first asked for, then kept."""
        with kept_for_backward():
            return self.sample_index >= 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy with its tensors on `device`."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory, for `.to(device, non_blocking=True)`."""
        return self._each_tensor(torch.Tensor.pin_memory)

    def _each_tensor(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        with kept_for_backward():
            return self.unchecked(**{n: function(v) if isinstance(v, torch.Tensor) else v for n, v in fields.items()})

    def __post_init__(self) -> None:
        kind, device = type(self).__name__, self.cu_seqlens.device
        for name, shape in self._shapes().items():
            tensor = getattr(self, name)
            shaped(kind, name, tensor, *shape)
            if tensor.dtype != torch.int32:
                raise TypeError(f"{kind}: {name} must be int32, got {tensor.dtype}")
            require(
                tensor.device == device,
                "{}: {} must be on {} as cu_seqlens is, got {}",
                kind,
                name,
                device,
                tensor.device,
            )
            require(tensor.is_contiguous(), "{}: {} must be contiguous, got strides {}", kind, name, tensor.stride())
        if traced(self.cu_seqlens) or device.type == "meta":
            return
        for name, holds, expected in self._broken(self._rules()):
            place = int(holds.flatten().int().argmin())
            value = getattr(self, name).flatten()[place].item()
            raise ValueError(f"{kind}: {name}[{place}] must be {expected}, got {value}")

    @staticmethod
    def _broken(rules: list[Rule]) -> list[Rule]:
        """The rules that do not hold, found with one copy from the device."""
        held = torch.stack([rule.holds.all() for rule in rules]).tolist()
        return [rule for rule, good in zip(rules, held, strict=True) if not good]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"cu_seqlens": (self.batch_size + 1,), "sample_index": (self.capacity,)}

    def _rules(self) -> list[Rule]:
        cu = self.cu_seqlens
        start, end = torch.cat([cu.new_zeros(1), cu[:-1]]), cu.new_full((), self.capacity)
        row_at = torch.arange(len(cu), device=cu.device)
        rises = (cu >= start) & (cu <= end) & ((row_at > 0) | (cu == 0))
        short = cu - start <= self.max_seqlen
        full = (row_at < self.batch_size) | (cu == end) | (not self.exact)
        sample = sample_of_rows(cu, self.capacity)
        return [
            Rule("cu_seqlens", rises, f"between the one before and the capacity, {self.capacity}, and the first be 0"),
            Rule("cu_seqlens", short, f"at most max_seqlen, {self.max_seqlen}, above the one before"),
            Rule("cu_seqlens", full, f"the capacity, {self.capacity}, of an exact packing"),
            Rule("sample_index", self.sample_index == sample, "the sample whose cu_seqlens hold the row, or -1"),
        ]


def sample_of_rows(cu_seqlens: torch.Tensor, capacity: int) -> torch.Tensor:
    """The sample of each row, int32 (capacity,); -1 past the last live row."""
    row = torch.arange(capacity, dtype=torch.int32, device=cu_seqlens.device)
    sample = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True, out_int32=True)
    return torch.where(row < cu_seqlens[-1], sample, -1)


def kept_for_backward() -> Any:
    """Context for tensors that a backward may save, also inside `torch.inference_mode`."""
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inference else contextlib.nullcontext()
