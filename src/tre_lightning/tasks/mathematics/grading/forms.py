"""Forms of answers. Equal forms are equal answers; `matching` says what else is equal."""

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias


@dataclass(frozen=True)
class Value:
    """An expression.

    Attributes:
        key: its tokens; equal keys are the same expression.
        number: its value if it is a plain number (an integer, decimal, fraction, mixed number).
        latex: LaTeX for the grammar, None if it holds something that is not allowed there.
        names: its variables.
        features: what may make it a copy of the question: "logarithm", "factorial", ...
        unit: its unit, "" if there is none.
    """

    key: tuple[str, ...]
    number: Fraction | None
    latex: str | None
    names: frozenset[str]
    features: frozenset[str]
    unit: str = ""


@dataclass(frozen=True)
class Text:
    r"""Words: ``\text{even}``."""

    words: str


@dataclass(frozen=True)
class Based:
    """A number in a base: ``43_5``."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """Sides of ``3:4``, or a time of day."""

    sides: tuple[Value, ...]
    unit: str


@dataclass(frozen=True)
class Bracketed:
    """Tuple, vector, or interval."""

    open: str
    close: str
    items: "tuple[Form, ...]"


@dataclass(frozen=True)
class Many:
    """Items without an order: kind "list" (also a set), or "union" of intervals and sets."""

    kind: str
    items: "tuple[Form, ...]"


@dataclass(frozen=True)
class Matrix:
    """A matrix or column vector."""

    rows: "tuple[tuple[Form, ...], ...]"


@dataclass(frozen=True)
class Named:
    r"""``x = form``, ``f(x) = form``, ``x \in form``; an inequality for x is named, too."""

    name: str
    form: "Form"


@dataclass(frozen=True)
class Equation:
    """Sides of an equation or chain of equations that names nothing: ``x^2+y^2=1``, ``2+3=5``."""

    sides: "tuple[Form, ...]"


@dataclass(frozen=True)
class Inequality:
    r"""Sides in rising order; ``signs`` are "<" and "\le"."""

    signs: tuple[str, ...]
    sides: "tuple[Form, ...]"


Form: TypeAlias = (
    Value | Text | Based | Ratio | Bracketed | Many | Matrix | Named | Equation | Inequality
)
