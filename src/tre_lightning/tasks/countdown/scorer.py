"""Exact scorer of the Countdown game: reach a target with each given number used once.

The task is that of TinyZero (Jiayi-Pan/TinyZero): a response ends in an equation over the given
numbers and scores 1 if it is worth the target. That code evaluates the text with Python; here the
text is hostile, so nothing is evaluated: tags are found by plain search, the expression is read by
a non-recursive operator-precedence parser in linear time, and the numbers are compared with the
given ones before any arithmetic, which is exact (``fractions.Fraction``).
"""

import re
import reprlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, TypeGuard, get_args

Format = Literal["think_answer", "answer", "steps"]

LARGEST = 999_999_999  # that is read in a response

_MAX_DIGITS = 9
_MAX_DEPTH = 64
_SPACE = " \t\r\n"
_OPERATORS = str.maketrans({"\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/"})
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2}
_ALPHABET = frozenset("0123456789+-*/()" + _SPACE)
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_GAP, _INTEGER = r"[ \t\r\n]*", r"(0|-?[1-9][0-9]{0,8})"
# Each next character leaves one way to go on, so a match never backtracks.
_STEP = re.compile(_GAP.join(["", _INTEGER, "([-+*/])", _INTEGER, "=", _INTEGER, ""]))


def score_countdown(
    response: str,
    numbers: Sequence[int],
    target: int,
    *,
    format: Format = "think_answer",
    max_chars: int = 16384,
    strict: bool = False,
) -> float:
    """Score one response: 1.0 if it solves the puzzle in the given format, else 0.0.

    Formats:

    * ``"think_answer"``: a thought that ends with ``</think>``, then ``<answer>EXPR</answer>``. Of
      several answers the last one after the last ``</think>`` counts; tags that the thought
      mentions do not, nor does a thought that is begun and not ended. The opening ``<think>`` may
      be missing, because a chat prompt often ends in it.
    * ``"answer"``: the same, and there need be no thought.
    * ``"steps"``: nothing but steps ``3 * 4 = 12 , 12 + 5 = 17``. A step takes two numbers from
      the pool (given numbers and earlier results) and puts back its result, an integer, maybe
      negative. The pool must end as the target alone, so a puzzle of one number scores 0.

    EXPR holds decimal integers without leading zeros or signs, ``+ - * /`` (or the characters
    U+00D7 and U+00F7), round brackets nested at most 64 deep and whitespace. Spaces between
    tokens are optional in every format. Integers have at most 9 digits.

    Args:
        response: the generated text; any string is safe, and none raises.
        numbers: the given numbers, each from 0 to 999999999; each is to be used exactly once.
        target: the value to reach.
        format: what the response must look like.
        max_chars: a longer response scores 0.0.
        strict: the thought begins with ``<think>``, and only white space may stand between thought
            and answer, and after the answer (the authors of TRE).

    Raises:
        ValueError: for a wrong argument other than the text of the response.
    """
    _check(response, numbers, target, format, max_chars)
    if len(response) > max_chars:
        return 0.0
    if format == "steps":
        return float(_steps_reach(response, numbers, target))
    expression = final_expression(response, think=format == "think_answer", strict=strict)
    tokens = None if expression is None else _tokens(expression)
    if tokens is None or sorted(t for t in tokens if isinstance(t, int)) != sorted(numbers):
        return 0.0
    return float(_evaluate(tokens) == target)


def _check(
    response: object, numbers: object, target: object, format: object, max_chars: object
) -> None:
    if not isinstance(response, str):
        raise ValueError(f"response={_show(response)} is not a string; pass the decoded text")
    if not (
        isinstance(numbers, Sequence)
        and numbers
        and all(_is_int(n) and 0 <= n < 10**_MAX_DIGITS for n in numbers)
    ):
        raise ValueError(
            f"numbers={_show(numbers)}; pass a non-empty sequence of ints from 0 to 999999999"
        )
    if not _is_int(target):
        raise ValueError(f"target={_show(target)} is not an int; pass an int")
    if format not in get_args(Format):
        raise ValueError(f"format={_show(format)} is unknown; use one of {get_args(Format)}")
    if not (_is_int(max_chars) and max_chars >= 1):
        raise ValueError(f"max_chars={_show(max_chars)}; pass an int of at least 1")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _show(value: object) -> str:
    return " ".join(reprlib.repr(value).split())


def final_expression(response: str, *, think: bool, strict: bool = False) -> str | None:
    """The text inside the final ``<answer> </answer>``, in linear time.

    Args:
        response: the generated text; any string is safe.
        think: whether a thought must come before it (format ``"think_answer"``).
        strict: as of :func:`score_countdown`.

    Returns:
        None where the tags are not those of :func:`score_countdown`. The text itself is not read.
    """
    thought, ended, rest = response.rpartition("</think>")
    if think and not (ended and (not strict or "<think>" in thought)):
        return None
    start = rest.rfind("<answer>", 0, max(rest.rfind("</answer>"), 0))
    if start < 0:
        return None
    before = rest[:start]
    expression, _, behind = rest[start + len("<answer>") :].partition("</answer>")
    if think and "<think>" in before:  # a thought that does not end
        return None
    if strict and (behind.strip(_SPACE) or (ended and before.strip(_SPACE))):
        return None
    return expression


def _tokens(expression: str) -> list[int | str] | None:
    text = expression.translate(_OPERATORS)
    if not _ALPHABET.issuperset(text):
        return None
    tokens: list[int | str] = []
    for token in _TOKEN.findall(text):
        if not token.isdigit():
            tokens.append(token)
        elif len(token) > _MAX_DIGITS or (token[0] == "0" and token != "0"):
            return None
        else:
            tokens.append(int(token))
    return tokens


def _evaluate(tokens: list[int | str]) -> Fraction | None:
    """Value of an infix expression by two stacks; None if malformed or dividing by zero."""
    values: list[Fraction] = []
    pending: list[str] = []
    depth = 0
    want_operand = True
    try:
        for token in tokens:
            if want_operand != (isinstance(token, int) or token == "("):
                return None
            if isinstance(token, int):
                values.append(Fraction(token))
                want_operand = False
            elif token == "(":
                depth += 1
                if depth > _MAX_DEPTH:
                    return None
                pending.append(token)
            else:
                floor = 1 if token == ")" else _PRECEDENCE[token]
                while pending and _PRECEDENCE[pending[-1]] >= floor:
                    _reduce(values, pending.pop())
                if token == ")":
                    if not pending:
                        return None
                    pending.pop()
                    depth -= 1
                else:
                    pending.append(token)
                    want_operand = True
        if want_operand or depth:
            return None
        while pending:
            _reduce(values, pending.pop())
    except ZeroDivisionError:
        return None
    return values[0]


def _reduce(values: list[Fraction], operator: str) -> None:
    right, left = values.pop(), values.pop()
    values.append(_apply(left, operator, right))


def _apply(left: Fraction, operator: str, right: Fraction) -> Fraction:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left / right


def _steps_reach(response: str, numbers: Sequence[int], target: int) -> bool:
    if response.count(",") != len(numbers) - 2:  # one step fewer than numbers
        return False
    pool = list(numbers)
    for step in response.translate(_OPERATORS).split(","):
        match = _STEP.fullmatch(step)
        if match is None:
            return False
        left, right, result = (int(text) for text in match.group(1, 3, 4))
        for operand in (left, right):
            if operand not in pool:
                return False
            pool.remove(operand)
        try:
            value = _apply(Fraction(left), match[2], Fraction(right))
        except ZeroDivisionError:
            return False
        if value != result:
            return False
        pool.append(result)
    return pool == [target]
