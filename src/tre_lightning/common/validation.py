"""Checks of option values, and option dataclasses from plain mappings."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Options = TypeVar("Options")


def options(kind: type[Options], value: Options | Mapping[str, Any]) -> Options:
    """The options as their dataclass; ``load_from_checkpoint`` passes a plain mapping."""
    return kind(**value) if isinstance(value, Mapping) else value


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError for a value below the least, and for NaN."""
    if not value >= least:
        raise ValueError(f"{name}={value} must be at least {least}")


def positive(name: str, value: float) -> None:
    """Raise ValueError unless the value is above 0."""
    if not value > 0.0:
        raise ValueError(f"{name}={value} must be above 0")


def one_of(name: str, value: str | None, words: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of the words (the parser lets null through)."""
    if value not in words:
        raise ValueError(f"{name}={value} must be one of the words {', '.join(words)}")


def unit_fraction(name: str, value: float) -> None:
    """Raise ValueError unless the value lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} must lie in [0, 1]")
