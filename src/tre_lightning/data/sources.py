"""Rows of a local file or of a dataset of the hub."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# What a name may end with that is meant as a file, though it is not of a kind that is read here.
_OTHER_FILES = (".arrow", ".csv", ".gz", ".json", ".tsv", ".txt", ".yaml", ".zst")


def read_rows(field: str, source: str, split: str = "train") -> Iterator[tuple[str, Row]]:
    """Rows of a file or dataset, each with where it stands (``FILE:LINE``), for error messages.

    Args:
        field: the option that names the source, for error messages.
        source: path of a ``.jsonl`` file (an object a line; blank lines are skipped) or of a
            ``.parquet`` file, else the name of a dataset of the hub.
        split: split of a dataset of the hub.

    Raises:
        ValueError: if the source or a line of it cannot be read. It is raised on the way, when the
            rows before have been given out.
    """
    suffix = Path(source).suffix.lower()
    if suffix == ".jsonl":
        return _jsonl_rows(field, source)
    if suffix == ".parquet":
        return _dataset_rows(field, source, split, "parquet")
    if suffix in _OTHER_FILES or Path(source).is_file():
        raise ValueError(
            f"{field}={source} is of an unknown kind; give a .jsonl or .parquet file, or the name "
            "of a dataset of the hub"
        )
    return _dataset_rows(field, source, split, None)


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


def _jsonl_rows(field: str, source: str) -> Iterator[tuple[str, Row]]:
    try:
        lines = Path(source).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(
            f"{field}={source} cannot be read ({error.strerror}); give a .jsonl or .parquet file, "
            "or the name of a dataset of the hub"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: the line is not JSON; write one object") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: the line is no object; write one with the columns as keys")
        yield where, row


def _dataset_rows(
    field: str, source: str, split: str, kind: str | None
) -> Iterator[tuple[str, Row]]:
    try:
        # Late: it takes a second, and JSONL does without.
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(
            f"{field}={source} needs the package datasets; pip install datasets, or give a .jsonl "
            "file"
        ) from None
    try:
        if kind is not None:
            rows = datasets.load_dataset(kind, data_files=source, split="train")
        else:
            rows = datasets.load_dataset(source, split=split)
    except Exception as error:
        raise ValueError(
            f"{field}={source} (split {split}) could not be loaded; give a .jsonl or .parquet "
            f"file, or a dataset of the hub ({type(error).__name__}: {str(error).strip()[:200]})"
        ) from error
    for number, row in enumerate(rows):
        yield f"{source}: row {number}", row
