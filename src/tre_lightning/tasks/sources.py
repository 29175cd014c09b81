"""Reads rows of local files and of datasets on the hub."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tre_lightning.common.validation import at_least

Row = Mapping[str, Any]

# What a name may end with that is meant as a file, though it is not of a kind that is read here.
_OTHER_FILES = (".arrow", ".csv", ".gz", ".json", ".tsv", ".txt", ".yaml", ".zst")
# Types of a column, as Arrow and as datasets name them, whose numbers have few digits.
_SHORT = {
    "halffloat": np.float16,
    "float16": np.float16,
    "float": np.float32,
    "float32": np.float32,
}
_MOST_DIGITS = 1000  # of a number as text; more are an attack, not data
_log = logging.getLogger(__name__)


class Source(NamedTuple):
    """A source of rows: a local file or a dataset on the hub.

    ``file`` is the path of a ``.jsonl`` file (an object a line; blank lines are skipped) or of a
    ``.parquet`` file, else the name of a dataset of the hub; ``split`` and ``name`` are the split
    and the configuration of a dataset of the hub.
    """

    file: str | None
    split: str = "train"
    name: str | None = None


def read_rows(
    field: str,
    source: str,
    split: str = "train",
    name: str | None = None,
    *,
    decimals: bool = False,
) -> Iterator[tuple[str, Row]]:
    """Rows of a file or dataset, each with its place (``FILE:LINE``), for error messages.

    Args:
        field: the option that names the source, for error messages.
        source: as ``file`` of :class:`Source`; ``~`` is the home directory.
        split: split of a dataset of the hub.
        name: configuration of a dataset of the hub; None = its only one, or its default.
        decimals: give numbers with a fraction or an exponent as :class:`~decimal.Decimal`, with the
            digits that JSON has, or the few that stand for a number of single precision.

    Raises:
        ValueError: if the source or a line of it cannot be read. It is raised on the way, when the
            rows before have been given out.
    """
    if not Path(source).exists():
        with suppress(RuntimeError):  # ~ of an unknown user
            source = str(Path(source).expanduser())
    suffix = Path(source).suffix.lower()
    if suffix == ".jsonl":
        return _jsonl_rows(field, source, Decimal if decimals else float)
    if suffix == ".parquet":
        # Of a pattern or an address datasets makes something; a file's name is neither.
        if Path(source).is_file():
            rows = _parquet_rows(field, source)
        else:
            rows = _dataset_rows(field, source, "parquet", data_files=source, split="train")
        return _with_few_digits(rows) if decimals else _plain(rows)
    if suffix in _OTHER_FILES or Path(source).is_file():
        raise ValueError(
            f"{field}={source} is of an unknown kind; give a .jsonl or .parquet file, or the name "
            "of a dataset of the hub"
        )
    configuration = {} if name is None else {"name": name}
    rows = _dataset_rows(field, source, source, split=split, **configuration)
    return _with_few_digits(rows) if decimals else _plain(rows)


def row_order(count: int, shuffle_seed: int | None) -> list[int]:
    """The order of the datasets library's ``Dataset.shuffle(seed=shuffle_seed)``.

    None = as they stand in the source.
    """
    if shuffle_seed is None:
        return list(range(count))
    at_least("data.shuffle_seed", shuffle_seed, 0)
    order: list[int] = np.random.default_rng(shuffle_seed).permutation(count).tolist()
    return order


def text_of(row: Row, column: str, where: str) -> str:
    """The text in a column.

    Raises:
        ValueError: if there is no such column, or it holds no text; the message starts with
            ``where``.
    """
    value = row.get(column)
    if column not in row:
        columns = ", ".join(map(str, row))[:200] or "none"
        raise ValueError(f"{where}: no column {column!r}; rename or add it (there are: {columns})")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {column}={str(value)[:80]!r} is no text; write a string")
    return value


def number_text(value: object) -> str | None:
    """A number in plain digits, ``0.00005`` and not ``5e-05``; None for what is no finite number.

    Takes every kind of number (also of numpy), but no truth value.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return str(int(value))
    if not isinstance(value, Real | Decimal):
        return None
    text = str(value)  # of a float the shortest digits that stand for it
    try:
        number = Decimal(text)
    except ArithmeticError:
        return text  # a fraction
    if not number.is_finite():
        return None
    return f"{number:f}" if abs(number.adjusted()) <= _MOST_DIGITS else text


def warn_of_unscorable(field: str, source: str | None, found: Sequence[str], total: int) -> None:
    """Warn once of the rows that no response can solve: how many, and the first of them.

    Args:
        field: the option that names the source.
        source: its value.
        found: of each such row, where it stands and what is wrong.
        total: rows.
    """
    if found:
        _log.warning(
            "%d of %d rows of %s=%s can hardly be scored: a response to them gets 0 whatever it "
            "says, or has to repeat the text. The first: %s",
            *(len(found), total, field, source, found[0]),
        )


def _jsonl_rows(field: str, source: str, number: Callable[[str], Any]) -> Iterator[tuple[str, Row]]:
    try:
        lines = Path(source).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(
            f"{field}={source} cannot be read ({error.strerror}); give a .jsonl or .parquet file, "
            "or the name of a dataset of the hub"
        ) from error
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{source}:{place}"
        try:
            row = json.loads(line, parse_float=number)
        except (ValueError, ArithmeticError, RecursionError):
            raise ValueError(f"{where}: the line is not JSON; write one object") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: the line is no object; write one with the columns as keys")
        yield where, row


# Where a row stands, the row, and the types of its columns.
_TypedRows = Iterator[tuple[str, Row, Mapping[str, str]]]


def _parquet_rows(field: str, source: str) -> _TypedRows:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with open(source, "rb") as opened:
            for batch in parquet.ParquetFile(opened).iter_batches():
                dtypes = {item.name: str(item.type) for item in batch.schema}
                for row in batch.to_pylist():
                    yield f"{source}: row {number}", row, dtypes
                    number += 1
    except (OSError, ValueError, NotImplementedError) as error:  # those of arrow, too
        raise _not_loaded(field, source, error) from error


def _dataset_rows(field: str, source: str, loader: str, **options: Any) -> _TypedRows:
    try:
        # Late: it takes a second, and JSONL does without.
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(
            f"{field}={source} needs the package datasets; pip install datasets, or give a .jsonl "
            "file"
        ) from None
    try:
        rows = datasets.load_dataset(loader, **options)
    except Exception as error:
        raise _not_loaded(field, f"{source} (split {options['split']})", error) from error
    features = getattr(rows, "features", None) or {}
    dtypes = {column: str(getattr(feature, "dtype", "")) for column, feature in features.items()}
    for number, row in enumerate(rows):
        yield f"{source}: row {number}", row, dtypes


def _not_loaded(field: str, source: str, error: Exception) -> ValueError:
    name = field.replace("source", "name").replace("_file", "_name")
    return ValueError(
        f"{field}={source} could not be loaded; give a .jsonl or .parquet file, or a dataset of "
        f"the hub, with {name} where it has several configurations "
        f"({type(error).__name__}: {str(error).strip()[:200]})"
    )


def _plain(rows: _TypedRows) -> Iterator[tuple[str, Row]]:
    return ((where, row) for where, row, _ in rows)


def _with_few_digits(rows: _TypedRows) -> Iterator[tuple[str, Row]]:
    """Rows whose numbers of half or single precision have the digits that they print with."""
    for where, row, dtypes in rows:
        digits = {
            column: Decimal(str(_SHORT[dtype](row[column])))
            for column, dtype in dtypes.items()
            if dtype in _SHORT and row.get(column) is not None
        }
        yield where, {**row, **digits}
