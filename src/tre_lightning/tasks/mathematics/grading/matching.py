"""Comparison of two forms part by part: lists, tuples, units, equations, and their values."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from tre_lightning.tasks.mathematics.grading.evaluation import agree
from tre_lightning.tasks.mathematics.grading.forms import (
    Bracketed,
    Equation,
    Form,
    Inequality,
    Many,
    Matrix,
    Named,
    Ratio,
    Text,
    Value,
)
from tre_lightning.tasks.mathematics.grading.limits import MAX_CHARS
from tre_lightning.tasks.mathematics.grading.numbers import quotient
from tre_lightning.tasks.mathematics.grading.reader import read

# "value": a step on the way to the answer, which may be any formula of that value.
_Mode: TypeAlias = Literal["answer", "value", "up to a factor"]
_Same: TypeAlias = Callable[[Value, Value, _Mode], bool]


class _Undecided(Exception):
    """Raised where two expressions must be compared, which is left to a worker."""


def _match(gold: Form, answer: Form, same: _Same) -> bool:
    """Whether two forms are equal, given a function that compares expressions."""
    if gold == answer:
        return True
    if isinstance(gold, Named) or isinstance(answer, Named):
        if isinstance(gold, Named) and isinstance(answer, Named) and gold.name != answer.name:
            return False
        return _match(_unnamed(gold), _unnamed(answer), same)
    if isinstance(answer, Equation):
        if isinstance(gold, Equation):
            return _match_equations(gold, answer, same)
        return _match(gold, answer.sides[-1], same) and all(
            _match(gold, side, lambda g, a, _: same(g, a, "value")) for side in answer.sides[:-1]
        )
    if isinstance(gold, Equation):  # 0.56 = 56\%
        return _is_chain(gold) and all(_match(side, answer, same) for side in gold.sides)
    gold, answer = _single(gold), _single(answer)
    match gold, answer:
        case Value(), Value():
            return _units_agree(gold.unit, answer.unit) and same(gold, answer, "answer")
        case (Text() as text, Value() as value) | (Value() as value, Text() as text):
            return text.words == "".join(value.key).lower()  # \text{odd}; three bare letters
        case Ratio(), Ratio():
            return _units_agree(gold.unit, answer.unit) and _all(gold.sides, answer.sides, same)
        case Ratio(), Value():
            return _match_ratio(gold, answer)
        case Value(), Ratio():
            return _match_ratio(answer, gold)
        case Bracketed(), Bracketed():
            brackets = gold.open + gold.close == answer.open + answer.close
            return brackets and _all(gold.items, answer.items, same)
        case Many(), Many():
            return gold.kind == answer.kind and _match_unordered(gold.items, answer.items, same)
        case Matrix(), Matrix():
            if len(gold.rows) != len(answer.rows):
                return False
            return all(_all(g, a, same) for g, a in zip(gold.rows, answer.rows, strict=True))
        case Inequality(), Inequality():
            return gold.signs == answer.signs and _all(gold.sides, answer.sides, same)
    return False


def _unnamed(form: Form) -> Form:
    return form.form if isinstance(form, Named) else form


def _single(form: Form) -> Form:
    """The only item of a list of one, else the form itself."""
    return form.items[0] if isinstance(form, Many) and len(form.items) == 1 else form


def _all(gold: Sequence[Form], answer: Sequence[Form], same: _Same) -> bool:
    return len(gold) == len(answer) and all(
        _match(g, a, same) for g, a in zip(gold, answer, strict=True)
    )


def _match_unordered(gold: Sequence[Form], answer: Sequence[Form], same: _Same) -> bool:
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        found = next((i for i, other in enumerate(left) if _match(item, other, same)), None)
        if found is None:
            return False
        del left[found]
    return True


def _is_chain(equation: Equation) -> bool:
    return all(isinstance(side, Value) and not side.names for side in equation.sides)


def _match_equations(gold: Equation, answer: Equation, same: _Same) -> bool:
    if len(gold.sides) != 2 or len(answer.sides) != 2:
        return False
    if _all(gold.sides, answer.sides, same) or _all(gold.sides, answer.sides[::-1], same):
        return True
    left, right = _difference(gold), _difference(answer)
    return left is not None and right is not None and same(left, right, "up to a factor")


def _difference(equation: Equation) -> Value | None:
    """Left side less right side."""
    left, right = equation.sides
    if not (isinstance(left, Value) and isinstance(right, Value) and left.latex and right.latex):
        return None
    latex = f"{left.latex}-({right.latex})"
    names = left.names | right.names
    if left.unit or right.unit or not names:
        return None
    return Value((latex,), None, latex, names, left.features | right.features)


def _units_agree(gold: str, answer: str) -> bool:
    clock = {"am", "pm"}
    if gold in clock or answer in clock:
        return gold == answer
    return not gold or not answer or gold == answer


def _match_ratio(ratio: Ratio, value: Value) -> bool:
    if len(ratio.sides) != 2 or ratio.unit:
        return False
    first, second = (side.number for side in ratio.sides)
    return value.number is not None and value.number == quotient(first, second)


def _same_at_sight(gold: Value, answer: Value, mode: _Mode) -> bool | None:
    """Whether two expressions are equal; None if that takes the grammar."""
    if gold.key == answer.key and "%" not in (gold.unit, answer.unit):
        return True
    if gold.number is not None and answer.number is not None:
        return _same_number(gold, answer)
    if gold.latex is None or answer.latex is None or gold.names != answer.names:
        return False
    if mode != "value" and (gold.number is not None or not answer.features <= gold.features):
        return False
    return None


def _same_number(gold: Value, answer: Value) -> bool:
    """50% is 50, where the question asks for percent, and 1/2; 0.5 is no percentage."""
    assert gold.number is not None and answer.number is not None
    if gold.unit == answer.unit:
        return gold.number == answer.number
    if gold.unit == "%" and gold.number == 100 * answer.number:
        return True
    if answer.unit == "%" and (100 * gold.number == answer.number or abs(gold.number) <= 1):
        return 100 * gold.number == answer.number
    return gold.number == answer.number


def _same_or_undecided(gold: Value, answer: Value, mode: _Mode) -> bool:
    same = _same_at_sight(gold, answer, mode)
    if same is None:
        raise _Undecided
    return same


def _same_by_grammar(gold: Value, answer: Value, mode: _Mode) -> bool:
    same = _same_at_sight(gold, answer, mode)
    if same is None:
        assert gold.latex is not None and answer.latex is not None
        return agree(
            gold.latex,
            answer.latex,
            real="i" not in gold.key,
            up_to_factor=mode == "up to a factor",
        )
    return same


def _equal(gold: str, answer: str, same: _Same) -> bool:
    """Whether two answers are equal."""
    for thousands in (True, False):
        forms = read(gold, thousands), read(answer, thousands)
        if forms[0] is not None and forms[1] is not None and _match(forms[0], forms[1], same):
            return True
    return False


def equal_in_worker(gold: str, answer: str) -> bool:
    """Whether two answers are equal, run in a worker: may take forever."""
    return _equal(gold, answer, _same_by_grammar)


def decide(gold: str, answer: str) -> bool | None:
    """Whether two answers are equal; None if a worker must decide.

    Neither may have white space around it.
    """
    if not gold or len(gold) > MAX_CHARS or len(answer) > MAX_CHARS:
        return bool(gold) and gold == answer
    if gold == answer:
        return True
    try:
        return _equal(gold, answer, _same_or_undecided)
    except _Undecided:
        return None
