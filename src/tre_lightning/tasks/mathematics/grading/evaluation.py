"""Comparison of two expressions by value, at several points. For a worker: may take forever.

Imports its libraries late: the trainer imports this module, too, and needs none of them.
"""

import functools
import math
import random
from fractions import Fraction
from typing import Any

from tre_lightning.tasks.mathematics.grading.limits import MAX_MAGNITUDE
from tre_lightning.tasks.mathematics.grading.numbers import exact_power

_DIGITS = 150  # computed
_AGREEMENT = 120  # of them compared
_POINTS = 4  # of each kind; see `_coordinate`


@functools.lru_cache(maxsize=2048)
def _parsed(latex: str) -> Any:
    from latex2sympy2_extended.latex2sympy2 import (  # type: ignore[import-untyped]
        ConversionConfig,
        latex2sympy,
    )

    config = ConversionConfig(lowercase_symbols=False)
    try:
        return latex2sympy(latex, is_real=True, normalization_config=None, conversion_config=config)
    except MemoryError:
        raise
    except Exception:
        return None


def agree(gold: str, answer: str, real: bool, up_to_factor: bool) -> bool:
    """Whether two expressions have the same value at all points; exact for rational ones.

    Args:
        gold: LaTeX for the grammar.
        answer: the same.
        real: at points of either sign, neither may have a real value where the other has none:
            sqrt(x^2) is not x.
        up_to_factor: the quotient of the values need only be the same at all points.
    """
    import mpmath  # type: ignore[import-untyped]

    with mpmath.workdps(_DIGITS):
        quotient = None
        for point in range(2 * _POINTS):
            left, right = (_value_at(_parsed(latex), point) for latex in (gold, answer))
            if point >= _POINTS and real:
                if not _is_real(left) and not _is_real(right):
                    continue
                if not _is_real(left) or not _is_real(right):
                    return False
            if left is None or right is None:
                return False
            if up_to_factor:
                if not left or not right:
                    return False
                left, right = left / right, quotient or left / right
                quotient = right
            if not _close(left, right):
                return False
    return True


def _is_real(value: Any) -> bool:
    if value is None or isinstance(value, Fraction):
        return value is not None
    return bool(abs(value.imag) <= abs(value) * _tolerance())


def _close(left: Any, right: Any) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = _approximate(left), _approximate(right)
    size = max(abs(left), abs(right))
    return bool(abs(left - right) <= size * _tolerance())


def _tolerance() -> Any:
    import mpmath

    return mpmath.mpf(10) ** -_AGREEMENT


class _NoValue(Exception):
    """An expression without a value: undefined, or of a kind that is not evaluated."""


def _value_at(expression: Any, point: int) -> Any:
    """Value where each variable has a number of its own; None if it has none, or is None.

    An exact Fraction if nothing but arithmetic led to it, else a number of mpmath.
    """
    try:
        value = _evaluate(expression, point)
    except (_NoValue, ArithmeticError, AttributeError, ValueError, TypeError):
        return None
    return value if isinstance(value, Fraction) or value == value else None  # not NaN


def _coordinate(name: str, point: int) -> Fraction:
    """Positive at the first points, of either sign at the others."""
    value = Fraction(random.Random(f"{name} {point}").randrange(1, 30_000), 10_007)
    return value if point < _POINTS else value - Fraction(3, 2)


def _approximate(value: Any) -> Any:
    import mpmath

    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def _evaluate(expression: Any, point: int) -> Any:
    import mpmath
    import sympy  # type: ignore[import-untyped]

    if expression.is_Rational:
        return Fraction(expression.p, expression.q)
    if expression.is_Symbol:
        return mpmath.mpc(0, 1) if expression.name == "i" else _coordinate(expression.name, point)
    if expression is sympy.pi:
        return +mpmath.pi
    if expression is sympy.E:
        return +mpmath.e
    parts = [_evaluate(part, point) for part in expression.args]
    exact = all(isinstance(part, Fraction) for part in parts)
    if isinstance(expression, sympy.exp):
        parts = [+mpmath.e, *parts]
    elif expression.is_Pow and exact:
        power = exact_power(*parts)
        if power is not None:
            return power
    elif expression.is_Add and exact:
        return sum(parts)
    elif expression.is_Mul and exact:
        return math.prod(parts)
    parts = [_approximate(part) for part in parts]
    if expression.is_Add:
        return mpmath.fsum(parts)
    if expression.is_Mul:
        return mpmath.fprod(parts)
    if expression.is_Pow or isinstance(expression, sympy.exp):
        base, exponent = parts
        if base and abs(exponent * mpmath.log(abs(base))) > MAX_MAGNITUDE:
            raise _NoValue
        return mpmath.power(base, exponent)
    function = {
        sympy.log: mpmath.log,
        sympy.sin: mpmath.sin,
        sympy.cos: mpmath.cos,
        sympy.tan: mpmath.tan,
        sympy.cot: mpmath.cot,
        sympy.sec: mpmath.sec,
        sympy.csc: mpmath.csc,
        sympy.asin: mpmath.asin,
        sympy.acos: mpmath.acos,
        sympy.atan: mpmath.atan,
        sympy.sinh: mpmath.sinh,
        sympy.cosh: mpmath.cosh,
        sympy.tanh: mpmath.tanh,
        sympy.coth: mpmath.coth,
        sympy.Abs: abs,
        sympy.floor: mpmath.floor,
        sympy.ceiling: mpmath.ceil,
        sympy.factorial: mpmath.factorial,
        sympy.binomial: mpmath.binomial,
        sympy.UnevaluatedExpr: lambda value: value,
    }.get(expression.func)
    if function is None:
        raise _NoValue  # a sum, an integral, a derivative, an unknown function
    return function(*parts)
