"""Samples in parquet: a row each, its tensors nested lists, as Hugging Face datasets has them, or bytes of npy files.

Needs pyarrow. A row is read with its row group, of which one is kept at a time.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, DataError, one_line
from .npy import Header, read_header, read_tensor


@dataclass
class Groups:
    """Row groups of the files of a folder: their footers, and the columns of the last group that was asked for."""

    footers: dict[Path, Any] = field(default_factory=dict)
    last: tuple[tuple, dict[str, Any]] = ((), {})

    def read(self, file: Path, group: int, names: tuple[str, ...]) -> dict[str, Any]:
        """Arrow arrays of those columns that are there."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.last[0] != (file, group, names):
            self.last = (), {}  # not two at once
            with pq.ParquetFile(file, metadata=self.footers[file]) as parquet:
                columns = [name for name in names if name in parquet.schema_arrow.names]
                table = parquet.read_row_group(group, columns=columns, use_threads=False)
            arrays = {name: table[name].combine_chunks() for name in columns}
            plain = {n: a.storage if isinstance(a, pa.ExtensionArray) else a for n, a in arrays.items()}
            self.last = (file, group, names), plain
        return self.last[1]


@dataclass(frozen=True)
class Row:
    """One sample, as `SampleFile` has them. `size` is its row group's, in bytes."""

    name: str
    place: str
    size: int
    file: Path
    group: int
    row: int
    groups: Groups = field(repr=False)

    def header(self, names: tuple[str, ...]) -> Header:
        """Of those tensors that are there. Raises DataError for what cannot be read."""
        return {name: found[:2] for name, found in self._cells(names).items()}

    def load(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Those tensors, as they are. Raises DataError as `header`."""
        cells = self._cells(names)
        try:
            return {
                name: read_tensor(io.BytesIO(values)) if isinstance(values, bytes) else torch.tensor(values).view(shape)
                for name, (shape, _, values) in cells.items()
            }
        except (ValueError, TypeError, EOFError, MemoryError) as error:  # a header may ask for any amount
            raise DataError(f"{self.name} cannot be read: {error}") from error

    def _cells(self, names: tuple[str, ...]) -> dict[str, tuple[tuple[int, ...], str, Any]]:
        import pyarrow as pa

        try:
            arrays = self.groups.read(self.file, self.group, names)
            cells = {name: _cell(name, array.slice(self.row, 1)) for name, array in arrays.items()}
        except (OSError, ValueError, TypeError, KeyError, EOFError, pa.ArrowException) as error:
            raise DataError(f"{self.name} cannot be read: {one_line(error)}") from error
        return {name: cell for name, cell in cells.items() if cell}


def find_rows(file: Path, place: str, groups: Groups) -> list[Row]:
    """All rows of a file. Raises DataError where it is no parquet file, and ConfigError without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(f"{file} needs pyarrow: pip install dcdit[parquet]") from error
    try:
        footer = groups.footers[file] = pq.read_metadata(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file} is not a parquet file that can be read: {one_line(error)}") from error
    rows: list[Row] = []
    for group in range(footer.num_row_groups):
        part = footer.row_group(group)
        for row in range(part.num_rows):
            at = len(rows)
            rows.append(Row(f"{file}:{at}", f"{place}:{at}", part.total_byte_size, file, group, row, groups))
    return rows


def _cell(name: str, array: Any) -> tuple[tuple[int, ...], str, np.ndarray | bytes] | None:
    """Shape, dtype and values, of an array of one; None where it is null."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as types

    if array.null_count:
        return None
    if types.is_binary(array.type) or types.is_large_binary(array.type):
        data = array[0].as_py()
        return *read_header(io.BytesIO(data)), data
    sides: list[int] = []
    while isinstance(array.type, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        lengths = pc.unique(pc.list_value_length(array))
        if len(lengths) > 1 or lengths.null_count:
            raise ValueError(f"the lists of {name} must be of one length, got {lengths.to_pylist()[:4]}")
        sides.append(lengths[0].as_py() if len(lengths) else 0)
        array = array.flatten()
    if not sides or not (types.is_floating(array.type) or types.is_integer(array.type)):
        raise ValueError(f"{name} must be nested lists of numbers or bytes of an npy file, got {array.type}")
    if array.null_count:
        raise ValueError(f"{name} has {array.null_count} empty values")
    values = array.to_numpy(zero_copy_only=False)
    return tuple(sides), f"F{8 * values.itemsize}" if values.dtype.kind == "f" else values.dtype.name, values
