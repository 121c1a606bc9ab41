"""The table of a sweep's indices: a pandas DataFrame where pandas is installed, and a small one of our own else."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any

from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import written_pair
from transformer_lens.checks import a_list, a_text, whole_numbers


@dataclass(frozen=True)
class IndexTable:
    """Rows of integers under names: what a sweep patches, one row for each intervention.

    >>> table = IndexTable(("layer", "pos"), ((0, 0), (0, 1)))
    >>> len(table), list(table), table.columns
    (2, [(0, 0), (0, 1)], ('layer', 'pos'))
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.rows)


@checked
def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> Any:
    """Every combination of the integers below each maximum, the last column running fastest: a pandas DataFrame if
    pandas is installed, an `IndexTable` if not. Raises `ValueError` if the lengths differ.

    >>> table = make_df_from_ranges([2, 3], ["layer", "pos"])
    >>> len(table), list(table.columns)
    (6, ['layer', 'pos'])
    """
    if len(column_max_ranges) != len(column_names):
        raise ValueError(f"make_df_from_ranges: got {len(column_max_ranges)} ranges and {len(column_names)} names")
    for name in column_names:
        a_text("column_names", name)
    rows = list(product(*map(range, whole_numbers("column_max_ranges", column_max_ranges))))
    if find_spec("pandas") is None:
        return IndexTable(tuple(column_names), tuple(rows))
    return importlib.import_module("pandas").DataFrame(rows, columns=list(column_names))


@checked
def index_rows(index_df: Any) -> list[list[int]]:
    """The rows of a DataFrame, an `IndexTable` or any sequence of sequences of integers; a head or an expert in the
    words of its layer, such as `"L3H2"`, is a row of two.

    >>> index_rows([(0, 1), "L3H2"])
    [[0, 1], [3, 2]]
    """
    rows: Iterable[Any] = index_df.itertuples(index=False) if hasattr(index_df, "itertuples") else index_df
    made = []
    for row in rows:
        if isinstance(row, str):
            row = written_pair("expert" if "E" in row else "head", row, "index_df")
        a_list("index_df: a row", row)
        made.append(whole_numbers("index_df", row))
    return made
